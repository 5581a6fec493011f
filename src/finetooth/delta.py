"""The result of a fine-tune: which units changed, their new values, and what base they belong to.

    apply(base, delta) = the tuned model, and apply(tuned, inverse) = the base, bit for bit

New values are stored, not differences: adding a difference back does not reproduce a bf16 weight. (Where a file has them
coded against the base, the steps count bit patterns, which come back exactly.) Because of that, applying needs no
arithmetic, and taking a delta off needs the values that were there before: `apply` returns them as the inverse
delta, and so does `inverse` where the base can be read.

Everything is checked before the first write (`fit.py`): names, shapes, dtypes, the fingerprint of every touched tensor
before, and what its fingerprint will be after. If a write fails all the same (a lost device, an interrupt), what was
written is put back. `quick` looks at the replaced values only.

A loaded delta reads its tensors from the file one at a time, when they are needed; `archive.py` says what happens if the
file changes meanwhile. Applying to a folder holds one tensor and its change. Applying in memory holds the inverse, and one tensor.

Not covered: tensors that the delta does not touch are not fingerprinted, so a base that differs only there
passes; a delta is not applied to a sharded model (DTensor), only extracted from one; a delta
made of two checkpoints without `lm_head.weight` does not know that this name is tied, so a state dict that
holds a *copy* under it keeps the copy as it is (a module, whose names share storage, is fine).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import archive, checkpoint, codec, fit
from finetooth.base import Base, Files, Held, open_base, raw
from finetooth.codec import Change, DeltaError, Origin, Parts
from finetooth.diff import Comparison, gather, scatter_
from finetooth.files import room, whole
from finetooth.fit import State, WrongBase
from finetooth.made import Made, taken_off, written_out
from finetooth.shards import sharded

__all__ = ["Change", "Delta", "DeltaError", "Origin", "WrongBase", "apply_folder"]


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

    changes: Mapping[str, Change]  # of a loaded delta a look-up reads the file
    tied: Mapping[str, str] = field(default_factory=dict)  # alias -> name
    base: Origin = field(default_factory=Origin)
    method: str | None = None
    recipe: Any = None  # JSON
    library: str = ""
    # What takes this delta off, where it is known: after `extract` and after `apply`. Never saved.
    _back: Mapping[str, Change] = field(default_factory=dict, repr=False, compare=False)

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
        changes, back = dict[str, Change](), dict[str, Change]()
        with _compared(model, base) as found:
            for name, step, before in found:
                changes[name] = step
                if keep_base:
                    back[name] = step.back(before)
        return Delta(changes, found.tied, found.origin(), method, recipe, _library(), back)

    @staticmethod
    def extract_to(
        path: str | Path, model: Any, base: Any, recipe: Any = None, method: str | None = None, *, steps: bool = False
    ) -> Delta:
        """`extract` straight into a file, tensor by tensor: the memory of two tensors. Returns the file's delta.

        `steps` codes the values against the base, as `save(against=)` does. Where nothing differs no file is written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _compared(model, base) as found, room(path), codec.writer(path) as out:
            for name, step, before in found:
                out.add(name, step, before if steps else None)
            names: Any = dict.fromkeys(out.entries)
            delta = Delta(names, found.tied, found.origin(), method, recipe, _library())
            if not names:
                return delta
            with whole(path) as temp:
                out.finish(delta._parts(), temp)
        return Delta.load(path)

    def save(self, path: str | Path, *, against: Any = None, plain: bool = False) -> None:
        """Write one safetensors file, all or nothing: a temporary file beside it takes its place when complete.

        Ids and values are coded as small as each tensor allows. `against`, the base (anything that `open_base` opens),
        codes values against those that they replace; such a file is smaller, and needs the base to be read as well as to
        be applied. `plain` codes nothing: a file of version 1.

        Raises WrongBase if `against` is not the base, DeltaError if values that are coded against a base shall be
        plain, NotWritten (an OSError that says how much room there is) if the disk is full.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        held = None if against is None else open_base(against)
        with nullcontext() if held is None else held.opened(), whole(path) as temp:
            codec.write(self._parts(), temp, None if held is None else self._reader(held), plain)

    @staticmethod
    def load(path: str | Path) -> Delta:
        """Open a file and check all of it; DeltaError says what is wrong with it. Its tensors are read when asked for.

        `path` may also be a folder that holds delta.safetensors, such as a run's, or `org/name[@revision]` on the hub.
        """
        parts = archive.read(checkpoint.delta_file(path))
        return Delta(parts.changes, parts.tied, parts.base, parts.method, parts.recipe, parts.library)

    def portable(self, base: Any) -> Delta:
        """The same delta with new values that can be read without the base, read from `base` when asked for.

        Raises WrongBase, when a tensor is asked for, if `base` is not the one that the delta was made for.
        """
        old = self._reader(open_base(base))
        return replace(self, changes=Made(self.changes, lambda n, c: written_out(c, lambda: old(n, c))))

    def apply(self, target: nn.Module | dict[str, Tensor], *, quick: bool = False) -> Delta:
        """Write the new values into `target`, in place, all or nothing, and return the inverse delta.

        `quick` checks only the values that are replaced, not the tensors around them.

        Raises WrongBase if a touched tensor is not the one the delta was made for, DeltaError if names, shapes
        or dtypes do not fit. In both cases `target` is as it was.
        """
        held = _live(target)
        self._check(held, quick)
        back = {name: replace(c, values=c.values.cpu()) for name, c in self._write(held).items()}
        object.__setattr__(self, "_back", back)
        return self._inverse(back)

    def inverse(self, base: Any = None, *, check: bool = True) -> Delta:
        """The delta that takes this one off. After `extract` or `apply` it is known; else `base` has to be given.

        Of a base in files, the old values are read when they are asked for. `check=False` reads nothing before that.
        """
        if base is None:
            if set(self._back) != set(self.changes):
                raise DeltaError(
                    "this delta holds the new values only, as a file does: its inverse is what apply returns, or give "
                    f"base= ({self.base})."
                )
            return self._inverse(self._back)
        held = open_base(base)
        if check:
            self._check(held)
        old = self._reader(held)
        if isinstance(held, Files):
            return self._inverse(Made(self.changes, lambda name, c: taken_off(c, lambda: old(name, c))))
        return self._inverse({name: c.back(old(name, c)) for name, c in self.changes.items()})

    @contextmanager
    def reverted(self, model: nn.Module | dict[str, Tensor], *, check: bool = True) -> Iterator[Any]:
        """The base for the length of a block, the tuned weights again afterwards, also after an exception.

        The weights must not be trained inside the block. `check=False` leaves the fingerprints out, for a
        reference model that is needed at every step.
        """
        inverse, held = self.inverse(), _live(model)
        if check:
            inverse._check(held)
        inverse._write(held)
        try:
            yield model
        finally:
            self._write(_live(model))

    def verify(self, target: Any, *, quick: bool = False) -> State:
        """'base' or 'applied': which of the two all touched tensors are. Anything else is WrongBase.

        `target` is anything that `open_base` opens; it is only read. `quick` looks at the replaced values only.
        """
        if quick:
            fit.require_quick(self._parts())
        return fit.verify(self._parts(), open_base(target), quick)

    def info(self) -> dict[str, Any]:
        """What the delta is, as plain data for a table or JSON."""
        changed = sum(c.changed for c in self.changes.values())
        units: dict[str, int] = {}
        for c in self.changes.values():
            units[str(c.unit)] = units.get(str(c.unit), 0) + 1
        stored = self.changes if isinstance(self.changes, archive.Archive) else None
        size = codec.size(self._parts()) if stored is None else stored.bytes
        return {
            "tensors": len(self.changes),
            "changed": changed,
            "weights": self.base.weights,
            "share": changed / self.base.weights if self.base.weights else None,
            "bytes": size,
            "bytes_per_weight": size / changed if changed else None,
            "units": units,
            "codings": None if stored is None else stored.codings(),
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

    def _inverse(self, back: Mapping[str, Change]) -> Delta:
        return replace(self, changes=back, base=replace(self.base, tuned=not self.base.tuned), _back=self.changes)

    def _check(self, held: Base, quick: bool = False) -> None:
        """Everything that could be wrong, before the first write."""
        parts = self._parts()
        if quick:
            fit.require_quick(parts)
        with held.opened():
            fit.require_after({} if quick else self.base.after, held)
            for name, where in fit.places(parts, held).items():
                c = self.changes[name]
                for n in reversed(where):
                    t = held.tensor(n).detach()
                    t = t if quick else t.cpu().contiguous()
                    old = fit.before(parts, held, name, n, c, t, quick)
                scratch = None if quick else t if isinstance(held, Files) else t.clone()
                fit.promised(name, c, old.cpu(), scratch)

    def _reader(self, held: Base) -> Callable[[str, Change], Tensor]:
        """A function that gives the values which a change replaces, checked, out of a base."""
        parts = self._parts()
        where = fit.places(parts, held)

        def old(name: str, c: Change) -> Tensor:
            t = held.tensor(where[name][0]).detach().cpu().contiguous()
            return fit.before(parts, held, name, where[name][0], c, t, c.replaced is not None)

        return old

    @torch.no_grad()
    def _write(self, held: Held) -> dict[str, Change]:
        """Write the new values; returns the changes that put the old ones back. If a write fails, none has happened."""
        done: list[tuple[Tensor, Change]] = []
        back: dict[str, Change] = {}
        try:
            for name, places in fit.places(self._parts(), held).items():
                c = self.changes[name]
                for n in places:
                    t = held.tensor(n)
                    back[name] = c.back(gather(c.selection, t))
                    done.append((t, back[name]))
                    scatter_(c.selection, t, c.new(back[name].values))
        except BaseException:
            for t, undo in done:
                scatter_(undo.selection, t, undo.values)
            raise
        return back


def apply_folder(
    src: str | Path, dst: str | Path, delta: Delta, *, inverse: str | Path | None = None, quick: bool = False
) -> Delta:
    """Write `dst`, a checkpoint folder that is `src` with the delta applied; returns the inverse delta, which reads `src`.

    Shard by shard, tensor by tensor, each read once; configuration and tokenizer are copied. `dst` must not exist, and does
    not until it is complete. `inverse` is a file to write the inverse delta to, likewise. Raises as `Delta.apply` does.
    """
    src, dst = checkpoint.resolve(src), Path(dst)
    if not src.is_dir():
        raise DeltaError(f"{src} is not a folder: give the folder of a checkpoint.")
    checkpoint.refuse_target(src, dst)
    if quick:
        fit.require_quick(delta._parts())
    inverse = None if inverse is None else Path(inverse)
    with open_base(src).opened() as held, codec.kept(inverse) as (add, finish):
        parts, where = delta._parts(), fit.places(delta._parts(), held)
        fit.require_after({} if quick else delta.base.after, held)
        owner = {place: name for name, places in where.items() for place in places}

        def new_bytes(place: str) -> memoryview:
            name = owner[place]
            c = delta.changes[name]
            c.fetch()
            t = held.tensor(place)
            old = fit.before(parts, held, name, place, c, t, quick)
            if place == where[name][0]:
                add(name, taken_off(c, lambda: old))
            fit.promised(name, c, old, None if quick else t)
            if quick:
                scatter_(c.selection, t, c.new(old))
            return raw(t)

        back = delta._inverse(delta.changes)._parts()
        checkpoint.copy_changed(src, dst, owner, new_bytes, lambda: finish(back))
    return delta.inverse(src, check=False)


@contextmanager
def _compared(model: Any, base: Any) -> Iterator[Comparison]:
    try:
        with open_base(model).opened() as tuned, open_base(base).opened() as old:
            yield Comparison(tuned, old, model)
    except DeltaError:
        raise
    except ValueError as e:
        raise DeltaError(str(e)) from e


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
