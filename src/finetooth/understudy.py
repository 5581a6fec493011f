"""The optimizer of a rehearsal: the real one on tensors without values, to count bytes.

Calibration, gradients and state are those of a real run: the same code, on torch's fake tensors. Two things need values
and are replaced. *Which* entries are chosen is: a rule says how many, so the first k
stand for them; whole matrices of a random row are the ones that will be drawn. And the optimizer's *step*: its kernels
update in place, so what counts is what it holds beside them (`Understudy.spend`), line by line as in `optim.py`.

Where a pool has several tensors and the values decide how its budget falls on them, it is spread evenly, the rest on the
largest; whole matrices are then the largest that the budget allows. `exact` is False in that case.

Not covered: state that grows when a compact row chooses again (units that came and went, ages of each), and the noise of
layers other than `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from finetooth import linear, scores
from finetooth.base import Replaced
from finetooth.meter import unique_bytes
from finetooth.optim import SelectiveAdamW
from finetooth.rest import frozen
from finetooth.rule import Rule
from finetooth.selection import Selection, group_of, select
from finetooth.slot import Slot
from finetooth.units import WHOLE, Unit
from finetooth.weight import Unavailable, Weight
from finetooth.when import once

Stored = dict[str, tuple[tuple[int, ...], Unit]]  # shape and unit in storage, by parameter name


def counted(rule: Rule, stored: Stored, seed: int) -> tuple[dict[str, int], bool]:
    """How many units of every tensor are chosen, and whether that is certain before any value is known.

    >>> counted(Rule(scores.magnitude, keep=0.25), {"a": ((2, 4), Unit()), "b": ((2, 2), Unit())}, 0)
    ({'a': 2, 'b': 1}, True)
    """
    pools: dict[str, list[str]] = {}
    for name in stored:
        pools.setdefault(rule.pool(name), []).append(name)
    if rule.unit.kind in WHOLE:
        return _whole(rule, stored, pools, seed)
    units = {name: unit.count(shape) for name, (shape, unit) in stored.items()}
    budgets = rule.budgets({pool: sum(units[n] for n in names) for pool, names in pools.items()}, seed)
    out = dict[str, int]()
    for pool, names in pools.items():
        total, left = sum(units[n] for n in names), budgets[pool]
        for i, name in enumerate(sorted(names, key=lambda n: units[n])):
            out[name] = left if i == len(names) - 1 else min(left, round(budgets[pool] * units[name] / max(total, 1)))
            left -= out[name]
    return out, all(len(names) == 1 or budgets[p] in (0, sum(units[n] for n in names)) for p, names in pools.items())


def _whole(rule: Rule, stored: Stored, pools: dict[str, list[str]], seed: int) -> tuple[dict[str, int], bool]:
    if getattr(rule.score, "blind", False):  # the real choice, on tensors that take no memory
        known = [_weight(rule, name, shape, seed) for name, (shape, _) in stored.items()]
        return {name: len(s) for name, s in select(rule, known).items()}, True
    groups: dict[str, dict[str, int]] = {pool: {} for pool in pools}
    for pool, names in pools.items():
        for name in names:
            group = group_of(rule.unit, name)
            groups[pool][group] = groups[pool].get(group, 0) + torch.Size(stored[name][0]).numel()
    budgets = rule.budgets({pool: len(sizes) for pool, sizes in groups.items()}, seed)
    kept = {g for pool, sizes in groups.items() for g in sorted(sizes, key=lambda g: -sizes[g])[: budgets[pool]]}
    alike = all(len(set(s.values())) <= 1 or budgets[p] in (0, len(s)) for p, s in groups.items())
    return {name: int(group_of(rule.unit, name) in kept) for name in stored}, alike


def _weight(rule: Rule, name: str, shape: tuple[int, ...], seed: int) -> Weight:
    return Weight(name, torch.zeros(()).expand(shape), seed=seed, unit=rule.unit)


class Understudy(SelectiveAdamW):
    """The optimizer of a plan: it selects by counting, and takes no fingerprints. Built and used under fake tensors."""

    exact = True

    def _start(self, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._kind, self._slots = self.rest.kind, {n: _Slot(n, kind=s.kind) for n, s in self._slots.items()}
        if self._kind in ("noise", "quantized"):  # made of values: noise has a stand-in, rounding changes no size
            self.rest = frozen()
        if self.rule is not None:
            stored = {n: self._weight(n, p, None).stored for n, p in self._parameters().items()}
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                self._units, self.exact = counted(self.rule, stored, self.seed)
        super()._start(stats)

    def _check_weights(self) -> None:
        """There are no values."""

    def _take_origins(self) -> None:
        """Values are compared there."""

    def _take_prints(self) -> None:
        """And hashed here."""

    def _selection(self, name: str, w: Weight) -> Selection:
        shape, unit = w.stored
        dtype = torch.int32 if unit.count(shape) < 2**31 else torch.int64
        return Selection(torch.zeros(self._units[name], dtype=dtype, device=w.value.device), unit, shape)

    def _select_compact(self, grads: Mapping[str, Any], stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        """As the real one, but that a score is only asked what memory it takes."""
        assert self.rule is not None
        live, found = self._parameters(), dict[str, Selection]()
        for names in self._pools(live):
            weights = [self._weight(n, live[n], grads.get(n), stats.get(n)) for n in names]
            if self.rule.unit.kind not in WHOLE or not all(self._units[n] for n in names):
                self._rank(weights)
            found |= {w.name: self._selection(w.name, w) for w in weights}
            del weights
        for name, new in found.items():
            slot = self._slots[name]
            slot.follow(new, live[name], self.rest.kind == "reset", self._remembers(slot), self._masters)
        self._turns, self._made_for = self._turns + 1, self.steps
        self._settle()
        self._gather()

    def _pools(self, names: Iterable[str]) -> list[list[str]]:
        assert self.rule is not None
        pools: dict[str, list[str]] = {}
        for name in names:
            pools.setdefault(self.rule.pool(name), []).append(name)
        return list(pools.values())

    def _rank(self, weights: list[Weight]) -> None:
        """Scores in a row, then positions as int64: those above the cut, all that are chosen, these sorted with their order."""
        assert self.rule is not None
        found = [_score(self.rule, w) for w in weights]
        flat = found[0] if len(found) == 1 else torch.cat([f.flatten() for f in found])
        k = sum(self._units[w.name] for w in weights)
        held = [torch.zeros(k, dtype=torch.int64, device=flat.device) for _ in range(4)]
        del held

    def _settle(self) -> None:
        """Noise is drawn by a stand-in: the real one counts forwards, which takes values."""
        super()._settle()
        if self._kind != "noise":
            return
        assert self._model is not None
        for name, selection in self.selections().items():
            module = self._model.get_submodule(name.removesuffix(".weight"))
            if isinstance(module, torch.nn.Linear) and len(selection) < selection.unit.count(selection.shape):
                linear.attach(module, getattr(module, "chosen", None), _Noise(name, module.weight))

    def _watches(self) -> bool:
        """The second step stands for those of a window."""
        return self.rule is not None and self.rule.exchange is not None and self._compact and self.steps == 1

    def chosen(self) -> dict[str, int]:
        """How many entries of every tensor are chosen at a step."""
        live = self._parameters()
        if self.rule is None:
            return {n: p.numel() for n, p in live.items()}
        units = {n: self._weight(n, p, None).stored for n, p in live.items()}
        return {n: self._units[n] * unit.numel(shape) for n, (shape, unit) in units.items()}

    def planned_state(self, names: Iterable[str] | None = None) -> int:
        """Bytes of the state between steps, as `state_bytes` counts them; of some tensors or of all."""
        slots = [slot for name, slot in self._slots.items() if names is None or name in names]
        return unique_bytes(t for slot in slots for t in slot.tensors())

    def gathered(self) -> dict[str, Tensor]:
        """The gradients that a step would find."""
        return self._collected()

    def selection_of(self, name: str) -> Selection | None:
        """What is chosen of a tensor."""
        return self._slots[name].seen(tuple(self._parameter(name).shape))

    def changes_everything(self) -> bool:
        """Whether any entry may end with another value, not only what is chosen last."""
        return (not self._compact or self.when is not once) and self._kind != "reset"

    def remarks(self) -> list[str]:
        """What the numbers leave open."""
        out = []
        if not self.exact:
            out.append("which tensors the chosen units lie in depends on the values: spread evenly here.")
        if self._compact and self.when is not once:
            out.append("the state is that of the first selection: what later ones add is not counted.")
        return out

    # -- a step ---------------------------------------------------------------------------------------

    def spend(self, grads: Mapping[str, Tensor]) -> None:
        """Make what a step keeps, and what it holds for a moment, as `optim.py` does; gradients stay the caller's."""
        live = {n: p for n, p in self._parameters().items() if n in grads}
        with torch.no_grad():
            if self._compact:
                self._spend_compact(live, grads)
            elif self._mask == "update" and self.rule is not None and not self._by_threshold():
                self._spend_update(live, grads)
            else:
                self._spend_dense(live, grads)
        self.steps += 1
        if self._gradients is not None:
            self._gradients.pause(self._needs_all())

    def _open(self, name: str) -> None:
        """Moments in eight bits are float32 for the length of an update."""
        slot = self._slots[name]
        if slot.kind != "fp32":
            held = [torch.zeros(torch.Size(m.shape)) for m in (slot.exp_avg, slot.exp_avg_sq) if m is not None]
            del held

    def _spend_compact(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        """Gradients of the chosen entries, where none are gathered; of one tensor what AdamW works on."""
        if not self._selected():
            self._select_compact(grads, {})
        if self._watches():
            for slot in self._slots.values():
                if (s := slot.selection) is not None:
                    sums = torch.zeros((len(s), s.unit.numel(s.shape)), device=s.index.device)
                    slot.window = Replaced(s.unit, s.shape, s.index.clone(), sums)
        paused = self._gradients is None or self._gradients.paused
        gathered = {} if paused or self._gradients is None else self._gradients.chosen
        chosen = {n: s for n in live if (s := self._slots[n].selection) is not None and len(s)}
        as_is = {n for n, s in chosen.items() if n in gathered or s.unit.kind in WHOLE}
        used = {n: grads[n] if n in as_is else s.gather(grads[n]) for n, s in chosen.items()}
        for name, s in chosen.items():
            self._open(name)
            if s.unit.kind not in ("element", *WHOLE):
                held = [torch.zeros_like(used[name], dtype=torch.float32) for _ in range(2)]  # values, and a root
                del held

    def _spend_dense(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        """Fused: moments, and flags where a threshold decides; a base tensor where decay pulls there."""
        for name, p in live.items():
            slot = self._slots[name]
            if self._by_threshold():
                slot.start_bits(p)
            elif self.rule is not None:
                slot.selection = self._selection(name, self._weight(name, p, None))
                grads[name].masked_fill(slot.selection.mask(), 0.0)
            slot.start_dense(p)
            self._open(name)
            if self._to_base:
                held = [p.float(), torch.empty_like(p, dtype=torch.float32).zero_(), grads[name].float()]
                del held

    def _spend_update(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        """Pool by pool: proposals and bases, the scores of all entries, positions; then writing."""
        assert self.rule is not None
        for names in self._pools(live):
            proposals, bases = dict[str, Tensor](), dict[str, Tensor]()
            for name in names:
                p = live[name]
                proposals[name] = p.detach().clone() if p.dtype == torch.float32 else p.detach().float()
                self._slots[name].start_dense(p)
                self._open(name)
                bases[name] = self._known(name)
            to, of = proposals.__getitem__, bases.__getitem__
            self._rank([self._weight(n, live[n], grads[n], proposed=to, base=of) for n in names])
            for name in names:
                p = live[name]
                new, selection = proposals[name].to(p.dtype), self._selection(name, self._weight(name, p, None))
                base = bases[name] if self.rest.kind == "reset" else None
                self._slots[name].write(p, new, selection, base, self.rest.zero_moments)
                del proposals[name], bases[name], base, new, selection


def _score(rule: Rule, w: Weight) -> Tensor:
    """A score's memory; where it needs values (a compiled kernel), that of two float32 copies of the weight."""
    if rule.score in (scores.random, scores.grown):  # hashed in small pieces: thousands of them for a large model
        shape, unit = w.stored
        return torch.zeros(unit.count(shape), device=w.value.device)
    with suppress(Unavailable):
        _ = w.grad  # it may have to be measured, which is counted too
    try:
        return rule.score(w).float()
    except RuntimeError:
        copy = w.value.to(torch.float32, copy=True)
        return torch.zeros_like(copy)


class _Slot(Slot):
    """A slot whose flags have no values: what kernels would make of them is made by count."""

    def seen(self, shape: tuple[int, ...]) -> Selection | None:
        """As many positions as base values are held."""
        if self.selection is not None or self.held is None:
            return self.selection
        return Selection(self.held.new_zeros(self.held.numel(), dtype=torch.int32), Unit(), shape)

    def _hold(self, selection: Selection, base: Tensor) -> None:
        if selection.unit != Unit():
            super()._hold(selection, base)
            return
        self.selection, self.held = None, selection.gather(base).view(-1)
        self.bits = base.new_zeros((base.numel() + 7) // 8, dtype=torch.uint8)


class _Noise:
    """What `linear.py` asks of a layer's noise."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.backend = name, "auto"
        self.half_step = weight.new_zeros((weight.shape[0], 1), dtype=torch.float32)
        self.kept = weight.new_zeros(weight.shape[1], dtype=torch.bool)
        self.number = weight.new_zeros((), dtype=torch.int64)

    def draw(self) -> tuple[Tensor, Tensor, Tensor, int, str, None]:
        """As `LayerNoise.draw`."""
        return self.half_step, self.kept, self.number, 0, self.name, None
