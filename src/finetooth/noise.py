"""GIFT-SW's noise in a model: who draws it, when, and that backward sees what forward saw.

It is drawn again in every training forward of the model and made again in backward from its key (seed, parameter
name, number of the forward), so it is never stored, and the stored weight is never touched. The forward is counted at the
model, or at the part of it that holds all noisy layers where that is called by itself, not at the layer: a layer that is recomputed for gradient checkpointing sees the noise of its forward. Two training
forwards before one backward, with checkpointing, would recompute the first with the second's noise: that is an error.

In an `nn.Linear` the noise is part of the product (`linear.py`). Other layers that multiply (GPT-2's `Conv1D`) get a
hook that adds x E^T to their output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import linear, quantize, shards
from finetooth.anatomy import multiplies
from finetooth.kernels import pick
from finetooth.rest import kept_columns, oriented
from finetooth.selection import Selection

_ATTRIBUTE = "_finetooth_noise"
_TWO_FORWARDS = (
    "two training forwards before one backward, with gradient checkpointing: the noise of the first forward cannot be made "
    "again. Call backward after every forward, or switch checkpointing off."
)


class Noise:
    """The noise of one model, from construction until `remove`.

    A model has one: a new one, or another optimizer for the same model, takes the old one out (`remove_noise`). A deep
    copy of the model has its own, with its own count.
    """

    def __init__(
        self, model: nn.Module, columns: Mapping[str, Selection], bits: int, seed: int, backend: str = "auto"
    ) -> None:
        remove_noise(model)
        self.backend = backend
        self.count = torch.zeros(
            (), dtype=torch.int64
        )  # training forwards so far; a tensor, so that compiled code can count
        self.unanswered = 0  # training forwards since a backward last made a layer again
        self.counted = False  # whether the forward that the inner model begins has been counted by the outer one
        inner = _inner(model, list(columns))
        self._handles = [model.register_forward_pre_hook(_Counter(self, inner is not model))]
        if inner is not model:
            self._handles.append(inner.register_forward_pre_hook(_Inner(self)))
        self._linears: list[linear.SelectiveLinear] = []
        for name, selection in columns.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            if isinstance(module, nn.Linear) and not multiplies(module):
                raise ValueError(
                    f"noise has no meaning for {name!r}: the forward of a {type(module).__name__} is its own. Leave it out of targets."
                )
            layer = LayerNoise(self, name, selection, shards.whole(module.get_parameter("weight").detach()), bits, seed)
            if isinstance(module, nn.Linear) and type(module) in (nn.Linear, linear.SelectiveLinear):
                self._linears.append(linear.attach(module, getattr(module, "chosen", None), layer))
            else:
                self._handles.append(module.register_forward_hook(_AddAfter(layer)))
        model.__dict__[_ATTRIBUTE] = self

    @property
    def forwards(self) -> int:
        """How many training forwards there were."""
        return int(self.count)

    @forwards.setter
    def forwards(self, number: int) -> None:
        self.count.fill_(number)

    def remove(self) -> None:
        """Take it out: the model's training forwards see the weights as they are."""
        for handle in self._handles:
            handle.remove()
        for module in self._linears:
            if module.noise is not None and module.noise.noise is self:
                linear.attach(module, module.chosen, None) if module.chosen else linear.detach(module)
        self._handles.clear()
        self._linears.clear()


def remove_noise(model: nn.Module) -> None:
    """Take GIFT-SW's noise out of a model, if there is any."""
    if (noise := model.__dict__.pop(_ATTRIBUTE, None)) is not None:
        noise.remove()


class _Counter:
    """Before a forward of the model: count it, if it is one of training."""

    def __init__(self, noise: Noise, outer: bool) -> None:
        self.noise, self.outer = noise, outer

    def __call__(self, module: nn.Module, args: object) -> None:
        if module.training:
            self.noise.count.add_(1)
            self.noise.unanswered += 1
            self.noise.counted = self.outer


class _Inner(_Counter):
    """Before a forward of the part that holds all noisy layers: count it, unless the whole model has been called."""

    def __init__(self, noise: Noise) -> None:
        super().__init__(noise, False)

    def __call__(self, module: nn.Module, args: object) -> None:
        if not self.noise.counted:
            super().__call__(module, args)
        self.noise.counted = False


