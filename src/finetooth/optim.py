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

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetooth.anatomy import Part, guess, matching, survey
from finetooth.kernels import reference
from finetooth.named import NamedOptimizer, check_choice, check_parameter, check_rates
from finetooth.rest import Noise, Rest, frozen, quantize_
from finetooth.rule import Rule
from finetooth.selection import Selection, select, select_pools
from finetooth.slot import Slot
from finetooth.units import WHOLE
from finetooth.weight import Unavailable, Weight
from finetooth.when import When, once

State = Literal["compact", "dense"]
Mask = Literal["gradient", "update"]


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that is not finite."""


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
        stop_after: raise `NonFiniteError` after so many non-finite gradients in a row; such a step writes nothing.
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
        given = dict(named_parameters)
        check_rates(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        check_choice("state", state, ("compact", "dense"))
        check_choice("mask", mask, ("gradient", "update"))
        check_choice("rounding", rounding, ("auto", "stochastic", "nearest"))
        check_choice("decay_to", decay_to, ("zero", "base"))
        self.rule, self.when, self.rest = rule, when, rest or frozen()
        self.max_grad_norm, self.stop_after, self.grad_norm = max_grad_norm or 0.0, stop_after, 0.0
        self._compact, self._mask, self._rounding = state == "compact" and rule is not None, mask, rounding
        self._to_base, self._model, self._bad_in_a_row = decay_to == "base", model, 0
        self._noise: Noise | None = None
        self._parts: dict[str, Part] = survey(model) if model is not None else guess(given.items())
        self._check_choices()
        names = matching(rule.targets if rule else "all", {n: self._parts[n] for n in given})
        for name in names:
            check_parameter(name, given[name])
        others = {name: p for name, p in given.items() if name not in set(names)}
        rates = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([(n, given[n]) for n in names], others, base, rates)
        self.seed = seed
        self._start(stats or {})

    def _check_choices(self) -> None:
        """Choices that cannot work together are refused here, not ignored later."""
        rule, kind = self.rule, self.rest.kind
        if rule is not None and rule.keep == 0:
            raise ValueError("keep=0 selects nothing: nothing would train.")
        if kind == "reset" and not self._compact and not self._selects_update():
            raise ValueError('rest=reset() needs mask="update" with dense state: a masked gradient moves every entry.')
        if kind in ("noise", "quantized"):
            if rule is None or not self._compact or self.when is not once:
                raise ValueError(f"rest={kind}(...) needs a selection made once, with compact state.")
            if rule.unit.kind != "column":
                raise ValueError(f"rest={kind}(...) acts on the other columns of a matrix: the unit is {rule.unit}.")
            if kind == "noise" and self._model is None:
                raise ValueError("rest=noise(...) acts in the model's forward: give model=.")

    # -- building ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
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
        if self.rest.kind == "quantized":
            self._rewrote_base = True
            for name, selection in self.selections().items():
                quantize_(self._parameter(name), selection, self.rest.bits)
        if self.rule is None:
            for name, p in self._parameters().items():
                self._slots[name].selection = Selection.whole(tuple(p.shape), p.device)
        self._take_prints()

    def _remembers(self, slot: Slot) -> bool:
        if self.rest.kind == "reset" or not self._compact or self.rule is None:
            return self.rest.kind == "reset"
        return self._base is None or self.rule.unit.kind not in WHOLE or self._to_base

    def _select_compact(self, grads: Mapping[str, Tensor | None], stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Select, and let the state follow; the first selection also settles what will never train."""
        assert self.rule is not None
        live = self._parameters()
        found = select(self.rule, [self._weight(n, p, grads.get(n), stats.get(n)) for n, p in live.items()])
        if not any(s.numel for s in found.values()):
            raise ValueError(f"keep={self.rule.keep} selects nothing in {len(found)} tensors: nothing would train.")
        for name, selection in found.items():
            slot = self._slots[name]
            slot.follow(selection, live[name], self.rest.kind == "reset", self._remembers(slot))
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
            if self._noise:
                self._noise.remove()
            columns = {n: s for n, s in self.selections().items() if len(s) < s.unit.count(s.shape)}
            self._noise = Noise(self._model, columns, self.rest.bits, self.seed)
            self._noise.forwards = forwards

    # -- the step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimizer step; a non-finite gradient writes nothing and is counted in `skipped`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        live = {n: p for n, p in self._parameters().items() if p.grad is not None}
        if not live or not self._finite(live):
            return loss
        update = (
            self._step_compact
            if self._compact
            else self._step_update
            if self._selects_update()
            else self._step_gradient
        )
        update(live, {n: p.grad for n, p in live.items() if p.grad is not None})
        self.steps += 1
        return loss

    def _selects_update(self) -> bool:
        return self._mask == "update" and self.rule is not None

    def _finite(self, live: Mapping[str, Tensor]) -> bool:
        if torch.isfinite(_norm(p.grad for p in live.values() if p.grad is not None)):
            self._bad_in_a_row = 0
            return True
        self.skipped += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= self.stop_after:
            bad = next((n for n, p in live.items() if p.grad is not None and not torch.isfinite(p.grad).all()), None)
            raise NonFiniteError(
                f"{self._bad_in_a_row} gradients in a row were not finite; the first bad tensor is {bad!r}. "
                "No weight was written in these steps. Lower the learning rate or look at the data."
            )
        return False

    def _step_compact(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        if self.when(self.steps) and not (self.steps == 0 and self._selected()):
            unused = {n: torch.zeros_like(p) for n, p in self._parameters().items() if n not in grads}
            self._select_compact({**grads, **unused}, {})
            if self.when is once and not self.steps:
                self._take_prints()
        chosen = {n: s for n in live if (s := self._slots[n].selection) is not None and len(s)}
        gathered = {n: s.gather(grads[n]).float() for n, s in chosen.items()}
        scale, rates = self._clip(gathered), self._rates()
        for name, g in gathered.items():
            self._slots[name].update(live[name], scale(g), rates[name], self._to_base)

    def _step_gradient(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        if self.rule is not None and self.when(self.steps):
            found = select(self.rule, [self._weight(n, p, grads[n]) for n, p in live.items()])
            for name, selection in found.items():
                self._slots[name].selection = selection
        for name, g in grads.items():  # between two selections the last one holds; before the first, none does
            if self.rule is not None and (held := self._slots[name].selection) is not None:
                g.masked_fill_(~held.mask(), 0.0)
        scale, rates = self._clip(grads), self._rates()
        for name, p in live.items():
            x = p.detach() if p.dtype == torch.float32 else p.detach().float()
            self._slots[name].update_dense(x, scale(grads[name]), rates[name], self._target(name))
            if x.dtype != p.dtype:
                p.copy_(self._rounded(name, x, p.dtype))

    def _step_update(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        """Dense moments, chosen entries written; pool by pool, so that one pool's proposals are alive."""
        assert self.rule is not None
        scale, rates, proposals = self._clip(grads), self._rates(), dict[str, Tensor]()

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

    def _clip(self, grads: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Measure the norm of the gradients in use; the function that brings one to float32 and scales it."""
        total = _norm(grads.values())
        self.grad_norm = float(total)
        factor = (self.max_grad_norm / (total + 1e-6)).clamp(max=1.0)  # the 1e-6 of torch's clip_grad_norm_
        clips = bool(self.max_grad_norm) and float(factor) < 1.0
        return lambda g: g.float().mul_(factor) if clips else g.float()

    def _selected(self) -> bool:
        return any(slot.chosen for slot in self._slots.values())

    def _target(self, name: str) -> Tensor | None:
        """Where weight decay pulls to: None for zero."""
        if not self._to_base:
            return None
        base = self.base_tensor(name)
        if base is None:
            raise ValueError(f"decay_to='base' needs the pretrained value of {name!r}: give base=.")
        return base.to(self._parameter(name).device, torch.float32)

    def _rounded(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self._rounding == "nearest":
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
        part, slot = self._parts[name], self._slots[name]
        assert self.rule is not None

        def turn(x: Tensor) -> Tensor:
            return x.transpose(-1, -2) if part.transposed else x

        return Weight(
            name,
            turn(p.detach()),
            grad=None if grad is None else turn(grad),
            base=lambda: turn(slot.original(p.detach())),
            proposed=None if proposed is None else lambda: turn(proposed(name)),
            stats=stats,
            seed=self.seed,
            step=self.steps,
            unit=self.rule.unit,
            transposed=part.transposed,
        )

    def _extra_state(self) -> dict[str, Any]:
        return {"forwards": self._noise.forwards if self._noise else 0}

    def _load_extra_state(self, extra: dict[str, Any]) -> None:
        if self._selected():
            self._settle()
        if self._noise:
            self._noise.forwards = extra["forwards"]


def _norm(grads: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, in float32: float16's own would overflow at 65504."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
