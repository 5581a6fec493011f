"""Codings of the two streams of a delta: sorted ids as gaps or bits, new values as steps from the base's. numpy only.

Ids. A gap is how many ids were left out since the one before. `gap8` writes it in bytes, `gap16` in 16 bits: the largest
number means "so many, and the gap goes on". Summing the stream and looking where it is not the largest number decodes it,
so no loop looks at entries. At 1 % random entries a gap takes 1.083 bytes; the entropy is 1.01. `bitmap` is a bit for
every unit, `plain` the ids themselves. `smallest` counts what each would take.

Values. Bit patterns, mapped so that a larger number is a larger integer, and subtracted: fine-tuning moves a bf16 weight
by a few steps. The step is zigzagged (0, -1, 1, -2, ...) and stored in 4, 8, 16 or 24 bits, with the largest number for
"see the list of long ones". All arithmetic is modulo 2^bits, so every pattern comes back.

The alternative, an entropy coder (zstd, ANS), gains a tenth more and decodes ten times slower or needs a dependency.

Nothing is believed: a stream that is not what an encoder would write raises ValueError, which the reader of a file turns into a
DeltaError. `check_*` look at streams piece by piece without making anything of their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]
GAPS: dict[str, type[np.unsignedinteger[Any]]] = {"gap8": np.uint8, "gap16": np.uint16}
STEPS = {"base4": 4, "base8": 8, "base16": 16, "base24": 24}  # bits of a short step
INDEX, VALUES = ("plain", *GAPS, "bitmap"), ("plain", *STEPS)
_PIECE = 1 << 16  # entries: what is worked on stays in the cache


# -- ids -----------------------------------------------------------------------------------------


def index_sizes(index: Ints, units: int) -> dict[str, int]:
    """Bytes of the sorted ids `index` [k] in every coding. The ids are in [0, units)."""
    sizes = {"gap8": index.size, "gap16": 2 * index.size, "bitmap": -(-units // 8), "plain": index.nbytes}
    for gaps in _gaps(index):
        long = gaps[gaps >= 255]
        sizes["gap8"] += int((long // 255).sum())
        sizes["gap16"] += 2 * int((long[long >= 65535] // 65535).sum())
    return sizes


def encode_index(index: Ints, units: int) -> tuple[str, Ints]:
    """The smallest coding of sorted ids [k], and its stream.

    >>> encode_index(np.array([1, 2, 600], np.int32), 1000)
    ('gap8', array([  1,   0, 255, 255,  87], dtype=uint8))
    """
    sizes = index_sizes(index, units)
    coding = min(sizes, key=lambda name: sizes[name])
    if coding == "plain":
        return coding, index
    if coding == "bitmap":
        bits = np.zeros(8 * sizes["bitmap"], bool)
        bits[index] = True
        return coding, np.packbits(bits, bitorder="little")
    return coding, np.concatenate([_escaped(gaps, GAPS[coding]) for gaps in _gaps(index)])


def decode_index(coding: str, stream: Ints, count: int, units: int) -> Ints:
    """The ids [count] of a stream: int32 where they fit, else int64. ValueError as `check_index`."""
    if coding == "plain":
        check_index(coding, stream, count, units)
        return stream
    out = np.empty(count, np.int32 if units <= 2**31 else np.int64)
    _walk(coding, stream, count, units, out)
    return out


def check_index(coding: str, stream: Ints, count: int, units: int) -> None:
    """ValueError unless the stream holds exactly `count` ids, strictly increasing, in [0, units)."""
    _walk(coding, stream, count, units, None)


def _gaps(index: Ints) -> Iterator[Ints]:
    last = -1
    for i in range(0, index.size, _PIECE):
        piece = index[i : i + _PIECE]
        gaps = np.empty_like(piece)
        np.subtract(piece[1:], piece[:-1], out=gaps[1:])
        gaps[0] = piece[0] - last
        last = piece[-1]
        gaps -= 1
        yield gaps


def _escaped(gaps: Ints, dtype: type[np.unsignedinteger[Any]]) -> Ints:
    top = int(np.iinfo(dtype).max)
    out, long = gaps.astype(dtype), np.flatnonzero(gaps >= top)
    if not long.size:
        return out
    escapes, out[long] = np.divmod(gaps[long], top)
    before = np.repeat(long, escapes)  # entries before each escape; the escapes before it are its own number
    ends = np.ones(out.size + before.size, bool)
    ends[before + np.arange(before.size)] = False
    stream = np.full(ends.size, top, dtype)
    stream[ends] = out
    return stream


def _walk(coding: str, stream: Ints, count: int, units: int, out: Ints | None) -> None:
    n, last = 0, -1
    for ids in _BITS[coding](stream):
        if not ids.size:
            continue
        low, high = int(ids[0]), int(ids[-1])
        if low < 0 or high >= units:
            raise ValueError(
                f"is out of range: [{low if last < 0 else min(low, last)}, {high}], the tensor has {units} units."
            )
        if low <= last or (coding == "plain" and not bool((ids[1:] > ids[:-1]).all())):
            raise ValueError("is not strictly increasing (unsorted, or a unit twice).")
        if n + ids.size > count:
            raise ValueError(f"holds more than its {count} ids.")
        if out is not None:
            out[n : n + ids.size] = ids
        n, last = n + ids.size, high
    if n != count:
        raise ValueError(f"holds {n} ids: expected {count}.")


def _plain_ids(stream: Ints) -> Iterator[Ints]:
    for i in range(0, stream.size, _PIECE):
        yield stream[i : i + _PIECE]


def _gap_ids(stream: Ints) -> Iterator[Ints]:
    top, total, n = np.iinfo(stream.dtype).max, 0, 0
    if stream.size and stream[-1] == top:
        raise ValueError("ends in the middle of a gap.")
    step, ramp = _PIECE // 4, np.arange(_PIECE // 4, dtype=np.int32)
    for i in range(0, stream.size, step):  # short enough that sums fit into 32 bits
        piece = stream[i : i + step]
        sums = np.cumsum(piece, dtype=np.int32)
        after = total + int(sums[-1])
        ends = piece != top
        if not ends.all():
            sums = sums[np.flatnonzero(ends)]
        sums += ramp[: sums.size]
        yield (sums if total + n + step * top < 2**31 else sums.astype(np.int64)) + (total + n)
        total, n = after, n + sums.size


def _bitmap_ids(stream: Ints) -> Iterator[Ints]:
    for i in range(0, stream.size, _PIECE):
        bits = np.unpackbits(stream[i : i + _PIECE], bitorder="little")
        yield np.flatnonzero(bits.view(bool)) + 8 * i


_BITS = {"plain": _plain_ids, "gap8": _gap_ids, "gap16": _gap_ids, "bitmap": _bitmap_ids}


# -- values --------------------------------------------------------------------------------------


def steps(old: Ints, new: Ints, floating: bool) -> Ints:
    """Zigzagged steps from `old` to `new`, bit patterns as unsigned integers [n].

    >>> one, two = (np.array([x], np.float32).view(np.uint32) for x in (1.0, np.float32(1.0000001)))
    >>> steps(one, two, True), steps(two, one, True)
    (array([2], dtype=uint32), array([1], dtype=uint32))
    """
    out = np.empty_like(new)
    for i in range(0, new.size, _PIECE):
        d = _ordered(new[i : i + _PIECE], floating)
        d -= _ordered(old[i : i + _PIECE], floating)
        sign = np.negative(d >> (8 * d.itemsize - 1))
        d <<= 1
        np.bitwise_xor(d, sign, out=out[i : i + _PIECE])
    return out


def moved(old: Ints, z: Ints, floating: bool) -> Ints:
    """The new bit patterns that `steps(old, new, floating)` were taken of."""
    out = np.empty_like(old)
    for i in range(0, old.size, _PIECE):
        piece = z[i : i + _PIECE]
        new = np.negative(piece & 1)
        new ^= piece >> 1
        new += _ordered(old[i : i + _PIECE], floating)
        out[i : i + _PIECE] = _ordered(new, floating)
    return out


def _ordered(bits: Ints, floating: bool) -> Ints:
    """A copy in which a larger float is a larger two's complement integer; its own inverse."""
    if not floating:
        return bits.copy()
    mask = np.negative(bits >> (8 * bits.itemsize - 1))
    mask >>= 1
    mask ^= bits
    return np.asarray(mask)


