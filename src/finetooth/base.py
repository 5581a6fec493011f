"""Pretrained values: read one tensor at a time, fingerprinted, or rebuilt from what was replaced.

A `Base` is anything that has named tensors: a state dict, a module, a checkpoint folder or file, a hub id,
or the optimizer that trained the model (which knows what it replaced). Tensors are handed out one by one,
so that comparing two checkpoints needs the memory of two tensors, not of two models.

`Replaced` is how an optimizer knows the pretrained model without a second copy of it: everything it has not
chosen *is* still the base, so only the values under the chosen units are held.

`fingerprint` hashes a tensor's dtype, shape and bytes. A hash of the whole model would be one number, but
could neither name the tensor that differs nor be checked shard by shard.

A sharded tensor (DTensor) is put together when it is read, which every rank must ask for.

Not covered: quantized checkpoints, pickle files (`pytorch_model.bin`).
"""

from __future__ import annotations

import hashlib
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import shards
from finetooth.checkpoint import HUB_ID, Span, fill, layout, names_in, resolve
from finetooth.checkpoint import shards as files_of
from finetooth.selection import Selection
from finetooth.units import Unit

# The names that safetensors gives to dtypes: shorter than torch's, and what a delta file's header says anyway.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype; ValueError for one that a checkpoint of weights does not have."""
    if dtype not in _NAMES:
        raise ValueError(f"dtype {dtype} is not supported: weights are one of {', '.join(_NAMES.values())}.")
    return _NAMES[dtype]


def bits(x: Tensor) -> Tensor:
    """`x` seen as integers of the same size, the same storage: what -0.0 and 0.0 differ in."""
    return x.view(_BITS[x.element_size()])


def fingerprint(t: Tensor) -> str:
    """`sha256:<hex>` over dtype, shape and bytes: equal exactly when two tensors are equal bit for bit.

    Hashed is the line `BF16 [2, 3]`, a newline, and the entries in row-major order, little-endian.

    >>> fingerprint(torch.tensor([0.0])) == fingerprint(torch.tensor([-0.0]))
    False
    """
    digest = hashlib.sha256(f"{dtype_name(t.dtype)} {list(t.shape)}\n".encode("ascii"))
    digest.update(raw(t))
    return f"sha256:{digest.hexdigest()}"


def raw(t: Tensor) -> memoryview:
    """The entries of `t`, row-major and little-endian, without a copy where the tensor already is that."""
    flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        flat = flat.reshape(-1, t.element_size())[:, ::-1].copy().reshape(-1)
    return flat.data


class Base(ABC):
    """Named tensors. `tied` maps an alias to the name that holds the storage; `optional` are names that the
    other side of a comparison need not have (buffers). `id` and `revision` say where the weights came from."""

    id: str | None = None
    revision: str | None = None
    tied: Mapping[str, str] = {}
    optional: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return repr(self.id) if self.id else "the given tensors"

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all tensors."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One tensor, read when asked for."""

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        t = self.tensor(name)
        return tuple(t.shape), t.dtype

    @contextmanager
    def opened(self) -> Iterator[Base]:
        """Keep what lies behind the tensors open for the length of a block; only files need it."""
        yield self


class Held(Base):
    """Tensors in memory: a state dict or a module. `tensor` hands out the live tensor, not a copy."""

    def __init__(self, tensors: Mapping[str, Any], origin: Any = None, optional: frozenset[str] = frozenset()):
        self.tensors = {_WRAPPERS.sub("", n): t.detach() for n, t in tensors.items() if isinstance(t, Tensor)}
        self.tied, self.optional = _shared(self.tensors), optional
        self.id, self.revision = _origin(origin)

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> Tensor:
        return _plain(name, self.tensors[name])

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self.tensors[name].shape), self.tensors[name].dtype


