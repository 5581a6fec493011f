"""The delta's file format, writing: between changes in memory and one safetensors file. `docs/format.md` is the contract.

Encoding is deterministic: the same delta gives the same bytes, so a file can be compared, hashed and pinned.
That is why the file is laid out here (the header's order included) and not by safetensors' writer, which
orders metadata by a hash that changes from call to call. Reading is in `archive.py`.

The header says how long every stream is, and it comes first. So `Writer` takes one tensor after another, keeps their
streams in an unnamed file beside the one to be written, and puts the header and the streams together at the end: a delta can be
written that is nowhere in memory. Every tensor gets its smallest coding (`coding.py`, `zigzag.py`); with `plain=True` all are plain,
and the file is one of version 1.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from finetooth import coding, zigzag
from finetooth.base import bits, dtype_name, fingerprint, raw
from finetooth.files import room, whole
from finetooth.selection import Selection
from finetooth.units import Unit

FORMAT = "finetooth-delta"
VERSION = 2
_BLOCK = 1 << 16
_STREAMS = {"gap7": "U8", "gap8": "U8", "gap16": "U16", "bitmap": "U8"}
_SIZES = {"U8": 1, "U16": 2}
_LONGEST_NAME = 1024


class DeltaError(ValueError):
    """A delta that cannot be read, or that does not fit what it is applied to. Nothing has been changed."""


@dataclass(frozen=True, eq=False)
class Change:
    """What happened to one tensor: the chosen units and their new values.

    Of a loaded delta, `selection` and `values` are read from the file when they are asked for, and kept as long as
    this object. `values` is a DeltaError where the file has them coded against the base: `new` gives them there.
    """

    selection: Selection
    values: Tensor = field(repr=False)  # [k, unit_numel] in the weight's dtype
    changed: int  # entries under the units whose bits differ from the base's
    fingerprint: str  # of the tensor before
    result: str  # of the tensor after
    replaced: str | None = None  # fingerprint of the values [k, unit_numel] before, where they were known
    written: str | None = None  # likewise of the new ones

    @property
    def kind(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the tensor."""
        return self.selection.shape, self.values.dtype

    @property
    def unit(self) -> Unit:
        return self.selection.unit

    @property
    def coded(self) -> tuple[str, Any] | None:
        """Coding and stream of values that are stored as steps from the base; None where they are not."""
        return None

    def new(self, old: Tensor) -> Tensor:
        """The new values; `old` are those that the base has under the units, [k, unit_numel]."""
        return self.values

    def fetch(self) -> None:
        """Read what has to be read, so that it is not read beside something else in memory."""

    def back(self, old: Tensor) -> Change:
        """The change that takes this one off, in memory."""
        return Change(self.selection, old, self.changed, self.result, self.fingerprint, self.written, self.replaced)


@dataclass(frozen=True)
class Origin:
    """What a delta belongs to. `weights` is how many the whole base has; `tuned` marks an inverse, whose base
    is the tuned model; `after` has the fingerprints of tensors that earlier deltas of a chain changed and this one
    does not."""

    id: str | None = None
    revision: str | None = None
    weights: int | None = None
    tuned: bool = False
    after: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        name = self.id or "a base without a name"
        return ("the tuned form of " if self.tuned else "") + name + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, eq=False)
class Parts:
    """What a file holds, before it is a `Delta`."""

    changes: Mapping[str, Change]
    tied: Mapping[str, str]
    base: Origin
    method: str | None
    recipe: Any
    library: str


@dataclass(frozen=True)
class Stream:
    """One tensor of the file: safetensors' name of its dtype, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: Any = field(repr=False)
    width: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.width


def encode(
    name: str, change: Change, old: Tensor | None = None, plain: bool = False
) -> tuple[dict[str, Any], list[Stream]]:
    """A tensor's entry in the metadata, and its streams of ids and values.

    With `old`, the values that the base has there, the new ones are coded against them where that is smaller. DeltaError
    if a new value is not finite, or values that are coded against a base shall be plain.
    """
    require_name(name)
    selection = change.selection
    units = selection.unit.count(selection.shape)
    ids = selection.index.cpu().numpy()
    how, stream = ("plain", ids) if plain else coding.encode_index(ids, units)
    code = _STREAMS.get(how) or dtype_name(selection.index.dtype)
    index = Stream(code, (stream.size,), np.ascontiguousarray(stream).view(np.uint8).data, stream.itemsize)
    value_coding, values = _values(name, change, old, plain)
    (shape, dtype), prints = change.kind, {"replaced": change.replaced, "written": change.written}
    entry = {
        "shape": list(shape),
        "dtype": dtype_name(dtype),
        "unit": {"kind": selection.unit.kind, "size": selection.unit.size},
        "count": len(selection),
        "changed": change.changed,
        "fingerprint": change.fingerprint,
        "result": change.result,
        "index_coding": how,
        "value_coding": value_coding,
        **{key: text for key, text in prints.items() if text is not None},
    }
    return entry, [index, values]


def _values(name: str, change: Change, old: Tensor | None, plain: bool) -> tuple[str, Stream]:
    coded = change.coded if old is None else None
    if coded is not None:
        if plain:
            raise DeltaError(f"the values of '{name}' are coded against the base: give the base.")
        return coded[0], Stream("U8", (coded[1].size,), coded[1].data, 1)
    values = change.values if old is None else change.new(old)
    require_finite(name, values)
    found = None if old is None or plain else zigzag.encode(_steps(old, values))
    if found is not None:
        return found[0], Stream("U8", (found[1].size,), found[1].data, 1)
    return "plain", Stream(dtype_name(values.dtype), tuple(values.shape), raw(values), values.element_size())


def patterns(values: Tensor) -> Any:
    """Bit patterns as a flat numpy array of unsigned integers."""
    flat = bits(values.detach().cpu().contiguous().reshape(-1)).numpy()
    return flat.view(np.dtype(f"u{flat.itemsize}"))


def _steps(old: Tensor, new: Tensor) -> Any:
    return zigzag.steps(patterns(old), patterns(new), new.dtype.is_floating_point)


def require_name(name: str) -> None:
    """Raise unless a name can be shown as it is: what a terminal obeys or hides is no part of a parameter's name."""
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise DeltaError(f"a tensor is called {ascii(name)[:99]}: expected 1 to {_LONGEST_NAME} printable characters.")


