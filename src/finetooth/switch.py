"""One model in memory, many deltas: put one on, take it off, put on another, all of it bit for bit.

    to("math"):   p[chosen] <-> values of "math"        the values now hold the base's
    to("code"):   p[chosen] <-> values of "math", then  p[chosen] <-> values of "code"
    to(None):     the base

Values change places, so that the old ones are held once: the memory is the model, and for every delta its indices and its
k values, on the model's device. Between two deltas the base is restored, so that they may overlap. Nothing is added or
subtracted (a difference taken off again does not give a bf16 weight back), and there is no adapter in the forward.

A switch is all or nothing: whatever goes wrong in the middle, the tensors that were done are put back.

Threads: switching takes a lock, and `using` holds it for the length of its block, so that threads that want other deltas wait
for each other. One model has one set of weights: a forward that has to see one delta belongs inside `using`.

Parameters are looked up at every switch, so that the model may be moved to another device in between. Tied weights are one
storage and change once. The alternative, PEFT's adapters, keeps float32 differences beside every layer and adds them to a
copy of the weight in each forward.

Not covered: sharded models (DTensor), weights that are trained while a delta is on (they are taken for the delta's), CUDA
streams other than the current one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from finetooth.base import Held, dtype_name, open_base
from finetooth.delta import Delta, DeltaError
from finetooth.diff import gather, place, scatter_
from finetooth.moves import Given, new_values, opened
from finetooth.selection import Selection
from finetooth.shards import sharded


class _Part:
    """One tensor of one delta: `values` are what the model does not hold at present."""

    def __init__(self, name: str, selection: Selection, values: Tensor) -> None:
        self.name, self.selection, self.values, self.on = name, selection, values, False

    def swap(self, p: Tensor) -> None:
        """Let the model's values and these change places, or leave both as they were."""
        aside, old, was = self.values, gather(self.selection, p.contiguous()), self.on
        try:
            scatter_(self.selection, p, aside)
            self.values, self.on = old, not was
        except BaseException:
            scatter_(self.selection, p, old)
            self.values, self.on = aside, was
            raise


class DeltaSwitch:
    """A model, and deltas of it by name, one of which may be on.

    Args:
        model: an `nn.Module` with the base's weights.
        deltas: by name; `Delta`s, or what `Delta.load` takes.
        check: whether the fingerprint of every touched tensor is compared when a delta is added.

    Raises WrongBase if the model is not the base of a delta, DeltaError if names, shapes or dtypes do not fit.

    >>> model = nn.Linear(2, 2)
    >>> tuned = {name: p + 1 for name, p in model.state_dict().items()}
    >>> switch = DeltaSwitch(model, {"plus": Delta.extract(tuned, model)})
    >>> with switch.using("plus"):
    ...     torch.equal(model.bias, tuned["bias"])
    True
    >>> switch.active is None, torch.equal(model.bias, tuned["bias"])
    (True, False)
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, Given] | None = None, *, check: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise DeltaError(f"a switch works on a module, not on a {type(model).__name__}.")
        self.model = model
        self._lock = RLock()
        self._active: str | None = None
        self._parts: dict[str, list[_Part]] = {}
        for name, delta in (deltas or {}).items():
            self.add(name, delta, check=check)

    @property
    def active(self) -> str | None:
        """The name of the delta that is on; None: the base."""
        return self._active

    @property
    def names(self) -> list[str]:
        """Of all deltas."""
        return list(self._parts)

    def nbytes(self) -> int:
        """What is held beside the model: indices and values of all deltas."""
        held = (t for parts in self._parts.values() for p in parts for t in (p.selection.index, p.values))
        return sum(t.numel() * t.element_size() for t in held)

    def add(self, name: str, delta: Given, *, check: bool = True) -> None:
        """Take in one more delta; the model is the base for the time of it."""
        (found,) = opened([delta])
        with self._lock:
            if name in self._parts:
                raise DeltaError(f"there is a delta {name!r} already: remove it first.")
            with self.using(None):
                self._parts[name] = _parts(found, self.model, check)

    def remove(self, name: str) -> None:
        """Forget a delta; if it is on, it is taken off first."""
        with self._lock:
            self._known(name)
            if self._active == name:
                self.to(None)
            del self._parts[name]

    @torch.no_grad()
    def to(self, name: str | None) -> None:
        """Put the delta `name` on, in the place of the one that is on; None gives the base. All or nothing."""
        with self._lock:
            if name is not None:
                self._known(name)
            if name == self._active:
                return
            off, on = (self._parts[n] if n is not None else [] for n in (self._active, name))
            live, wanted = _live(self.model), [(p, False) for p in off] + [(p, True) for p in on]
            try:
                for part, state in wanted:
                    if part.on != state:
                        part.swap(live[part.name])
                self._active = name
            except BaseException:
                for part, state in reversed(wanted):
                    if part.on == state:
                        part.swap(live[part.name])
                raise

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """A delta (None: the base) for the length of a block, then what was on before, also after an exception."""
        with self._lock:
            before = self._active
            self.to(name)
            try:
                yield self.model
            finally:
                self.to(before)

    def _known(self, name: str) -> None:
        if name not in self._parts:
            raise DeltaError(f"there is no delta {name!r}: there are {', '.join(self._parts) or 'none'}.")


def _live(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model by the names that deltas have."""
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return Held(dict(named)).tensors


def _parts(delta: Delta, model: nn.Module, check: bool) -> list[_Part]:
    """What a delta does to this model, on its device; raises as `DeltaSwitch` says."""
    held, live = open_base(model), _live(model)
    if lost := next((name for name, t in live.items() if sharded(t)), None):
        raise DeltaError(f"'{lost}' is sharded over ranks: deltas are switched on whole tensors.")
    if check:
        delta.inverse(model)  # which needs all that `apply` checks
    there, out, storage = set(live), [], dict[str, str]()
    for name, c in delta.changes.items():
        at = place(name, there, dict(delta.tied))
        if at is None:
            raise DeltaError(f"the model has no '{name}': the delta was made for {delta.base}.")
        p = live[at]
        other = storage.setdefault(held.tied.get(at, at), name)
        if other != name:
            raise DeltaError(f"the model ties '{other}' and '{name}', which the delta changes apart.")
        if tuple(p.shape) != c.selection.shape:
            raise DeltaError(f"'{at}' is {list(p.shape)}, and {list(c.selection.shape)} in the delta.")
        copies = [a for a, of in delta.tied.items() if of == name and a in there and a != at]
        for n in (at, *(a for a in copies if held.tied.get(a, a) != held.tied.get(at, at))):
            out.append(_part(n, c, live[n]))
    return out


def _part(name: str, c: Any, p: Tensor) -> _Part:
    selection = Selection(c.selection.index.to(p.device), c.selection.unit, c.selection.shape)
    values = new_values(c, gather(selection, p.contiguous()).cpu()).to(p.device, copy=True)
    if values.dtype != p.dtype:
        raise DeltaError(f"'{name}' is {dtype_name(p.dtype)}, and {dtype_name(values.dtype)} in the delta.")
    return _Part(name, selection, values)
