"""Two deltas of one base held against each other, and one delta cut down to its largest changes.

    contrast    entries that only one of them changes, that both change to the same bits, that both change to different ones,
                and the cosine of new - base, over all tensors and in each
    trim        the `keep` largest |new - base| stay, the others go back to the base

Without the base, listed entries are compared and there is no cosine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from finetooth.base import bits
from finetooth.delta import Delta, DeltaError
from finetooth.moves import Given, Step, described, largest, named, opened, rewritten, walk
from finetooth.rule import check_keep


@dataclass(frozen=True)
class Contrast:
    """Counts of entries of one tensor, or of all: what only the first changes, only the second, both alike, both otherwise."""

    name: str
    first: int
    second: int
    same: int
    different: int
    products: tuple[float, float, float] | None = None  # <a, a>, <b, b>, <a, b> of the differences to the base

    @property
    def cosine(self) -> float | None:
        """Of the two differences to the base; None without the base, or if one of them is zero."""
        if self.products is None or not self.products[0] * self.products[1]:
            return None
        a, b, ab = self.products
        return ab / math.sqrt(a * b)

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return {**{k: v for k, v in asdict(self).items() if k != "products"}, "cosine": self.cosine}


def contrast(first: Given, second: Given, base: Any = None) -> list[Contrast]:
    """What two deltas of the same base have in common, tensor by tensor; `together` adds it up.

    Raises DeltaError if they do not have the same base, or `base` is another one.
    """
    return [_compared(step) for step in walk(opened([first, second]), base)]


def together(found: Iterable[Contrast]) -> Contrast:
    """All tensors as one."""
    every = list(found)
    sums = {k: sum(getattr(x, k) for x in every) for k in ("first", "second", "same", "different")}
    known = [x.products for x in every if x.products is not None]
    aa, bb, ab = (sum(p[i] for p in known) for i in range(3))
    return Contrast("all", **sums, products=(aa, bb, ab) if known else None)


def _compared(step: Step) -> Contrast:
    a, b = step.moves
    empty = torch.empty(0, dtype=torch.int64)
    ours, its = (empty if m is None else m.index for m in (a, b))
    shared = torch.isin(ours, its)
    both, same = int(shared.count_nonzero()), 0
    if a is not None and b is not None:
        same = int((bits(a.new)[shared] == bits(b.new)[torch.isin(its, ours)]).count_nonzero())
    products = None
    if step.tensor is not None:
        x, y = (empty.double() if m is None else m.difference().double() for m in (a, b))
        dot = float(x[shared] @ y[torch.isin(its, ours)]) if both else 0.0
        products = (float(x @ x), float(y @ y), dot)
    return Contrast(step.name, len(ours) - both, len(its) - both, same, both - same, products)


def trim(delta: Given, base: Any, keep: float | int = 0.5, by: Literal["file", "tensor"] = "file") -> Delta:
    """The delta with its largest changes only, by |new - base|; the other entries are the base's again.

    Args:
        keep: a share (float) of the entries that the delta changes, or how many (int).
        by: "file": of all tensors together; "tensor": of each.

    Equal changes: the earlier tensor in the order of names stays, then the smaller index. Raises DeltaError if `base` is
    another one, `keep` is out of range, or the delta is an inverse.
    """
    if by not in ("file", "tensor"):
        raise DeltaError(f"by={by!r} is unknown: choose file or tensor.")
    try:
        check_keep(keep, "keep")
    except ValueError as e:
        raise DeltaError(str(e)) from e
    if keep == 0:
        raise DeltaError("keep=0 leaves nothing of the delta: that is the base.")
    (whole,) = found = opened([delta])
    sizes: dict[str, Tensor] = {}
    for step in walk(found, base):
        if step.moves[0] is not None:
            sizes[step.name] = step.moves[0].difference().abs()
    kept, changes = largest(sizes, keep, by), {}
    for step in walk(found, base, check=False):
        move = step.moves[0]
        assert move is not None and step.tensor is not None
        left = move.only(kept[step.name])
        change = rewritten(step.name, step.tensor, left.index, left.new)
        if change is not None:
            changes[step.name] = change
    recipe = {"trim": {"keep": keep, "by": by, "of": described(whole, named(delta))}}
    return Delta(changes, whole.tied, whole.base, whole.method, recipe)
