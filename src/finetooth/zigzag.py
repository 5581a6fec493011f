"""Coding of new values as steps from the base's.

Bit patterns, mapped so that a larger number is a larger integer, and subtracted: fine-tuning moves a bf16 weight
by a few steps. The step is zigzagged (0, -1, 1, -2, ...) and stored in 4, 8, 16 or 24 bits, with the largest number for
"see the list of long ones". All arithmetic is modulo 2^bits, so every pattern comes back.

The alternative, an entropy coder (zstd, ANS), gains a tenth more and decodes ten times slower or needs a dependency.

Nothing is believed: a stream that is not what `encode` would write raises ValueError, a DeltaError to the reader of a
file. `check` looks at it piece by piece without making anything of its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetooth.twins import twin

Ints = NDArray[Any]
STEPS = {"base4": 4, "base8": 8, "base16": 16, "base24": 24}  # bits of a short step
VALUES = ("plain", *STEPS)
_PIECE = 1 << 16  # entries: what is worked on stays in the cache


def steps(old: Ints, new: Ints, floating: bool) -> Ints:
    """Zigzagged steps from `old` to `new`, bit patterns as unsigned integers [n].

    >>> one, two = (np.array([x], np.float32).view(np.uint32) for x in (1.0, np.float32(1.0000001)))
    >>> steps(one, two, True), steps(two, one, True)
    (array([2], dtype=uint32), array([1], dtype=uint32))
    """
    out, scratch = np.empty_like(new), np.empty(min(new.size, _PIECE), new.dtype)
    for at in _pieces(new.size):
        z = out[at]
        if fast := twin("steps", z.size):
            fast(old[at], new[at], floating, z)
            continue
        d = scratch[: z.size]
        _ordered(new[at], floating, z)
        z -= _ordered(old[at], floating, d)
        _signs(z, d)
        z <<= 1
        z ^= d
    return out


def moved(old: Ints, z: Ints, floating: bool) -> Ints:
    """The new bit patterns that `steps(old, new, floating)` were taken of, in the place of these, `z`."""
    scratch = np.empty(min(old.size, _PIECE), old.dtype)
    for at in _pieces(old.size):
        new = z[at]
        if fast := twin("moved", new.size):
            fast(old[at], new, floating)
            continue
        d = scratch[: new.size]
        np.bitwise_and(new, 1, out=d)
        np.negative(d, out=d)
        new >>= 1
        new ^= d
        new += _ordered(old[at], floating, d)
        if floating:
            new ^= _flips(new, d)
    return z


def _pieces(n: int) -> list[slice]:
    return [slice(at, min(at + _PIECE, n)) for at in range(0, n, _PIECE)]


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


def encode(z: Ints) -> tuple[str, Ints] | None:
    """The smallest coding of zigzagged steps [n] and its stream of bytes; None where the plain values are no larger."""
    sizes = {"plain": z.nbytes, **_sizes(z)}
    best = min(sizes, key=lambda name: sizes[name])
    return None if best == "plain" else (best, _packed(z, best, sizes[best]))


def _sizes(z: Ints) -> dict[str, int]:
    """Bytes in every coding that has no more bits than the steps."""
    sizes = {name: _short_bytes(bits, z.size) for name, bits in STEPS.items() if bits <= 8 * z.itemsize}
    for at in _pieces(z.size):
        fast = twin("long_steps", at.stop - at.start)
        for name, long in zip(sizes, fast(z[at]) if fast else _long_steps(z[at]), strict=False):
            sizes[name] += z.itemsize * long
    return sizes


def _long_steps(piece: Ints) -> Iterator[int]:
    """How many are too long for each coding, from the narrowest on; those of which none is longer are left out."""
    for bits in STEPS.values():
        yield (long := int(np.count_nonzero(piece >= (1 << bits) - 1)))
        if not long:
            return


def decode(coding: str, stream: Ints, n: int, dtype: Any) -> Ints:
    """Zigzagged steps [n], unsigned integers of type `dtype`. ValueError as `check`."""
    out = np.empty(n, dtype)
    _unpack(coding, stream, n, out.dtype, out)
    return out


def check(coding: str, stream: Ints, n: int, dtype: Any) -> None:
    """ValueError unless the stream holds exactly n steps."""
    _unpack(coding, stream, n, np.dtype(dtype), None)


def packed(z: Ints, coding: str) -> Ints:
    """The stream of steps in that coding: the short ones, then the long ones."""
    return _packed(z, coding, _sizes(z)[coding])


def _packed(z: Ints, coding: str, size: int) -> Ints:
    bits, stream = STEPS[coding], np.empty(size, np.uint8)
    top, short = (1 << bits) - 1, stream[: _short_bytes(bits, z.size)]
    long, first = stream[short.size :].reshape(-1, z.itemsize), 0
    for at in _pieces(z.size):
        piece = z[at]
        if fast := twin("pack", piece.size):
            first = fast(piece, bits, _planes(short, bits), at.start, long, first)
            continue
        where = np.flatnonzero(piece >= top)
        if where.size:
            found = piece[where].astype(z.dtype.newbyteorder("<")).view(np.uint8)
            long[first : first + where.size] = found.reshape(-1, z.itemsize)
            first += where.size
            piece = piece.copy()
            piece[where] = top
        _pack(piece, short, bits, at.start)
    return stream


def _planes(short: Ints, bits: int) -> Ints:
    """The short steps by byte: [bytes a step, n]; two steps a byte in 4 bits."""
    return short.reshape(max(1, bits // 8), -1)


def _short_bytes(bits: int, n: int) -> int:
    return -(-n // 2) if bits == 4 else n * bits // 8


def _pack(piece: Ints, planes: Ints, bits: int, lo: int) -> None:
    """Write short steps, the first of which is number lo (even)."""
    if bits == 4:
        low, high = piece[0::2].astype(np.uint8), piece[1::2].astype(np.uint8)
        low[: high.size] |= high << 4
        planes[lo // 2 : lo // 2 + low.size] = low
        return
    for i, plane in enumerate(_planes(planes, bits)):
        plane[lo : lo + piece.size] = piece >> 8 * i if i else piece


def _shorts(planes: Ints, bits: int, lo: int, out: Ints) -> None:
    """Read short steps, the first of which is number lo (even), into `out`."""
    if bits == 4:
        pairs = planes[lo // 2 : -(-(lo + out.size) // 2)]
        out[0::2], out[1::2] = pairs & 15, pairs[: out.size // 2] >> 4
        return
    for i, plane in enumerate(_planes(planes, bits)):
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
    long, first = stream[short:].view(dtype.newbyteorder("<")), 0
    scratch = np.empty(min(n, _PIECE), dtype)
    for at in _pieces(n):
        z = scratch[: at.stop - at.start] if out is None else out[at]
        if fast := twin("unpack", z.size):
            listed = long.view(np.uint8).reshape(-1, z.itemsize)
            found, wrong = fast(_planes(stream[:short], bits), bits, at.start, listed, first, z)
            _require_listed(wrong == 1, wrong == 2, long.size)
            first += found
            continue
        _shorts(stream[:short], bits, at.start, z)
        marks = z == top
        found = int(np.count_nonzero(marks))
        listed = long[first : first + found]
        _require_listed(listed.size < found, bool((listed < top).any()), long.size)
        if found and out is not None:
            z[np.flatnonzero(marks)] = listed
        first += found
    if first != long.size:
        raise ValueError(f"have {first} long steps: {long.size} are listed.")


def _require_listed(too_few: bool, a_short_one: bool, listed: int) -> None:
    if too_few:
        raise ValueError(f"have more than the {listed} long steps that are listed.")
    if a_short_one:
        raise ValueError("have a short step among the long ones.")
