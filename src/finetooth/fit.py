"""Whether a delta fits what it is put on: names, shapes and dtypes, the tensor before, and the tensor it will give.

    hash(t) = fingerprint,  t[chosen] <- new,  hash(t) = result

Both hashes are taken of the same copy in memory: a tensor is read once. `quick` hashes only the values under the chosen
units, before (`replaced`) and new (`written`), which version 2 files state. It does not see that an entry which the delta
does not touch is another one, nor that an index was changed where the old values happen to be equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, NoReturn

from torch import Tensor

from finetooth.base import Base, Files, bits, dtype_name, fingerprint
from finetooth.codec import Change, DeltaError, Parts
from finetooth.diff import gather, scatter_

State = Literal["base", "applied"]
JOINED = (
    " A mixture of experts has other names in a checkpoint than in memory, where transformers joins its experts: load the base with "
    "transformers, and apply the delta to that model, in Python."
)


class WrongBase(DeltaError):
    """The target holds other weights than the delta was made for. Nothing has been changed."""


def places(parts: Parts, held: Base) -> dict[str, list[str]]:
    """Where `held` has each changed tensor: under its name, and under aliases that are copies of their own.

    Raises DeltaError if it has not, or has it in another shape or dtype.
    """
    there, groups = set(held.names()), {name: [name] for name in parts.changes}
    for alias, name in parts.tied.items():
        groups.get(name, []).append(alias)
    found_at = {name: list(filter(None, (known(n, there, held) for n in group))) for name, group in groups.items()}
    lost = [name for name, found in found_at.items() if not found]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        hint = JOINED if isinstance(held, Files) and len(parts.changes[lost[0]].kind[0]) == 3 else ""
        raise DeltaError(f"the target has no '{lost[0]}'{more}: the delta was made for {parts.base}.{hint}")
    owners: dict[str, str] = {}
    for name, found in found_at.items():
        kind = parts.changes[name].kind
        for n in found:
            _same_kind(kind, n, held)
            storage = held.tied.get(n, n)
            if owners.setdefault(storage, name) != name:
                raise DeltaError(f"the target ties '{owners[storage]}' and '{name}', which the delta changes apart.")
    return {name: [n for n in found if held.tied.get(n) not in found] for name, found in found_at.items()}


def known(name: str, there: set[str], held: Base) -> str | None:
    """What `held` calls a tensor: files may leave out the name of the inner model, as GPT-2's on the hub leave out "transformer"."""
    bare = name.partition(".")[2]
    return name if name in there else bare if isinstance(held, Files) and bare in there else None


def _same_kind(kind: Any, place: str, held: Base) -> None:
    shape, dtype = held.shape_dtype(place)
    if (shape, dtype) != kind:
        expected = f"{dtype_name(kind[1])} {list(kind[0])}"
        raise DeltaError(f"'{place}' is {dtype_name(dtype)} {list(shape)}, and {expected} in the delta.")


def require_quick(parts: Parts) -> None:
    """Raise unless the delta says what the values are that it replaces."""
    for name, change in parts.changes.items():
        if change.replaced is None or change.written is None:
            raise DeltaError(
                f"the delta has no fingerprint of the values that it replaces in '{name}' (version 1 files have none): "
                "leave quick out, or write the file again with `finetooth delta pack --base`."
            )


def before(parts: Parts, held: Base, name: str, place: str, change: Change, t: Tensor, quick: bool) -> Tensor:
    """The values that `change` replaces in `t`, which lies at `place`; WrongBase if they, or all of t, are other ones."""
    old = gather(change.selection, t)
    found, expected = fingerprint(old if quick else t), change.replaced if quick else change.fingerprint
    if found != expected:
        _refuse(parts, held, place, found, str(expected), quick)
    return old


def _refuse(parts: Parts, held: Base, place: str, found: str, expected: str, quick: bool) -> NoReturn:
    applied = False
    with suppress(WrongBase):
        applied = verify(parts, held, quick) == "applied"
    if applied:
        raise WrongBase(f"already applied: the target holds the result of this delta (base: {parts.base}).")
    if quick:
        raise WrongBase(
            f"the replaced values of '{place}' are not those of {parts.base}: {expected} expected, {found} found."
        )
    raise WrongBase(f"'{place}' is not that of {parts.base}: expected {expected}, found {found}.")


def promised(name: str, change: Change, old: Tensor, t: Tensor | None) -> Tensor:
    """The new values, written into `t`, checked to be what the delta promises: the count of changed entries, and the tensor.

    Where `t` is None, only the values are looked at.
    """
    new = change.new(old)
    changed = int((bits(old.cpu()) != bits(new)).count_nonzero())
    if changed != change.changed:
        raise DeltaError(f"the delta says that it changes {change.changed} entries of '{name}': it changes {changed}.")
    if t is not None:
        scatter_(change.selection, t, new)
    found, expected = (fingerprint(new), change.written) if t is None else (fingerprint(t), change.result)
    if found != expected:
        raise DeltaError(f"the values of '{name}' do not give the tensor that the delta promises ({expected}).")
    return new


def require_after(after: Mapping[str, str], held: Base) -> None:
    """DeltaError unless `held` has the tensors that the earlier deltas of a chain left (`Origin.after`)."""
    there = set(held.names())
    for name, expected in after.items():
        found = fingerprint(held.tensor(name)) if name in there else "no such tensor"
        if found != expected:
            raise DeltaError(
                f"this delta was made on top of others, and '{name}' is not as they leave it: expected {expected}, found "
                f"{found}. Apply the chain in its order: finetooth delta apply BASE FIRST SECOND …"
            )


def verify(parts: Parts, held: Base, quick: bool) -> State:
    """Which of the two all touched tensors are; WrongBase for anything else."""
    first: dict[State, str] = {}
    with held.opened():
        for name, where in places(parts, held).items():
            change = parts.changes[name]
            for place in where:
                first.setdefault(_state(parts, change, place, held.tensor(place), quick), place)
    if len(first) == 2:
        raise WrongBase(f"partly applied: '{first['base']}' is still the base's, '{first['applied']}' the tuned one.")
    return "base" if "base" in first else "applied"


def _state(parts: Parts, c: Change, place: str, t: Tensor, quick: bool) -> State:
    found = fingerprint(gather(c.selection, t) if quick else t)
    old, new = (c.replaced, c.written) if quick else (c.fingerprint, c.result)
    if found == new:
        return "applied"
    if found == old:
        return "base"
    raise WrongBase(
        f"'{place}' is neither the base's nor the tuned one: found {found}, the base ({parts.base}) has "
        f"{old}, the tuned model {new}."
    )
