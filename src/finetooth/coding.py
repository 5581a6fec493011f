"""Codings of the sorted ids of a delta as gaps or bits. Those of its values are in `zigzag.py`.

A gap is how many ids were left out since the one before. `gap8` writes it in bytes, `gap16` in 16 bits: the largest
number means "so many, and the gap goes on". Summing the stream and looking where it is not the largest number decodes it,
so no loop looks at entries. At 1 % random entries a gap takes 1.083 bytes; the entropy is 1.01. `gap7` (`varint.py`) is for ids
in clusters. `bitmap` is a bit for every unit, `plain` the ids themselves. `index_sizes` counts what each would take.

Every coding is worked on in pieces that stay in the cache, and a piece needs to know of those before it only how many ids
they have and how far they reach. That is counted first, which checks the stream too.

Nothing is believed: a stream that is not what an encoder would write raises ValueError, a DeltaError to the reader of a
file. `check_index` looks at it without making anything of its size. The loops have compiled twins (`twins.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetooth import varint
from finetooth.twins import twin

Ints = NDArray[Any]
GAPS: dict[str, type[np.unsignedinteger[Any]]] = {"gap8": np.uint8, "gap16": np.uint16}
INDEX = ("plain", *GAPS, "gap7", "bitmap")
_PIECE = 1 << 16  # entries
_BYTES = _PIECE // 8  # of a bitmap
_SHORT = 1.5  # bytes a gap up to which `gap7` is taken: beyond, it saves little and takes several times as long to read


def index_sizes(index: Ints, units: int) -> dict[str, int]:
    """Bytes of the sorted ids `index` [k] in every coding that `encode_index` would take. The ids are in [0, units)."""
    return _tried(index, units)[0]


def encode_index(index: Ints, units: int) -> tuple[str, Ints]:
    """The smallest coding of sorted ids [k], and its stream.

    >>> encode_index(np.array([1, 2, 203], np.int32), 1000)
    ('gap8', array([  1,   0, 200], dtype=uint8))
    """
    sizes, found = _tried(index, units)
    if (coding := min(sizes, key=lambda name: sizes[name])) == "plain":
        return coding, index
    if coding == "bitmap":
        bits = np.zeros(8 * sizes["bitmap"], bool)
        bits[index] = True
        return coding, np.packbits(bits, bitorder="little")
    return coding, _encoded(index, coding, found)


def encoded(index: Ints, coding: str) -> Ints:
    """The stream of sorted ids [k] as gaps of that coding."""
    return _encoded(index, coding, _tried(index, 0)[1])


def _tried(index: Ints, units: int) -> tuple[dict[str, int], list[dict[str, int]]]:
    """The sizes, and those of each piece as gaps."""
    found = [_gap_sizes(index, at) for at in range(0, index.size, _PIECE)]
    sizes = {name: sum(sizes[name] for sizes in found) for name in (*GAPS, "gap7")}
    if sizes["gap7"] > _SHORT * index.size:
        del sizes["gap7"]
    return {**sizes, "bitmap": -(-units // 8), "plain": index.nbytes}, found


def _encoded(index: Ints, coding: str, sizes: list[dict[str, int]]) -> Ints:
    ends = list(accumulate((found[coding] for found in sizes), initial=0))
    stream = np.empty(ends[-1], np.uint8)
    scratch = np.arange(min(index.size, _PIECE)), np.empty(min(index.size, _PIECE), np.intp)
    for i, (start, end) in enumerate(pairwise(ends)):
        at, out = i * _PIECE, stream[start:end].view(GAPS.get(coding, np.uint8))
        if fast := _twin(f"into_{coding}", index, at):
            fast(*_piece(index, at), out)
        elif coding == "gap7":
            out[:] = varint.encode(_gaps(index, at))
        else:
            gaps = _gaps(index, at)
            _escaped(gaps, out, *(part[: gaps.size] for part in scratch))
    return stream.view(GAPS.get(coding, np.uint8))


def decode_index(coding: str, stream: Ints, count: int, units: int) -> Ints:
    """The ids [count] of a stream: int32 where they fit, else int64. ValueError as `check_index`."""
    parts = _checked(coding, stream, count, units)
    if coding == "plain":
        return stream
    out = np.empty(count, np.int32 if units <= 2**31 else np.int64)
    for part in parts:
        _CODINGS[coding].into(stream[part.at], out[part.ids], part.start)
    return out


def check_index(coding: str, stream: Ints, count: int, units: int) -> None:
    """ValueError unless the stream holds exactly `count` ids, strictly increasing, in [0, units)."""
    _checked(coding, stream, count, units)


@dataclass(frozen=True)
class _Part:
    """A piece of a stream, which of the ids it holds, and from which unit on they are counted."""

    at: slice
    ids: slice
    start: int


@dataclass(frozen=True)
class _Coding:
    """How a coding is read: where it can be cut, how many ids a piece holds and over how many units, and the ids."""

    cuts: Callable[[Ints], list[slice]]
    measure: Callable[[Ints], tuple[int, int]]
    into: Callable[[Ints, Ints, int], None]  # a piece, where its ids belong, the unit it starts from


def _checked(coding: str, stream: Ints, count: int, units: int) -> list[_Part]:
    if coding == "plain":
        n, low, high, parts = *_plain_extent(stream), []
    else:
        way = _CODINGS[coding]
        cuts = way.cuts(stream)
        found = [way.measure(stream[at]) for at in cuts]
        ids = [0, *accumulate(n for n, _ in found)]
        units_before = [0, *accumulate(far for _, far in found)]
        parts = [_Part(at, slice(*ids[i : i + 2]), units_before[i]) for i, at in enumerate(cuts)]
        n, low, high = ids[-1], 0, (_last_bit(stream) if coding == "bitmap" else units_before[-1] - 1)
    if n and (low < 0 or high >= units):
        raise ValueError(f"is out of range: it has an id of {low if low < 0 else high}, the tensor {units} units.")
    if n > count:
        raise ValueError(f"holds more than its {count} ids.")
    if n != count:
        raise ValueError(f"holds {n} ids: expected {count}.")
    return parts


# -- plain ---------------------------------------------------------------------------------------


def _plain_extent(stream: Ints) -> tuple[int, int, int]:
    """How many ids, the first and the last."""
    for at in range(0, stream.size, _PIECE):
        ids = stream[at : at + _PIECE + 1]  # the next piece's first as well
        if not bool((ids[1:] > ids[:-1]).all()):
            raise ValueError("is not strictly increasing (unsorted, or a unit twice).")
    return (stream.size, int(stream[0]), int(stream[-1])) if stream.size else (0, 0, 0)


# -- gaps ----------------------------------------------------------------------------------------


def _piece(index: Ints, at: int) -> tuple[Ints, int]:
    """The piece of ids that begins at `at`, and the id before."""
    return index[at : at + _PIECE], int(index[at - 1]) if at else -1


def _twin(name: str, index: Ints, at: int) -> Callable[..., Any] | None:
    return twin(name, min(index.size - at, _PIECE)) if index.dtype == np.int32 else None


def _gaps(index: Ints, at: int) -> Ints:
    """Those of the piece of ids that begins at `at`."""
    piece, before = _piece(index, at)
    gaps = np.empty_like(piece)
    np.subtract(piece[1:], piece[:-1], out=gaps[1:])
    gaps[1:] -= 1
    gaps[0] = piece[0] - (before + 1)
    return gaps.view(f"u{gaps.itemsize}")  # numpy divides unsigned numbers faster


def _gap_sizes(index: Ints, at: int) -> dict[str, int]:
    if fast := _twin("gap_sizes", index, at):
        return dict(zip((*GAPS, "gap7"), fast(*_piece(index, at)), strict=True))
    gaps = _gaps(index, at)
    sizes = {"gap7": varint.size(gaps)}
    for name, dtype in GAPS.items():
        top = int(np.iinfo(dtype).max)
        more = int((gaps // top).sum(dtype=gaps.dtype)) if gaps.max() >= top else 0
        sizes[name] = (gaps.size + more) * top.bit_length() // 8
    return sizes


def _escaped(gaps: Ints, out: Ints, order: Ints, at: Ints) -> None:
    """`order` is 0, 1, ... [k], `at` [k] memory to work in: to be given some for every piece takes longer than the work."""
    top = int(np.iinfo(out.dtype).max)
    if out.size == gaps.size:
        out[:] = gaps
        return
    escapes = gaps // top
    np.add.accumulate(escapes, dtype=np.intp, out=at)
    at += order  # where gaps end: no branch on which are long
    escapes += gaps  # less what is escaped, as the short numbers wrap around
    out.fill(top)
    out[at] = escapes.astype(out.dtype)


def _gap_cuts(stream: Ints) -> list[slice]:
    if stream.size and stream[-1] == np.iinfo(stream.dtype).max:
        raise ValueError("ends in the middle of a gap.")
    return [slice(at, at + _PIECE) for at in range(0, stream.size, _PIECE)]


def _gap_measure(piece: Ints) -> tuple[int, int]:
    if fast := twin("gap_extent", piece.size):
        n, far = fast(piece, int(np.iinfo(piece.dtype).max))
        return n, far
    n = int(np.count_nonzero(piece != np.iinfo(piece.dtype).max))
    return n, n + int(piece.sum(dtype=np.uint32))  # _PIECE * 65535 fits


def _from_gaps(piece: Ints, out: Ints, start: int) -> None:
    if out.dtype == np.int32 and (fast := twin("of_gaps", piece.size)):
        fast(piece, int(np.iinfo(piece.dtype).max), out, start)
        return
    ends = piece != np.iinfo(piece.dtype).max
    apart = (piece + ends).astype(out.dtype)  # where a number is the largest nothing is added, so nothing overflows
    apart[0] += start - 1
    if out.size == piece.size:
        np.add.accumulate(apart, out=out)
        return
    ids = np.add.accumulate(apart, out=apart)
    ids.take(np.flatnonzero(ends), out=out, mode="clip")  # ids[ends] branches on every entry, and takes twice as long


# -- bits ----------------------------------------------------------------------------------------


def _bit_cuts(stream: Ints) -> list[slice]:
    return [slice(at, at + _BYTES) for at in range(0, stream.size, _BYTES)]


def _bit_measure(piece: Ints) -> tuple[int, int]:
    return int(np.bitwise_count(piece).sum(dtype=np.uint32)), 8 * piece.size


def _last_bit(stream: Ints) -> int:
    for at in reversed(_bit_cuts(stream)):
        if (bits := _bits(stream[at])).size:
            return int(8 * at.start + bits[-1])
    return -1


def _from_bits(piece: Ints, out: Ints, start: int) -> None:
    np.add(_bits(piece), start, out=out, casting="same_kind")


def _bits(piece: Ints) -> Ints:
    """Where a piece of a bitmap has ones."""
    return np.flatnonzero(np.unpackbits(piece, bitorder="little").view(bool))


_CODINGS = {
    **dict.fromkeys(GAPS, _Coding(_gap_cuts, _gap_measure, _from_gaps)),
    "gap7": _Coding(varint.cuts, varint.measure, varint.into),
    "bitmap": _Coding(_bit_cuts, _bit_measure, _from_bits),
}
