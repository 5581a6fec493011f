"""How far a selection has moved: how much of it left since it was last looked at, and how much of the first is still chosen.

    left = share of what was chosen at the line before that is not chosen now
    kept = share of what was chosen first that is chosen now

Counts are exact. The shares are those of a sample: some chosen units of every tensor, weighted by the entries chosen in it. Keeping the
first selection whole would be a copy of every index, and comparing two of them a sort; a sample is a few thousand look-ups.

Not covered: sharded parameters, of which a rank holds some rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetooth.kernels import reference
from finetooth.optim import SelectiveAdamW
from finetooth.slot import Slot

SAMPLE, LEAST = (
    16_384,
    64,
)  # units followed in the whole model, and in one tensor: a share of them is off by 0.4 % (one deviation)
TRIES = 32  # places that are looked at for each unit wanted, where the choice is held as flags
_SET = torch.tensor([bin(byte).count("1") for byte in range(256)])


class Turnover:
    """Follows the selection of an optimizer."""

    def __init__(self, opt: SelectiveAdamW) -> None:
        self._opt = opt
        self._first, self._last = dict[str, Tensor](), dict[str, Tensor]()
        self._began, self._counts = dict[str, int](), dict[str, int]()

    def line(self, moves: bool = True) -> dict[str, Any]:
        """What there is to note now: the tensors whose count has changed, and what moved; `moves`: whether it ever can.

        The first line also has the size of every tensor, and the units that are followed from then on.
        """
        slots = self._opt.slots()
        now = {name: count(slot) for name, (slot, _) in slots.items()}
        out: dict[str, Any] = {"chosen": {n: k for n, k in now.items() if self._counts.get(n) != k}}
        samples = self._samples() if moves else {}
        if not self._counts:
            out["of"] = {name: _numel(shape) for name, (_, shape) in slots.items()}
            self._first, self._began = samples, now
            if moves:
                out["first"] = {name: ids.tolist() for name, ids in samples.items()}
        else:
            out["left"] = _rounded(1 - self._share(self._last, self._counts))
            out["kept"] = _rounded(self._share(self._first, self._began))
        self._last, self._counts = samples, now
        return out

    def go_on(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Continue behind these lines, the optimizer being as it was at the last."""
        if not lines:
            return
        for line in lines:
            self._counts |= line["chosen"]
        self._began, held = dict(lines[0]["chosen"]), lines[0].get("first", {})
        devices = {name: _device(slot) for name, (slot, _) in self._opt.slots().items()}
        self._first = {name: torch.tensor(ids, dtype=torch.int64, device=devices[name]) for name, ids in held.items()}
        self._last = self._samples() if held else {}

    def _samples(self) -> dict[str, Tensor]:
        slots = self._opt.slots()
        most = max(LEAST, SAMPLE // max(len(slots), 1))
        return {name: sample(slot, _numel(shape), most) for name, (slot, shape) in slots.items()}

    def _share(self, samples: Mapping[str, Tensor], counts: Mapping[str, int]) -> float:
        """The share of what was chosen then that is chosen now."""
        slots = self._opt.slots()
        known = [name for name, ids in samples.items() if len(ids)]
        if not known:
            return 0.0
        shares = torch.stack([holds(slots[name][0], samples[name]).double().mean().cpu() for name in known]).tolist()
        total = sum(counts[name] for name in known)
        held = sum(counts[name] * share for name, share in zip(known, shares, strict=True))
        return float(held / total)


def count(slot: Slot) -> int:
    """The number of entries chosen now."""
    if (bits := _flags(slot)) is None or slot.held is not None:
        return slot.chosen
    return int((torch.bincount(bits, minlength=256).cpu() * _SET).sum())


def sample(slot: Slot, numel: int, most: int) -> Tensor:
    """At most so many of the chosen units, spread over the tensor: sorted ids, int64. The same selection has the same sample."""
    if (bits := _flags(slot)) is not None:
        places = scattered(numel, TRIES * most, slot.name).to(bits.device)
        index = places[_set(bits, places)]
    elif slot.selection is not None:
        index = slot.selection.index
    else:
        return torch.empty(0, dtype=torch.int64)
    n = min(len(index), most)
    return index[torch.arange(n, device=index.device) * len(index) // max(n, 1)].long()


def holds(slot: Slot, ids: Tensor) -> Tensor:
    """Which of these units are chosen now."""
    if (bits := _flags(slot)) is not None:
        return _set(bits, ids)
    index = slot.selection.index if slot.selection is not None else ids[:0]
    if not len(index):
        return torch.zeros(len(ids), dtype=torch.bool)
    wanted = ids.to(index)
    return index[torch.searchsorted(index, wanted).clamp_max(len(index) - 1)] == wanted


def scattered(n: int, k: int, name: str) -> Tensor:
    """At most k places of n, one at random of each of k equal parts, so that no stride meets the same columns: sorted int64.

    >>> scattered(4, 9, "a").tolist()
    [0, 1, 2, 3]
    """
    k = min(n, k)
    edges = torch.arange(k + 1) * n // max(k, 1)
    widths = (edges[1:] - edges[:-1]).clamp_min(1)
    return edges[:-1] + (reference.hash64(edges[:-1], reference.key(0, "scattered", name)) >> 1).abs() % widths


def _flags(slot: Slot) -> Tensor | None:
    return slot.bits if slot.selection is None else None


def _set(bits: Tensor, places: Tensor) -> Tensor:
    return (bits[places >> 3] >> (places & 7).to(torch.uint8) & 1).bool()


def _device(slot: Slot) -> torch.device:
    return next((t.device for t in slot.tensors()), torch.device("cpu"))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _rounded(share: float) -> float:
    return round(share, 4)  # the sample does not know more
