"""The result of a fine-tune: which units changed, their new values, and what base they belong to.

    apply(base, delta) = the tuned model, and apply(tuned, inverse) = the base, bit for bit

New values are stored, not differences: adding a difference back does not reproduce a bf16 weight. Because of
that, applying needs no arithmetic, and taking a delta off needs the values that were there before: `apply`
returns them as the inverse delta, and so does `inverse` where the base can be read.

Everything is checked before the first write: names, shapes, dtypes, the fingerprint of every touched tensor
before, and what its fingerprint will be after. A check reads and hashes each touched tensor twice. If a write
fails all the same (a lost device, an interrupt), what was written is put back.

Not covered: tensors that the delta does not touch are not fingerprinted, so a base that differs only there
passes; extracting a delta holds all changed values in memory; a delta is not applied to a sharded model (DTensor), only extracted from one; a delta
made of two checkpoints without `lm_head.weight` does not know that this name is tied, so a state dict that
holds a *copy* under it keeps the copy as it is (a module, whose names share storage, is fine).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from finetooth import checkpoint, codec
from finetooth.base import Base, Held, bits, dtype_name, fingerprint, open_base, raw
from finetooth.codec import Change, DeltaError, Origin, Parts
from finetooth.diff import change, gather, pair, require_after, scatter_
from finetooth.files import whole
from finetooth.shards import sharded

__all__ = ["Change", "Delta", "DeltaError", "Origin", "WrongBase", "apply_folder"]

State = Literal["base", "applied"]


class WrongBase(DeltaError):
    """The target holds other weights than the delta was made for. Nothing has been changed."""


@dataclass(frozen=True, eq=False)
class Delta:
    """Changes by tensor name, and what they belong to.

    >>> base = {"w": torch.zeros(2, 2)}
    >>> delta = Delta.extract({"w": torch.tensor([[0.0, 1.0], [0.0, 0.0]])}, base)
    >>> inverse = delta.apply(base); base["w"]
    tensor([[0., 1.],
            [0., 0.]])
    >>> _ = inverse.apply(base); base["w"].any().item()
    False
    """

    changes: Mapping[str, Change]
    tied: Mapping[str, str] = field(default_factory=dict)  # alias -> name
    base: Origin = field(default_factory=Origin)
    method: str | None = None
    recipe: Any = None  # JSON
    library: str = ""
    # The values that `changes` replace, where they are known: after `extract` and after `apply`. Never saved.
    _before: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def extract(
        model: Any, base: Any, recipe: Any = None, method: str | None = None, *, keep_base: bool = True
    ) -> Delta:
        """What training did: the entries of `model` whose bits differ from those of `base`.

        `model` and `base` are each anything that `open_base` opens: a module, a state dict, a folder or file of
        safetensors, a hub id, and for the base the optimizer. Both are read tensor by tensor. For every tensor
        the unit (element, row, column, matrix) with the fewest bytes is taken. `keep_base=False` saves the
        memory of the replaced values; `reverted` and `inverse` then need to be told them.

        Raises DeltaError if the two do not have the same tensors, or a new value is not finite.
        """
        try:
            with open_base(model).opened() as tuned, open_base(base).opened() as old:
                delta = _compare(tuned, old, model, keep_base)
        except DeltaError:
            raise
        except ValueError as e:
            raise DeltaError(str(e)) from e
        return replace(delta, recipe=recipe, method=method)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, all or nothing: a temporary file beside it takes its place when complete.

        Raises NotWritten, an OSError that says how much room there is, if the disk is full.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temp:
            codec.write(self._parts(), temp)

    @staticmethod
    def load(path: str | Path) -> Delta:
        """Read a file and check all of it; DeltaError says what is wrong with it.

        `path` may also be a folder that holds delta.safetensors, such as a run's, or `org/name[@revision]` on the hub.
        """
        parts = codec.read(checkpoint.delta_file(path))
        return Delta(parts.changes, parts.tied, parts.base, parts.method, parts.recipe, parts.library)

    def apply(self, target: nn.Module | dict[str, Tensor]) -> Delta:
        """Write the new values into `target`, in place, all or nothing, and return the inverse delta.

        Raises WrongBase if a touched tensor is not the one the delta was made for, DeltaError if names, shapes
        or dtypes do not fit. In both cases `target` is as it was.
        """
        held = _live(target)
        before = self._check(held)
        self._before.update(before)
        self._write(held, before)
        return self.inverse()

    def inverse(self, base: Any = None) -> Delta:
        """The delta that takes this one off. After `extract` or `apply` it is known; else `base` has to be given."""
        before = self._before if base is None else self._check(open_base(base))
        if set(before) != set(self.changes):
            raise DeltaError(
                "this delta holds the new values only, as a file does: its inverse is what apply returns, or give "
                f"base= ({self.base})."
            )
        changes = {
            name: replace(c, values=before[name], fingerprint=c.result, result=c.fingerprint)
            for name, c in self.changes.items()
        }
        base_now = replace(self.base, tuned=not self.base.tuned)
        return replace(self, changes=changes, base=base_now, _before=self._values())

    @contextmanager
    def reverted(self, model: nn.Module | dict[str, Tensor], *, check: bool = True) -> Iterator[Any]:
        """The base for the length of a block, the tuned weights again afterwards, also after an exception.

        The weights must not be trained inside the block. `check=False` leaves the fingerprints out, for a
        reference model that is needed at every step.
        """
        inverse = self.inverse()
        held = _live(model)
        if check:
            inverse._check(held)
        inverse._write(held, self._values())
        try:
            yield model
        finally:
            self._write(_live(model), inverse._values())

    def verify(self, target: Any) -> State:
        """'base' or 'applied': which of the two all touched tensors are. Anything else is WrongBase.

        `target` is anything that `open_base` opens; it is only read.
        """
        first: dict[State, str] = {}
        with open_base(target).opened() as held:
            for name, places in self._fits(held).items():
                for place in places:
                    first.setdefault(self._state(name, place, fingerprint(held.tensor(place))), place)
        if len(first) == 2:
            raise WrongBase(
                f"partly applied: '{first['base']}' is still the base's, '{first['applied']}' the tuned one."
            )
        return "base" if "base" in first else "applied"

    def info(self) -> dict[str, Any]:
        """What the delta is, as plain data for a table or JSON."""
        changed = sum(c.changed for c in self.changes.values())
        units: dict[str, int] = {}
        for c in self.changes.values():
            units[str(c.selection.unit)] = units.get(str(c.selection.unit), 0) + 1
        head, tensors = codec.encode(self._parts())
        size = len(head) + sum(t.numel() * t.element_size() for t in tensors)
        return {
            "tensors": len(self.changes),
            "changed": changed,
            "weights": self.base.weights,
            "share": changed / self.base.weights if self.base.weights else None,
            "bytes": size,
            "bytes_per_weight": size / changed if changed else None,
            "units": units,
            "base": self.base.id,
            "revision": self.base.revision,
            "inverse": self.base.tuned,
            "method": self.method,
            "recipe": self.recipe,
            "library": self.library,
            "tied": dict(self.tied),
        }

    def _parts(self) -> Parts:
        return Parts(self.changes, self.tied, self.base, self.method, self.recipe, self.library or _library())

    def _values(self) -> dict[str, Tensor]:
        return {name: c.values for name, c in self.changes.items()}

    def _fits(self, held: Base) -> dict[str, list[str]]:
        """Where `held` has each changed tensor: under its name, and under aliases that are copies of their own.

        Raises DeltaError if it has not, or has it in another shape or dtype.
        """
        there, groups = set(held.names()), {name: [name] for name in self.changes}
        for alias, name in self.tied.items():
            groups.get(name, []).append(alias)
        places = {name: [n for n in group if n in there] for name, group in groups.items()}
        lost = [name for name, found in places.items() if not found]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise DeltaError(f"the target has no '{lost[0]}'{more}: the delta was made for {self.base}.")
        owners: dict[str, str] = {}
        for name, found in places.items():
            for n in found:
                self._same_kind(name, n, held)
                storage = held.tied.get(n, n)
                if owners.setdefault(storage, name) != name:
                    raise DeltaError(
                        f"the target ties '{owners[storage]}' and '{name}', which the delta changes apart."
                    )
        return {name: [n for n in found if held.tied.get(n) not in found] for name, found in places.items()}

    def _same_kind(self, name: str, place: str, held: Base) -> None:
        c = self.changes[name]
        shape, dtype = held.shape_dtype(place)
        if (shape, dtype) != (c.selection.shape, c.values.dtype):
            expected = f"{dtype_name(c.values.dtype)} {list(c.selection.shape)}"
            raise DeltaError(f"'{place}' is {dtype_name(dtype)} {list(shape)}, and {expected} in the delta.")

    def _state(self, name: str, place: str, found: str) -> State:
        c = self.changes[name]
        if found == c.result:
            return "applied"
        if found == c.fingerprint:
            return "base"
        raise WrongBase(
            f"'{place}' is neither the base's nor the tuned one: found {found}, the base ({self.base}) has "
            f"{c.fingerprint}, the tuned model {c.result}."
        )

    def _check(self, held: Base) -> dict[str, Tensor]:
        """Everything that could be wrong, before the first write. Returns the values that will be replaced."""
        before = {}
        with held.opened():
            require_after(self.base.after, held)
            for name, places in self._fits(held).items():
                for n in reversed(places):
                    t = held.tensor(n).detach().cpu().contiguous()
                    found = fingerprint(t)
                    if found != self.changes[name].fingerprint:
                        self._refuse(held, name, n, found)
                before[name] = gather(self.changes[name].selection, t)
                self._promise(name, t, before[name])
        return before

    def _refuse(self, held: Base, name: str, place: str, found: str) -> NoReturn:
        try:
            applied = self.verify(held) == "applied"
        except WrongBase:
            applied = False
        if applied:
            raise WrongBase(f"already applied: the target holds the result of this delta (base: {self.base}).")
        expected = self.changes[name].fingerprint
        raise WrongBase(f"'{place}' is not that of {self.base}: expected {expected}, found {found}.")

    def _promise(self, name: str, t: Tensor, before: Tensor) -> None:
        """Writing the new values into `t` must give exactly what the delta says."""
        c = self.changes[name]
        changed = int((bits(before) != bits(c.values)).sum())
        if changed != c.changed:
            raise DeltaError(f"the delta says that it changes {c.changed} entries of '{name}': it changes {changed}.")
        after = t.clone()
        scatter_(c.selection, after, c.values)
        if fingerprint(after) != c.result:
            raise DeltaError(f"the values of '{name}' do not give the tensor that the delta promises ({c.result}).")

    @torch.no_grad()
    def _write(self, held: Held, before: Mapping[str, Tensor]) -> None:
        done: list[tuple[str, str]] = []
        try:
            for name, places in self._fits(held).items():
                for n in places:
                    done.append((name, n))
                    scatter_(self.changes[name].selection, held.tensor(n), self.changes[name].values)
        except BaseException:
            for name, n in done:
                scatter_(self.changes[name].selection, held.tensor(n), before[name])
            raise


def apply_folder(src: str | Path, dst: str | Path, delta: Delta) -> Delta:
    """Write `dst`, a checkpoint folder that is `src` with the delta applied; returns the inverse delta.

    Shard by shard, tensor by tensor; configuration and tokenizer are copied. `dst` must not exist, and does
    not until it is complete. Raises as `Delta.apply` does.
    """
    src, dst = checkpoint.resolve(src), Path(dst)
    if not src.is_dir():
        raise DeltaError(f"{src} is not a folder: give the folder of a checkpoint.")
    checkpoint.refuse_target(src, dst)
    with open_base(src).opened() as held:
        delta._before.update(delta._check(held))
        owner = {n: name for name, places in delta._fits(held).items() for n in places}

        def new_bytes(n: str) -> memoryview:
            c, t = delta.changes[owner[n]], held.tensor(n).clone()
            scatter_(c.selection, t, c.values)
            return raw(t)

        checkpoint.copy_changed(src, dst, owner, new_bytes)
    return delta.inverse()


def _compare(tuned: Base, old: Base, model: Any, keep_base: bool) -> Delta:
    found, tied = pair(tuned, old, model)
    changes, before, weights = {}, {}, 0
    for name, a, b in found:
        new = tuned.tensor(a)
        weights += new.numel()
        step = change(name, old.tensor(b), new)
        if step is not None:
            changes[name] = step[0]
            if keep_base:
                before[name] = step[1]
    known: Base | None = (
        old if old.id else tuned if isinstance(tuned, Held) else None
    )  # a model in memory knows its base
    origin = Origin(known.id, known.revision, weights) if known else Origin(weights=weights)
    return Delta(changes, tied, origin, library=_library(), _before=before)


def _live(target: Any) -> Held:
    if not isinstance(target, (nn.Module, dict)):
        raise DeltaError(f"a delta is applied to a module or a state dict, not to a {type(target).__name__}.")
    held = open_base(target)
    assert isinstance(held, Held)
    if lost := next((name for name, t in held.tensors.items() if sharded(t)), None):
        raise DeltaError(f"'{lost}' is sharded over ranks: apply a delta, or take it off, before the model is sharded.")
    return held


def _library() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"finetooth {version('finetooth')}"
    except PackageNotFoundError:
        return "finetooth"
