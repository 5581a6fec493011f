"""What the optimizer remembers about one tensor, and how that moves when the selection does.

Dense slots hold moments of the weight's shape. Compact slots hold, for k chosen units of u entries, moments
`[k, u]`, the age of every unit, and for weights of less than 32 bits a master `[k, u]` that makes them float32,
because a bf16 weight swallows most steps of a small learning rate. When a selection changes, units that stay carry all
of it along, new ones start at zero with the weight's present value, units that left are dropped.

`replaced` holds the pretrained values of what trains, which is enough to rebuild the base tensor. Where many single
entries train (DST), `bits` and `held` do the same with a bit for every entry instead of four bytes for every chosen one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetooth import moments
from finetooth.base import Replaced
from finetooth.kernels import pick, reference
from finetooth.moments import Moment
from finetooth.selection import Selection
from finetooth.units import WHOLE, Unit

MOMENTS = ("exp_avg", "exp_avg_sq")
UNITS = ("selection", "replaced", "window")  # what it holds of units
PLAIN = ("master", "bits", "held")  # what a slot's state holds as it is


@dataclass(frozen=True)
class Rounding:
    """How an update is computed and written: the kernels' backend, and the key of stochastic rounding or None for nearest."""

    backend: str = "auto"
    key: int | None = None

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """float32 values as a weight's dtype."""
        if self.key is None or dtype == torch.float32:
            return x.to(dtype)
        out = torch.empty_like(x, dtype=dtype)
        pick("round_stochastic", x.device, self.backend)(x, dtype, self.key, out)
        return out


