"""How Adam's moments are kept between two steps: in float32, or in eight bits with a scale for every 256 entries.

Eight bits are Dettmers et al.'s dynamic map ("8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861), quantized and read
back by torchao. A step makes float32 moments of one tensor at a time, so that the kernels need not know. Tensors of less than
4,096 entries stay in float32, as the paper leaves small ones. Where entries of very different size share a block of 256, the small ones
are known badly, and move too far or not at all: embeddings of rare words, for one. Six bytes of eight are saved for every entry that trains; the price
is time, and moments that are known to two digits.

Not covered: four bits, and fused kernels, which would save the conversion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

KINDS = ("fp32", "8bit")
BLOCK, SMALL = 256, 4096
CHUNK = 1 << 18  # entries converted at a time: torchao's search holds some fifty bytes for each


@dataclass
class EightBit:
    """One moment: a code for every entry, padded to whole blocks, and a scale for every block."""

    shape: tuple[int, ...]
    signed: bool
    codes: Tensor = field(repr=False)  # [ceil(n / 256) * 256] uint8
    scale: Tensor = field(repr=False)  # [ceil(n / 256)] float32

    @staticmethod
    def zeros(shape: tuple[int, ...], signed: bool, device: torch.device) -> EightBit:
        """Nothing yet."""
        blocks = -(-math.prod(shape) // BLOCK)
        zero = 127 if signed else 0  # where the map is 0: there is one value more above than below
        codes = torch.full((blocks * BLOCK,), zero, dtype=torch.uint8, device=device)
        return EightBit(shape, signed, codes, torch.zeros(blocks, device=device))

    def full(self) -> Tensor:
        """The moment in float32."""
        out = torch.empty(self.codes.numel(), device=self.codes.device)
        table = _map(self.signed, str(self.codes.device))
        for codes, scale, part in zip(*_chunks(self.codes, self.scale, out), strict=True):
            part.copy_(_library().dequant_with_qmap(codes, table, scale))
        return out[: math.prod(self.shape)].view(self.shape)

    def keep(self, x: Tensor) -> None:
        """Take over a float32 moment, rounded."""
        flat = torch.nn.functional.pad(x.reshape(-1), (0, self.codes.numel() - x.numel()))
        table = _map(self.signed, str(self.codes.device))
        for codes, scale, part in zip(*_chunks(self.codes, self.scale, flat), strict=True):
            unit, largest = _library().scale_tensor(part, BLOCK)
            codes.copy_(_library().quantize_8bit_with_qmap(unit, table))
            scale.copy_(largest)

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {"codes": self.codes, "scale": self.scale, "signed": self.signed, "shape": list(self.shape)}


Moment = Tensor | EightBit


def zeros(shape: tuple[int, ...], signed: bool, device: torch.device, kind: str) -> Moment:
    """A moment of nothing yet; `kind` is one of KINDS."""
    if kind == "8bit" and math.prod(shape) >= SMALL:
        return EightBit.zeros(shape, signed, device)
    return torch.zeros(shape, device=device)


def full(moment: Moment | None) -> Tensor:
    """The moment in float32: itself, if it is kept so."""
    assert moment is not None
    return moment if isinstance(moment, Tensor) else moment.full()


def keep(moment: Moment | None, x: Tensor) -> None:
    """Take over what a kernel made of `full(moment)`."""
    if isinstance(moment, EightBit):
        moment.keep(x)


def tensors(moment: Moment | None) -> list[Tensor]:
    """The tensors that are held."""
    if moment is None:
        return []
    return [moment] if isinstance(moment, Tensor) else [moment.codes, moment.scale]


def restore(state: Any, device: torch.device) -> Moment | None:
    """The moment of a state: a tensor, or what `EightBit.state` says."""
    if not isinstance(state, dict):
        return None if state is None else state.to(device)
    codes, scale = state["codes"].to(device), state["scale"].to(device)
    return EightBit(tuple(state["shape"]), state["signed"], codes, scale)


def check(kind: str) -> None:
    """Raise ValueError for eight bits without torchao."""
    if kind == "8bit":
        try:
            _library()
        except ImportError:
            raise ValueError("moments='8bit' needs torchao: pip install 'finetooth[8bit]'.") from None


@cache
def _library() -> ModuleType:
    import torchao.optim.quant_utils as library

    return library  # type: ignore[no-any-return]


@cache
def _map(signed: bool, device: str) -> Tensor:
    return torch.tensor(_library().create_dynamic_map(signed), device=device)


def _chunks(codes: Tensor, scale: Tensor, x: Tensor) -> tuple[Any, Any, Any]:
    return torch.split(codes, CHUNK), torch.split(scale, CHUNK // BLOCK), torch.split(x, CHUNK)