def encode_steps(z: Ints) -> tuple[str, Ints] | None:
    """The smallest coding of zigzagged steps [n] and its stream of bytes; None where the plain values are no larger."""
    width, best = 8 * z.itemsize, ("plain", z.nbytes)
    long_ones = dict.fromkeys((coding for coding, bits in STEPS.items() if bits <= width), 0)
    for piece in _plain_ids(z):
        for coding in long_ones:
            long_ones[coding] += int(np.count_nonzero(piece >= (1 << STEPS[coding]) - 1))
    for coding, n in long_ones.items():
        size = _short_bytes(STEPS[coding], z.size) + z.itemsize * n
        best = (coding, size) if size < best[1] else best
    if best[0] == "plain":
        return None
    top = (1 << STEPS[best[0]]) - 1
    long = z[z >= top].astype(z.dtype.newbyteorder("<"))
    return best[0], np.concatenate([_packed(np.minimum(z, top), STEPS[best[0]]), long.view(np.uint8)])


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


def _packed(short: Ints, bits: int) -> Ints:
    if bits == 4:
        low, high = short[0::2].astype(np.uint8), short[1::2].astype(np.uint8)
        low[: high.size] |= high << 4
        return low
    return np.concatenate([(short >> at).astype(np.uint8) for at in range(0, bits, 8)])


