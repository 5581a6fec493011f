"""Codings of the two streams of a delta: sorted ids as gaps or bits, new values as steps from the base's. numpy only.

Ids. A gap is how many ids were left out since the one before. `gap8` writes it in bytes, `gap16` in 16 bits: the largest
number means "so many, and the gap goes on". Summing the stream and looking where it is not the largest number decodes it,
so no loop looks at entries. At 1 % random entries a gap takes 1.083 bytes; the entropy is 1.01. `gap7` (`varint.py`) is for ids
in clusters. `bitmap` is a bit for every unit, `plain` the ids themselves. `index_sizes` counts what each would take.

Values. Bit patterns, mapped so that a larger number is a larger integer, and subtracted: fine-tuning moves a bf16 weight
by a few steps. The step is zigzagged (0, -1, 1, -2, ...) and stored in 4, 8, 16 or 24 bits, with the largest number for
"see the list of long ones". All arithmetic is modulo 2^bits, so every pattern comes back.

The alternative, an entropy coder (zstd, ANS), gains a tenth more and decodes ten times slower or needs a dependency. Compiled
twins of these loops would take longer to compile than numpy takes for the largest tensor there is.

Nothing is believed: a stream that is not what an encoder would write raises ValueError, a DeltaError to the reader of a file. `check_*` look at streams piece by piece without making anything of their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetooth import varint

Ints = NDArray[Any]
GAPS: dict[str, type[np.unsignedinteger[Any]]] = {"gap8": np.uint8, "gap16": np.uint16}
STEPS = {"base4": 4, "base8": 8, "base16": 16, "base24": 24}  # bits of a short step
INDEX, VALUES = ("plain", *GAPS, "gap7", "bitmap"), ("plain", *STEPS)
_PIECE = 1 << 16  # entries: what is worked on stays in the cache
_BYTES = _PIECE // 8  # of a bitmap


# -- ids -----------------------------------------------------------------------------------------


def index_sizes(index: Ints, units: int) -> dict[str, int]:
    """Bytes of the sorted ids `index` [k] in every coding. The ids are in [0, units)."""
    return _tried(index, units)[0]


def encode_index(index: Ints, units: int) -> tuple[str, Ints]:
    """The smallest coding of sorted ids [k], and its stream.

    >>> encode_index(np.array([1, 2, 203], np.int32), 1000)
    ('gap8', array([  1,   0, 200], dtype=uint8))
    """
    sizes, tried = _tried(index, units)
    if (coding := min(sizes, key=lambda name: sizes[name])) == "plain":
        return coding, index
    if coding == "bitmap":
        bits = np.zeros(8 * sizes["bitmap"], bool)
        bits[index] = True
        return coding, np.packbits(bits, bitorder="little")
    if coding != "gap8" or tried is None:
        tried = [varint.encode(gaps) if coding == "gap7" else _escaped(gaps, GAPS[coding]) for gaps in _gaps(index)]
    return coding, np.concatenate(tried)


def decode_index(coding: str, stream: Ints, count: int, units: int) -> Ints:
    """The ids [count] of a stream: int32 where they fit, else int64. ValueError as `check_index`."""
    check_index(coding, stream, count, units)
    if coding == "plain":
        return stream
    out = np.empty(count, np.int32 if units <= 2**31 else np.int64)
    {"bitmap": _from_bits, "gap7": varint.into}.get(coding, _from_gaps)(stream, out)
    return out


def check_index(coding: str, stream: Ints, count: int, units: int) -> None:
    """ValueError unless the stream holds exactly `count` ids, strictly increasing, in [0, units)."""
    n, low, high = _EXTENTS[coding](stream)
    if n and (low < 0 or high >= units):
        raise ValueError(f"is out of range: [{low}, {high}], the tensor has {units} units.")
    if n > count:
        raise ValueError(f"holds more than its {count} ids.")
    if n != count:
        raise ValueError(f"holds {n} ids: expected {count}.")


def _pieces(stream: Ints) -> Iterator[Ints]:
    for i in range(0, stream.size, _PIECE):
        yield stream[i : i + _PIECE]


def _gaps(index: Ints) -> Iterator[Ints]:
    after = 0
    for piece in _pieces(index):
        gaps = np.empty_like(piece)
        np.subtract(piece[1:], piece[:-1], out=gaps[1:])
        gaps[1:] -= 1
        gaps[0] = piece[0] - after
        after = int(piece[-1]) + 1
        yield gaps.view(f"u{gaps.itemsize}")  # numpy divides unsigned numbers faster


def _tried(index: Ints, units: int) -> tuple[dict[str, int], list[Ints] | None]:
    """The sizes, and the stream of gap8 in pieces; None if another coding was smaller on the way."""
    sizes = {"gap8": index.size, "gap16": 2 * index.size, "bitmap": -(-units // 8), "plain": index.nbytes, "gap7": 0}
    stream: list[Ints] | None = []
    for gaps in _gaps(index):
        longest = gaps.max()
        for name, dtype in GAPS.items():
            top = np.iinfo(dtype).max
            if longest >= top:
                sizes[name] += int((gaps // top).sum(dtype=gaps.dtype)) * top.bit_length() // 8
        sizes["gap7"] += varint.size(gaps)
        if sizes["gap8"] > min(sizes["gap16"], sizes["bitmap"], sizes["plain"]):
            stream = None
        if stream is not None:
            stream.append(_escaped(gaps, np.uint8))
    return sizes, stream


def _escaped(gaps: Ints, dtype: type[np.unsignedinteger[Any]]) -> Ints:
    top = int(np.iinfo(dtype).max)
    if gaps.max() < top:
        return gaps.astype(dtype)
    escapes = gaps // top
    at = np.add.accumulate(escapes.astype(np.intp) + 1)  # where gaps end: no branch on which are long
    at -= 1
    stream = np.full(int(at[-1]) + 1, top, dtype)
    stream[at] = (gaps + escapes).astype(dtype)  # gaps - escapes * top, as these numbers wrap around
    return stream


# How many ids a stream holds, the first and the last.


def _plain_extent(stream: Ints) -> tuple[int, int, int]:
    for i in range(0, stream.size, _PIECE):
        ids = stream[i : i + _PIECE + 1]  # the next piece's first as well
        if not bool((ids[1:] > ids[:-1]).all()):
            raise ValueError("is not strictly increasing (unsorted, or a unit twice).")
    return (stream.size, int(stream[0]), int(stream[-1])) if stream.size else (0, 0, 0)


def _gap_extent(stream: Ints) -> tuple[int, int, int]:
    top = int(np.iinfo(stream.dtype).max)
    if stream.size and stream[-1] == top:
        raise ValueError("ends in the middle of a gap.")
    n, total, low = 0, 0, -1
    for piece in _pieces(stream):
        ends = piece != top
        if low < 0 and ends.any():
            low = total + int(piece[: ends.argmax() + 1].sum(dtype=np.uint32))
        n += int(np.count_nonzero(ends))
        total += int(piece.sum(dtype=np.uint32))  # _PIECE * 65535 fits
    return n, low, total + n - 1


def _bitmap_extent(stream: Ints) -> tuple[int, int, int]:
    n = sum(int(np.bitwise_count(piece).sum(dtype=np.uint32)) for piece in _pieces(stream))
    if not n:
        return 0, -1, -1
    starts = range(0, stream.size, _BYTES)
    low, high = (next(ids for i in way if (ids := _bits(stream, i)).size) for way in (starts, reversed(starts)))
    return n, int(low[0]), int(high[-1])


_EXTENTS = {"plain": _plain_extent, **dict.fromkeys(GAPS, _gap_extent), "gap7": varint.extent, "bitmap": _bitmap_extent}

# From streams that were checked: `out` has room for all ids, and they fit into its type.


def _from_gaps(stream: Ints, out: Ints) -> None:
    top, n, last = np.iinfo(stream.dtype).max, 0, -1
    wide, sums = np.empty((2, min(stream.size, _PIECE)), out.dtype)
    for piece in _pieces(stream):
        ends, apart = piece != top, wide[: piece.size]
        np.copyto(apart, piece + ends)  # where a number is `top` nothing is added, so nothing overflows
        apart[0] += last
        every = bool(ends.all())
        after = np.add.accumulate(apart, out=out[n : n + piece.size] if every else sums[: piece.size])
        if not every:
            where = np.flatnonzero(ends)  # after[ends] branches on every entry, and takes twice as long
            after.take(where, out=out[n : n + where.size], mode="clip")
        n, last = n + (piece.size if every else where.size), int(after[-1])


def _from_bits(stream: Ints, out: Ints) -> None:
    n = 0
    for i in range(0, stream.size, _BYTES):
        ids = _bits(stream, i)
        out[n : n + ids.size] = ids
        n += ids.size


def _bits(stream: Ints, i: int) -> Ints:
    """The ids in the piece of a bitmap that begins with byte i, eight entries a byte."""
    ids = np.flatnonzero(np.unpackbits(stream[i : i + _BYTES], bitorder="little").view(bool))
    ids += 8 * i
    return ids


# -- values --------------------------------------------------------------------------------------


def steps(old: Ints, new: Ints, floating: bool) -> Ints:
    """Zigzagged steps from `old` to `new`, bit patterns as unsigned integers [n].

    >>> one, two = (np.array([x], np.float32).view(np.uint32) for x in (1.0, np.float32(1.0000001)))
    >>> steps(one, two, True), steps(two, one, True)
    (array([2], dtype=uint32), array([1], dtype=uint32))
    """
    out, scratch = np.empty_like(new), np.empty(min(new.size, _PIECE), new.dtype)
    for before, after, z in zip(*map(_pieces, (old, new, out)), strict=True):
        d = scratch[: z.size]
        _ordered(after, floating, z)
        z -= _ordered(before, floating, d)
        _signs(z, d)
        z <<= 1
        z ^= d
    return out


def moved(old: Ints, z: Ints, floating: bool) -> Ints:
    """The new bit patterns that `steps(old, new, floating)` were taken of."""
    out, scratch = np.empty_like(old), np.empty(min(old.size, _PIECE), old.dtype)
    for before, step, new in zip(*map(_pieces, (old, z, out)), strict=True):
        d = scratch[: new.size]
        np.bitwise_and(step, 1, out=new)
        np.negative(new, out=new)
        new ^= np.right_shift(step, 1, out=d)
        new += _ordered(before, floating, d)
        if floating:
            new ^= _flips(new, d)
    return out


def _ordered(bits: Ints, floating: bool, out: Ints) -> Ints:
    """Into `out`: a larger float is a larger two's complement integer. Its own inverse."""
    if not floating:
        np.copyto(out, bits)
        return out
    np.bitwise_xor(_flips(bits, out), bits, out=out)
    return out


