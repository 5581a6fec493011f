"""Several deltas of one base as one delta: sum, average, TIES and DARE, on what changed and nothing else.

    tau_i  = new_i - base                        zero where delta i changes nothing
    sum      tau = sum_i w_i tau_i                                       (task arithmetic, arXiv 2212.04089)
    average  tau = sum_i w_i tau_i / sum_i w_i                           over all deltas, those that change nothing here too
    ties     trim every tau_i to its largest; the sign of sum_i w_i tau_i wins; the weighted mean of those that have it
             (Yadav et al. 2023, arXiv 2306.01708)
    dare     drop entries of every tau_i at random, scale what stays, and sum   (Yu et al. 2023, arXiv 2311.03099)
    new    = base + scale * tau                  in float32 (float64 of float64 weights), rounded once to the weight's dtype

New values are stored, as in every delta, so that the merged one is applied and taken off bit for bit. An entry that comes out
as the base's drops out; one that a single delta contributes, with a factor of exactly 1, is that delta's value and not
a sum that may round: deltas that do not overlap merge to exactly what applying one after the other gives.

A method is a row of `MERGES`. Of the papers it deviates as `docs/compose.md` says: `density` is a share of what a delta
*changes*, as most entries of a sparse one are zero already; DARE draws by a hash of (seed, delta, tensor, index).

Not covered: integer tensors, merging by layer with other weights, and models of different bases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from finetooth.base import bits
from finetooth.codec import Change
from finetooth.delta import Delta, DeltaError
from finetooth.kernels import reference
from finetooth.moves import Given, Move, Step, described, largest, named, names_of, opened, rewritten, walk, wide

Kept = Sequence[Mapping[str, Tensor]]  # of every delta, by tensor, which of its entries stay


def summed(taus: Tensor, weights: list[float]) -> Tensor:  # [deltas, n] -> [n]
    """sum_i w_i tau_i"""
    out = torch.zeros_like(taus[0])
    for w, tau in zip(weights, taus, strict=True):
        out += w * tau
    return out


def averaged(taus: Tensor, weights: list[float]) -> Tensor:
    """sum_i w_i tau_i / sum_i w_i"""
    return summed(taus, weights) / sum(weights)


def elected(taus: Tensor, weights: list[float]) -> Tensor:
    """The weighted mean of those that have the sign of the sum; zero where the sum is."""
    sign = summed(taus, weights).sign()
    agree = (taus.sign() == sign) & (sign != 0)
    share = summed(agree.to(taus.dtype), weights)
    return summed(torch.where(agree, taus, 0.0), weights) / torch.where(share > 0, share, 1.0)


@dataclass(frozen=True)
class Merge:
    """One way to merge: how differences are combined, what happens to them before, and what a lone one is worth."""

    combine: Callable[[Tensor, list[float]], Tensor]
    alone: Callable[[list[float]], list[float]]  # the factor of an entry that one delta alone contributes
    thin: Literal["trim", "drop"] | None = None
    density: float | None = None  # the share that stays, by default


MERGES: Mapping[str, Merge] = MappingProxyType(
    {
        "sum": Merge(summed, lambda w: w),
        "average": Merge(averaged, lambda w: [x / sum(w) for x in w]),
        "ties": Merge(elected, lambda w: [1.0 for _ in w], "trim", 0.2),
        "dare": Merge(summed, lambda w: w, "drop", 0.1),
    }
)


def merge(
    deltas: Sequence[Given],
    base: Any,
    how: str = "sum",
    *,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int | None = None,
    scale: float = 1.0,
) -> Delta:
    """One delta of several that were made on the same base; see the module for the equations.

    Args:
        deltas: `Delta`s, or what `Delta.load` takes.
        base: anything that `open_base` opens: a folder, a hub id, a model or state dict that holds the base's values.
        how: "sum", "average", "ties" or "dare".
        weights: w_i, one for each delta; 1 without. Those of ties are positive, the sum of those of average is not 0.
        density: the share of every delta's changed entries that stays: ties keeps its largest, over the whole delta (0.2,
            the paper's), dare keeps each with this probability and multiplies it by 1 / density (0.1: p = 0.9).
        seed: of dare; 0 without.
        scale: a factor of the whole (lambda in the papers).

    Raises DeltaError if the deltas do not have the same base, one of them is an inverse, `base` is another one, a
    merged value is not finite, or an argument is out of range or would be ignored.

    >>> base = {"w": torch.zeros(3)}
    >>> a = Delta.extract({"w": torch.tensor([1.0, 2.0, 0.0])}, base)
    >>> b = Delta.extract({"w": torch.tensor([0.0, 4.0, 8.0])}, base)
    >>> merged = merge([a, b], base, "average")
    >>> _ = merged.apply(base); base["w"]
    tensor([0.5000, 3.0000, 4.0000])
    """
    found, row = opened(deltas, 2), _row(how, weights, len(deltas), density, seed, scale)
    factors = [1.0] * len(found) if weights is None else [float(w) for w in weights]
    share = row.density if density is None else density
    kept = _trimmed(found, base, share) if row.thin == "trim" and share is not None else None
    changes: dict[str, Change] = {}
    for step in walk(found, base, check=kept is None):
        moves = _thinned(step, row, share, seed or 0, kept)
        result = _merged(step, moves, row, factors, scale, 1.0 / share if row.thin == "drop" and share else 1.0)
        if result is not None:
            changes[step.name] = result
    parts = [described(d, named(g)) for d, g in zip(found, deltas, strict=True)]
    settings: dict[str, Any] = {"how": how, "weights": factors, "scale": scale, "parts": parts}
    if row.thin is not None:
        settings |= {"density": share} | ({"seed": seed or 0} if row.thin == "drop" else {})
    return Delta(changes, names_of(found)[1], _origin(found, changes), "merge", {"merge": settings})


def _row(
    how: str, weights: Sequence[float] | None, n: int, density: float | None, seed: int | None, scale: float
) -> Merge:
    """The row, once all that is asked of it makes sense."""
    if how not in MERGES:
        raise DeltaError(f"how={how!r} is unknown: choose one of {', '.join(MERGES)}.")
    row = MERGES[how]
    if weights is not None and len(weights) != n:
        raise DeltaError(f"{len(weights)} weights were given for {n} deltas: give one for each.")
    every = [*(weights or ()), scale]
    if not all(abs(w) < float("inf") for w in every):
        raise DeltaError(f"weights={weights} and scale={scale}: give finite numbers.")
    if weights is not None and how == "average" and sum(weights) == 0:
        raise DeltaError(f"weights={list(weights)} add up to 0: there is no average.")
    if weights is not None and how == "ties" and min(weights) <= 0:
        raise DeltaError(f"weights={list(weights)}: those of ties are positive, as they vote on a sign.")
    for name, value, wanted in (("density", density, row.thin), ("seed", seed, row.thin == "drop")):
        if value is not None and not wanted:
            raise DeltaError(f"{name}={value} has no meaning for how={how!r}: leave it out.")
    if density is not None and not 0 < density <= 1:
        raise DeltaError(f"density={density} is out of range: give a share in (0, 1].")
    return row


def _trimmed(deltas: list[Delta], base: Any, share: float) -> Kept:
    """Of every delta its largest differences, over all of its tensors."""
    sizes: list[dict[str, Tensor]] = [{} for _ in deltas]
    for step in walk(deltas, base):
        for known, move in zip(sizes, step.moves, strict=True):
            if move is not None:
                known[step.name] = move.difference().abs()
    return [largest(known, float(share)) for known in sizes]


def _thinned(step: Step, row: Merge, share: float | None, seed: int, kept: Kept | None) -> list[Move | None]:
    out = list(step.moves)
    for i, (move, c) in enumerate(zip(step.moves, step.changes, strict=True)):
        if move is not None and kept is not None:
            out[i] = move.only(kept[i][step.name])
        elif move is not None and c is not None and share is not None and row.thin == "drop":
            # `result` stands for the delta: each drops its own entries, whatever the order in which they are given.
            key = reference.key(seed, "dare", step.name, c.result)
            out[i] = move.only(reference.uniform_at(move.index, key) < share)
    return out


def _merged(
    step: Step, moves: list[Move | None], row: Merge, weights: list[float], scale: float, each: float
) -> Change | None:
    """One tensor; `each` is the factor of every difference that was not dropped."""
    assert step.tensor is not None
    t = step.tensor
    if not t.dtype.is_floating_point:
        raise DeltaError(f"'{step.name}' is {t.dtype}: merging adds differences, of floating-point weights.")
    index = torch.unique(torch.cat([m.index for m in moves if m is not None]))
    flat = bits(t).view(-1)[index]
    old = wide(flat.view(t.dtype))
    taus = torch.zeros(len(moves), len(index), dtype=old.dtype)
    there = torch.zeros(len(moves), len(index), dtype=torch.bool)
    at = [torch.searchsorted(index, m.index) if m is not None else None for m in moves]
    for i, (m, here) in enumerate(zip(moves, at, strict=True)):
        if m is not None:
            taus[i, here], there[i, here] = m.difference() * each, True
    tau = scale * row.combine(taus, weights)
    new = torch.where(tau == 0, flat, bits((old + tau).to(t.dtype)))  # -0.0 + 0 is 0.0: what stays keeps its bits
    lone = there.sum(0) == 1
    for m, here, factor in zip(moves, at, row.alone(weights), strict=True):
        if m is not None and factor * each * scale == 1.0:
            its = lone[here]
            new[here[its]] = bits(m.new)[its]  # type: ignore[index]  # `here` is None where `m` is
    return rewritten(step.name, t, index, new.view(t.dtype))


def _origin(deltas: list[Delta], changes: Mapping[str, Change]) -> Any:
    """The base of all: with the first name there is, and what any of them says of earlier deltas."""
    first = next((d.base for d in deltas if d.base.id), deltas[0].base)
    after = {n: found for d in deltas for n, found in d.base.after.items() if n not in changes}
    weights = first.weights or next((d.base.weights for d in deltas if d.base.weights), None)
    return replace(first, weights=weights, after=after)
