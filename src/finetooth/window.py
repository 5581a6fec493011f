"""Gradients of what is not chosen, added up over a few steps for a selection that will grow by them (`rule.Exchange`).

In the first step of a window every tensor that takes part has its dense gradient, and of the units that are not chosen as many as
are chosen, those with the largest |g|, become candidates. Until the selection their gradients are added up: [k, unit_numel] float32
and k positions, so that what is held is of the size of what trains. The alternative, a dense sum for every weight, is of the model's.

The steps of a window have dense gradients of what takes part, all at once; the steps between windows have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from finetooth.base import Replaced
from finetooth.choosing import ChoosingOptimizer
from finetooth.gradients import averaged
from finetooth.scores import gradient
from finetooth.selection import Selection, among, select


class WatchingOptimizer(ChoosingOptimizer):
    """What `SelectiveAdamW` watches, apart from how it steps."""

    def _needs_all(self) -> bool:
        return super()._needs_all() or self._watches()

    def _watches(self) -> bool:
        """Whether the present step lies in a window."""
        exchange = None if self.rule is None else self.rule.exchange
        if exchange is None or not self._compact:
            return False
        return any(self.when(self.steps + ahead) for ahead in range(1, exchange.window + 1))

    def _watch(self, grads: Mapping[str, Tensor]) -> None:
        """Add this step's gradients to those of the window, which it may open."""
        assert self.rule is not None
        live = self._live()
        full = {n: grads[n] if n in grads else torch.zeros_like(p) for n, p in live.items()}
        if all(slot.window is None for slot in self._slots.values()):
            rule = replace(self.rule, score=among(gradient, False), exchange=None)
            weights = [self._weight(n, p, full[n]) for n, p in live.items()]
            for name, found in select(rule, weights).items():
                here = self._here(name, found)
                self._slots[name].window = Replaced(here.unit, here.shape, here.index, here.gather(full[name]).float())
            return
        for name, slot in self._slots.items():
            if (held := slot.window) is not None:
                held.values += Selection(held.index, held.unit, held.shape).gather(full[name]).float()

    def _averaged(self, dense: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same over all ranks, of tensors that DDP was told to leave; every rank must take part for every tensor."""
        live, routed = self._parameters(), self._gradients
        names = list(self._ours)
        if routed is not None:
            names = [n for n in names or routed.chosen if routed.paused or n not in routed.chosen]
        return dense if self._cuts else averaged(dense, {n: live[n] for n in names})
