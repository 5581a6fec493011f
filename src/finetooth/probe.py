"""Calibration: what a score needs to know before training, measured on a few batches.

Two things can be measured. `grad` is the mean gradient over the batches, in float32. `input_norm_r` is the
norm over all tokens of every input column of a layer (r = inf, 2 or 1). Hooks go in and come out again;
the model's mode, its gradients and its `requires_grad` flags are left as they were found. Padding tokens
(attention_mask 0) count in neither. Batches without labels use their input ids.

Gradients of all weights would take as much memory as the model. They are measured when they are read, some neighbouring
tensors at a time, in as many passes over the batches as that takes (up to eight): a selection that lets go of one
tensor before it reads the next never holds more.

The model runs in eval mode: a selection should not depend on dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import shards
from finetooth.anatomy import Part

Stats = dict[str, dict[str, Tensor]]
Batch = Mapping[str, Tensor] | Tensor
IGNORE = -100
ROOM, PASSES = 64 << 20, 8  # bytes of gradients that are measured in one pass, and how many passes at most take less


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],  # input_ids [b, t], attention_mask, labels
    parts: Mapping[str, Part],  # the parameters to measure
    needs: Iterable[str],  # "grad", "input_norm_inf", …
    room: int | None = None,  # bytes of gradients to measure in one pass: by default ROOM, or an eighth of them
) -> Mapping[str, Mapping[str, Tensor]]:
    """Measure `needs` for every part, by parameter name: `grad` like the weight, `input_norm_r` as `[in]`.

    Raises ValueError where there is no batch, or one without input_ids.
    """
    held, needs = list(batches), list(needs)
    if not held:
        raise ValueError("calibration has no batches: give at least one dict with input_ids of shape [batch, tokens].")
    for batch in held:
        _ids(batch)
    norms = [need for need in needs if need != "grad"]
    stats: Stats = _measured(model, held, parts, norms) if norms else {name: {} for name in parts}
    if "grad" not in needs:
        return stats
    sweeps = _Sweeps(model, held, parts, ROOM if room is None else room)
    return {name: _Swept(name, known, sweeps) for name, known in stats.items()}


class _Sweeps:
    """Mean gradients, a group of tensors at a time; reading one of another group lets go of the last."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], parts: Mapping[str, Part], room: int) -> None:
        self.model, self.batches, self.parts = model, batches, parts
        sizes = {name: 4 * p.numel() for name, p in model.named_parameters() if name in parts}
        room = max(room, sum(sizes.values()) // PASSES)
        self.group, group, filled = dict[str, int](), 0, 0
        for name, size in sizes.items():
            if filled and filled + size > room:
                group, filled = group + 1, 0
            self.group[name], filled = group, filled + size
        self.now: dict[str, Tensor] = {}

    def grad(self, name: str) -> Tensor:
        if name not in self.now:
            self.now = {}
            part = {n: self.parts[n] for n, group in self.group.items() if group == self.group[name]}
            self.now = {n: s["grad"] for n, s in _measured(self.model, self.batches, part, ["grad"]).items()}
        return self.now[name]


class _Swept(Mapping[str, Tensor]):
    """The statistics of one tensor; its gradient is measured when it is read."""

    def __init__(self, name: str, known: Mapping[str, Tensor], sweeps: _Sweeps) -> None:
        self._name, self._known, self._sweeps = name, known, sweeps

    def __getitem__(self, key: str) -> Tensor:
        return self._sweeps.grad(self._name) if key == "grad" else self._known[key]

    def __contains__(self, key: object) -> bool:
        return key == "grad" or key in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(["grad", *self._known])

    def __len__(self) -> int:
        return 1 + len(self._known)


def _measured(model: nn.Module, batches: Sequence[Batch], parts: Mapping[str, Part], needs: Sequence[str]) -> Stats:
    """One pass over the batches."""
    norms = [need.removeprefix("input_norm_") for need in needs if need.startswith("input_norm_")]
    with_grad = "grad" in needs
    stats: Stats = {name: {} for name in parts}
    with _as_found(model, parts if with_grad else {}, stats), _Inputs(model, parts, norms, stats) as inputs:
        device = next(model.parameters()).device
        for batch in batches:
            inputs.mask = (full := _with_labels(batch, device)).get("attention_mask")
            with torch.set_grad_enabled(with_grad):
                loss = model(**full).loss
            if with_grad:
                loss.backward()
    if with_grad:  # a parameter that no batch used has a gradient of zero
        for name, p in model.named_parameters():
            if name in stats:
                stats[name].setdefault("grad", torch.zeros_like(p, dtype=torch.float32))
    for measured in stats.values():
        for need, value in measured.items():
            if need == "grad":
                value.div_(len(batches))
                if not shards.sharded(value):  # FSDP2 has averaged over ranks
                    shards.reduce_([value], "mean")
            elif need.endswith("_inf"):
                shards.reduce_([value], "max")
            else:
                shards.reduce_([value], "sum")
                value.copy_(value.sqrt() if need.endswith("_2") else value)
    return stats


def _ids(batch: Batch) -> dict[str, Tensor]:
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    if "input_ids" not in given:
        raise ValueError(f"a calibration batch has the keys {sorted(given)}: input_ids is missing.")
    return given


def _with_labels(batch: Batch, device: torch.device) -> dict[str, Any]:
    full = {k: v.to(device) for k, v in _ids(batch).items() if k in ("input_ids", "attention_mask", "labels")}
    if "labels" not in full:
        mask = full.get("attention_mask", torch.ones_like(full["input_ids"]))
        full["labels"] = full["input_ids"].masked_fill(mask == 0, IGNORE)
    return full


def _adding(into: dict[str, Tensor]) -> Any:
    """Take a gradient as soon as it is complete, so that one at a time is there beside the sums."""

    def hook(p: Tensor) -> None:
        if p.grad is not None:
            so_far = into.get("grad")
            into["grad"] = p.grad.float() if so_far is None else so_far.add_(p.grad)
            p.grad = None

    return hook


@contextmanager
def _as_found(model: nn.Module, measured: Mapping[str, Part], stats: Stats) -> Iterator[None]:
    """Eval mode, and gradients only where they are measured and added up, for the length of the block."""
    modes = {module: module.training for module in model.modules()}
    found = {name: (p.grad, p.requires_grad) for name, p in model.named_parameters()}
    handles = []
    model.eval()
    try:
        for name, p in model.named_parameters():
            p.grad = None
            p.requires_grad_(name in measured)
            if name in measured:
                handles.append(p.register_post_accumulate_grad_hook(_adding(stats[name])))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        for name, p in model.named_parameters():
            p.grad, wanted = found[name]
            p.requires_grad_(wanted)


class _Inputs:
    """Norms of the input columns of layers, by hooks that live as long as the `with` block."""

    def __init__(self, model: nn.Module, parts: Mapping[str, Part], norms: list[str], stats: Stats) -> None:
        self.mask: Tensor | None = None
        self._model, self._parts, self._norms, self._stats = model, parts, norms, stats
        self._handles: list[Any] = []

    def __enter__(self) -> _Inputs:
        for name, part in self._parts.items() if self._norms else ():
            if part.kind in ("linear", "head") and name.endswith(".weight"):
                module = self._model.get_submodule(name.removesuffix(".weight"))
                self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            if self.mask is not None and x.shape[:2] == self.mask.shape:
                x = x[self.mask.bool()]
            elif (
                self.mask is not None and x.ndim == 2 and len(x) == self.mask.numel()
            ):  # as blocks of experts flatten it
                x = x[self.mask.bool().flatten()]
            x = x.reshape(-1, x.shape[-1]).float()
            for norm in self._norms:
                _add(self._stats[name], f"input_norm_{norm}", x.abs(), norm)

        return hook


def _add(into: dict[str, Tensor], key: str, x: Tensor, norm: str) -> None:
    new = x.amax(0) if norm == "inf" else x.sum(0) if norm == "1" else x.square().sum(0)
    old = into.get(key)
    into[key] = new if old is None else torch.maximum(old, new) if norm == "inf" else old + new
