"""Where deltas of one base get in each other's way, before they are merged.

    overlap     entries that more than one delta changes
    share       overlap / entries that any of them changes
    opposed     entries of the overlap that one delta moves up and another down; needs the base's values

Counted by tensor and added up by layer. Without the base, entries of listed units count as changed (a file that lists rows
does not say which entries of a row moved), so that overlap is an upper bound; the report says which of the two it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from finetooth.moves import Given, Step, opened, walk
from finetooth.rule import layer


@dataclass(frozen=True)
class Overlap:
    """Counts of entries, of a tensor, a layer or all; `opposed` is None without the base."""

    name: str
    changed: int
    overlap: int
    opposed: int | None

    @property
    def share(self) -> float:
        """overlap / changed"""
        return self.overlap / self.changed if self.changed else 0.0


@dataclass(frozen=True)
class Conflicts:
    """What `conflicts` found: `total`, and the same by tensor and by layer."""

    tensors: tuple[Overlap, ...]
    exact: bool  # counted are entries whose bits change; False: entries that are listed

    @property
    def total(self) -> Overlap:
        """Everything together."""
        return _added("all", self.tensors)

    @property
    def layers(self) -> tuple[Overlap, ...]:
        """By layer; what lies outside the blocks goes by its own name."""
        groups: dict[str, list[Overlap]] = {}
        for t in self.tensors:
            groups.setdefault(layer(t.name) or t.name, []).append(t)
        return tuple(_added(name, found) for name, found in groups.items())

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        total, counted = self.total, "changed" if self.exact else "listed"
        return {
            "counted": counted,
            **{k: v for k, v in _plain(total).items() if k != "name"},
            "layers": [_plain(x) for x in self.layers],
            "tensors": [_plain(x) for x in self.tensors],
        }


def conflicts(deltas: Sequence[Given], base: Any = None) -> Conflicts:
    """Count what several deltas of one base change in common, and where they pull apart.

    Args:
        deltas: `Delta`s, or what `Delta.load` takes.
        base: where the base's values can be read; without it nothing is known of signs, and listed entries are counted.

    Raises DeltaError if the deltas do not have the same base, or `base` is another one.
    """
    found = opened(deltas, 2)
    return Conflicts(tuple(_counted(step) for step in walk(found, base)), base is not None)


def _counted(step: Step) -> Overlap:
    moves = [m for m in step.moves if m is not None]
    index, times = torch.unique(torch.cat([m.index for m in moves]), return_counts=True)
    shared = times > 1
    if step.tensor is None:
        return Overlap(step.name, len(index), int(shared.count_nonzero()), None)
    up, down = (torch.zeros(len(index), dtype=torch.bool) for _ in range(2))
    for m in moves:
        at, sign = torch.searchsorted(index, m.index), m.difference().sign()
        up[at] |= sign > 0
        down[at] |= sign < 0
    return Overlap(step.name, len(index), int(shared.count_nonzero()), int((up & down).count_nonzero()))


def _added(name: str, found: Sequence[Overlap]) -> Overlap:
    signs = [x.opposed for x in found if x.opposed is not None]
    opposed = sum(signs) if len(signs) == len(found) else None
    return Overlap(name, sum(x.changed for x in found), sum(x.overlap for x in found), opposed)


def _plain(x: Overlap) -> dict[str, Any]:
    return {**asdict(x), "share": x.share}