def _flips(bits: Ints, out: Ints) -> Ints:
    """All ones but the highest where the sign is set, else zero."""
    _signs(bits, out)
    out >>= 1
    return out


def _signs(bits: Ints, out: Ints) -> None:
    """All ones where the highest bit is set, else zero."""
    signed = f"i{bits.itemsize}"
    np.right_shift(bits.view(signed), 8 * bits.itemsize - 1, out=out.view(signed))


def encode_steps(z: Ints) -> tuple[str, Ints] | None:
    """The smallest coding of zigzagged steps [n] and its stream of bytes; None where the plain values are no larger."""
    sizes = {"plain": z.nbytes}
    sizes |= {name: _short_bytes(bits, z.size) for name, bits in STEPS.items() if bits <= 8 * z.itemsize}
    for piece in _pieces(z):
        for name in list(sizes)[1:]:
            long = int(np.count_nonzero(piece >= (1 << STEPS[name]) - 1))
            sizes[name] += z.itemsize * long
            if not long:
                break  # nor has a wider one
    best = min(sizes, key=lambda name: sizes[name])
    return None if best == "plain" else (best, _packed(z, STEPS[best]))


def decode_steps(coding: str, stream: Ints, n: int, dtype: Any) -> Ints:
    """Zigzagged steps [n], unsigned integers of type `dtype`. ValueError as `check_steps`."""
    out = np.empty(n, dtype)
    _unpack(coding, stream, n, out.dtype, out)
    return out


