"""Where the gradients of what was chosen come from: `dense`, `compact` or `structured`, all with the same result.

`dense`       `p.grad`, as autograd leaves it.
`compact`     the chosen entries alone are kept, in float32. An `nn.Linear` does not form the others (`linear.py`); of
              everything else (Conv1D, experts, embeddings, tied weights, losses that multiply with the head's weight
              themselves) a hook gathers them from `p.grad` as soon as it is complete, and drops it, so that one
              dense gradient is alive at a time.
`structured`  the same with the promise that no dense gradient is formed at all: an error where a hook would be needed.

"auto" is `compact` for compact rows of elements, blocks, rows and columns. Whole matrices and layers keep `p.grad`, which
holds nothing but what trains. At a step that selects by gradient, every route gives way to dense gradients (`pause`).

Gradients gathered here are not in `p.grad`: `clip_grad_norm_` and loss scaling do not see them. The optimizer clips,
and refuses a loss scaler. `model.zero_grad()` forgets them too, while they are gathered. Under DDP they are averaged over ranks in `step`, k numbers a tensor instead of all. Under FSDP2, which reduces whole
gradients, every rank gathers from its shard of them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import linear, shards
from finetooth.linear import Chosen
from finetooth.selection import Selection

ROUTES = ("auto", "dense", "compact", "structured")
_ATTRIBUTE = "_finetooth_gradients"
_LEFT = "_finetooth_left"
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


class Gradients:
    """The gathered gradients of one model, from construction until `remove`."""

    def __init__(
        self,
        model: nn.Module | None,
        parameters: Mapping[str, Tensor],
        selections: Mapping[str, Selection],
        route: str,
        backend: str = "auto",
        before: Mapping[str, Chosen] | None = None,  # gradients gathered so far: they stay where the selection does
        sharded: bool = False,  # FSDP2 reduces whole gradients, and its shards of them are gathered from, by the hook
    ) -> None:
        self._sharded = sharded
        self.chosen: dict[str, Chosen] = {}
        self.paused = False
        self._handles: list[Any] = []
        self._linears: list[nn.Linear] = []
        self._model, self._ignored = model, list[str]()
        if model is not None:
            remove_gradients(model)
            model.__dict__[_ATTRIBUTE] = self
            model.__dict__["zero_grad"] = _ZeroGrad(model, self)
        owners = {} if model is None or sharded else _owners(model)
        for name, selection in selections.items():
            if not linear.structured(selection.unit):
                continue
            owner = owners.get(name)
            if owner is None and route == "structured":
                raise ValueError(
                    f"gradients='structured' needs an nn.Linear of its own for {name!r}: choose 'compact' or 'auto'."
                )
            chosen = self.chosen[name] = _kept((before or {}).get(name), selection) or Chosen(name, selection, backend)
            if owner is not None:
                self._linears.append(linear.attach(owner, chosen, getattr(owner, "noise", None)))
            # Also for a linear layer: a loss that multiplies with its weight itself goes past the layer's forward.
            hook = parameters[name].register_post_accumulate_grad_hook(_Gather(chosen))  # type: ignore[no-untyped-call]
            self._handles.append(hook)
        self._keep_from_ddp()

    def _keep_from_ddp(self) -> None:
        """DDP would average zeros of the size of the weights. It refuses a model that leaves it nothing: the smallest stays."""
        if self._model is None or not self.chosen or self._sharded:
            return
        known, sizes = list(getattr(self._model, _DDP_IGNORES, [])), dict(self._model.named_parameters())
        left = [name for name in self.chosen if name not in known]
        if not any(p.requires_grad for name, p in sizes.items() if name not in self.chosen):
            left.remove(min(left, key=lambda name: sizes[name].numel()))
        self._ignored = _everywhere(self._model, left)
        self._model.__dict__[_DDP_IGNORES] = _Ignored([*known, *self._ignored])

    def names(self) -> list[str]:
        """The tensors whose gradients are gathered here."""
        return list(self.chosen)

    def taken(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients so far, `[k, unit_numel]` float32 by parameter name, averaged over ranks.

        A `p.grad` that somebody set by hand counts too. Raises RuntimeError if the model has another parameter by now.
        """
        found = {}
        self._check(parameters)
        for name, chosen in self.chosen.items():
            if (dense := parameters[name].grad) is not None:
                chosen.add(chosen.selection.gather(shards.local(dense)).float())
            if shards.world() > 1 and chosen.grad is None:  # every rank must take part for every tensor
                chosen.zero()
            if chosen.grad is not None:
                found[name] = chosen.grad
        if not self._sharded:
            shards.reduce_(found.values(), "mean")
        return found

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        for name in self.chosen if self._model is not None else ():
            if self._model.get_parameter(name) is not parameters[name]:  # type: ignore[union-attr]
                raise RuntimeError(
                    f"{name!r} is another parameter now than the one this optimizer was built with, so what it trains is not in "
                    "the model: build the optimizer again (load_state_dict(assign=True) and new parameters need that)."
                )

    def clear(self) -> None:
        """Forget them."""
        for chosen in self.chosen.values():
            chosen.clear()

    def pause(self, paused: bool) -> None:
        """While paused, gradients are dense and in `p.grad`."""
        self.paused = paused
        for chosen in self.chosen.values():
            chosen.active = not paused

    def remove(self) -> None:
        """Take out hooks and give modules their class back."""
        for handle in self._handles:
            handle.remove()
        for module in self._linears:
            noise = getattr(module, "noise", None)
            linear.detach(module) if noise is None else linear.attach(module, None, noise)
        if self._model is not None and self._ignored:
            left = [name for name in getattr(self._model, _DDP_IGNORES, []) if name not in self._ignored]
            self._model.__dict__[_DDP_IGNORES], self._ignored = left, []
        if self._model is not None:
            patched = self._model.__dict__.get("zero_grad")
            if isinstance(patched, _ZeroGrad) and patched.forgets(self):  # another optimizer may have taken over
                del self._model.__dict__["zero_grad"]
        self._handles.clear()
        self._linears.clear()
        self.chosen = {}

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the model has none: its gradients are dense."""


class LeftByDDP:
    """Parameters that DDP is told to leave, because their need of a gradient will change; one that needs one now stays with it.

    DDP settles what it waits for when it wraps a model: what is frozen then never trains, and what is frozen later is waited for.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        known, parameters = list(getattr(model, _DDP_IGNORES, [])), dict(model.named_parameters())
        now = [name for name in names if parameters[name].requires_grad]
        self.stays = min(now, key=lambda name: parameters[name].numel(), default=None)
        left = [n for n in names if n != self.stays and n not in known]
        self._model, self._names = weakref.ref(model), set(_everywhere(model, left))
        model.__dict__[_DDP_IGNORES], model.__dict__[_LEFT] = _Ignored([*known, *self._names]), self

    def remove(self) -> None:
        """DDP may have them again, unless another optimizer has taken over."""
        if (model := self._model()) is not None and model.__dict__.get(_LEFT) is self:
            del model.__dict__[_LEFT]
            kept = [name for name in getattr(model, _DDP_IGNORES, []) if name not in self._names]
            model.__dict__[_DDP_IGNORES] = _Ignored(kept)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the model has none."""


def _everywhere(model: nn.Module, names: list[str]) -> list[str]:
    """These parameters by all their names: DDP leaves a tied one only where it is told each of them."""
    known = dict(model.named_parameters())
    wanted = {id(known[name]) for name in names}
    return [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in wanted]


def averaged(dense: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients with those of these parameters averaged over ranks; one that a rank has none of counts as zero there."""
    if shards.world() > 1:
        dense |= {n: torch.zeros_like(p) for n, p in parameters.items() if n not in dense and p.requires_grad}
        shards.reduce_([dense[n] for n in parameters if n in dense], "mean")
    return dense


