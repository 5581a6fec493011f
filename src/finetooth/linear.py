"""Weight gradients of the chosen entries only: an `nn.Linear` that never forms the whole one.

    y = x W^T + b;   dx = dy W;   dW[chosen] = (dy^T x)[chosen]

A weight that is trained in part gets a *leaf*, a tensor `[k, unit_numel]` with no storage of its own, beside it. The
layer's autograd function hands the chosen slice of the weight gradient to the leaf, where autograd adds it up in float32
over micro-batches, and none to the weight. Columns keep `x[..., chosen]` for backward and multiply that; rows
multiply `dy[..., chosen]`; elements and blocks form dy^T x in stripes of rows and gather from each stripe, or, where few
entries are chosen, sum each one over the tokens (a sampled product). Nothing of a weight's size is saved or made.

The class of the module changes to a subclass of `nn.Linear`; names of modules and parameters, state dicts and checkpoints
do not. The alternative, a copy of the weight with the new values scattered in at every forward, is what SHiRA does: it
saves a copy of every weight for backward.

GIFT-SW's noise is made here too, stripe by stripe, in forward and again in backward: y = x (W + E)^T.

Not covered: subclasses of `nn.Linear`, `Conv1D`, experts and tied weights, whose gradient goes through a hook
(`gradients.py`), and double backward.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetooth import shards
from finetooth.kernels import pick, reference
from finetooth.selection import Selection
from finetooth.units import Unit

STRIPE = 1 << 20  # entries of a weight (or its gradient) made at a time: 4 MB of float32
# Below these shares of chosen entries a sampled product beats dense stripes on a CPU: with a compiled kernel, and without.
# The break-even at 256 and 2,048 tokens, rounded down (benchmarks/kernels.py times both).
SAMPLED = {torch.float32: 0.2, torch.bfloat16: 0.08, torch.float16: 0.08}
SAMPLED_PLAIN = {torch.float32: 0.007, torch.bfloat16: 0.003, torch.float16: 0.003}


class Chosen:
    """What trains of one tensor, and the gradient of it so far: `grad`, `[k, unit_numel]` float32, or None."""

    def __init__(self, name: str, selection: Selection, backend: str = "auto") -> None:
        self.name, self.selection, self.backend = name, selection, backend
        self.active = True  # False: the weight's own dense gradient is wanted
        self._leaf: Tensor | None = None

    def leaf(self, device: torch.device) -> Tensor:
        """The tensor that autograd gives the gradient to."""
        if self._leaf is None or self._leaf.device != device:
            shape = (len(self.selection), self.selection.unit.numel(self.selection.shape))
            self._leaf = torch.zeros((), device=device).expand(shape).requires_grad_()
        return self._leaf

    @property
    def grad(self) -> Tensor | None:
        """The gradient added up since `clear`."""
        return None if self._leaf is None else self._leaf.grad

    def add(self, g: Tensor) -> None:
        """Add a gathered gradient, which is given away."""
        leaf = self.leaf(g.device)
        leaf.grad = g if leaf.grad is None else leaf.grad.add_(g)

    def zero(self) -> None:
        """Make the gradient zero, on the device of the index."""
        leaf = self.leaf(self.selection.index.device)
        leaf.grad = torch.zeros(leaf.shape, device=leaf.device)

    def clear(self) -> None:
        """Forget the gradient."""
        if self._leaf is not None:
            self._leaf.grad = None


class SelectiveLinear(nn.Linear):
    """`nn.Linear`, part of which trains; made of a module by `attach`."""

    chosen: Chosen | None  # plain attributes: they are no parameters, and no state dict knows them
    noise: Any  # a `noise.LayerNoise`, or None

    def forward(self, input: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]`."""
        chosen, noise = getattr(self, "chosen", None), getattr(self, "noise", None) if self.training else None
        learns = chosen is not None and chosen.active and torch.is_grad_enabled() and self.weight.requires_grad
        if not learns and noise is None:
            return functional.linear(input, self.weight, self.bias)
        # Nothing goes to the weight itself, so that hooks on its gradient are not called with none; but DDP waits for it.
        weight = self.weight.detach() if learns and shards.world() == 1 else self.weight
        x, w, b = (_cast(t, input.device) for t in (input, weight, self.bias))
        leaf = chosen.leaf(x.device) if learns and chosen is not None else None
        index = chosen.selection.index if learns and chosen is not None else None
        unit = str(chosen.selection.unit) if learns and chosen is not None else ""
        drawn = (None, None, None, 0, "", None) if noise is None else noise.draw()
        backend = "auto" if (part := chosen or noise) is None else part.backend
        y: Tensor = _Linear.apply(x, w, b, leaf, index, unit, backend, *drawn)  # type: ignore[no-untyped-call]
        return y

    def __getstate__(self) -> dict[str, Any]:
        """A copy learns by itself: it has no optimizer that its gradients could be gathered for."""
        return {**self.__dict__, "chosen": None}


