"""Selections and state of a sharded tensor: cut to the rows that a rank holds, and put together again.

A unit lies in the rows of one rank (an entry, a row, a block that ends with its row), and then ranks hold different units; or it
lies across them (a column of a matrix, a whole tensor), and then every rank has the same units and a piece of each. Everything that is kept
by unit is cut along the one or the other. What is put together is what a single process would hold, name for name and bit
for bit: that is what checkpoints have, and why they load on another number of ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from finetooth import shards
from finetooth.kernels import pick
from finetooth.selection import Selection
from finetooth.shards import Cut
from finetooth.units import WHOLE, Unit

MOMENTS = ("exp_avg", "exp_avg_sq")


def span(cut: Cut, unit: Unit) -> tuple[int, int] | None:
    """The ids `[first, last)` of the units in a rank's rows; None where units lie across ranks.

    >>> span(Cut((8, 3), start=4, rows=4), Unit("row")), span(Cut((8, 3), start=4, rows=4), Unit("column"))
    ((4, 8), None)
    """
    if unit.kind in WHOLE or (unit.kind == "column" and len(cut.shape) == 2):
        return None
    size = unit.numel(cut.shape)
    if cut.row % size:
        raise ValueError(
            f"unit {unit} of a tensor of shape {list(cut.shape)} ends in the middle of a row, and rows are sharded: choose a "
            "block size that divides a row, or targets without this tensor."
        )
    per = cut.row // size
    return cut.start * per, (cut.start + cut.rows) * per


def mine(selection: Selection, cut: Cut | None) -> Selection:
    """What a rank holds of a selection of the whole tensor."""
    if cut is None:
        return selection
    part = _part(selection, cut)
    index = selection.index if part is None else selection.index[part] - span(cut, selection.unit)[0]  # type: ignore[index]
    return Selection(index, selection.unit, cut.local)


def joined(selection: Selection, cut: Cut | None) -> Selection:
    """The selection of the whole tensor, from what every rank holds of it."""
    if cut is None:
        return selection
    held = span(cut, selection.unit)
    index = selection.index if held is None else shards.joined(selection.index + held[0])
    return Selection(index, selection.unit, cut.shape)


def rows(whole: Tensor, cut: Cut | None) -> Tensor:
    """A rank's rows of a whole tensor, a view."""
    return whole if cut is None else whole.narrow(0, cut.start, cut.rows)


def values(of_units: Tensor, selection: Selection, cut: Cut) -> Tensor:
    """A rank's part of what is known of the units of a selection of the whole tensor: `[k]` or `[k, unit_numel]`."""
    part = _part(selection, cut)
    if part is not None:
        return of_units[part]
    if of_units.ndim < 2:
        return of_units
    step = cut.row if selection.unit.kind in WHOLE else 1
    return of_units.narrow(1, cut.start * step, cut.rows * step).contiguous()


def _part(selection: Selection, cut: Cut) -> slice | None:
    """Which of a sorted list of units a rank holds."""
    held = span(cut, selection.unit)
    if held is None:
        return None
    first, last = torch.searchsorted(selection.index, selection.index.new_tensor(held)).tolist()
    return slice(first, last)


def join_state(state: dict[str, Any], cut: Cut | None, compact: bool) -> dict[str, Any]:
    """The state of a slot (`Slot.state`) as one process would have it, from every rank's."""
    if cut is None:
        return state
    out = dict(state)
    for key in ("selection", "replaced", "window"):
        if key in state:
            out[key] = _join_units(state[key], cut)
    if "selection" in state and compact:
        unit = Unit(*state["selection"]["unit"])
        across = span(cut, unit) is None
        for key in (*MOMENTS, "master"):
            if key in state:
                out[key] = shards.joined(state[key], 1 if across else 0)
        if not across:
            out["age"] = _join_ages(state["age"], state["selection"]["index"])
    elif not compact:
        out |= {key: shards.joined(state[key]) for key in MOMENTS if key in state}
    if "bits" in state:
        positions = pick("positions", state["bits"].device)(state["bits"], math.prod(cut.local))
        index = shards.joined(positions + cut.start * cut.row)
        out["bits"] = pick("flagged", index.device)(index, math.prod(cut.shape))
    if "held" in state:
        out["held"] = shards.joined(state["held"])
    return out


def _join_units(held: dict[str, Any], cut: Cut) -> dict[str, Any]:
    unit = Unit(*held["unit"])
    found = joined(Selection(held["index"], unit, cut.local), cut)
    out = {**held, "index": found.index, "shape": list(cut.shape)}
    if "values" in held:
        out["values"] = shards.joined(held["values"], 1 if span(cut, unit) is None else 0)
    return out


def _join_ages(age: int | Tensor, index: Tensor) -> int | Tensor:
    ages = age if isinstance(age, Tensor) else torch.full((len(index),), age, dtype=torch.int32, device=index.device)
    everywhere = shards.joined(ages)
    if not len(everywhere):
        return 0
    first = int(everywhere[0])
    return first if bool((everywhere == first).all()) else everywhere


def cut_state(state: dict[str, Any], cut: Cut | None, compact: bool) -> dict[str, Any]:
    """A rank's part of the state of a slot of the whole tensor: undoes `join_state`."""
    if cut is None:
        return state
    out = dict(state)
    for key in ("selection", "replaced", "window"):
        if key in state:
            out[key] = _cut_units(state[key], cut)
    if "selection" in state and compact:
        whole = Selection(state["selection"]["index"], Unit(*state["selection"]["unit"]), cut.shape)
        for key in (*MOMENTS, "master"):
            if key in state:
                out[key] = values(state[key], whole, cut)
        if isinstance(state["age"], Tensor):
            out["age"] = values(state["age"], whole, cut)
    elif not compact:
        out |= {key: rows(state[key], cut).clone() for key in MOMENTS if key in state}
    if "bits" in state:
        index = pick("positions", state["bits"].device)(state["bits"], math.prod(cut.shape))
        chosen = Selection(index, Unit(), cut.shape)
        out["bits"] = pick("flagged", index.device)(mine(chosen, cut).index, math.prod(cut.local))
        if "held" in state:
            out["held"] = values(state["held"], chosen, cut)
    return out


def _cut_units(held: dict[str, Any], cut: Cut) -> dict[str, Any]:
    whole = Selection(held["index"], Unit(*held["unit"]), cut.shape)
    out = {**held, "index": mine(whole, cut).index, "shape": list(cut.local)}
    if "values" in held:
        out["values"] = values(held["values"], whole, cut)
    return out