class _ZeroGrad:
    """`model.zero_grad`, which also forgets what was gathered for the model."""

    def __init__(self, model: nn.Module, gradients: Gradients) -> None:
        self._model, self._gradients = weakref.ref(model), weakref.ref(gradients)

    def forgets(self, gradients: Gradients) -> bool:
        """Whether it was made for these."""
        return self._gradients() is gradients

    def __call__(self, set_to_none: bool = True) -> None:
        if (model := self._model()) is not None:
            type(model).zero_grad(model, set_to_none)
        if (gradients := self._gradients()) is not None:
            gradients.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model has the plain one."""
        twin: Any = memo.get(id(self._model()))
        return functools.partial(type(twin).zero_grad, twin)

    def __reduce__(self) -> Any:
        model: Any = self._model()
        return functools.partial, (type(model).zero_grad, model)


class _Ignored(list[str]):
    """Names that DDP leaves alone while gradients are gathered; a copy of the model has no such names."""

    def __deepcopy__(self, memo: object) -> list[str]:
        return []


def _kept(chosen: Chosen | None, selection: Selection) -> Chosen | None:
    def told(s: Selection) -> tuple[object, ...]:
        return s.unit, s.shape, s.index.device, len(s)

    same = chosen is not None and told(chosen.selection) == told(selection)
    return chosen if same and chosen is not None and chosen.selection.index.equal(selection.index) else None


class _Gather:
    """After a gradient is complete: keep the chosen entries, drop the rest."""

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen

    def __call__(self, p: Tensor) -> None:
        if self.chosen.active and p.grad is not None:
            self.chosen.add(self.chosen.selection.gather(shards.local(p.grad)).float())
            p.grad = None


def _owners(model: nn.Module) -> dict[str, nn.Linear]:
    """By parameter name, the `nn.Linear` that alone holds it as its weight."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            holders[id(p)] = holders.get(id(p), 0) + 1
    found = {}
    for path, module in model.named_modules():
        if type(module) in (nn.Linear, linear.SelectiveLinear) and holders.get(id(module.weight)) == 1:
            found[f"{path}.weight" if path else "weight"] = module
    return found


def remove_gradients(model: nn.Module) -> None:
    """Give a model's gradients back to autograd, if an optimizer gathers them."""
    if (gradients := model.__dict__.pop(_ATTRIBUTE, None)) is not None:
        gradients.remove()
    if (left := model.__dict__.get(_LEFT)) is not None:
        left.remove()


class Follow:
    """Before a forward: see whether the parameters have been sharded, as their gradients are then gathered in another way."""

    def __init__(self, opt: Any) -> None:
        self._opt = weakref.ref(opt)

    def __call__(self, module: nn.Module, args: object) -> None:
        if (opt := self._opt()) is not None:
            opt._adopt()


def take_out(attached: dict[str, Any]) -> None:
    """The model is as it was, once its optimizer is gone."""
    for part in attached.values():
        part.remove()
