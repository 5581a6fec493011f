"""What happens to the weights that were not chosen.

`frozen`     they keep the value they have.
`reset`      they go back to the base: what is not selected *is* the base (DST).
`noise`      they are frozen, and training forwards see them with noise of the size of a b-bit rounding error
             (GIFT-SW): y = x (W + E)^T with E_:j = 0 for the chosen columns j and
             E_ij = 1/2 D_i n_ij, n ~ N(0, 1), elsewhere; D_i is the quantization step of output row i.
`quantized`  they are rounded to b bits once, before training (GIFT-SW's second order: quantize, then train).

Noise is drawn again in every forward of the model and made again in backward from its key
(seed, parameter name, forward), so it is never stored, and it is added to the layer's output, so the stored
weight is never touched. The forward is counted at the model, not at the layer: a layer that is recomputed
for gradient checkpointing sees the noise of its forward. Two training forwards before one backward, with
checkpointing, would recompute the first with the second's noise: that is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import quantize
from finetooth.kernels import reference
from finetooth.selection import Selection


@dataclass(frozen=True)
class Rest:
    """A choice of this module; make one with `frozen()`, `reset()`, `noise()` or `quantized()`."""

    kind: str = "frozen"
    bits: int = 0
    zero_moments: bool = False


def frozen() -> Rest:
    """Weights that were not chosen keep their value."""
    return Rest()


def reset(zero_moments: bool = False) -> Rest:
    """Weights that were not chosen return to the base; zero_moments: their optimizer moments start again too."""
    return Rest("reset", zero_moments=zero_moments)


def noise(bits: int = 4) -> Rest:
    """Training forwards see the other columns with noise of half a b-bit quantization step."""
    return Rest("noise", _checked(bits))


def quantized(bits: int = 4) -> Rest:
    """The other columns are rounded to b bits before training."""
    return Rest("quantized", _checked(bits))


def _checked(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is out of range: give 2 to 8.")
    return bits


class Noise:
    """The hooks that add the noise to a model's training forwards, from construction until `remove`.

    A model has one `Noise`: a new one, or another optimizer for the same model, takes the old one out (`remove_noise`).
    A deep copy of the model has its own, with its own count.
    """

    def __init__(self, model: nn.Module, columns: Mapping[str, Selection], bits: int, seed: int) -> None:
        remove_noise(model)
        self.forwards = 0
        self.unanswered = 0  # training forwards since a backward last made a layer again
        self._handles = [model.register_forward_pre_hook(_Counter(self))]
        for name, selection in columns.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            self._handles.append(module.register_forward_hook(_LayerNoise(self, name, selection, bits, seed)))
        model.__dict__[_NOISE] = self

    def remove(self) -> None:
        """Take the hooks out: the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def remove_noise(model: nn.Module) -> None:
    """Take GIFT-SW's noise out of a model, if there is any: its training forwards see the weights as they are."""
    if (noise := model.__dict__.pop(_NOISE, None)) is not None:
        noise.remove()


_NOISE = "_finetooth_noise"


class _Counter:
    """Before a forward of the model: count it, if it is one of training."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def __call__(self, module: nn.Module, args: object) -> None:
        self.noise.forwards += module.training
        self.noise.unanswered += module.training


class _LayerNoise:
    """After a layer's forward: add x E^T, with E of this layer and this forward of the model."""

    def __init__(self, noise: Noise, name: str, selection: Selection, bits: int, seed: int) -> None:
        self.noise, self.name, self.selection, self.bits, self.seed = noise, name, selection, bits, seed
        self.half_step: Tensor | None = None
        self.remade: tuple[int, int] | None = None  # the backward pass that made this layer again, and its forward
        self.reentrant = False

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        kept = kept_columns(self.selection)
        if self.half_step is None:
            stored = module.get_parameter("weight").detach()
            self.half_step = quantize.steps(_oriented(stored, self.selection), self.bits, kept) / 2
        self._made_again()
        added: Tensor = _AddNoise.apply(args[0], self.half_step, kept, self.noise.forwards, self)  # type: ignore[no-untyped-call]
        return output + added

    def key(self, forward: int) -> int:
        """The key of this layer's noise in a forward of the model."""
        return reference.key(self.seed, "noise", self.name, forward)

    def _made_again(self) -> None:
        """Note a recomputation for gradient checkpointing, which must be of the model's latest training forward."""
        task: int = torch._C._current_graph_task_id()
        if (
            task == -1
        ):  # not in a backward pass; without gradients, only a reentrant checkpoint comes back to this layer
            self.reentrant = not torch.is_grad_enabled()
            return
        if self.reentrant and self.noise.unanswered > 1:
            raise RuntimeError(_TWO_FORWARDS)
        self.remade = (task, self.noise.forwards)

    def check(self, forward: int) -> None:
        """In backward: what was made again must be the forward that is being differentiated."""
        self.noise.unanswered = 0
        if (
            self.remade is not None
            and self.remade[0] == torch._C._current_graph_task_id()
            and self.remade[1] != forward
        ):
            raise RuntimeError(_TWO_FORWARDS)


_TWO_FORWARDS = (
    "two training forwards before one backward, with gradient checkpointing: the noise of the first forward cannot be made "
    "again. Call backward after every forward, or switch checkpointing off."
)


class _AddNoise(torch.autograd.Function):
    """x -> x E^T, with E made from its key in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half_step: Tensor, kept: Tensor, number: int, layer: _LayerNoise) -> Tensor:
        ctx.save_for_backward(half_step, kept)
        ctx.number, ctx.layer = number, layer
        return x @ perturbation(half_step, kept, layer.key(number)).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        half_step, kept = ctx.saved_tensors
        ctx.layer.check(ctx.number)
        return grad @ perturbation(half_step, kept, ctx.layer.key(ctx.number)).to(grad.dtype), None, None, None, None


def perturbation(
    half_step: Tensor,  # [out, 1] float32: the standard deviation of every row
    kept: Tensor,  # [in] bool: the chosen columns
    key: int,
) -> Tensor:  # [out, in] float32
    """The noise E of one layer in one forward."""
    generator = torch.Generator(half_step.device).manual_seed(key & (2**63 - 1))
    shape = (half_step.shape[0], kept.numel())
    return torch.randn(shape, generator=generator, device=half_step.device).mul_(half_step).masked_fill_(kept, 0.0)


def kept_columns(selection: Selection) -> Tensor:
    """The chosen input columns as bool [in]; a selection of stored rows is one of a transposed weight's columns."""
    n = selection.unit.count(selection.shape)
    kept = torch.zeros(n, dtype=torch.bool, device=selection.index.device)
    kept[selection.index.long()] = True
    return kept


def _oriented(stored: Tensor, selection: Selection) -> Tensor:
    return stored.t() if selection.unit.kind == "row" else stored


def quantize_(p: Tensor, selection: Selection, bits: int) -> None:
    """Round the columns of a matrix that were not chosen to b bits, in place; the chosen ones keep their bits."""
    weight = _oriented(p, selection)
    kept = kept_columns(selection)
    weight.copy_(torch.where(kept, weight, quantize.quantized(weight, bits, kept).to(p.dtype)))


@contextmanager
def quantized_rest(model: nn.Module, columns: Mapping[str, Selection], bits: int) -> Iterator[None]:
    """The model with its frozen columns in b bits and the chosen ones as trained, for the length of a block.

    This is what is left after quantizing a GIFT-SW result: evaluate inside. The weights come back bit for bit.
    """
    parameters = {name: model.get_parameter(name) for name in columns}
    held = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                quantize_(p.detach(), columns[name], _checked(bits))
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.detach().copy_(held[name])
