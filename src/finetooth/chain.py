"""Deltas made one on top of the other: in which order, and as one delta.

    base -> D1 -> base + D1 -> D2 -> base + D1 + D2

D2 belongs to the result of D1. Where both change a tensor, its fingerprints say so. Where they do not, nothing in the two
files would keep D2 from being applied to a base without D1; `link` therefore notes in D2 what D1 left of the tensors that D2
does not touch: `base.after`, {name: fingerprint}. Applying checks it like every other fingerprint. (The digest of D1 in its
place would be shorter, and could be checked against nothing but D1: not against a model.)

`compose` is exact: it writes what the chain writes, tensor by tensor, and compares the end with the start.

Not covered: taking D1 off while D2 is still on. Its inverse fits wherever D2 did not touch a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from finetooth.base import fingerprint, open_base
from finetooth.codec import Change
from finetooth.delta import Delta, DeltaError, WrongBase
from finetooth.diff import change, gather, place, scatter_
from finetooth.fit import require_after
from finetooth.moves import Given, claims, described, named, names_of, new_values, opened


def link(delta: Given, after: Sequence[Given], base: Any) -> Delta:
    """`delta` with a note that it was made on top of the deltas `after`, in their order.

    `base` is what `delta` was made from, anything that `open_base` opens: it must be what these deltas leave.
    Raises DeltaError if it is not, or if `delta` belongs to something else.
    """
    (last,), before = opened([delta]), opened(after)
    aliases = names_of([*before, last])[1]
    state = _state(before, aliases)
    with open_base(base).opened() as held:
        require_after(state, held)
        if last.verify(held) != "base":
            raise DeltaError(f"base= is the result of the delta: give what it was made from ({last.base}).")
    mine = {aliases.get(name, name) for name in last.changes}
    noted = {name: found for name, found in state.items() if name not in mine}
    return replace(last, base=replace(last.base, after=noted))


def compose(deltas: Sequence[Given], base: Any) -> Delta:
    """A chain as one delta on the base of its first: applying it gives, bit for bit, what applying them in turn gives.

    Raises DeltaError, before anything is read of the base, if a delta does not belong on top of those before it, and
    WrongBase if `base` is not that of the first.

    >>> import torch
    >>> base, one, two = ({"w": torch.tensor(x)} for x in ([0.0, 0.0], [1.0, 0.0], [1.0, 2.0]))
    >>> both = compose([Delta.extract(one, base), Delta.extract(two, one)], base)
    >>> both.verify(two)
    'applied'
    """
    found = opened(deltas)
    own, aliases = names_of(found)
    _state(found, aliases)
    changes: dict[str, Change] = {}
    with open_base(base).opened() as held:
        require_after(found[0].base.after, held)
        there = set(held.names())
        for name in dict.fromkeys(name for known in own for name in known):
            at = place(name, there, aliases)
            if at is None:
                raise DeltaError(f"the base has no '{name}', which a delta changes.")
            old = held.tensor(at).detach().cpu().contiguous()
            steps = [d.changes[known[name]] for d, known in zip(found, own, strict=True) if name in known]
            step = change(name, old, _through(name, old, steps))
            if step is not None:
                changes[name] = step[0]
    after = {n: was for n, was in found[0].base.after.items() if n not in changes}
    first = replace(found[0].base, after=after)
    parts = [described(d, named(g)) for d, g in zip(found, deltas, strict=True)]
    return Delta(changes, aliases, first, "chain", {"chain": {"parts": parts}})


def _through(name: str, old: Tensor, steps: Sequence[Change]) -> Tensor:
    """The tensor after all of its changes, every one of them checked."""
    now = old.clone()
    for c in steps:
        if tuple(now.shape) != c.selection.shape or fingerprint(now) != c.fingerprint:
            raise WrongBase(
                f"'{name}' is not what the chain starts from: expected {c.fingerprint}, as {c.selection.shape}."
            )
        values = new_values(c, gather(c.selection, now))
        if values.dtype != now.dtype:
            raise DeltaError(f"'{name}' is {now.dtype} in the base, and {values.dtype} in a delta.")
        scatter_(c.selection, now, values)
        if fingerprint(now) != c.result:
            raise DeltaError(f"the values of '{name}' do not give the tensor that the delta promises ({c.result}).")
    return now


def _state(deltas: Sequence[Delta], aliases: Mapping[str, str]) -> dict[str, str]:
    """What a chain leaves: the fingerprint of every tensor it changed. DeltaError if its order cannot be shown."""
    state: dict[str, str] = {}
    for i, d in enumerate(deltas):
        said = claims(d, aliases)
        for name, found in said.items():
            if state.get(name, found) != found:
                raise DeltaError(
                    f"delta {i + 1} (made for {d.base}) does not go on top of those before it: they leave '{name}' as "
                    f"{state[name]}, it was made for {found}. Deltas of one base are merged (finetooth delta merge)."
                )
        if i and not state.keys() & said.keys():
            raise DeltaError(
                f"delta {i + 1} (made for {d.base}) changes other tensors than those before it and does not say that it was "
                "made on top of them. If it was, note it (finetooth delta link); if they share a base, merge them."
            )
        if i == 0:
            state |= {aliases.get(n, n): found for n, found in d.base.after.items()}
        state |= {aliases.get(n, n): c.result for n, c in d.changes.items()}
    return state