def _cast(t: Tensor | None, device: torch.device) -> Any:
    """A tensor as autocast, if it is on, would have it."""
    if t is None or not torch.is_autocast_enabled(device.type):
        return t
    return t.to(torch.get_autocast_dtype(device.type))


def attach(module: nn.Linear, chosen: Chosen | None, noise: Any) -> SelectiveLinear:
    """Turn an `nn.Linear` into a `SelectiveLinear`, in place."""
    if not isinstance(module, SelectiveLinear):
        module.__class__ = SelectiveLinear
    assert isinstance(module, SelectiveLinear)
    module.chosen, module.noise = chosen, noise
    return module


def detach(module: nn.Linear) -> None:
    """Turn it back."""
    if isinstance(module, SelectiveLinear):
        module.chosen = module.noise = None
    if type(module) is SelectiveLinear:  # `fully_shard` may have made a class of its own of it, which stays
        del module.chosen, module.noise
        module.__class__ = nn.Linear  # type: ignore[assignment]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., in]
        w: Tensor,  # [out, in]
        b: Tensor | None,
        leaf: Tensor | None,  # None: the whole weight trains, or nothing of it
        index: Tensor | None,
        unit: str,
        backend: str,
        half_step: Tensor | None,  # of the noise; None: there is none
        kept: Tensor | None,
        number: Tensor | None,
        seed: int,
        name: str,
        layer: Any,  # is asked in backward whether the noise is the right one
    ) -> Tensor:
        ctx.unit, ctx.seed, ctx.name, ctx.layer, ctx.backend = unit, seed, name, layer, backend
        learnt = x if leaf is not None or ctx.needs_input_grad[1] else None
        if unit == "column" and index is not None:
            learnt = x.index_select(-1, index)
        ctx.save_for_backward(w, index, learnt, half_step, kept)
        ctx.number = number  # not saved: checkpointing would hand back that of the layer it makes again
        if half_step is None:
            return functional.linear(x, w, b)
        y: Tensor = torch.ops.finetooth.noisy_linear(x, w, half_step, kept, number, seed, name, backend)
        return y if b is None else y + b

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        w, index, x, half_step, kept = ctx.saved_tensors
        dx, dw, db, chosen = None, None, None, None
        if ctx.layer is not None:
            ctx.layer.check(ctx.number)
        if ctx.needs_input_grad[0]:
            noise = (half_step, kept, ctx.number, ctx.seed, ctx.name, ctx.backend)
            dx = dy @ w if half_step is None else torch.ops.finetooth.noisy_input_grad(dy, w, *noise)
        flat = dy.reshape(-1, dy.shape[-1])
        if index is not None:
            taken = (flat, x.reshape(-1, x.shape[-1]), index, ctx.unit, w.shape[1], ctx.backend)
            chosen = torch.ops.finetooth.chosen_gradient(*taken)
        elif ctx.needs_input_grad[1]:
            dw = flat.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            db = flat.sum(0)
        return (dx, dw, db, chosen, *[None] * 9)


def sampled(unit: str, k: int, entries: int, dtype: torch.dtype, device: torch.device, backend: str) -> bool:
    """Whether the gradient of k of so many entries is a sampled product."""
    if unit != "element" or device.type != "cpu":
        return False
    plain = pick("sampled_product_", device, backend) is reference.sampled_product_
    return k < (SAMPLED_PLAIN if plain else SAMPLED).get(dtype, 0.0) * entries


