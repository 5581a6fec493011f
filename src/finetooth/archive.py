"""The delta's file format, reading: a file is checked once, tensor by tensor, and then read when it is asked.

Nothing is believed: everything that the metadata says is checked against the streams, and whatever is wrong is a
DeltaError. What a file alone cannot prove (that the base is the right one, that the result is the promised one) is checked
when the delta is applied. No length that the file states is allocated before the file has been seen to hold that much.

An `Archive` holds the metadata, an open file, and a hash of every stream as it was when it was checked. A stream is read
again for every use, and compared with its hash: a file that was written over meanwhile is a DeltaError. One that was
replaced or deleted is not lost, because the open file is still the old one. Streams are read, not mapped: a mapped file
that is cut short kills the process.

safetensors checks the header; its own reader would map the file.

Not covered: a header that is large itself is held in memory, as text and as tables.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetooth import coding, zigzag
from finetooth.base import DTYPES
from finetooth.checkpoint import fill, layout
from finetooth.codec import Change, DeltaError, Origin, Parts, patterns, require_finite
from finetooth.made import Lazy
from finetooth.manifest import Entry, check_format, entry, origin, parsed, table, tied
from finetooth.selection import Selection

_INDEX = {"plain": ("I32", "I64"), "gap7": ("U8",), "gap8": ("U8",), "gap16": ("U16",), "bitmap": ("U8",)}
_LONGEST_MESSAGE = 1000


class Stored(Lazy):
    """A change in a file."""

    _source: tuple[Archive, str] | None = None  # None: made by dataclasses.replace, of values in memory

    @property
    def coded(self) -> tuple[str, Any] | None:
        if self._source is None or self._source[0].entries[self._source[1]].value_coding == "plain":
            return None
        archive, name = self._source
        return archive.entries[name].value_coding, archive.stream(f"values:{name}")

    def fetch(self) -> None:
        _ = self.selection

    def new(self, old: Tensor) -> Tensor:
        coded = self.coded
        if coded is None or self._source is None:
            return self.values
        archive, name = self._source
        e, before = archive.entries[name], patterns(old)
        if (tuple(old.shape), old.dtype) != ((e.count, e.width), e.dtype):
            raise DeltaError(
                f"the new values of '{name}' are coded against {e.dtype} {[e.count, e.width]}: {old.dtype} "
                f"{list(old.shape)} was given."
            )
        z = zigzag.decode(*coded, before.size, before.dtype)
        after = zigzag.moved(before, z, e.dtype.is_floating_point)
        values = torch.from_numpy(after.view(np.uint8)).view(e.dtype).reshape(old.shape)
        require_finite(name, values)
        return values


class Archive(Mapping[str, Change]):
    """The changes of a file. Every look-up is a new object that reads, so look once and let go."""

    def __init__(self, path: Path):
        self.path, self.base = path, Origin()
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        self.bytes = os.fstat(self._file.fileno()).st_size
        self.spans, self.metadata = layout(path, self._file)
        self.entries: dict[str, Entry] = {}
        self._sums: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> Change:
        e = self.entries[name]
        facts = {key: getattr(e, key) for key in ("changed", "fingerprint", "result", "replaced", "written")}
        kind, source = (e.shape, e.dtype), (self, name)
        return Stored.at(
            kind, e.unit, lambda: self._selection(name), lambda: self._values(name), **facts, _source=source
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __deepcopy__(self, memo: Any) -> Archive:
        return self  # nothing of it changes

    def stream(self, key: str) -> Any:
        """The bytes of one tensor of the file; DeltaError if they are not those that were checked."""
        span = self.spans[key]
        data = np.empty(span.nbytes, np.uint8)
        with self._lock:
            self._file.seek(span.begin)
            whole = fill(self._file, data)
        found = hashlib.sha256(data.data).digest()
        if not whole or self._sums.setdefault(key, found) != found:
            raise DeltaError(f"{self.path.name} was written over after it was loaded ('{key}'): load it again.")
        return data

    def index(self, name: str) -> Any:
        """The stream of a tensor's ids, as the integers it is made of."""
        key = f"index:{name}"
        return self.stream(key).view({"U8": "u1", "U16": "<u2", "I32": "<i4", "I64": "<i8"}[self.spans[key].dtype])

    def codings(self) -> dict[str, int]:
        """How many tensors have their ids and values in which coding."""
        return dict(Counter(f"{e.index_coding} + {e.value_coding}" for e in self.entries.values()))

    def _selection(self, name: str) -> Selection:
        e = self.entries[name]
        ids = coding.decode_index(e.index_coding, self.index(name), e.count, e.units)
        return Selection(torch.from_numpy(ids), e.unit, e.shape)

    def _values(self, name: str) -> Tensor:
        e = self.entries[name]
        if e.value_coding != "plain":
            raise DeltaError(
                f"the values of '{name}' are coded against the base ({self.base}): give the base, as "
                "portable(base) or `finetooth delta unpack --base`; applying needs nothing else."
            )
        return torch.from_numpy(self.stream(f"values:{name}")).view(e.dtype).reshape(e.count, e.width)

    def check(self) -> None:
        """Check every stream against the metadata, one at a time."""
        version, entries = int(self.metadata["version"]), table(self.metadata, "tensors")
        expected = {f"{kind}:{name}" for name in entries for kind in ("index", "values")}
        for what, keys in (
            ("lacks", expected - set(self.spans)),
            ("has, beyond what its metadata lists,", set(self.spans) - expected),
        ):
            if keys:
                more = f" and {len(keys) - 1} more." if len(keys) > 1 else "."
                raise DeltaError(f"the file {what} {min(keys)!r}{more}")
        for name, said in entries.items():
            found = entry(name, said, version)
            self._check_index(name, found)
            self._check_values(name, found)
            self.entries[name] = found

    def _check_index(self, name: str, entry: Entry) -> None:
        span, how = self.spans[f"index:{name}"], entry.index_coding
        sizes = {"plain": span.shape == (entry.count,), "bitmap": span.shape == (-(-entry.units // 8),)}
        if span.dtype not in _INDEX[how] or len(span.shape) != 1 or not sizes.get(how, span.shape[0] >= entry.count):
            raise DeltaError(
                f"the index of '{name}' is {span.dtype} {list(span.shape)}: expected {entry.count} ids as {how}, "
                f"{' or '.join(_INDEX[how])}."
            )
        try:
            coding.check_index(how, self.index(name), entry.count, entry.units)
        except DeltaError:
            raise
        except ValueError as e:
            raise DeltaError(f"the index of '{name}' {e}") from e

    def _check_values(self, name: str, entry: Entry) -> None:
        key, n = f"values:{name}", entry.count * entry.width
        span, plain = self.spans[key], entry.value_coding == "plain"
        expected = DTYPES.get(span.dtype) == entry.dtype and span.shape == (entry.count, entry.width)
        if not (expected if plain else span.dtype == "U8" and len(span.shape) == 1):
            wanted = f"{entry.dtype} {[entry.count, entry.width]}" if plain else "a row of U8"
            raise DeltaError(f"the values of '{name}' are {span.dtype} {list(span.shape)}: expected {wanted}.")
        data = self.stream(key)
        if plain:
            require_finite(name, torch.from_numpy(data).view(entry.dtype))
            return
        try:
            zigzag.check(entry.value_coding, data, n, f"u{entry.dtype.itemsize}")
        except ValueError as e:
            raise DeltaError(f"the values of '{name}' {e}") from e


def read(path: Path) -> Parts:
    """Open and check a file; anything wrong with it is a DeltaError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no delta file at {path}.")
    try:
        archive = Archive(path)
        check_format(archive.metadata)
        archive.check()
        return _parts(archive)
    except DeltaError as e:
        raise DeltaError(f"{path.name}: {_cut(str(e))}") from e
    except (ValueError, OSError, RuntimeError, TypeError) as e:
        raise DeltaError(_cut(str(e).replace(str(path), path.name))) from e


def _cut(message: str) -> str:
    """What a file says of itself may be as long as the file."""
    return message.partition("\n")[0][:_LONGEST_MESSAGE]


def _parts(archive: Archive) -> Parts:
    metadata = archive.metadata
    archive.base, method = origin(metadata), parsed(metadata, "method")
    if method is not None and not isinstance(method, str):
        raise DeltaError(f"method is {method!r}: expected a name or null.")
    return Parts(
        archive, tied(metadata, archive.entries), archive.base, method, parsed(metadata, "recipe"), metadata["library"]
    )
