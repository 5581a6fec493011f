"""Compiled twins of the loops of `coding.py` and `varint.py`, each over a piece of a stream; `numba_steps` has those of `zigzag.py`.
`twins.py` says when they are taken.

Where the next number belongs depends on all before it, so most of these cannot be vectorized. They have no branch on what a stream
holds instead: a number is written where the next one belongs, and stays there if it was one. A branch that is wrong on every twelfth
entry (so many gaps are escaped at 1 %) costs more than all the rest.

Ids are int32, gaps uint32: `np.uint32(...)` around every operation keeps numba from widening it to 64 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetooth.kernels.numba_core import Array, compiled
from finetooth.kernels.numba_steps import long_steps, moved, pack, steps, unpack

__all__ = [
    "gap7_extent",
    "gap_extent",
    "gap_sizes",
    "into_gap7",
    "into_gap8",
    "into_gap16",
    "long_steps",
    "moved",
    "of_gap7",
    "of_gaps",
    "pack",
    "steps",
    "unpack",
]

Counts = Any  # a tuple of numbers, whose types are numpy's here and Python's where it is called

U32, U64, I64 = np.uint32, np.uint64, np.int64
LONGEST = 6  # bytes of a number of seven bits each, as in varint.py
FAR = U32(65535)  # gaps up to here are divided by 255 with shifts
BY_255 = I64(0x80808081)  # a gap of 31 bits times this, shifted by 39 bits, is a 255th of it
BY_65535 = I64(0x80008001)  # and a 65535th by 47


# -- gaps ----------------------------------------------------------------------------------------


@compiled()
def gap_sizes(ids: Array, before: int) -> Counts:
    """Bytes of sorted ids [k] that follow the id `before`, as gap8, gap16 and gap7."""
    n = ids.size
    if n == 0:
        return 0, 0, 0
    first = U32(I64(ids[0]) - before - 1)
    escapes, longest = _escapes(first), first
    more = U32(U32(first >= 1 << 7) + U32(first >= 1 << 14))
    for i in range(1, n):
        gap = U32(ids[i] - ids[i - 1] - 1)
        longest = max(longest, gap)
        escapes = U32(escapes + _escapes(gap))
        more = U32(more + U32(gap >= 1 << 7))
        more = U32(more + U32(gap >= 1 << 14))
    if longest < FAR:
        return n + escapes, 2 * n, n + more
    eight, sixteen, seven, last = I64(n), I64(n), I64(n), I64(before)
    for i in range(n):
        gap = U32(I64(ids[i]) - last - 1)
        last = I64(ids[i])
        eight += gap // U32(255)
        sixteen += gap // FAR
        for place in range(1, 5):
            seven += (gap >> U32(7 * place)) > 0
    return eight, 2 * sixteen, seven


@compiled(inline="always")
def _escapes(gap: Any) -> Any:
    """A gap below 65535 divided by 255."""
    x = U32(gap + U32(1))
    return U32(U32(x + U32(x >> U32(8))) >> U32(8))


@compiled()
def into_gap8(ids: Array, before: int, out: Array) -> None:
    """The ids' gaps as bytes; `out` has as many as `gap_sizes` says."""
    _into_gaps(ids, before, out, np.uint8(255), BY_255, 39)


@compiled()
def into_gap16(ids: Array, before: int, out: Array) -> None:
    """The same in 16 bits."""
    _into_gaps(ids, before, out, np.uint16(65535), BY_65535, 47)


@compiled(inline="always")
def _into_gaps(ids: Array, before: int, out: Array, top: Any, inverse: Any, shift: int) -> None:
    out[:] = top
    at, last = U64(0), I64(before)
    for i in range(ids.size):
        gap = I64(ids[i]) - last - 1
        last = I64(ids[i])
        over = (gap * inverse) >> shift
        at += U64(over)
        out[at] = out.dtype.type(gap + over)  # less `top` times so many, as it wraps around
        at += U64(1)


@compiled()
def gap_extent(piece: Array, top: int) -> Counts:
    """How many ids a piece of gap8 or gap16 has, and over how many units."""
    n, left = I64(0), I64(0)
    for i in range(piece.size):
        n += piece[i] != top
        left += piece[i]
    return n, n + left