class Trained(Base):
    """The base as an optimizer knows it: anything with `base_tensor(name) -> Tensor | None`."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    def names(self) -> list[str]:
        return list(self.optimizer.names())

    def tensor(self, name: str) -> Tensor:
        found = self.optimizer.base_tensor(name)
        if found is None:
            raise ValueError(
                f"the optimizer does not know the pretrained values of '{name}' (every entry of it trains, "
                "or rest=quantized rewrote them): give base= as a state dict, or as a folder or hub id that has the model's names."
            )
        return _plain(name, found.detach())


class Files(Base):
    """A checkpoint in safetensors: one file or shards. Tensors are read when asked for, each into memory of its own."""

    def __init__(self, where: dict[str, Path], id: str | None, revision: str | None):
        self.where, self.id, self.revision = where, id, revision
        self._spans: dict[Path, dict[str, Span]] = {}

    def names(self) -> list[str]:
        return list(self.where)

    def tensor(self, name: str) -> Tensor:
        span, dtype = self._span(name)
        data = torch.empty(span.nbytes, dtype=torch.uint8)
        with self.where[name].open("rb", buffering=0) as f:
            f.seek(span.begin)
            if not fill(f, data.numpy()):
                raise ValueError(f"{self.where[name]} is not a whole safetensors file: it ends within '{name}'.")
        return data.view(dtype).reshape(span.shape)

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        span, dtype = self._span(name)
        return span.shape, dtype

    @contextmanager
    def opened(self) -> Iterator[Base]:
        if self._spans:
            yield self
            return
        try:
            self._spans = {path: _spans(path) for path in dict.fromkeys(self.where.values())}
            yield self
        finally:
            self._spans = {}

    def _span(self, name: str) -> tuple[Span, torch.dtype]:
        path = self.where[name]
        span = (self._spans.get(path) or _spans(path))[name]
        if span.dtype not in DTYPES:
            raise ValueError(f"'{name}' has dtype {span.dtype}: weights are one of {', '.join(DTYPES)}.")
        return span, DTYPES[span.dtype]


def _spans(path: Path) -> dict[str, Span]:
    with path.open("rb", buffering=0) as f:
        return layout(path, f)[0]


def open_base(source: Any) -> Base:
    """Open whatever holds weights: a state dict, a module, a folder or file of safetensors, a hub id, the
    optimizer that trained the model, or a `Base`.

    Raises FileNotFoundError where a path or shard is missing and ValueError where it is not a checkpoint.
    """
    if isinstance(source, Base):
        return source
    if isinstance(source, nn.Module):
        return _module(source)
    if isinstance(source, Mapping):
        return Held(source)
    if isinstance(source, (str, Path)):
        return _checkpoint(source)
    inner = source
    while not hasattr(inner, "base_tensor") and hasattr(inner, "optimizer"):  # accelerate wraps optimizers
        inner = inner.optimizer
    if hasattr(inner, "base_tensor"):
        return Trained(inner)
    raise ValueError(
        f"weights cannot be read from a {type(source).__name__}: give a state dict, a module, a folder or file of "
        "safetensors, a hub id, or the Finetooth optimizer that trained the model."
    )


def _checkpoint(source: str | Path) -> Base:
    path = resolve(source)
    where = files_of(path) if path.is_dir() else names_in(path)
    resolved = path.resolve()
    if resolved.parent.name == "snapshots":  # the hub's cache: models--org--name/snapshots/<commit>
        return Files(where, resolved.parent.parent.name.removeprefix("models--").replace("--", "/"), resolved.name)
    return Files(where, path.resolve().name, None)


def _module(model: nn.Module) -> Base:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    model = getattr(model, "_orig_mod", model)
    shards.reshard(model)
    buffers = frozenset(_WRAPPERS.sub("", name) for name, _ in model.named_buffers())
    return Held(model.state_dict(), model, buffers)


def _origin(model: Any) -> tuple[str | None, str | None]:
    """Hub id and commit as transformers notes them; of a local folder its name, never the whole path."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or None
    if name and not (HUB_ID.fullmatch(name) and not Path(name).exists()):
        name = Path(name).resolve().name
    return name, getattr(config, "_commit_hash", None)


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which names look at the same storage in the same way: {alias: first name}."""
    first: dict[Any, str] = {}
    tied = {}
    for name, t in tensors.items():
        if t.numel() == 0 or t.device.type == "meta":
            continue
        # A rank may hold no row of a sharded tensor, but FSDP2 pads its storage.
        place = shards.local(t).untyped_storage().data_ptr() if shards.sharded(t) else t.data_ptr()
        key = (t.device, place, t.dtype, tuple(t.shape), t.stride())
        if first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied


def _plain(name: str, t: Tensor) -> Tensor:
    if t.device.type == "meta":
        raise ValueError(f"'{name}' has no data (it is on the meta device): load the weights first.")
    return shards.whole(t)


@dataclass
class Replaced:
    """The pretrained values under the units that train: what it takes to know the base without a copy of it.

    >>> x = torch.arange(4.0)
    >>> held = Replaced.empty(Unit(), x)
    >>> held.remember(torch.tensor([1, 3], dtype=torch.int32), x)
    >>> x[1] = 9.0
    >>> held.original(x)
    tensor([0., 1., 2., 3.])
    """

    unit: Unit
    shape: tuple[int, ...]
    index: Tensor = field(repr=False)  # [k] sorted unit ids
    values: Tensor = field(repr=False)  # [k, unit_numel] in the weight's dtype

    @staticmethod
    def empty(unit: Unit, tensor: Tensor) -> Replaced:
        """Nothing replaced yet; device and dtype are those of `tensor`."""
        shape = tuple(tensor.shape)
        dtype = torch.int32 if unit.count(shape) <= 2**31 else torch.int64
        index = torch.empty(0, dtype=dtype, device=tensor.device)
        return Replaced(unit, shape, index, tensor.new_empty((0, unit.numel(shape))))

    @torch.no_grad()
    def remember(self, index: Tensor, x: Tensor) -> None:
        """Hold the values that the units `index` (sorted) have in `x` now; units already held stay as they are."""
        if self.index.numel() == 0:
            self.index, self.values = index, self._at(index).gather(x.detach())
            return
        new = index[~_member(index, self.index)].to(self.index.dtype)
        if new.numel() == 0:
            return
        self.index, order = torch.cat([self.index, new]).sort()
        self.values = torch.cat([self.values, self._at(new).gather(x.detach())])[order]

    def forget(self, index: Tensor) -> None:
        """Drop the units `index` (sorted): they are the base again, or they no longer matter."""
        stay = ~_member(self.index, index)
        if not bool(stay.all()):
            self.index, self.values = self.index[stay], self.values[stay]

    def without(self, index: Tensor | None) -> Tensor:
        """The units that are held, but for those of `index` (sorted)."""
        return self.index if index is None else self.index[~_member(self.index, index)]

    @torch.no_grad()
    def original(self, x: Tensor) -> Tensor:
        """A copy of `x` with the held values put back."""
        out = x.detach().clone(memory_format=torch.contiguous_format)
        self._at(self.index).scatter_(out, self.values)
        return out

    def _at(self, index: Tensor) -> Selection:
        return Selection(index, self.unit, self.shape)


def _member(index: Tensor, table: Tensor) -> Tensor:  # both sorted -> [len(index)] bool
    if table.numel() == 0:
        return torch.zeros_like(index, dtype=torch.bool)
    at = torch.searchsorted(table, index.to(table.dtype)).clamp_(max=table.numel() - 1)
    return table[at] == index