def _inner(model: nn.Module, names: list[str]) -> nn.Module:
    """The smallest module that holds all of these and is no list of layers: a Llama's `model`."""
    here, prefix = model, ""
    while True:
        inside = [n for n, _ in here.named_children() if any(f"{name}.".startswith(f"{prefix}{n}.") for name in names)]
        child = here.get_submodule(inside[0]) if len(inside) == 1 else None
        if child is None or isinstance(child, nn.ModuleList | nn.ModuleDict) or not any(child.children()):
            return here
        here, prefix = child, f"{prefix}{inside[0]}."


class LayerNoise:
    """The noise of one layer: E_ij = half_step_i n_ij with n ~ N(0, 1), zero in the chosen columns."""

    def __init__(self, noise: Noise, name: str, selection: Selection, stored: Tensor, bits: int, seed: int) -> None:
        self.noise, self.name, self.seed, self.backend = noise, name, seed, noise.backend
        self.kept = kept_columns(selection)
        self.half_step = quantize.steps(oriented(stored, selection), bits, self.kept) / 2
        self.remade: tuple[int, int] | None = None  # the backward pass that made this layer again, and its forward
        self.reentrant = False

    def draw(self) -> tuple[Tensor, Tensor, Tensor, int, str, LayerNoise | None]:
        """What it takes to make the noise of the present forward: half_step, kept, number, seed, name, who checks."""
        if torch.compiler.is_compiling():
            return self.half_step, self.kept, self.noise.count.clone(), self.seed, self.name, None
        self._note_recomputation()
        return self.half_step, self.kept, self.noise.count.clone(), self.seed, self.name, self

    def _note_recomputation(self) -> None:
        """For gradient checkpointing a layer is made again in backward, with the number of the latest forward."""
        task: int = torch._C._current_graph_task_id()
        if (
            task == -1
        ):  # not in a backward pass; without gradients, only a reentrant checkpoint comes back to this layer
            self.reentrant = not torch.is_grad_enabled()
            return
        if self.reentrant and self.noise.unanswered > 1:
            raise RuntimeError(_TWO_FORWARDS)
        self.remade = (task, self.noise.forwards)

    def check(self, number: Tensor) -> None:
        """In backward: what was made again must be the forward that is being differentiated."""
        self.noise.unanswered = 0
        here: int = torch._C._current_graph_task_id()
        if self.remade is not None and self.remade[0] == here and self.remade[1] != int(number):
            raise RuntimeError(_TWO_FORWARDS)


class _AddAfter:
    """After the forward of a layer that is no `nn.Linear`: add x E^T."""

    def __init__(self, layer: LayerNoise) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        added: Tensor = _AddNoise.apply(args[0], self.layer.backend, *self.layer.draw())  # type: ignore[no-untyped-call]
        return output + added


class _AddNoise(torch.autograd.Function):
    """x -> x E^T, with E made from its key in both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        backend: str,
        half_step: Tensor,
        kept: Tensor,
        number: Tensor,
        seed: int,
        name: str,
        layer: Any,
    ) -> Tensor:
        ctx.save_for_backward(half_step, kept)
        ctx.number, ctx.seed, ctx.name, ctx.layer, ctx.backend = number, seed, name, layer, backend
        return x @ perturbation(half_step, kept, linear.noise_key(seed, name, number), backend).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        half_step, kept = ctx.saved_tensors
        if ctx.layer is not None:
            ctx.layer.check(ctx.number)
        noise = perturbation(half_step, kept, linear.noise_key(ctx.seed, ctx.name, ctx.number), ctx.backend)
        return (grad @ noise.to(grad.dtype), *[None] * 7)


def perturbation(
    half_step: Tensor,  # [out, 1] float32: the standard deviation of every row
    kept: Tensor,  # [in] bool: the chosen columns
    key: int,
    backend: str = "auto",
) -> Tensor:  # [out, in] float32
    """The noise E of one layer in one forward."""
    out = torch.zeros((half_step.shape[0], kept.numel()), device=half_step.device)
    pick("noisy", out.device, backend)(out, half_step, kept, key, 0, out)
    return out