def require_finite(name: str, values: Tensor) -> None:
    """Raise if a new value is an infinity or not a number."""
    if not values.dtype.is_floating_point:
        return
    flat = values.reshape(-1)
    for at in range(0, flat.numel(), _BLOCK):
        part = flat[at : at + _BLOCK]
        numbers = part.float() if part.element_size() == 1 else part  # torch has no isfinite for 8-bit floats
        if not bool(torch.isfinite(numbers).all()):
            raise DeltaError(
                f"'{name}' has new values that are not finite: such a model is broken, a delta refuses it."
            )


class Writer:
    """Takes the changes of a delta one by one and makes the file of them. Use `writer`."""

    def __init__(self, spool: BinaryIO, plain: bool = False):
        self.spool, self.plain = spool, plain
        self.entries: dict[str, Any] = {}
        self.streams: dict[str, tuple[Stream, int]] = {}  # without the bytes, and where they are in the spool

    def add(self, name: str, change: Change, old: Tensor | None = None) -> None:
        """Keep one tensor's change; `old` as in `encode`."""
        if old is not None and None in (change.replaced, change.written):
            new = change.new(old)
            change = replace(change, values=new, replaced=fingerprint(old), written=fingerprint(new))
        self.entries[name], streams = encode(name, change, old, self.plain)
        for kind, stream in zip(("index", "values"), streams, strict=True):
            self.streams[f"{kind}:{name}"] = replace(stream, data=None), self.spool.tell()
            self.spool.write(stream.data)

    def finish(self, parts: Parts, path: Path) -> None:
        """Write the file. Of `parts` everything but the changes is taken, and of those the order."""
        entries = {name: self.entries[name] for name in parts.changes}
        head, order = header(parts, entries, {key: stream for key, (stream, _) in self.streams.items()})
        with path.open("wb") as f:
            f.write(head)
            for key in order:
                stream, at = self.streams[key]
                self.spool.seek(at)
                for left in range(stream.nbytes, 0, -_BLOCK):
                    f.write(self.spool.read(min(left, _BLOCK)))


@contextmanager
def writer(path: Path, plain: bool = False) -> Iterator[Writer]:
    """A `Writer` whose spool lies where `path` will, without a name."""
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        yield Writer(spool, plain)


@contextmanager
def kept(path: Path | None) -> Iterator[tuple[Callable[[str, Change], None], Callable[[Parts], None]]]:
    """What takes the changes of a file one by one, and what makes the file of them; without a path, both do nothing."""
    if path is None:
        yield lambda name, change: None, lambda parts: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with writer(path) as out:

        def add(name: str, change: Change) -> None:
            with room(path):
                out.add(name, change)

        def finish(parts: Parts) -> None:
            with whole(path) as temp:
                out.finish(parts, temp)

        yield add, finish


def write(parts: Parts, path: Path, old: Callable[[str, Change], Tensor] | None = None, plain: bool = False) -> None:
    """Write a file, tensor by tensor. `old` gives the base's values under a change: new ones are coded against them."""
    with writer(path, plain) as out:
        for name, change in parts.changes.items():
            out.add(name, change, None if old is None else old(name, change))
        out.finish(parts, path)


def size(parts: Parts) -> int:
    """Bytes of the file that `write` makes."""
    entries, streams = dict[str, Any](), dict[str, Stream]()
    for name, change in parts.changes.items():
        entries[name], pair = encode(name, change)
        streams |= {f"{kind}:{name}": replace(s, data=None) for kind, s in zip(("index", "values"), pair, strict=True)}
    return len(header(parts, entries, streams)[0]) + sum(s.nbytes for s in streams.values())


def header(parts: Parts, entries: dict[str, Any], streams: Mapping[str, Stream]) -> tuple[bytes, list[str]]:
    """The head of the file (its length, then the header), and the order in which the streams follow."""
    # Widest entries first, as safetensors itself does, so that every tensor is aligned to its entries.
    order = sorted(streams, key=lambda key: (-streams[key].width, key))
    table: dict[str, Any] = {"__metadata__": _metadata(parts, entries)}
    at = 0
    for key in order:
        s = streams[key]
        table[key] = {"dtype": s.dtype, "shape": list(s.shape), "data_offsets": [at, at + s.nbytes]}
        at += s.nbytes
    text = _dumps(table).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def _metadata(parts: Parts, entries: dict[str, Any]) -> dict[str, str]:
    for alias in parts.tied:
        require_name(alias)
    plain = all(e["index_coding"] == e["value_coding"] == "plain" for e in entries.values())
    return {
        "format": FORMAT,
        "version": "1" if plain else str(VERSION),
        "library": parts.library,
        "base": _dumps({k: v for k, v in asdict(parts.base).items() if k != "after" or v}),
        "method": _dumps(parts.method),
        "recipe": _dumps(parts.recipe),
        "tensors": _dumps(entries),
        "tied": _dumps(dict(parts.tied)),
    }


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise DeltaError(f"the recipe of a delta is JSON, and this one is not: {e}.") from e
