"""What deltas do to one base, tensor by tensor and entry by entry: what merging, comparing and trimming start from.

    step.moves[i].index, .old, .new        where delta i changes the tensor, from what, to what

Deltas list units, and in one file a row, in another single entries. Here both are entries, so that they can be held
against each other; where the base is read, entries that only lie in a listed unit and did not change are left out.

One tensor of the base is held at a time, and of the deltas what changes in it: never a model. The alternative, a dense
difference for each delta, is as many models as there are deltas.

Deltas belong together if they were made on the same base. Every delta says what some tensors of its base are (the
fingerprints of what it changes, and of what the earlier deltas of its chain changed): what two of them say of the same
tensor must agree, and what any of them says must be true of the base that is given. Tied tensors go by one name.

Not covered: tensors that no delta speaks of may differ between the bases; nothing can tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetooth.base import Base, bits, fingerprint, open_base
from finetooth.codec import Change
from finetooth.delta import Delta, DeltaError, WrongBase
from finetooth.diff import change, place
from finetooth.fit import require_after
from finetooth.rule import count
from finetooth.selection import Selection, top

Given = Delta | str | Path


@dataclass(frozen=True, eq=False)
class Move:
    """What one delta does to one tensor."""

    index: Tensor  # [n] int64, sorted entries, row-major
    new: Tensor  # [n] in the weight's dtype
    old: Tensor  # [n]; without a base, a second name of `new`

    def difference(self) -> Tensor:
        """new - old, in float64 of float64 weights, else in float32."""
        return wide(self.new) - wide(self.old)

    def only(self, mask: Tensor) -> Move:
        """Some of the entries; mask [n]."""
        return Move(self.index[mask], self.new[mask], self.old[mask])


@dataclass(frozen=True, eq=False)
class Step:
    """One tensor: its name, what every delta does to it, and the base's value of it."""

    name: str
    tensor: Tensor | None
    moves: tuple[Move | None, ...]
    changes: tuple[Change | None, ...]


def wide(x: Tensor) -> Tensor:
    """The precision that differences are taken in."""
    return x if x.dtype == torch.float64 else x.float()


def opened(deltas: Sequence[Given], least: int = 1) -> list[Delta]:
    """Deltas or files of them as deltas; DeltaError for an inverse, or if there are too few."""
    found = [d if isinstance(d, Delta) else Delta.load(d) for d in deltas]
    if len(found) < least:
        raise DeltaError(f"{len(found)} deltas were given: it takes at least {least}.")
    for i, d in enumerate(found):
        if d.base.tuned:
            raise DeltaError(f"delta {i + 1} is an inverse, which belongs to {d.base}: give the delta itself.")
    return found


