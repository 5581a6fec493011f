"""The part of the optimizer that chooses: it applies the rule, keeps state and gradients in step with it, and proves nothing moved.

    start: select -> origins -> (quantize the rest) -> fingerprints -> noise in, hooks in
    later: select -> migrate state -> hooks again

A compact selection that needs no gradient is made between two steps, so that the next backward computes what will be used and
nothing else; one that reads the gradient is made within its step, which has dense gradients for it. `optim.py` has the update.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import pieces, shards
from finetooth.anatomy import Part
from finetooth.checks import check_finite, check_shards
from finetooth.gradients import Follow, Gradients, LeftByDDP, remove_gradients, take_out
from finetooth.kernels import reference
from finetooth.linear import Chosen, structured
from finetooth.noise import Noise, remove_noise
from finetooth.rest import Rest, quantize_
from finetooth.rule import Rule
from finetooth.selection import Selection, select
from finetooth.slot import Rounding, Slot
from finetooth.state import SavedOptimizer
from finetooth.units import WHOLE
from finetooth.weight import Lazy, Unavailable, Weight
from finetooth.when import When, once


class ChoosingOptimizer(SavedOptimizer):
    """What `SelectiveAdamW` chooses, apart from how it steps."""

    rule: Rule | None
    when: When
    rest: Rest
    _compact: bool
    _mask: str
    _rounding: str
    _masters: bool  # float32 copies of what is chosen of low-precision weights; without, the weight itself is rounded
    _to_base: bool
    _model: nn.Module | None
    _parts: dict[str, Part]
    _route: str
    _backend: str
    _moments: str
    _turns = 0  # selections made so far, and the step that the last one was made for
    _made_for = -1
    _ours: tuple[str, ...] = ()  # whose gradients are averaged over ranks here, because which need one changes
    _left: LeftByDDP | None = None  # these, of which one stays with DDP, as it refuses a model without any
    _noise: Noise | None = None
    _gradients: Gradients | None = None

    @property
    def gathers(self) -> bool:
        """Whether gradients are gathered, now or after the first selection, instead of left in `p.grad`."""
        return self._compact and self._route != "dense" and self.rule is not None and structured(self.rule.unit)

    @torch.no_grad()
    def _start(self, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._attached = dict[str, Any]()  # what is in the model for as long as the optimizer lives; each can `remove`
        weakref.finalize(self, take_out, self._attached)
        self._check_weights()
        if self._model is not None:
            remove_noise(self._model)  # of an earlier optimizer
            remove_gradients(self._model)
            if shards.world() > 1:
                self._attached["follow"] = self._model.register_forward_pre_hook(Follow(self))
        for p in self._others.values():
            if p is not None:
                p.requires_grad_(False)
        for p in self._parameters().values():
            p.requires_grad_(True)
        if self._compact and self.when(0):
            grads = {n: partial(s.__getitem__, "grad") for n, s in stats.items() if "grad" in s}
            if not self._ahead(grads, stats) and (stats or self.rest.kind in ("noise", "quantized")):
                self._select_compact(
                    grads, stats
                )  # says what it misses; without calibration the first step's gradient will do
        if self.rule is None:
            for name, p in self._live().items():
                self._slots[name].selection = Selection.whole(tuple(p.shape), p.device)
            self._count_chosen()
        if self._model is not None and self._compact and self.when is not once:
            self._ours = tuple(self._slots)
            self._attached["ddp"] = self._left = LeftByDDP(self._model, self._ours)
        self._rewrote_base = self.rest.kind == "quantized"
        self._take_origins()
        if self._rewrote_base:
            for name, selection in self.selections().items():
                p = self._parameter(name)
                rounded = shards.whole(
                    p
                )  # its own copy where it is sharded: a step belongs to a row, wherever its columns are
                quantize_(rounded, selection, self.rest.bits)
                if name in self._cuts:
                    shards.local(p).copy_(pieces.rows(rounded, self._cuts[name]))
        self._take_prints()
        if self._to_base and not self._knows_bases():
            raise ValueError('decay_to="base" needs the pretrained values of what trains: give base=.')

    def _check_weights(self) -> None:
        known = {n: p for n, p in [*self._parameters().items(), *self._others.items()] if p is not None}
        check_finite(known, bool(self._cuts))

    def _live(self) -> dict[str, Tensor]:
        self._adopt()
        return super()._live()

    def _adopt(self) -> None:
        """Follow parameters that were sharded after the optimizer was built: accelerate swaps them in `param_groups`."""
        held = self._parameters()
        if self._cuts or not any(shards.sharded(p) for p in held.values()):
            return
        if self._model is None or (self._gradients is not None and "follow" not in self._attached):
            raise RuntimeError(
                "the parameters were sharded after the optimizer was built: give it model= and build it when there is a process group "
                "(after Accelerator() or init_process_group), or build it after sharding."
            )
        check_shards(held, self._moments)
        one = next(iter(held.values()))
        names = {name: tuple(p.shape) for name, p in [*held.items(), *self._others.items()] if p is not None}
        self._cuts = {name: shards.like(shape, one) for name, shape in names.items()}
        self._others = dict.fromkeys(self._others)  # the model has others by now, and these would be kept alive
        for name, slot in self._slots.items():
            state = pieces.cut_state(slot.state(), self._cuts[name], self._compact)
            self._slots[name] = Slot.restore(name, state, shards.local(held[name]).device, slot.kind)
        self._count_chosen()
        if self._gradients is not None:
            self._gather()

    def _resharded(self, name: str) -> Tensor:
        assert self._model is not None  # _adopt has asked
        shards.reshard(self._model)
        return self._model.get_parameter(name)

    def _remembers(self, slot: Slot) -> bool:
        if self.rest.kind == "reset" or not self._compact or self.rule is None:
            return self.rest.kind == "reset"
        return self._base is None or self.rule.unit.kind not in WHOLE or self._to_base

    def _never_trains(self, slot: Slot) -> bool:
        return self.when is once and super()._never_trains(slot)

    def _knows_bases(self) -> bool:
        return self._base is not None or all(self._remembers(slot) for slot in self._slots.values())

    def _select_compact(self, grads: Mapping[str, Lazy], stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Select, and let the state follow; the first selection also settles what will never train."""
        assert self.rule is not None
        live = self._live()
        weights = (self._weight(n, p, grads.get(n), stats.get(n)) for n, p in live.items())  # let go of pool by pool
        found = {name: self._here(name, selection) for name, selection in select(self.rule, weights).items()}
        if self.rest.kind != "reset":  # there, what rests is the base
            self._renew_rests(found)
        for name, here in found.items():
            slot = self._slots[name]
            slot.follow(here, live[name], self.rest.kind == "reset", self._remembers(slot), self._masters)
            slot.window = None
        self._count_chosen()
        self._turns, self._made_for = self._turns + 1, self.steps
        if not self._selected():
            why = " Every unit holds an excluded entry: choose a smaller unit." if self.rule.exclude else ""
            raise ValueError(
                f"keep={self.rule.keep} selects nothing in {len(found)} tensors: nothing would train.{why}"
            )
        self._settle()
        self._gather()

    def _ahead(self, grads: Mapping[str, Lazy], stats: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Select for the step to come; False for a score that reads a gradient which is not known before that step."""
        try:
            self._select_compact(grads, stats)
        except Unavailable:
            return False
        return True

    def _between(self) -> None:
        """After a step: the next selection if it is due and can be made now, and gradients in the form the next step needs."""
        if self._compact and self.rule is not None:
            if self._selects():
                self._ahead({}, {})
            self._ask_for_gradients()
        if self._gradients is not None:
            self._gradients.clear()
            self._gradients.pause(self._needs_all())

    def _ask_for_gradients(self) -> None:
        """Tensors without a chosen unit compute no gradient, but for a step that looks at all of them."""
        needed, waited_for = self._needs_all(), self._left.stays if self._left and shards.world() > 1 else None
        for name, p in self._parameters().items():
            if p.requires_grad != (wanted := needed or self._slots[name].chosen > 0 or name == waited_for):
                p.requires_grad_(wanted)

    def _settle(self) -> None:
        """What a selection settles: which tensors compute gradients, and where noise goes in."""
        self._ask_for_gradients()
        if self.rest.kind == "noise":
            assert self._model is not None
            forwards = self._noise.forwards if self._noise else 0
            columns = {n: s for n, s in self.selections().items() if len(s) < s.unit.count(s.shape)}
            self._noise = Noise(self._model, columns, self.rest.bits, self.seed, self._backend)
            self._noise.forwards = forwards
            self._attached["noise"] = self._noise

    def _gather(self) -> None:
        """Gather the gradients of what is chosen, where that is worth it; dense at a step that selects by them."""
        selections = {n: s for n, s in self._held().items() if self._slots[n].chosen}
        if self._route == "dense" or not self._compact or not selections:
            return
        before = dict[str, Chosen]()
        if self._gradients is not None:
            before = self._gradients.chosen
            self._gradients.remove()
        parameters, sharded = self._parameters(), bool(self._cuts)
        self._gradients = Gradients(self._model, parameters, selections, self._route, self._backend, before, sharded)
        self._gradients.pause(self._needs_all())
        self._attached["gradients"] = self._gradients

    def _needs_all(self) -> bool:
        """Whether the present step looks at the gradients of what is not chosen."""
        return self._selects()

    def _selects(self) -> bool:
        """Whether the present step makes a selection."""
        return self.rule is not None and self.when(self.steps) and not (self._compact and self._made_for == self.steps)

    # -- what a step asks -------------------------------------------------------------------------

    def _selected(self) -> bool:
        return any(slot.chosen for slot in self._slots.values())

    def _target(self, name: str) -> Tensor | None:
        """Where weight decay pulls to: None for zero."""
        if not self._to_base:
            return None
        base = self._pretrained(name)
        assert base is not None  # _start has asked
        return base.float()

    @contextmanager
    def _kept(self, live: Mapping[str, Tensor]) -> Iterator[None]:
        """What is excluded has its values again after the block: where gradients are masked, decay moves every weight."""
        exclude = self.rule.exclude if self.rule is not None else {}
        places = {n: exclude[n].to(p.device, torch.int64) for n, p in live.items() if n in exclude}
        aside = {n: live[n].detach().view(-1)[at] for n, at in places.items()}
        yield
        for n, values in aside.items():
            live[n].detach().view(-1)[places[n]] = values

    def _how(self, name: str) -> Rounding:
        """How this step writes a tensor of low precision: from a master to nearest, else as asked, or without bias."""
        nearest = self._rounding == "nearest" or (self._compact and self._masters)
        place = (name, self._cuts[name].start) if name in self._cuts and self._cuts[name].start else (name,)
        return Rounding(self._backend, None if nearest else reference.key(self.seed, "round", *place, self.steps))

    def _weight(
        self,
        name: str,
        p: Tensor,
        grad: Lazy,
        stats: Mapping[str, Tensor] | None = None,
        proposed: Callable[[str], Tensor] | None = None,
        base: Callable[[str], Tensor] | None = None,
    ) -> Weight:
        part, slot, cut = self._parts[name], self._slots[name], self._cuts.get(name)
        assert self.rule is not None

        def turn(x: Tensor) -> Tensor:
            seen = x if cut is None else shards.local(x) if self._by_entry else self._assembled(x)
            return seen.transpose(-1, -2) if part.transposed else seen

        as_is = cut is None or self._by_entry
        return Weight(
            name,
            turn(p.detach()) if as_is else lambda: turn(p.detach()),
            grad=None if grad is None else lambda: turn(_read(grad)),
            base=lambda: turn((base or self._known)(name)),
            proposed=None if proposed is None else lambda: turn(proposed(name)),
            stats=stats,
            squares=(lambda: turn(stats["grad_square"])) if stats and "grad_square" in stats else None,
            window=(lambda: turn(slot.seen_window(p))) if slot.window is not None else None,
            chosen=None if slot.selection is None else lambda s=slot.selection: turn(s.mask()),  # type: ignore[misc]
            seed=self.seed,
            step=self.steps,
            turn=self._turns,
            unit=self.rule.unit,
            transposed=bool(part.transposed),
            cut=cut,
            whole=not as_is,
        )

    @property
    def _by_entry(self) -> bool:
        """Whether scores of sharded tensors are computed on what each rank holds; else on whole tensors, one at a time."""
        return (
            self.rule is not None and self.rule.unit.kind == "element" and getattr(self.rule.score, "by_entry", False)
        )

    def _assembled(self, x: Tensor) -> Tensor:
        return shards.whole(x) if shards.sharded(x) else shards.joined(x)

    def _here(self, name: str, found: Selection) -> Selection:
        """What this rank holds of what `select` found."""
        return found if self._by_entry else pieces.mine(found, self._cuts.get(name))

    def _known(self, name: str) -> Tensor:
        base = self._pretrained(name)
        if base is None:
            raise Unavailable(f"the score reads w.base, and the pretrained value of {name!r} is not held: give base=.")
        return base

    def _choices(self) -> dict[str, Any]:
        rule, rest = self.rule, self.rest
        return {
            "unit": "all" if rule is None else str(rule.unit),
            "state": "compact" if self._compact else "dense",
            "mask": self._mask,
            "rest": f"{rest.kind}({rest.bits}, {rest.zero_moments})",
            "rounding": self._rounding,
            "moments": self._moments,
            "exclude": None if rule is None else rule.excluded(),
        }

    def _extra_state(self) -> dict[str, Any]:
        forwards = self._noise.forwards if self._noise else 0
        return {"forwards": forwards, "turns": self._turns, "made_for": self._made_for}

    def _load_extra_state(self, extra: dict[str, Any]) -> None:
        self._turns, self._made_for = extra.get("turns", 1), extra.get("made_for", 0)
        if self._selected():
            self._settle()
            self._gather()
        if self._noise:
            self._noise.forwards = extra["forwards"]


def _read(lazy: Lazy) -> Tensor:
    found = lazy() if callable(lazy) and not isinstance(lazy, Tensor) else lazy
    assert isinstance(found, Tensor)
    return found