@compiled()
def of_gaps(piece: Array, top: int, out: Array, start: int) -> None:
    """The ids of a piece of gap8 or gap16, counted from unit `start`; `out` has as many as `gap_extent` says."""
    stop = piece.size
    while (
        stop > 0 and piece[stop - 1] == top
    ):  # a gap that goes on in the next piece: there is no place for its id here
        stop -= 1
    at, unit = U64(0), I64(start - 1)
    for i in range(stop):
        is_id = I64(piece[i] != top)
        unit += I64(piece[i]) + is_id
        out[at] = unit
        at += U64(is_id)


# -- numbers of seven bits a byte ------------------------------------------------------------------


@compiled()
def into_gap7(ids: Array, before: int, out: Array) -> None:
    """The ids' gaps as numbers of seven bits; `out` has as many bytes as `gap_sizes` says."""
    at, last, n = U64(0), I64(before), ids.size
    for i in range(n):
        gap = U32(I64(ids[i]) - last - 1)
        last = I64(ids[i])
        if gap < 1 << 14 and i + 1 < n:  # the next id has a byte at least, so there is one to write to
            two = U32(gap > 127)
            out[at] = np.uint8((gap & U32(127)) | U32(two << U32(7)))
            out[at + U64(1)] = np.uint8(gap >> U32(7))
            at += U64(1) + U64(two)
        else:
            while gap > 127:
                out[at] = np.uint8((gap & U32(127)) | U32(128))
                at += U64(1)
                gap = U32(gap >> U32(7))
            out[at] = np.uint8(gap)
            at += U64(1)


@compiled()
def gap7_extent(piece: Array) -> Counts:
    """How many ids, over how many units, and what is wrong: 0 nothing, 1 a last byte of zero, 2 a number of more than six bytes.

    The piece begins where a number does, and has at most 2^24 bytes. How far a byte is into its number is seen from
    those before it, so that this loop is vectorized, for numbers of up to three bytes.
    """
    n, zeros, long = U32(0), U32(0), U32(0)
    first, second, third = (
        U32(0),
        U32(0),
        U32(0),
    )  # sums of the bytes that have none before them in their number, one, or two
    one, two, three = piece[2:], piece[1:], piece  # piece[i - 1] might be the last, which is not vectorized
    here = piece[3:]
    for i in range(piece.size - 3):
        byte = U32(here[i])
        value, after = U32(byte & U32(127)), U32(one[i] > 127)
        n = U32(n + U32(byte < U32(128)))
        zeros = U32(zeros + U32(after & U32(byte == U32(0))))
        first = U32(first + value)
        second = U32(second + U32(after * value))
        after = U32(after & U32(two[i] > 127))
        third = U32(third + U32(after * value))
        long = U32(long + U32(after & U32(three[i] > 127)))
    if long or piece.size < 3:
        return _gap7_slowly(piece)
    begun, far, wrong = _gap7_slowly(piece[:3])
    far += I64(first) + I64(second) * 127 + (I64(third) * 127 << 7) + n
    return begun + n, far, max(wrong, 1 if zeros else 0)


@compiled()
def _gap7_slowly(piece: Array) -> Counts:
    """The same of a piece whose last number need not end."""
    n, far, place, wrong = I64(0), I64(0), I64(0), I64(0)
    for i in range(piece.size):
        byte = I64(piece[i])
        if place == LONGEST:
            return n, far, I64(2)
        if byte == 0 and place > 0:
            wrong = I64(1)
        far += (byte & 127) << (7 * place)
        if byte < 128:
            n, far, place = n + 1, far + 1, I64(0)
        else:
            place += 1
    return n, far, wrong


@compiled()
def of_gap7(piece: Array, out: Array, start: int) -> None:
    """The ids of a piece that ends where a number does, counted from unit `start`."""
    at, unit, place = U64(0), I64(start - 1), I64(0)
    for i in range(piece.size):
        byte = I64(piece[i])
        last = I64(byte < 128)
        unit += ((byte & 127) << place) + last
        out[at] = unit
        at += U64(last)
        place = I64(0) if last else place + 7
