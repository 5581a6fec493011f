"""Calibration: what a score needs to know before training, measured on a few batches.

Two things can be measured. `grad` is the mean gradient over the batches, in float32. `input_norm_r` is the
norm over all tokens of every input column of a layer (r = inf, 2 or 1). Hooks go in and come out again;
the model's mode, its gradients and its `requires_grad` flags are left as they were found. Padding tokens
(attention_mask 0) count in neither. Batches without labels use their input ids.

The model runs in eval mode: a selection should not depend on dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import shards
from finetooth.anatomy import Part

Stats = dict[str, dict[str, Tensor]]
IGNORE = -100


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor] | Tensor],  # input_ids [b, t], attention_mask, labels
    parts: Mapping[str, Part],  # the parameters to measure
    needs: Iterable[str],  # "grad", "input_norm_inf", …
) -> Stats:
    """Measure `needs` for every part, by parameter name: `grad` like the weight, `input_norm_r` as `[in]`."""
    norms = [need.removeprefix("input_norm_") for need in needs if need.startswith("input_norm_")]
    with_grad, seen = "grad" in needs, 0
    stats: Stats = {name: {} for name in parts}
    with _as_found(model, with_grad and list(parts)), _Inputs(model, parts, norms, stats) as inputs:
        device = next(model.parameters()).device
        for batch in batches:
            inputs.mask = (full := _with_labels(batch, device)).get("attention_mask")
            with torch.set_grad_enabled(with_grad):
                loss = model(**full).loss
            if with_grad:
                loss.backward()
                _collect(model, stats)
            seen += 1
    if not seen:
        raise ValueError("calibration has no batches: give at least one dict with input_ids of shape [batch, tokens].")
    if with_grad:  # a parameter that no batch used has a gradient of zero
        for name, p in model.named_parameters():
            if name in stats:
                stats[name].setdefault("grad", torch.zeros_like(p, dtype=torch.float32))
    for measured in stats.values():
        for need, value in measured.items():
            if need == "grad":
                value.div_(seen)
                shards.reduce_([value], "mean")
            elif need.endswith("_inf"):
                shards.reduce_([value], "max")
            else:
                shards.reduce_([value], "sum")
                value.copy_(value.sqrt() if need.endswith("_2") else value)
    return stats


def _with_labels(batch: Mapping[str, Tensor] | Tensor, device: torch.device) -> dict[str, Any]:
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    full = {k: v.to(device) for k, v in given.items() if k in ("input_ids", "attention_mask", "labels")}
    if "input_ids" not in full:
        raise ValueError(f"a calibration batch has the keys {sorted(given)}: input_ids is missing.")
    if "labels" not in full:
        mask = full.get("attention_mask", torch.ones_like(full["input_ids"]))
        full["labels"] = full["input_ids"].masked_fill(mask == 0, IGNORE)
    return full


def _collect(model: nn.Module, stats: Stats) -> None:
    for name, p in model.named_parameters():
        if name in stats and p.grad is not None:
            so_far = stats[name].get("grad")
            stats[name]["grad"] = p.grad.float() if so_far is None else so_far.add_(p.grad)
        p.grad = None


@contextmanager
def _as_found(model: nn.Module, measured: list[str] | bool) -> Iterator[None]:
    """Eval mode and gradients only where they are measured, for the length of the block."""
    modes = {module: module.training for module in model.modules()}
    found = {name: (p.grad, p.requires_grad) for name, p in model.named_parameters()}
    model.eval()
    try:
        for name, p in model.named_parameters():
            p.grad = None
            p.requires_grad_(bool(measured) and name in measured)  # type: ignore[operator]
        yield
    finally:
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
