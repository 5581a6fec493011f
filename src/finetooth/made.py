"""Changes that are not in memory: their ids and values are read, or worked out of others, when they are first asked for.

A delta of a large model is used one tensor at a time. `Lazy` is a `Change` that knows what can be said without reading;
`Made` is a table of changes made of another table's, such as an inverse whose old values lie in the base's folder. A look-up
is a new object every time: what it has read goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from finetooth.codec import Change
from finetooth.selection import Selection
from finetooth.units import Unit


class Lazy(Change):
    """A change whose `selection` and `values` are made when they are first asked for. `dataclasses.replace` makes them."""

    _made: tuple[tuple[tuple[int, ...], torch.dtype], Unit] | None = None
    _selection: Callable[[], Selection]
    _values: Callable[[], Tensor]

    @classmethod
    def at(
        cls,
        kind: tuple[tuple[int, ...], torch.dtype],
        unit: Unit,
        selection: Callable[[], Selection],
        values: Callable[[], Tensor],
        **facts: Any,
    ) -> Self:
        """`facts` are the other fields of a Change."""
        c = object.__new__(cls)
        c.__dict__.update(facts, _made=(kind, unit), _selection=selection, _values=values)
        return c

    @cached_property
    def selection(self) -> Selection:
        return self._selection()

    @cached_property
    def values(self) -> Tensor:
        return self._values()

    def fetch(self) -> None:
        _ = self.selection, self.values

    @property
    def kind(self) -> tuple[tuple[int, ...], torch.dtype]:
        return super().kind if self._made is None else self._made[0]

    @property
    def unit(self) -> Unit:
        return super().unit if self._made is None else self._made[1]


class Made(Mapping[str, Change]):
    """Changes made of those of another table, one at a time, when they are looked up."""

    def __init__(self, changes: Mapping[str, Change], make: Callable[[str, Change], Change]):
        self.changes, self.make = changes, make

    def __getitem__(self, name: str) -> Change:
        return self.make(name, self.changes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)


def taken_off(change: Change, old: Callable[[], Tensor]) -> Change:
    """The change that takes `change` off; `old` gives the values that it replaces."""
    prints = {"fingerprint": change.result, "result": change.fingerprint}
    parts = {"replaced": change.written, "written": change.replaced}
    return Lazy.at(change.kind, change.unit, lambda: change.selection, old, changed=change.changed, **prints, **parts)


def written_out(change: Change, old: Callable[[], Tensor]) -> Change:
    """The same change with new values that need no base."""
    names = ("changed", "fingerprint", "result", "replaced", "written")
    facts = {name: getattr(change, name) for name in names}
    return Lazy.at(change.kind, change.unit, lambda: change.selection, lambda: change.new(old()), **facts)