@torch.library.custom_op("finetooth::chosen_gradient", mutates_args=())
def chosen_gradient(dy: Tensor, x: Tensor, index: Tensor, unit: str, width: int, backend: str) -> Tensor:
    """The chosen units of dy^T x as `[k, unit_numel]` float32.

    dy `[t, out]`; x `[t, in]`, or for columns `[t, k]`, the chosen inputs; index `[k]` unit ids in a weight `[out, in]`;
    unit: "element", "block(32)", "row" or "column"; width: in.
    """
    if unit == "column":
        return (x.t() @ dy).float()
    if unit == "row":
        return (dy.index_select(1, index).t() @ x).float()
    if sampled(unit, len(index), dy.shape[1] * width, dy.dtype, dy.device, backend):
        out = dy.new_zeros(len(index), dtype=torch.float32)
        pick("sampled_product_", dy.device, backend)(out, dy, x, index // width, index % width)
        return out[:, None]
    return _from_stripes(dy, x, index, int(unit[6:-1]) if unit != "element" else 1, width)


@chosen_gradient.register_fake
def _(dy: Tensor, x: Tensor, index: Tensor, unit: str, width: int, backend: str) -> Tensor:
    size = {"column": dy.shape[1], "row": width, "element": 1}.get(unit) or int(unit[6:-1])
    return dy.new_empty((len(index), size), dtype=torch.float32)


def _from_stripes(dy: Tensor, x: Tensor, index: Tensor, size: int, width: int) -> Tensor:
    """Elements (size 1) and blocks: some rows of dy^T x at a time, as many as end with a whole block."""
    out = dy.new_empty((len(index), size), dtype=torch.float32)
    step = (
        size // torch.gcd(torch.tensor(size), torch.tensor(width)).item()
    )  # rows after which a block ends with its row
    rows = int(max(1, STRIPE // (width * step)) * step)
    edges = torch.arange(0, dy.shape[1] + rows, rows, device=index.device) * width // size
    ends = torch.searchsorted(index, edges.to(index.dtype)).tolist()
    for i, (start, stop) in enumerate(pairwise(ends)):
        if start < stop:
            stripe = (dy[:, i * rows : (i + 1) * rows].t() @ x).view(-1, size)
            out[start:stop] = stripe.index_select(0, index[start:stop] - i * rows * width // size)
    return out


def _stripes(w: Tensor, half_step: Tensor, kept: Tensor, key: int, backend: str) -> Any:
    """(rows, W + E of these rows), one buffer for all."""
    rows, made = max(1, STRIPE // w.shape[1]), pick("noisy", w.device, backend)
    buffer = torch.empty((min(rows, w.shape[0]), w.shape[1]), dtype=w.dtype, device=w.device)
    for first in range(0, w.shape[0], rows):
        part = slice(first, min(first + rows, w.shape[0]))
        out = buffer[: part.stop - first]
        made(w[part], half_step[part], kept, key, first * w.shape[1], out)
        yield part, out


@torch.library.custom_op("finetooth::noisy_linear", mutates_args=())
def noisy_linear(
    x: Tensor, w: Tensor, half_step: Tensor, kept: Tensor, number: Tensor, seed: int, name: str, backend: str
) -> Tensor:
    """x (W + E)^T, with the noise E of a layer in the `number`-th forward of the model."""
    y = x.new_empty((*x.shape[:-1], w.shape[0]))
    flat, result = x.reshape(-1, x.shape[-1]), y.view(-1, w.shape[0])
    for part, noisy in _stripes(w, half_step, kept, noise_key(seed, name, number), backend):
        torch.mm(flat, noisy.t(), out=result[:, part])
    return y


@torch.library.custom_op("finetooth::noisy_input_grad", mutates_args=())
def noisy_input_grad(
    dy: Tensor, w: Tensor, half_step: Tensor, kept: Tensor, number: Tensor, seed: int, name: str, backend: str
) -> Tensor:
    """dy (W + E), with the same noise."""
    flat = dy.reshape(-1, dy.shape[-1])
    dx = flat.new_zeros((flat.shape[0], w.shape[1]))
    for part, noisy in _stripes(w, half_step, kept, noise_key(seed, name, number), backend):
        dx.addmm_(flat[:, part], noisy)
    return dx.view(*dy.shape[:-1], w.shape[1])


@noisy_linear.register_fake
def _(
    x: Tensor, w: Tensor, half_step: Tensor, kept: Tensor, number: Tensor, seed: int, name: str, backend: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


@noisy_input_grad.register_fake
def _(
    dy: Tensor, w: Tensor, half_step: Tensor, kept: Tensor, number: Tensor, seed: int, name: str, backend: str
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], w.shape[1]))


def noise_key(seed: int, name: str, number: Tensor | int) -> int:
    """The key of a layer's noise in a forward of the model."""
    return reference.key(seed, "noise", name, int(number))


def structured(unit: Unit) -> bool:
    """Whether an `nn.Linear` can compute only what this unit chooses."""
    return unit.kind in ("element", "block", "row", "column")