def _shorts(planes: Ints, bits: int, dtype: np.dtype[Any], lo: int, hi: int) -> Ints:
    """Short steps lo..hi (lo even) out of what `_packed` wrote."""
    if bits == 4:
        pairs = planes[lo // 2 : -(-hi // 2)]
        out = np.empty(2 * pairs.size, dtype)
        out[0::2], out[1::2] = pairs & 15, pairs >> 4
        return out[: hi - lo]
    planes = planes.reshape(bits // 8, -1)
    out = planes[0, lo:hi].astype(dtype)
    for i, plane in enumerate(planes[1:], 1):
        out |= plane[lo:hi].astype(dtype) << (8 * i)
    return out


def _unpack(coding: str, stream: Ints, n: int, dtype: np.dtype[Any], out: Ints | None) -> None:
    bits = STEPS[coding]
    short, top = _short_bytes(bits, n), (1 << bits) - 1
    if bits > 8 * dtype.itemsize or stream.size < short or (stream.size - short) % dtype.itemsize:
        raise ValueError(
            f"are {stream.size} bytes of {coding}, which {n} steps of {8 * dtype.itemsize} bits cannot be."
        )
    if bits == 4 and n % 2 and stream[short - 1] >> 4:
        raise ValueError("end with half a byte that is not zero.")
    planes, tail = stream[:short], stream[short:]
    at, left = 0, tail.size // dtype.itemsize
    for lo in range(0, n, _PIECE):
        z = _shorts(planes, bits, dtype, lo, min(n, lo + _PIECE))
        marks = np.flatnonzero(z == top)
        if marks.size > left - at:
            raise ValueError(f"have more than the {left} long steps that are listed.")
        long = np.frombuffer(tail, dtype.newbyteorder("<"), marks.size, at * dtype.itemsize) if marks.size else z[:0]
        if bool((long < top).any()):
            raise ValueError("have a short step among the long ones.")
        at += marks.size
        if out is not None:
            z[marks] = long
            out[lo : lo + z.size] = z
    if at != left:
        raise ValueError(f"have {at} long steps: {left} are listed.")