def names_of(deltas: Sequence[Delta]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """For every delta {common name: its name} of what it changes, and {alias: common name} of tied tensors."""
    alias: dict[str, str] = {}

    def root(name: str) -> str:
        while name in alias:
            name = alias[name]
        return name

    for d in deltas:
        for a, b in d.tied.items():
            if root(a) != root(b):
                alias[root(a)] = root(b)
    own: list[dict[str, str]] = []
    for d in deltas:
        own.append({})
        for name in d.changes:
            other = own[-1].setdefault(root(name), name)
            if other != name:
                raise DeltaError(f"one delta ties '{other}' and '{name}', which another one changes apart.")
    return own, {a: root(a) for a in alias}


def claims(delta: Delta, aliases: Mapping[str, str]) -> dict[str, str]:
    """What a delta says of its base: fingerprints by common name."""
    said = {**delta.base.after, **{name: c.fingerprint for name, c in delta.changes.items()}}
    return {aliases.get(name, name): found for name, found in said.items()}


def same_base(deltas: Sequence[Delta], aliases: Mapping[str, str]) -> None:
    """Raise DeltaError, naming the tensor and both bases, if two deltas do not say the same of their base."""
    first: dict[str, tuple[str, int]] = {}
    for i, d in enumerate(deltas):
        for name, found in claims(d, aliases).items():
            expected, of = first.setdefault(name, (found, i))
            if expected != found:
                raise DeltaError(
                    f"the deltas have different bases: of '{name}' delta {of + 1} (made for {deltas[of].base}) says "
                    f"{expected}, delta {i + 1} (made for {d.base}) {found}. If one was made on top of the other, they "
                    "are a chain: finetooth delta compose."
                )


def walk(deltas: Sequence[Delta], base: Any = None, check: bool = True) -> Iterator[Step]:
    """Every tensor that a delta changes, in the order of names. Without a base, listed entries and no old values.

    Raises DeltaError if the deltas, or a delta and the base, do not belong together; nothing is checked where
    `check` is False, for a second walk.
    """
    own, aliases = names_of(deltas)
    same_base(deltas, aliases)
    names = sorted({name for known in own for name in known})
    if base is None:
        for name in names:
            changes = _changes(deltas, own, name)
            yield Step(name, None, tuple(None if c is None else _listed(c) for c in changes), changes)
        return
    with open_base(base).opened() as held:
        for d in deltas if check else ():
            require_after(d.base.after, held)
        for name in names:
            changes = _changes(deltas, own, name)
            t = _read(held, name, aliases, changes, check)
            yield Step(name, t, tuple(None if c is None else moved(c, t, name) for c in changes), changes)


def _changes(deltas: Sequence[Delta], own: Sequence[Mapping[str, str]], name: str) -> tuple[Change | None, ...]:
    return tuple(d.changes[n[name]] if name in n else None for d, n in zip(deltas, own, strict=True))


def _read(held: Base, name: str, aliases: Mapping[str, str], changes: Sequence[Change | None], check: bool) -> Tensor:
    """The base's tensor, [*shape], on the host; checked once, as all changes name the same fingerprint."""
    at = place(name, set(held.names()), dict(aliases))
    c = next(c for c in changes if c is not None)
    if at is None:
        raise DeltaError(f"the base has no '{name}', which a delta changes.")
    t = held.tensor(at).detach().cpu().contiguous()
    if check and (tuple(t.shape) != c.selection.shape or (found := fingerprint(t)) != c.fingerprint):
        told = f"expected {c.fingerprint}, found {found}" if tuple(t.shape) == c.selection.shape else str(list(t.shape))
        raise WrongBase(f"'{at}' is not that of the base the deltas were made for: {told}.")
    return t


def new_values(c: Change, old: Tensor) -> Tensor:
    """The new values [k, unit_numel] of a change, whose file may hold them coded against the `old` ones."""
    coded = getattr(c, "new", None)
    found: Tensor = c.values if coded is None else coded(old)
    return found


def moved(c: Change, t: Tensor, name: str) -> Move:
    """The entries of `t`, the base's tensor, that a change really changes."""
    index = c.selection.entries().flatten()
    old = bits(t).view(-1)[index]
    new = new_values(c, old.view(t.dtype).view(len(c.selection), -1))
    if new.dtype != t.dtype:
        raise DeltaError(f"'{name}' is {t.dtype} in the base, and {new.dtype} in a delta.")
    found = Move(index, new.reshape(-1), old.view(t.dtype))
    return _sorted(found.only(bits(found.new) != bits(found.old)), c.selection)


def _listed(c: Change) -> Move:
    values = c.values.reshape(-1)
    return _sorted(Move(c.selection.entries().flatten(), values, values), c.selection)


def _sorted(move: Move, selection: Selection) -> Move:
    if selection.unit.kind != "column":
        return move
    index, order = move.index.sort()
    return Move(index, move.new[order], move.old[order])


def rewritten(name: str, t: Tensor, index: Tensor, new: Tensor) -> Change | None:
    """The change from `t` to `t` with `new` values at `index`; None if all of them are there already."""
    after = t.clone()
    bits(after).view(-1)[index] = bits(new)
    found = change(name, t, after)
    return None if found is None else found[0]


def largest(sizes: Mapping[str, Tensor], keep: float | int, by: str = "file") -> dict[str, Tensor]:
    """Masks [n] of the largest of these magnitudes, exactly `keep` of all together, or of every tensor (`by="tensor"`).

    Equal ones: the earlier tensor, then the smaller index. A fraction is of as many as there are.
    """
    if by == "tensor":
        return {name: mask for name, x in sizes.items() for mask in largest({name: x}, keep).values()}
    flat = torch.cat([x.float() for x in sizes.values()]) if sizes else torch.empty(0)
    if not bool(torch.isfinite(flat).all()):
        raise DeltaError("a difference to the base is not finite: the base holds infinities, or NaN.")
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[top(flat, count(keep, len(flat)))] = True
    return dict(zip(sizes, torch.split(mask, [len(x) for x in sizes.values()]), strict=True))


def described(delta: Delta, name: str | None = None) -> dict[str, Any]:
    """A part of a merge, a chain or a trim, as its recipe has it."""
    return {
        "name": name,
        "method": delta.method,
        "recipe": delta.recipe,
        "base": delta.base.id,
        "tensors": len(delta.changes),
        "changed": sum(c.changed for c in delta.changes.values()),
    }


def named(given: Given) -> str | None:
    """What a part is called in a recipe: the last part of a path, as the rest tells about one machine only."""
    return None if isinstance(given, Delta) else Path(given).name
