"""The optimizer: one step order for every method, as an ordinary `torch.optim.Optimizer`.

    gradients finite? -> when? select -> migrate state -> gather -> clip -> AdamW -> scatter -> rest

Selection and update happen here, in `step`, after accumulation and unscaling; never in a hook. A method is
the choice of two words. `state`: "compact" keeps moments for the chosen units only, "dense" for all. `mask`
(dense only): "gradient" zeroes the gradient elsewhere, so that moments decide alone where a weight was not
chosen (GMT as it is run); "update" lets the moments see the whole gradient and writes chosen entries only.

Clipping is to the norm of the gradients that are used: of the masked gradient, of the gathered entries, or,
for mask="update", of all that the moments see. State is keyed by parameter name and lives in
`state_dict()["selective"]`, because torch casts whatever lies under `state[p]` to the parameter's dtype.

Low-precision weights: compact state holds float32 masters; dense updates are rounded stochastically, by a hash
of (seed, name, step, position). rounding="nearest" is an explicit choice.

Not covered: sharded parameters, sparse gradients, closures that are called more than once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetooth.anatomy import Part, guess, matching, survey, tied
from finetooth.checks import check_choice, check_named, check_parameter, check_parts, check_rates, check_together
from finetooth.guard import Guard
from finetooth.kernels import reference
from finetooth.named import NamedOptimizer
from finetooth.rest import Noise, Rest, frozen, quantize_, remove_noise
from finetooth.rule import Rule
from finetooth.selection import Selection, select, select_pools
from finetooth.slot import Slot
from finetooth.units import WHOLE
from finetooth.weight import Unavailable, Weight
from finetooth.when import When, once

State = Literal["compact", "dense"]
Mask = Literal["gradient", "update"]


class SelectiveAdamW(NamedOptimizer):
    """AdamW on the weights that a rule selects; every other weight is what `rest` says, bit for bit.

    Args:
        named_parameters: (name, parameter) pairs, as `model.named_parameters()` gives them.
        rule: what to select; None trains everything that takes part.
        when: at which steps (from 0) to select; `once` also freezes what was not chosen.
        rest: `frozen()`, `reset()`, `noise(bits)` or `quantized(bits)`.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; decay acts on selected entries only.
        decay_to: "zero", or "base" to pull towards the pretrained values.
        max_grad_norm: clip to this norm inside the step; None or 0 does not clip.
        stop_after: raise `NonFiniteError` after so many non-finite gradients in a row (RuntimeError: steps without any); such a step writes nothing.
        model: needed for `noise`, and to know layers by their class; without it names and shapes must do.
        stats: calibration statistics by parameter name (`probe.calibrate`).
        base: where the pretrained values can be read, so that no copy of whole matrices is kept.

    Raises ValueError for anything out of range, and if nothing would train.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        rule: Rule | None = None,
        when: When = once,
        rest: Rest | None = None,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_to: Literal["zero", "base"] = "zero",
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
        state: State = "compact",
        mask: Mask = "gradient",
        rounding: Literal["auto", "stochastic", "nearest"] = "auto",
        stop_after: int = 5,
        model: nn.Module | None = None,
        stats: Mapping[str, Mapping[str, Tensor]] | None = None,
        base: Any = None,
    ) -> None:
        given = check_named(named_parameters)
        check_rates(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        for word, value in (("state", state), ("mask", mask), ("rounding", rounding), ("decay_to", decay_to)):
            check_choice(word, value)
        check_together(rule, when, rest or frozen(), state, mask)
        self.rule, self.when, self.rest = rule, when, rest or frozen()
        self._guard = Guard(max_grad_norm or 0.0, stop_after)
        self._compact, self._mask, self._rounding = state == "compact" and rule is not None, mask, rounding
        self._masters = rounding == "auto"  # of compact state; the other two round the weight itself
        self._to_base, self._model = decay_to == "base", model
        self._noise: Noise | None = None
        self._parts: dict[str, Part] = survey(model) if model is not None else guess(given.items())
        names = matching(rule.targets if rule else "all", {n: self._parts[n] for n in given}, tied(model))
        check_parts(rule, self.rest, [self._parts[n] for n in names], model is not None)
        for name in names:
            check_parameter(name, given[name])
        others = {name: p for name, p in given.items() if name not in set(names)}
        rates = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([(n, given[n]) for n in names], others, base, rates)
        self.seed = seed
        self._start(stats or {})

    # -- building ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self._model is not None:
            remove_noise(self._model)  # of an earlier optimizer
        for p in self._others.values():
            p.requires_grad_(False)
        for p in self._parameters().values():
            p.requires_grad_(True)
        if self._compact and self.when(0):
            try:
                self._select_compact({n: s.get("grad") for n, s in stats.items()}, stats)
            except Unavailable:  # a score of gradients: the first step's will do, unless calibration was given
                if stats or self.rest.kind in ("noise", "quantized"):
                    raise
        if self.rule is None:
            for name, p in self._parameters().items():
                self._slots[name].selection = Selection.whole(tuple(p.shape), p.device)
        self._rewrote_base = self.rest.kind == "quantized"
        self._take_origins()
        if self._rewrote_base:
            for name, selection in self.selections().items():
                quantize_(self._parameter(name), selection, self.rest.bits)
        self._take_prints()
        if self._to_base and not self._knows_bases():
            raise ValueError('decay_to="base" needs the pretrained values of what trains: give base=.')

    def _remembers(self, slot: Slot) -> bool:
        if self.rest.kind == "reset" or not self._compact or self.rule is None:
            return self.rest.kind == "reset"
        return self._base is None or self.rule.unit.kind not in WHOLE or self._to_base

    def _never_trains(self, slot: Slot) -> bool:
        return self.when is once and super()._never_trains(slot)

    def _knows_bases(self) -> bool:
        return self._base is not None or all(self._remembers(slot) for slot in self._slots.values())

    def _select_compact(self, grads: Mapping[str, Tensor | None], stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Select, and let the state follow; the first selection also settles what will never train."""
        assert self.rule is not None
        live = self._parameters()
        found = select(self.rule, [self._weight(n, p, grads.get(n), stats.get(n)) for n, p in live.items()])
        if not any(s.numel for s in found.values()):
            raise ValueError(f"keep={self.rule.keep} selects nothing in {len(found)} tensors: nothing would train.")
        for name, selection in found.items():
            slot = self._slots[name]
            slot.follow(selection, live[name], self.rest.kind == "reset", self._remembers(slot), self._masters)
        self._settle()

    def _settle(self) -> None:
        """After a final selection: tensors without a chosen unit compute no gradient; noise goes in."""
        if self.when is not once:
            return
        for name, p in self._parameters().items():
            p.requires_grad_(self._slots[name].chosen > 0)
        if self.rest.kind == "noise":
            assert self._model is not None
            forwards = self._noise.forwards if self._noise else 0
            columns = {n: s for n, s in self.selections().items() if len(s) < s.unit.count(s.shape)}
            self._noise = Noise(self._model, columns, self.rest.bits, self.seed)
            self._noise.forwards = forwards
            weakref.finalize(self, self._noise.remove)

    # -- the step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimizer step; a non-finite gradient writes nothing and is counted in `skipped`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        live = {n: p for n, p in self._parameters().items() if p.grad is not None}
        grads = {n: p.grad for n, p in live.items() if p.grad is not None}
        if not self._guard.some(grads, next(iter(self._slots))):
            return loss
        self.skipped += 1  # until it is known to be used; so it stays if the guard raises
        if not self._guard.passes(grads):
            return loss
        self.skipped -= 1
        update = (
            self._step_compact
            if self._compact
            else self._step_update
            if self._selects_update()
            else self._step_gradient
        )
        update(live, grads)
        self.steps += 1
        return loss

    @property
    def grad_norm(self) -> float:
        """The norm, before clipping, of the gradients that the last step used."""
        return self._guard.norm

    def _selects_update(self) -> bool:
        return self._mask == "update" and self.rule is not None

    def _step_compact(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        if self.when(self.steps) and not (self.steps == 0 and self._selected()):
            unused = {n: torch.zeros_like(p) for n, p in self._parameters().items() if n not in grads}
            self._select_compact({**grads, **unused}, {})
            if self.when is once and not self.steps:
                self._take_prints()
        chosen = {n: s for n in live if (s := self._slots[n].selection) is not None and len(s)}
        gathered = {n: s.gather(grads[n]).float() for n, s in chosen.items()}
        scale, rates = self._guard.clip(gathered), self._rates()
        for name, g in gathered.items():
            self._slots[name].update(
                live[name], scale(g), rates[name], self._target(name), self._rounder(name, live[name])
            )

    def _step_gradient(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        if self.rule is not None and self.when(self.steps):
            found = select(self.rule, [self._weight(n, p, grads[n]) for n, p in live.items()])
            for name, selection in found.items():
                self._slots[name].selection = selection
        for name, g in grads.items():  # between two selections the last one holds; before the first, none does
            if self.rule is not None and (held := self._slots[name].selection) is not None:
                g.masked_fill_(~held.mask(), 0.0)
        scale, rates = self._guard.clip(grads), self._rates()
        for name, p in live.items():
            x = p.detach() if p.dtype == torch.float32 else p.detach().float()
            self._slots[name].update_dense(x, scale(grads[name]), rates[name], self._target(name))
            if x.dtype != p.dtype:
                p.copy_(self._rounded(name, x, p.dtype))

    def _step_update(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        """Dense moments, chosen entries written; pool by pool, so that one pool's proposals are alive."""
        assert self.rule is not None
        scale, rates, proposals = self._guard.clip(grads), self._rates(), dict[str, Tensor]()

        def propose(name: str) -> Tensor:
            if name not in proposals:
                x = live[name].detach().clone() if live[name].dtype == torch.float32 else live[name].detach().float()
                self._slots[name].update_dense(x, scale(grads[name]), rates[name], self._target(name))
                proposals[name] = x
            return proposals[name]

        if self.when(self.steps):
            weights = (self._weight(n, p, grads[n], proposed=propose) for n, p in live.items())
            for found in select_pools(self.rule, weights):
                for name, selection in found.items():
                    self._write(name, live[name], propose(name), selection)
                    del proposals[name]
        else:
            for name, p in live.items():
                self._write(name, p, propose(name), self._slots[name].selection)
                del proposals[name]

    def _write(self, name: str, p: Tensor, proposed: Tensor, selection: Selection | None) -> None:
        """Write the chosen entries of a proposal, and what `rest` says into the others."""
        new = proposed if p.dtype == torch.float32 else self._rounded(name, proposed, p.dtype)
        self._slots[name].write(p, new, selection, self.rest.kind == "reset", self.rest.zero_moments)

    # -- parts of a step ----------------------------------------------------------------------------

    def _selected(self) -> bool:
        return any(slot.chosen for slot in self._slots.values())

    def _target(self, name: str) -> Tensor | None:
        """Where weight decay pulls to: None for zero."""
        if not self._to_base:
            return None
        base = self._pretrained(name)
        assert base is not None  # _start has asked
        return base.float()

    def _rounder(self, name: str, p: Tensor) -> Callable[[Tensor], Tensor]:
        """How float32 values of a compact slot become the weight's: a master is rounded to nearest."""
        if self._rounding == "stochastic":
            return lambda x: self._rounded(name, x, p.dtype)
        return lambda x: x.to(p.dtype)

    def _rounded(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self._rounding == "nearest" or dtype == torch.float32:
            return x.to(dtype)
        out = torch.empty_like(x, dtype=dtype)
        reference.round_stochastic(x, dtype, reference.key(self.seed, "round", name, self.steps), out)
        return out

    def _weight(
        self,
        name: str,
        p: Tensor,
        grad: Tensor | None,
        stats: Mapping[str, Tensor] | None = None,
        proposed: Callable[[str], Tensor] | None = None,
    ) -> Weight:
        part = self._parts[name]
        assert self.rule is not None

        def turn(x: Tensor) -> Tensor:
            return x.transpose(-1, -2) if part.transposed else x

        return Weight(
            name,
            turn(p.detach()),
            grad=None if grad is None else turn(grad),
            base=lambda: turn(self._known(name)),
            proposed=None if proposed is None else lambda: turn(proposed(name)),
            stats=stats,
            seed=self.seed,
            step=self.steps,
            unit=self.rule.unit,
            transposed=bool(part.transposed),
        )

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
        }

    def _extra_state(self) -> dict[str, Any]:
        return {"forwards": self._noise.forwards if self._noise else 0}

    def _load_extra_state(self, extra: dict[str, Any]) -> None:
        if self._selected():
            self._settle()
        if self._noise:
            self._noise.forwards = extra["forwards"]
