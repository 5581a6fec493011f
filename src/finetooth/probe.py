"""Calibration: what a score needs to know before training, measured on a few batches.

Three things can be measured. `grad` is the mean gradient over the batches, in float32. `grad_square` is the sum over single rows
of the squared gradient of each: a row at a time, because the square of a mean is not the mean of squares. `input_norm_r` is the
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
GRADIENTS = ("grad", "grad_square")
ROOM, PASSES = 64 << 20, 8  # bytes of gradients that are measured in one pass, and how many passes at most take less


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],  # input_ids [b, t], attention_mask, labels
    parts: Mapping[str, Part],  # the parameters to measure
    needs: Iterable[str],  # "grad", "grad_square", "input_norm_inf", …
    room: int | None = None,  # bytes of gradients to measure in one pass: by default ROOM, or an eighth of them
) -> Mapping[str, Mapping[str, Tensor]]:
    """Measure `needs` for every part, by parameter name: `grad` and `grad_square` like the weight, `input_norm_r` as `[in]`.

    Raises ValueError where there is no batch, or one without input_ids.
    """
    held, needs = list(batches), list(needs)
    if not held:
        raise ValueError("calibration has no batches: give at least one dict with input_ids of shape [batch, tokens].")
    for batch in held:
        _ids(batch)
    norms = [need for need in needs if need not in GRADIENTS]
    stats: Stats = _measured(model, held, parts, norms) if norms else {name: {} for name in parts}
    if not (swept := [need for need in needs if need in GRADIENTS]):
        return stats
    sweeps = _Sweeps(model, held, parts, swept, ROOM if room is None else room)
    return {name: _Swept(name, known, sweeps) for name, known in stats.items()}


class _Sweeps:
    """Statistics of gradients, a group of tensors at a time; reading one of another group lets go of the last."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], parts: Mapping[str, Part], needs: list[str], room: int
    ) -> None:
        self.model, self.batches, self.parts, self.needs = model, batches, parts, needs
        sizes = {name: 4 * p.numel() for name, p in model.named_parameters() if name in parts}
        room = max(room, sum(sizes.values()) // PASSES)
        self.group, group, filled = dict[str, int](), 0, 0
        for name, size in sizes.items():
            if filled and filled + size > room:
                group, filled = group + 1, 0
            self.group[name], filled = group, filled + size
        self.now: Stats = {}

    def read(self, name: str, need: str) -> Tensor:
        if name not in self.now:
            self.now = {}
            part = {n: self.parts[n] for n, group in self.group.items() if group == self.group[name]}
            self.now = _measured(self.model, self.batches, part, self.needs)
        return self.now[name][need]


class _Swept(Mapping[str, Tensor]):
    """The statistics of one tensor; those of its gradient are measured when they are read."""

    def __init__(self, name: str, known: Mapping[str, Tensor], sweeps: _Sweeps) -> None:
        self._name, self._known, self._sweeps = name, known, sweeps

    def __getitem__(self, key: str) -> Tensor:
        return self._sweeps.read(self._name, key) if key in self._sweeps.needs else self._known[key]

    def __contains__(self, key: object) -> bool:
        return key in self._sweeps.needs or key in self._known

    def __iter__(self) -> Iterator[str]:
        return iter([*self._sweeps.needs, *self._known])

    def __len__(self) -> int:
        return len(self._sweeps.needs) + len(self._known)


def _measured(model: nn.Module, batches: Sequence[Batch], parts: Mapping[str, Part], needs: Sequence[str]) -> Stats:
    """One pass over the batches."""
    norms = [need.removeprefix("input_norm_") for need in needs if need.startswith("input_norm_")]
    gradients = [need for need in needs if need in GRADIENTS]
    stats: Stats = {name: {} for name in parts}
    with _as_found(model, parts if gradients else {}, stats, gradients), _Inputs(model, parts, norms, stats) as inputs:
        device = next(model.parameters()).device
        passes = 0
        for batch in _rows(model, batches) if "grad_square" in gradients else batches:
            inputs.mask = (full := _with_labels(batch, device)).get("attention_mask")
            with torch.set_grad_enabled(bool(gradients)):
                loss = model(**full, **uncached(model)).loss
            if gradients:
                loss.backward()
            passes += 1
    if unseen := [name for name in inputs.hooked if not stats[name]]:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise ValueError(
            f"no calibration batch came through the layer of {unseen[0]!r}{more}: leave it out of targets. (An expert wants more batches; a "
            "vision tower sees no text; Mamba multiplies with some weights itself.)"
        )
    for name, p in model.named_parameters():  # one that no batch used has a gradient of zero
        for need in gradients if name in stats else ():
            stats[name].setdefault(need, torch.zeros_like(p, dtype=torch.float32))
    for measured in stats.values():
        for need, value in measured.items():
            _finish(need, value, passes)
    return stats


def _finish(need: str, value: Tensor, passes: int) -> None:
    """From what a rank has added up to the statistic of all ranks, in place."""
    if need == "grad":
        value.div_(passes)
    if need in GRADIENTS and shards.sharded(value):  # FSDP2 has averaged over ranks, of which all had the same rows
        return
    shards.reduce_([value], "mean" if need == "grad" else "max" if need.endswith("_inf") else "sum")
    if need.startswith("input_norm_2"):
        value.sqrt_()


def _rows(model: nn.Module, batches: Sequence[Batch]) -> Iterator[Batch]:
    """The rows of all batches, one at a time; where parameters are sharded, those of every rank on every rank.

    FSDP2 averages gradients over ranks before anybody sees them, so a row's own gradient is there only if all ranks ran that row.
    """
    together = any(shards.sharded(p) for p in model.parameters())
    for batch in _everyones(batches) if together else batches:
        given = _ids(batch)
        for i in range(len(given["input_ids"])):
            yield {key: x[i : i + 1] for key, x in given.items() if isinstance(x, Tensor)}


def _everyones(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches of every rank, one after the other, padded on the right to one width."""
    kept = [_with_labels(batch, torch.device("cpu")) for batch in batches]
    device = _ids(batches[0])["input_ids"].device
    for i in range(int(shards.counts([len(kept)], device).max())):
        mine = kept[i] if i < len(kept) else {k: v[:0] for k, v in kept[0].items()}
        width = int(shards.counts([mine["input_ids"].shape[1]], device).max())
        filled = {"input_ids": (mine["input_ids"], 0), "labels": (mine["labels"], IGNORE)}
        filled["attention_mask"] = (mine.get("attention_mask", torch.ones_like(mine["input_ids"])), 0)
        yield {
            key: shards.joined(nn.functional.pad(x, (0, width - x.shape[1]), value=pad).to(device))
            for key, (x, pad) in filled.items()
        }


def uncached(model: nn.Module) -> dict[str, bool]:
    """What a forward is told so that it keeps nothing for the next token: some models could not go back through it."""
    return {} if getattr(getattr(model, "config", None), "use_cache", None) is None else {"use_cache": False}


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


def _adding(into: dict[str, Tensor], needs: Sequence[str]) -> Any:
    """Take a gradient as soon as it is complete, so that one at a time is there beside the sums."""

    def hook(p: Tensor) -> None:
        if p.grad is None:
            return
        for need in needs:
            so_far, new = into.get(need), p.grad.float()
            if need == "grad_square":
                new = new.square()
            into[need] = new if so_far is None else so_far.add_(new)
        p.grad = None

    return hook


@contextmanager
def _as_found(model: nn.Module, measured: Mapping[str, Part], stats: Stats, needs: Sequence[str]) -> Iterator[None]:
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
                handles.append(p.register_post_accumulate_grad_hook(_adding(stats[name], needs)))  # type: ignore[no-untyped-call]
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
        self.hooked: list[str] = []

    def __enter__(self) -> _Inputs:
        for name, part in self._parts.items() if self._norms else ():
            if part.kind in ("linear", "head") and name.endswith(".weight"):
                module = self._model.get_submodule(name.removesuffix(".weight"))
                self._handles.append(module.register_forward_pre_hook(self._hook(name)))
                self.hooked.append(name)
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
