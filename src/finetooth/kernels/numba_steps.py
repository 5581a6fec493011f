"""Compiled twins of the loops of `zigzag.py`: values coded as steps, each over a piece of them.

All numbers are unsigned integers of one type, which is `kind`: a cast around every operation keeps numba from widening it. A stream's long
steps are given as bytes, since they need not lie where such numbers do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetooth.kernels.numba_core import Array, compiled

Counts = Any  # a tuple of numbers, whose types are numpy's here and Python's where it is called

U32, U64 = np.uint32, np.uint64
BLOCK = 256  # steps among which long ones are looked for at once


@compiled()
def steps(old: Array, new: Array, floating: bool, out: Array) -> None:
    """As `zigzag.steps`, into `out`; all are unsigned integers of one type. What depends on a sign is vectorized as a choice, not as a shift."""
    kind, top = out.dtype.type, _highest(out)
    flips = kind(top - kind(1)) if floating else kind(0)
    for i in range(out.size):
        before, after = old[i], new[i]
        if before >= top:
            before = kind(before ^ flips)
        if after >= top:
            after = kind(after ^ flips)
        difference = kind(after - before)
        z = kind(difference << kind(1))
        if difference >= top:
            z = kind(~z)
        out[i] = z


@compiled()
def moved(old: Array, z: Array, floating: bool) -> None:
    """As `zigzag.moved`."""
    kind, top = z.dtype.type, _highest(z)
    flips = kind(top - kind(1)) if floating else kind(0)
    for i in range(z.size):
        before, difference = old[i], kind(z[i] >> kind(1))
        if z[i] & kind(1):
            difference = kind(~difference)
        if before >= top:
            before = kind(before ^ flips)
        after = kind(before + difference)
        if after >= top:
            after = kind(after ^ flips)
        z[i] = after


@compiled(inline="always")
def _highest(numbers: Array) -> Any:
    """The number of only the highest bit."""
    kind = numbers.dtype.type
    return kind(kind(1) << kind(8 * numbers.itemsize - 1))


@compiled()
def long_steps(z: Array) -> Counts:
    """How many steps are too long for 4, 8, 16 and 24 bits."""
    four, eight, sixteen, more = U32(0), U32(0), U32(0), U32(0)
    for i in range(z.size):
        four = U32(four + U32(z[i] >= (1 << 4) - 1))
        eight = U32(eight + U32(z[i] >= (1 << 8) - 1))
        sixteen = U32(sixteen + U32(z[i] >= (1 << 16) - 1))
        more = U32(more + U32(z[i] >= (1 << 24) - 1))
    return four, eight, sixteen, more


@compiled()
def pack(z: Array, bits: int, planes: Array, lo: int, long: Array, first: int) -> int:
    """Write short steps, the first of which is number `lo` (even), into `planes` [bytes a step, n], and long ones as bytes into `long`
    [n, bytes a step] from number `first` on; returns where the next one belongs."""
    kind = z.dtype.type
    top = kind((1 << bits) - 1)
    if bits == 4:
        for i in range(z.size // 2):
            planes[0, lo // 2 + i] = np.uint8(min(z[2 * i], top) | kind(min(z[2 * i + 1], top) << kind(4)))
        if z.size % 2:
            planes[0, (lo + z.size) // 2] = np.uint8(min(z[z.size - 1], top))
    else:
        for byte in range(planes.shape[0]):
            plane = planes[byte, lo : lo + z.size]
            for i in range(z.size):
                plane[i] = np.uint8(min(z[i], top) >> kind(8 * byte))
    where = np.empty(BLOCK + 1, np.uint16)
    for block in range(0, z.size, BLOCK):
        for i in where[: _from(z[block : block + BLOCK], top, where)]:
            step = z[block + i]
            for byte in range(long.shape[1]):
                long[first, byte] = np.uint8(step >> kind(8 * byte))
            first += 1
    return first


@compiled()
def _from(z: Array, top: Any, where: Array) -> Any:
    """Into `where`, which has a place more than z: where numbers are `top` or larger; returns how many these are."""
    some = U32(0)
    for i in range(z.size):
        some = U32(some + U32(z[i] >= top))
    if not some:
        return some
    found = U64(0)
    for i in range(z.size):
        where[found] = i
        found += U64(z[i] >= top)
    return some


@compiled()
def unpack(planes: Array, bits: int, lo: int, long: Array, first: int, out: Array) -> Counts:
    """Read short steps, the first of which is number `lo`, into `out`, and the long ones among them from number `first` of those that
    `long` has as bytes [n, bytes a step]. Returns how many these are, or would be, and what is wrong: 0 nothing, 1 too few are listed, 2 a
    short one is."""
    kind, found, wrong = out.dtype.type, 0, 0
    top = kind((1 << bits) - 1)
    if bits == 4:
        for i in range(out.size // 2):
            pair = planes[0, lo // 2 + i]
            out[2 * i] = kind(pair & np.uint8(15))
            out[2 * i + 1] = kind(pair >> np.uint8(4))
        if out.size % 2:
            out[out.size - 1] = kind(planes[0, (lo + out.size) // 2] & np.uint8(15))
    else:
        for byte in range(planes.shape[0]):
            plane = planes[byte, lo : lo + out.size]
            for i in range(out.size):
                out[i] = kind((out[i] if byte else kind(0)) | kind(kind(plane[i]) << kind(8 * byte)))
    where = np.empty(BLOCK + 1, np.uint16)
    for block in range(0, out.size, BLOCK):
        for i in where[: _from(out[block : block + BLOCK], top, where)]:
            if first + found < long.shape[0]:
                value = U64(0)
                for byte in range(long.shape[1]):
                    value |= U64(U64(long[first + found, byte]) << U64(8 * byte))
                wrong = 2 if value < top else wrong
                out[block + i] = kind(value)
            else:
                wrong = 1
            found += 1
    return found, wrong