def check_steps(coding: str, stream: Ints, n: int, dtype: Any) -> None:
    """ValueError unless the stream holds exactly n steps."""
    _unpack(coding, stream, n, np.dtype(dtype), None)


def _short_bytes(bits: int, n: int) -> int:
    return -(-n // 2) if bits == 4 else n * bits // 8


def _packed(z: Ints, bits: int) -> Ints:
    """The stream of steps: the short ones, then the long ones."""
    top, short = (1 << bits) - 1, np.empty(_short_bytes(bits, z.size), np.uint8)
    long = [short]
    for lo, piece in zip(range(0, z.size, _PIECE), _pieces(z), strict=True):
        marks = piece >= top
        if marks.any():
            where = np.flatnonzero(marks)
            long.append(piece[where].astype(z.dtype.newbyteorder("<")).view(np.uint8))
            piece = piece.copy()
            piece[where] = top
        _pack(piece, short, bits, lo)
    return np.concatenate(long)


def _pack(piece: Ints, planes: Ints, bits: int, lo: int) -> None:
    """Write short steps, the first of which is number lo (even)."""
    if bits == 4:
        low, high = piece[0::2].astype(np.uint8), piece[1::2].astype(np.uint8)
        low[: high.size] |= high << 4
        planes[lo // 2 : lo // 2 + low.size] = low
        return
    for i, plane in enumerate(planes.reshape(bits // 8, -1)):
        plane[lo : lo + piece.size] = piece >> 8 * i if i else piece


def _shorts(planes: Ints, bits: int, lo: int, out: Ints) -> None:
    """Read short steps, the first of which is number lo (even), into `out`."""
    if bits == 4:
        pairs = planes[lo // 2 : -(-(lo + out.size) // 2)]
        out[0::2], out[1::2] = pairs & 15, pairs[: out.size // 2] >> 4
        return
    for i, plane in enumerate(planes.reshape(bits // 8, -1)):
        part = plane[lo : lo + out.size]
        if i:
            out |= part.astype(out.dtype) << 8 * i
        else:
            out[:] = part


def _unpack(coding: str, stream: Ints, n: int, dtype: np.dtype[Any], out: Ints | None) -> None:
    bits = STEPS[coding]
    short, top = _short_bytes(bits, n), (1 << bits) - 1
    if bits > 8 * dtype.itemsize or stream.size < short or (stream.size - short) % dtype.itemsize:
        raise ValueError(
            f"are {stream.size} bytes of {coding}, which {n} steps of {8 * dtype.itemsize} bits cannot be."
        )
    if bits == 4 and n % 2 and stream[short - 1] >> 4:
        raise ValueError("end with half a byte that is not zero.")
    long, at = stream[short:].view(dtype.newbyteorder("<")), 0
    scratch = np.empty(min(n, _PIECE), dtype)
    for lo in range(0, n, _PIECE):
        z = scratch[: n - lo] if out is None else out[lo : lo + _PIECE]
        _shorts(stream[:short], bits, lo, z)
        marks = z == top
        found = int(np.count_nonzero(marks))
        if found > long.size - at:
            raise ValueError(f"have more than the {long.size} long steps that are listed.")
        listed = long[at : at + found]
        if bool((listed < top).any()):
            raise ValueError("have a short step among the long ones.")
        if found and out is not None:
            z[np.flatnonzero(marks)] = listed
        at += found
    if at != long.size:
        raise ValueError(f"have {at} long steps: {long.size} are listed.")