@dataclass
class Slot:
    """The state of one tensor; `age` is one number while all its units have the same."""

    name: str
    selection: Selection | None = None
    replaced: Replaced | None = None
    exp_avg: Moment | None = None
    exp_avg_sq: Moment | None = None
    master: Tensor | None = None  # what makes low-precision weights float32 (see `reference.exact`)
    age: int | Tensor = 0
    bits: Tensor | None = None  # [ceil(n / 8)] uint8: what was chosen at the last step, eight entries a byte
    held: Tensor | None = None  # [k] the base values under `bits`, in the weight's dtype
    kind: str = "fp32"  # of the moments, see `moments.py`
    window: Replaced | None = None  # where gradients are added up for the next selection, and the sums, float32
    everywhere: int | None = None  # of a sharded tensor: the number of entries chosen on all ranks together

    def start_bits(self, p: Tensor) -> Tensor:
        """Where a kernel writes down what a threshold chooses; it takes the place of a selection."""
        self.selection = None
        if self.bits is None:
            self.bits = torch.empty((p.numel() + 7) // 8, dtype=torch.uint8, device=p.device)
        return self.bits

    def seen(self, shape: tuple[int, ...]) -> Selection | None:
        """The present selection, from a list of units or from flags."""
        if self.selection is not None or self.bits is None:
            return self.selection
        return Selection(pick("positions", self.bits.device)(self.bits, math.prod(shape)), Unit(), shape)

    @property
    def chosen(self) -> int:
        """The number of entries chosen now, on all ranks together."""
        return self.numel if self.everywhere is None else self.everywhere

    @property
    def numel(self) -> int:
        """The same of what is held here, where that is known without counting flags."""
        if self.held is not None:
            return self.held.numel()
        return 0 if self.selection is None else self.selection.numel

    @property
    def knows_base(self) -> bool:
        """Whether the pretrained values of what trains are held here."""
        return self.replaced is not None or self.held is not None

    def start_dense(self, p: Tensor) -> None:
        """Moments for every entry, once."""
        if self.exp_avg is None:
            self._zero_moments(tuple(p.shape), p.device)

    def _zero_moments(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.exp_avg, self.exp_avg_sq = (moments.zeros(shape, signed, device, self.kind) for signed in (True, False))

    @contextmanager
    def moments(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Both moments in float32, to be written in place."""
        m, v = moments.full(self.exp_avg), moments.full(self.exp_avg_sq)
        yield m, v
        moments.keep(self.exp_avg, m)
        moments.keep(self.exp_avg_sq, v)

    def migrate(self, new: Selection, p: Tensor, masters: bool = True) -> None:
        """Take over a new selection (compact slots); masters: hold float32 copies of weights of less."""
        old, shape = self.selection, (len(new), new.unit.numel(new.shape))
        master = _master(new, p) if masters and p.dtype != torch.float32 else None
        before = (self.exp_avg, self.exp_avg_sq)
        self._zero_moments(shape, p.device)
        if old is not None and len(old) and len(new):
            here, there = _shared(old.index, new.index)
            with self.moments() as now:
                for moment, known in zip(now, before, strict=True):
                    moment[there] = moments.full(known)[here]
            if master is not None and self.master is not None:
                master[there] = self.master[here]
            self.age = self._ages(old, new, here, there)
        else:
            self.age = 0
        self.selection, self.master = new, master

    def _ages(self, old: Selection, new: Selection, here: Tensor, there: Tensor) -> int | Tensor:
        if isinstance(self.age, int) and len(here) == len(new):
            return self.age
        ages = torch.zeros(len(new), dtype=torch.int32, device=here.device)
        ages[there] = self.age[here] if isinstance(self.age, Tensor) else self.age
        return ages

    def update(
        self,
        p: Tensor,
        g: Tensor,
        rate: dict[str, Any],
        how: Rounding,
        scale: float = 1.0,
        base: Tensor | None = None,
    ) -> None:
        """One AdamW step of the chosen units (compact): g is `[k, u]`, or of the weight's shape where all of it trains.

        base: decay pulls to these values instead of zero.
        """
        self.age = self.age + 1
        with self.moments() as (m, v):
            self._update(p, g, m, v, rate, how, scale, base)

    def _update(
        self,
        p: Tensor,
        g: Tensor,
        m: Tensor,
        v: Tensor,
        rate: dict[str, Any],
        how: Rounding,
        scale: float,
        base: Tensor | None,
    ) -> None:
        selection = self.selection
        assert selection is not None
        kind, kernel, flat = selection.unit.kind, pick("adamw_at_", p.device, how.backend), p.is_contiguous()
        grad, state = g.reshape(-1), (m.view(-1), v.view(-1))
        if kind in ("element", *WHOLE) and base is None and how.key is None and flat:
            master = None if self.master is None else self.master.view(-1)
            index = selection.index if kind == "element" else None
            kernel(p.view(-1), index, grad, *state, master, scale=scale, age=self.age, **rate)
            return
        values = reference.exact(selection.gather(p), self.master)
        if base is None and isinstance(self.age, int):
            kernel(values.view(-1), None, grad, *state, None, scale=scale, age=self.age, **rate)
        else:
            target, g = None if base is None else selection.gather(base).float(), reference.scaled(g, scale)
            reference.adamw_(values, g.view(m.shape), m, v, age=self.age, decay_to=target, **rate)
        if how.key is None:
            selection.scatter_(p, reference.remembered(values, p.dtype, self.master))
        else:
            selection.scatter_(p, how.rounded(values, p.dtype))

    def update_dense(
        self, x: Tensor, g: Tensor, rate: dict[str, Any], base: Tensor | None, how: Rounding, scale: float
    ) -> None:
        """One AdamW step of the whole tensor x (float32), in place."""
        if base is None:
            self.update_masked(x, g, rate, Rounding(how.backend), scale=scale)
            return
        self.start_dense(x)
        self.age = self.age + 1
        with self.moments() as (m, v):
            reference.adamw_(x, reference.scaled(g, scale), m, v, age=self.age, decay_to=base, **rate)

    def update_masked(
        self,
        p: Tensor,
        g: Tensor,
        rate: dict[str, Any],
        how: Rounding,
        cut: float | None = None,
        strict: bool = False,
        scale: float = 1.0,
        chosen: Tensor | None = None,
    ) -> None:
        """One AdamW step of the whole tensor, of any dtype, in place, under the mask |g| >= cut."""
        self.start_dense(p)
        self.age = self.age + 1
        assert isinstance(self.age, int)
        kernel = pick("masked_adamw_", p.device, how.backend)
        with self.moments() as (m, v):
            mask = {"cut": cut, "strict": strict, "chosen": chosen}
            kernel(p, g, m, v, scale=scale, key=how.key, age=self.age, **mask, **rate)

    def follow(self, new: Selection, p: Tensor, reset: bool, remember: bool, masters: bool) -> None:
        """Take over a new selection (compact): what left goes back to the base under reset; hold what is replaced."""
        if reset and self.replaced is not None:
            base = self.original(p)
            self.migrate(new, p, masters)
            staying = new.gather(p)
            self.replaced = Replaced(new.unit, new.shape, new.index, new.gather(base))
            p.copy_(base)
            new.scatter_(p, staying)
            return
        self.migrate(new, p, masters)
        if remember:
            self.replaced = self.replaced or Replaced.empty(new.unit, p)
            self.replaced.remember(new.index, p)

    def write(
        self, p: Tensor, new: Tensor, selection: Selection | None, base: Tensor | None, zero_moments: bool
    ) -> None:
        """Write the chosen entries of `new` (dense); where a base is given, every other one becomes that.

        Without a selection, in a dense warm-up, all of `new` is written, and all of the base is held.
        """
        if selection is None:
            if base is not None and not self.knows_base:
                self._hold(Selection.whole(tuple(p.shape), p.device, Unit()), base)
            p.copy_(new)
            return
        if base is None:
            self.selection = selection
        else:
            self._hold(selection, base)
            p.copy_(base)
            if zero_moments:
                outside = ~selection.mask()
                with self.moments() as both:
                    for moment in both:
                        moment.masked_fill_(outside, 0.0)
        selection.scatter_(p, selection.gather(new))

    def _hold(self, selection: Selection, base: Tensor) -> None:
        """Hold what is chosen, and the base values there."""
        values, shape = selection.gather(base), selection.shape
        if selection.unit == Unit():
            flags = pick("flagged", base.device)
            self.selection, self.bits, self.held = None, flags(selection.index, math.prod(shape)), values.view(-1)
        else:
            self.selection, self.replaced = selection, Replaced(selection.unit, shape, selection.index, values)

    def before(self, p: Tensor) -> tuple[Selection, Tensor] | None:
        """What is held of the base: where, and the values there `[k, unit_numel]`."""
        if self.held is not None and (chosen := self.seen(tuple(p.shape))) is not None:
            return chosen, self.held[:, None]
        held = self.replaced
        return None if held is None else (Selection(held.index, held.unit, held.shape), held.values)

    def original(self, p: Tensor) -> Tensor:
        """The base tensor, rebuilt from what was replaced; p itself where nothing was."""
        if self.held is not None and (chosen := self.seen(tuple(p.shape))) is not None:
            base = p.detach().clone(memory_format=torch.contiguous_format)
            chosen.scatter_(base, self.held[:, None])
            return base
        return p if self.replaced is None else self.replaced.original(p)

    def seen_window(self, p: Tensor) -> Tensor:
        """The sums of the window in the shape of the tensor, 0 elsewhere."""
        out = torch.zeros_like(p, dtype=torch.float32)
        if self.window is not None:
            Selection(self.window.index, self.window.unit, self.window.shape).scatter_(out, self.window.values)
        return out

    def tensors(self) -> list[Tensor]:
        """Every tensor this slot keeps."""
        held = [*moments.tensors(self.exp_avg), *moments.tensors(self.exp_avg_sq)]
        held += [t for t in (self.master, self.age, self.bits, self.held) if isinstance(t, Tensor)]
        held += [self.selection.index] if self.selection is not None else []
        for part in (self.replaced, self.window):
            held += [part.index, part.values] if part is not None else []
        return held

    def state(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings, for `torch.save` and `weights_only=True`."""
        out: dict[str, Any] = {"age": self.age}
        out |= {f: held for f in PLAIN if (held := getattr(self, f)) is not None}
        for field in MOMENTS:
            if (moment := getattr(self, field)) is not None:
                out[field] = moment if isinstance(moment, Tensor) else moment.state()
        for field in UNITS:
            if (held := getattr(self, field)) is not None:
                out[field] = {"index": held.index, "unit": [held.unit.kind, held.unit.size], "shape": list(held.shape)}
            if isinstance(held, Replaced):
                out[field]["values"] = held.values
        return out

    @staticmethod
    def restore(name: str, state: dict[str, Any], device: torch.device, kind: str = "fp32") -> Slot:
        """The slot that `state` describes, on a device."""

        def here(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        slot = Slot(name, age=here(state["age"]), kind=kind)
        for field in PLAIN:
            setattr(slot, field, here(state.get(field)))
        for field in MOMENTS:
            setattr(slot, field, moments.restore(state.get(field), device))
        for field in UNITS:
            if held := state.get(field):
                unit, shape, index = Unit(*held["unit"]), tuple(held["shape"]), here(held["index"])
                made = (
                    Selection(index, unit, shape)
                    if field == "selection"
                    else Replaced(unit, shape, index, here(held["values"]))
                )
                setattr(slot, field, made)
        return slot


def _master(selection: Selection, p: Tensor) -> Tensor:
    """For weights that are what their masters say: nothing is missing of bfloat16, and float16 is copied."""
    if p.dtype == torch.bfloat16:
        return torch.zeros(len(selection), selection.unit.numel(selection.shape), dtype=torch.int16, device=p.device)
    return selection.gather(p).float()


def _shared(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in two sorted id lists of the ids they share."""
    at = torch.searchsorted(old, new).clamp_max(len(old) - 1)
    there = (old[at] == new).nonzero().flatten()
    return at[there], there
