"""Two models, tensor by tensor: which names belong together, which entries differ, in which unit to say so.

Bits are compared, not values: -0.0 is not 0.0, and a NaN equals itself. A difference of two tensors
(`tuned - base`) would be smaller to write about, but adding it back does not give the tuned weight back in
low precision.

Names: tied tensors (one storage, several names) are compared once, and either side may lack an alias. A
module's buffers may be missing on the other side. Anything else that only one side has is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from finetooth.base import Base, Files, Held, bits, dtype_name, fingerprint
from finetooth.codec import Change, DeltaError, Origin, require_finite
from finetooth.selection import Selection
from finetooth.units import Unit

_MATRIX = (Unit("element"), Unit("row"), Unit("column"), Unit("matrix"))
_VECTOR = (Unit("element"), Unit("matrix"))
_PIECE = 1 << 18  # units that are written at a time
_TWINS = 4  # so many names without a partner can be tied embeddings; more are another model


class Comparison:
    """Two models side by side. Iterating, once, reads them: (name, change, the old values) of every tensor that differs."""

    def __init__(self, tuned: Base, base: Base, model: Any = None):
        self.tuned, self.base, self.weights = tuned, base, 0
        self.found, self.tied = pair(tuned, base, model)

    def __iter__(self) -> Iterator[tuple[str, Change, Tensor]]:
        for name, a, b in self.found:
            new = self.tuned.tensor(a)
            self.weights += new.numel()
            step = change(name, self.base.tensor(b), new)
            if step is not None:
                yield name, *step

    def origin(self) -> Origin:
        """What the difference belongs to; known when the iteration is over."""
        in_memory = self.tuned if isinstance(self.tuned, Held) else None  # a model in memory knows its base
        known = self.base if self.base.id else in_memory
        return Origin(known.id, known.revision, self.weights) if known else Origin(weights=self.weights)


def change(name: str, old: Tensor, new: Tensor) -> tuple[Change, Tensor] | None:
    """What leads from `old` to `new` and the old values under it, in the cheapest unit; None if nothing does."""
    old, new = old.detach().cpu().contiguous(), new.detach().cpu().contiguous()
    differs = bits(old) != bits(new)
    changed = int(differs.count_nonzero())  # a sum of flags takes eight bytes for each
    if changed == 0:
        return None
    selection = _cheapest(differs, old.element_size())
    values, before = gather(selection, new), gather(selection, old)
    require_finite(name, values)
    whole, part = (fingerprint(old), fingerprint(new)), (fingerprint(before), fingerprint(values))
    return Change(selection, values, changed, *whole, *part), before


def gather(selection: Selection, x: Tensor) -> Tensor:
    """`selection.gather` on the bits: NaN payloads survive, and every dtype can be indexed. On the device of `x`."""
    there = Selection(selection.index.to(x.device), selection.unit, selection.shape)
    return there.gather(bits(x.contiguous())).view(x.dtype)


def scatter_(selection: Selection, x: Tensor, values: Tensor) -> None:
    """`selection.scatter_` on the bits; `x` may be on another device, and need not be contiguous."""
    if x.is_contiguous():
        size = _PIECE if x.device.type == "cpu" else max(1, len(selection))  # torch takes ids in int64, which need room
        for ids, new in zip(torch.split(selection.index, size), torch.split(values, size), strict=True):
            there = Selection(ids.to(x.device), selection.unit, selection.shape)
            there.scatter_(bits(x), bits(new.to(x.device)))
    else:
        whole = x.contiguous()
        scatter_(selection, whole, values)
        bits(x).copy_(bits(whole))


def _cheapest(differs: Tensor, itemsize: int) -> Selection:
    shape = tuple(differs.shape)
    best, price = None, 0
    for unit in _MATRIX if len(shape) > 1 else _VECTOR:
        hit = differs if unit.kind == "element" else unit.grid(differs).any(-1)
        width = 4 if unit.count(shape) <= 2**31 else 8
        cost = int(hit.count_nonzero()) * (width + unit.numel(shape) * itemsize)
        if best is None or cost < price:
            best, price = (unit, hit, width), cost
    assert best is not None
    unit, hit, width = best
    index = hit.reshape(-1).nonzero().squeeze(1).to(torch.int32 if width == 4 else torch.int64)
    return Selection(index, unit, shape)


def pair(tuned: Base, base: Base, model: Any = None) -> tuple[list[tuple[str, str, str]], dict[str, str]]:
    """Which tensors belong together: [(name, name in tuned, name in base)] and the tied names {alias: name}.

    Raises DeltaError naming the first tensor that has no partner, or another shape or dtype there.
    """
    tied = _ties(tuned, base)
    mine, theirs = set(tuned.names()), set(base.names())
    names = [n for n in dict.fromkeys([*tuned.names(), *base.names()]) if n not in tied]
    places = {n: (place(n, mine, tied), place(n, theirs, tied)) for n in names}
    lone = _lone(tuned, base, places, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    both = [n for n, (a, b) in places.items() if a is not None and b is not None]
    twins = {n: _twin(tuned if places[n][1] is None else base, n, both) for n in lone[:_TWINS]}
    if len(lone) > _TWINS or None in twins.values():
        _refuse_names(lone, tuned, base)
    tied |= {n: twin for n, twin in twins.items() if twin is not None}
    found = [(n, a, b) for n, (a, b) in places.items() if a is not None and b is not None]
    if not found:
        raise DeltaError("the two models have no tensor in common.")
    _same_kind(found, tuned, base)
    return found, tied


def place(name: str, there: set[str], tied: dict[str, str]) -> str | None:
    """Under which name a side has the tensor: its own, or that of an alias."""
    return next((n for n in (name, *(a for a, of in tied.items() if of == name)) if n in there), None)


def _ties(tuned: Base, base: Base) -> dict[str, str]:
    """Aliases that one side ties and the other does not contradict by holding other values under them."""
    known = dict(tuned.tied)
    for alias, name in base.tied.items():
        name = known.get(name, name)
        if alias not in known and alias not in known.values() and alias != name:
            known[alias] = name
    return {a: n for a, n in known.items() if all(_equal(side, a, n) for side in (tuned, base))}


def _equal(side: Base, alias: str, name: str) -> bool:
    names = side.names()
    if alias not in names or name not in names or side.tied.get(alias) == name:
        return True
    return side.shape_dtype(alias) == side.shape_dtype(name) and _same_bits(side.tensor(alias), side.tensor(name))


def _lone(tuned: Base, base: Base, places: dict[str, Any], ignored: Iterable[str]) -> list[str]:
    """Names that only one side has, but for buffers and for what transformers ignores in a checkpoint."""
    mine = [n for n, (a, b) in places.items() if b is None and n not in tuned.optional]
    theirs = [n for n, (a, b) in places.items() if a is None and n not in base.optional]
    return mine + [n for n in theirs if not any(re.search(pattern, n) for pattern in ignored)]


def _twin(side: Base, name: str, shared: list[str]) -> str | None:
    """The shared tensor that `name` is a copy of: a tied embedding, saved twice on one side."""
    kind = side.shape_dtype(name)
    if len(kind[0]) < 2:
        return None
    t = side.tensor(name)
    if t.numel() == 0 or bool((bits(t) == bits(t).reshape(-1)[0]).all()):
        return None
    here = set(side.names())
    return next(
        (n for n in shared if n in here and side.shape_dtype(n) == kind and _same_bits(t, side.tensor(n))), None
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(bits(a).cpu(), bits(b).cpu()))


def _refuse_names(lone: list[str], tuned: Base, base: Base) -> None:
    side = "the base" if lone[0] in tuned.names() else "the tuned model"
    more = f" and {len(lone) - 1} more names have no partner" if len(lone) > 1 else ""
    hint = ""
    if isinstance(base, Files) != isinstance(tuned, Files):
        hint = (
            " Names in memory can differ from those of a checkpoint (mixture-of-experts models join their experts "
            "when they are loaded): give the base as a state dict taken before training, or as the optimizer."
        )
    raise DeltaError(f"'{lone[0]}' is missing in {side}{more}.{hint}")


def _same_kind(found: list[tuple[str, str, str]], tuned: Base, base: Base) -> None:
    wrong = []
    for name, a, b in found:
        new, old = tuned.shape_dtype(a), base.shape_dtype(b)
        if new != old:
            wrong.append(f"'{name}' is {_kind(new)} in the tuned model and {_kind(old)} in the base")
    if wrong:
        more = f" ({len(wrong) - 1} more tensors differ too)" if len(wrong) > 1 else ""
        hint = ""
        if isinstance(base, Files) and isinstance(tuned, Held):
            hint = " If the model was loaded in another precision, give the base as a state dict or as the optimizer."
        raise DeltaError(f"{wrong[0]}{more}: a delta needs the same shapes and dtypes on both sides.{hint}")


def _kind(kind: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{dtype_name(kind[1])} {list(kind[0])}"
