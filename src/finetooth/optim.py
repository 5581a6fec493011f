"""The optimizer: one step order for every method, as an ordinary `torch.optim.Optimizer`.

    gradients finite? -> when? select -> migrate state -> gather -> clip -> AdamW -> scatter -> rest

Selection and update happen here, in `step`, after accumulation and unscaling; never in a hook. A method is the choice of two
words. `state`: "compact" keeps moments for the chosen units only, "dense" for all. `mask` (dense only): "gradient" zeroes the
gradient elsewhere, so that moments decide alone where a weight was not chosen (GMT as it is run); "update" lets the moments see
the whole gradient and writes chosen entries only.

Clipping is to the norm of the gradients that are used: of the masked gradient, of the gathered entries, or, for mask="update", of all
that the moments see. State is keyed by parameter name and lives in `state_dict()["selective"]`, because torch casts whatever lies
under `state[p]` to the parameter's dtype.

Low-precision weights: compact state holds float32 masters; dense updates are rounded stochastically, by a hash
of (seed, name, step, position). rounding="nearest" is an explicit choice.

Of sharded parameters (FSDP2) a step is made on the rows that this rank holds; norms and thresholds are those of all ranks.
Not covered: sparse gradients, closures that are called more than once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetooth import shards
from finetooth.anatomy import guess, matching, survey, tied
from finetooth.checks import (
    check_choice,
    check_excluded,
    check_live_rates,
    check_named,
    check_parameter,
    check_parts,
    check_rates,
    check_shards,
    check_together,
)
from finetooth.guard import Guard, norm
from finetooth.kernels import check as check_backend
from finetooth.moments import check as check_moments
from finetooth.rest import Rest, frozen
from finetooth.rule import Rule
from finetooth.scores import gradient
from finetooth.selection import Selection, magnitude_cuts, select, select_pools
from finetooth.units import WHOLE
from finetooth.when import When, once
from finetooth.window import WatchingOptimizer

State = Literal["compact", "dense"]
Mask = Literal["gradient", "update"]


class SelectiveAdamW(WatchingOptimizer):
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
        gradients: how gradients of compact state are formed, see `gradients.py`.
        kernels: the fastest backend that is installed, or one by name, which is then never replaced.
        moments: keep Adam's moments in float32, or in eight bits (see `moments.py`), which saves 6 bytes of 8 and takes time.
        model: needed for `noise`, for gradients that linear layers gather, and to know layers by their class; without it names and shapes must do.
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
        gradients: Literal["auto", "dense", "compact", "structured"] = "auto",
        kernels: Literal["auto", "reference", "numba", "triton"] = "auto",
        moments: Literal["fp32", "8bit"] = "fp32",
        model: nn.Module | None = None,
        stats: Mapping[str, Mapping[str, Tensor]] | None = None,
        base: Any = None,
    ) -> None:
        given = check_named(named_parameters)
        check_rates(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        words = {"state": state, "mask": mask, "rounding": rounding, "decay_to": decay_to, "gradients": gradients}
        for word, value in {**words, "moments": moments}.items():
            check_choice(word, value)
        check_together(rule, when, rest or frozen(), state, mask)
        check_excluded(rule, given)
        check_backend(kernels)
        self.rule, self.when, self.rest = rule, when, rest or frozen()
        self._guard = Guard(max_grad_norm or 0.0, stop_after)
        self._compact, self._mask, self._rounding = state == "compact" and rule is not None, mask, rounding
        self._masters = rounding == "auto"  # of compact state; the other two round the weight itself
        self._to_base, self._model = decay_to == "base", model
        self._route, self._backend = gradients, kernels
        self._parts = survey(model) if model is not None else guess(given.items())
        names = matching(rule.targets if rule else "all", {n: self._parts[n] for n in given}, tied(model))
        check_parts(rule, self.rest, [self._parts[n] for n in names], model is not None)
        for name in names:
            check_parameter(name, given[name])
        check_shards({name: given[name] for name in names}, moments)
        check_moments(moments)  # last: nobody should install what then cannot be used
        others: dict[str, Tensor | None] = {name: p for name, p in given.items() if name not in set(names)}
        rates = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([(n, given[n]) for n in names], others, base, rates)
        self.seed = seed
        self._guard.names = list(self._slots)
        for slot in self._slots.values():
            slot.kind = moments
        self._moments = moments
        self._start(stats or {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimizer step; a non-finite gradient, or loss of a closure, writes nothing and is counted in `skipped`.

        Gradients that were gathered (see `gradients.py`) are used up by it, whether it writes or not.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_parameters()
        check_live_rates(self.param_groups)
        self._adopt()
        grads = self._collected()
        self._refuse_rehearsal(grads)
        if not self._guard.some(grads, next(iter(self._slots))):
            return loss
        held = self._live()
        live = {name: held[name] for name in grads}
        self.skipped += 1  # until it is known to be used; so it stays if the guard raises
        if self._stepped(live, grads, 0.0 if loss is None else shards.total(float(loss), self._device())):
            self.skipped -= 1
            self.steps += 1
        self._between()
        return loss

    def _refuse_rehearsal(self, grads: Mapping[str, Tensor]) -> None:
        """torch.distributed.checkpoint steps with no gradients at all to make an optimizer fill its `state`, and saves that."""
        moves = any(float(group["lr"]) for group in self.param_groups)
        if not grads or moves or any(bool(g.any()) for g in grads.values()):
            return
        raise RuntimeError(
            "a step of lr 0 with gradients that are all 0: that is torch.distributed.checkpoint (accelerate's save_state under FSDP), "
            "which saves what lies in `optimizer.state`, where a selective optimizer keeps nothing. Nothing was changed. Save "
            "opt.state_dict(), called on every rank, from rank 0, and load it on every rank."
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, those in `p.grad` and those that were gathered."""
        super().zero_grad(set_to_none)
        if self._gradients is not None:
            self._gradients.clear()

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "guard": self._guard.state()}

    def _load_extra_state(self, extra: dict[str, Any]) -> None:
        super()._load_extra_state(extra)
        self._guard.restore(extra["guard"])

    @property
    def bad_steps(self) -> int:
        """How many steps in a row, up to the last one, wrote nothing, as a gradient was not finite."""
        return self._guard.bad

    @property
    def grad_norm(self) -> float:
        """The norm, before clipping, of the gradients that the last step used."""
        return self._guard.norm

    @property
    def clipped(self) -> int:
        """How many steps were clipped to `max_grad_norm`."""
        return self._guard.clipped

    def _norm(self, grads: Iterable[Tensor]) -> float:
        """The norm of gradients on all ranks together."""
        held = float(norm(grads))
        return shards.total(held * held, self._device()) ** 0.5 if self._cuts else held

    @property
    def max_grad_norm(self) -> float:
        """What the step clips to; 0: it does not clip."""
        return self._guard.max_norm

    def _collected(self) -> dict[str, Tensor]:
        """The gradients of this step: gathered ones as `[k, unit_numel]`, the others as `p.grad`."""
        routed = self._gradients
        dense = {n: shards.local(p.grad) for n, p in self._parameters().items() if p.grad is not None}
        if routed is None:
            return self._averaged(dense) if self._ours else dense
        if hasattr(self, "found_inf"):  # a GradScaler calls
            raise RuntimeError(
                "a loss scaler does not see gathered gradients: build with gradients='dense', or train in bf16."
            )
        if routed.paused:
            return self._averaged(dense)
        rest = self._averaged({n: g for n, g in dense.items() if n not in routed.chosen})
        return rest | routed.taken(self._parameters())

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self._gradients is not None  # so that a GradScaler calls `step`, which refuses it

    def _stepped(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor], loss: float) -> bool:
        """Update, unless a gradient that is used, or the loss, is not finite."""
        if self._by_threshold():
            return self._step_cut(live, grads, loss)
        if self._compact:
            return self._step_compact(live, grads, loss)
        if not self._guard.passes(grads, self._norm(grads.values()), loss):
            return False
        if self._mask == "update" and self.rule is not None:
            self._step_update(live, grads)
        else:
            with self._kept(live):
                self._step_gradient(live, grads)
        return True

    def _step_compact(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor], loss: float) -> bool:
        """The chosen entries; a gradient elsewhere is not used, unless this step selects by it."""
        routed = self._gradients
        gathered = set() if routed is None or routed.paused else set(routed.chosen)
        selects, watches = self._selects(), self._watches()
        if (selects or watches) and not self._guard.passes(grads, self._norm(grads.values()), loss):
            return False
        if selects:
            unused = {n: torch.zeros_like(p) for n, p in self._live().items() if n not in grads}
            self._select_compact({**grads, **unused}, {})
            if self.when is once and not self.steps:
                self._take_prints()
        chosen = {n: s for n in live if (s := self._slots[n].selection) is not None and len(s)}
        used = {n: grads[n] if n in gathered or s.unit.kind in WHOLE else s.gather(grads[n]) for n, s in chosen.items()}
        total = self._norm(used.values())
        if not self._guard.passes(used, total, loss):
            return False
        if watches:
            self._watch(grads)
        factor, rates = self._guard.factor(total), self._rates()
        for name, g in used.items():
            self._slots[name].update(live[name], g, rates[name], self._how(name), factor, self._target(name))
        return True

    def _by_threshold(self) -> bool:
        """Whether this step and the next mask by the magnitude of the gradient, which needs no list of what is chosen."""
        rule = self.rule
        if rule is None or rule.exclude or self._compact or self._to_base or self.rest.kind != "frozen":
            return False
        gmt = rule.threshold and rule.unit.kind == "element" and rule.score is gradient
        return gmt and self.when(self.steps) and self.when(self.steps + 1)

    def _step_cut(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor], loss: float) -> bool:
        """GMT in two readings of the gradient: one finds every pool's threshold, one masks and updates."""
        assert self.rule is not None
        sizes = {name: math.prod(self._cuts[name].shape) for name in grads} if self._cuts else None
        cuts, square = magnitude_cuts(self.rule, grads, self.seed, self._backend, sizes)
        strict = self._mask == "update"
        total = square**0.5  # the largest are among them: not finite, or too large, exactly if anything is
        if not self._guard.passes(grads, total, loss):
            return False
        factor, rates = self._guard.factor(self._norm(grads.values()) if strict else total), self._rates()
        for name, p in live.items():
            slot = self._slots[name]
            how, bits = self._how(name), slot.start_bits(p)
            slot.update_masked(p, grads[name], rates[name], how, cuts[name], strict, factor, bits)
        return True

    def _step_gradient(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        """Every weight trains, or the gradient of those that were not chosen is zero."""
        if self._selects():
            assert self.rule is not None
            found = select(self.rule, [self._weight(n, p, grads[n]) for n, p in live.items()])
            for name, selection in found.items():
                self._slots[name].selection = self._here(name, selection)
        for name, g in grads.items():  # between two selections the last one holds; before the first, none does
            if self.rule is not None and (held := self._slots[name].selection) is not None:
                g.masked_fill_(~held.mask(), 0.0)
        total = self._guard.total if self.rule is None else self._norm(grads.values())
        factor, rates = self._guard.factor(total), self._rates()
        for name, p in live.items():
            slot, target = self._slots[name], self._target(name)
            if target is None:
                slot.update_masked(p, grads[name], rates[name], self._how(name), scale=factor)
                continue
            x = p.detach().float() if p.dtype != torch.float32 else p
            slot.update_dense(x, grads[name], rates[name], target, self._how(name), factor)
            if x is not p:
                p.copy_(self._how(name).rounded(x, p.dtype))

    def _step_update(self, live: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        """Dense moments, chosen entries written; pool by pool, so that one pool's proposals and base are alive."""
        assert self.rule is not None
        factor, rates = self._guard.factor(self._guard.total), self._rates()
        proposals, bases = dict[str, Tensor](), dict[str, Tensor]()

        def propose(name: str) -> Tensor:
            if name not in proposals:
                x = live[name].detach().clone() if live[name].dtype == torch.float32 else live[name].detach().float()
                slot, target = self._slots[name], self._target(name)
                slot.update_dense(x, grads[name], rates[name], target, self._how(name), factor)
                proposals[name] = x
            return proposals[name]

        def base(name: str) -> Tensor:
            return bases[name] if name in bases else bases.setdefault(name, self._known(name))

        def write(name: str, selection: Selection | None) -> None:
            new, reset = self._how(name).rounded(propose(name), live[name].dtype), self.rest.kind == "reset"
            self._slots[name].write(live[name], new, selection, base(name) if reset else None, self.rest.zero_moments)
            del proposals[name]
            bases.pop(name, None)

        if self._selects():
            weights = (self._weight(n, p, grads[n], proposed=propose, base=base) for n, p in live.items())
            for found in select_pools(self.rule, weights):
                for name, selection in found.items():
                    write(name, self._here(name, selection))
        else:
            for name, p in live.items():
                write(name, self._slots[name].seen(tuple(p.shape)))
