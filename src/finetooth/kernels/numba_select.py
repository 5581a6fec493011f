"""Selection on a CPU: the exact k-th largest magnitude, and the positions that reach a value.

Float32: a random sample of magnitudes brackets the wanted rank, three standard deviations to either side. One pass over the bits then
counts and squares what is above the bracket and collects the one or two per cent inside, where numpy finds the rank.
If the rank is outside, or too much is inside (ties), two passes of counting by the high and the low 16 bits find it
without a guess. Both are exact; only the time is random. 16-bit floats have 32,768 magnitudes: one pass counts them.

Magnitudes of finite floats are ordered as their bits without the sign; exponents of all ones are not finite. A pool of
several tensors is read tensor by tensor, and nothing is concatenated.

Not taken: torch.topk and kthvalue, which use one thread and copy everything; a radix select alone, which reads a
float32 pool twice. Not covered: float64 and integers, which are the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetooth.kernels import reference
from finetooth.kernels.numba_core import ALONE, Array, compiled, flat, hash64, parts, spread

SAMPLE = 1 << 14  # magnitudes drawn from a pool: a quarter of a millisecond, and a bracket of at most 2.4 % of it
WIDTH = 3.0  # standard deviations on either side: 1 bracket in 400 misses, and costs two more passes
BLOCK = 1024  # entries whose sums and flags are made before one of them is taken out
HALF = np.uint64(32)
SPAN32, INFINITE32 = np.uint32(0x7FFFFFFF), 0x7F800000
INFINITE = {torch.float32: INFINITE32, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
NOT_FINITE = (float("nan"), float("nan"))


def magnitude_cut(gs: Sequence[Tensor], k: int) -> tuple[float, float]:
    """The exact k-th largest magnitude of a pool, and the sum of the squares of the entries that reach it."""
    dtype = gs[0].dtype
    if dtype not in INFINITE or any(g.dtype != dtype for g in gs):
        return reference.magnitude_cut(gs, k)
    word = np.uint32 if dtype == torch.float32 else np.uint16
    pool = [flat(g).view(word) for g in gs]
    n = sum(bits.size for bits in pool)
    if n <= ALONE:
        keys = np.concatenate(pool) & word(np.iinfo(word).max >> 1)
        return NOT_FINITE if keys.max() >= INFINITE[dtype] else _settle(keys, k, dtype)
    if word == np.uint16:
        return _of_16(pool, k, dtype)
    return _by_bracket(pool, k, n) or _by_counting(pool, k)


def reaching(x: Tensor, cut: float) -> tuple[Tensor, Tensor]:
    """Positions above `cut`, and equal to it, in a flat non-negative tensor: counted, then written, part by part."""
    if x.dtype != torch.float32:
        return reference.reaching(x, cut)
    values, level = flat(x), np.float32(cut)
    counts = np.zeros((2, parts(values.size)), np.int64)
    spread(_count_reaching, values.size, (values, level, counts))
    ends = counts.cumsum(1)
    above, equal = np.empty(counts[0].sum(), np.int64), np.empty(counts[1].sum(), np.int64)
    spread(_write_reaching, values.size, (values, level, ends, counts, above, equal))
    return torch.from_numpy(above), torch.from_numpy(equal)


# -- by counting -----------------------------------------------------------------------------------


def _of_16(pool: list[Array], k: int, dtype: torch.dtype) -> tuple[float, float]:
    counts = _histogram(pool, np.uint16(0x7FFF), 0)
    if counts[INFINITE[dtype] :].any():
        return NOT_FINITE
    at, _ = _rank(counts, k)
    values = _magnitudes(dtype)
    return float(values[at]), _weighted(counts[at : INFINITE[dtype]], values[at:])


@cache
def _magnitudes(dtype: torch.dtype) -> Array:
    """The finite magnitudes of a 16-bit float, by their bits."""
    array: Array = torch.arange(INFINITE[dtype], dtype=torch.int16).view(dtype).double().numpy()
    return array


def _by_counting(pool: list[Array], k: int) -> tuple[float, float]:
    """Which high half of the bits the rank falls on, then which low half."""
    high, left = _rank(_histogram(pool, SPAN32, 16), k)
    size = max(parts(bits.size) for bits in pool)
    counts, sums = np.zeros((size, 1 << 16), np.int64), np.zeros(size)
    for bits in pool:
        spread(_count_low, bits.size, (bits, bits.view(np.float32), np.uint32(high), counts, sums))
    low, _ = _rank(counts.sum(0), left)
    values = (np.arange(1 << 16, dtype=np.uint32) | np.uint32(high << 16)).view(np.float32).astype(np.float64)
    return float(values[low]), float(sums.sum()) + _weighted(counts.sum(0)[low:], values[low:])


def _weighted(counts: Array, values: Array) -> float:
    return float((counts * values**2).sum())  # a dot product would wake BLAS and its threads


def _histogram(pool: list[Array], mask: Any, shift: int) -> Array:
    counts = np.zeros((max(parts(bits.size) for bits in pool), 1 << 15), np.int64)
    for bits in pool:
        spread(_count, bits.size, (bits, mask, type(mask)(shift), counts))
    total: Array = counts.sum(0)
    return total


def _rank(counts: Array, k: int) -> tuple[int, int]:
    """The bin of the k-th largest, and its rank among the entries of that bin."""
    reach = counts[::-1].cumsum()
    back = int(np.searchsorted(reach, k))
    at = counts.size - 1 - back
    return at, k - int(reach[back] - counts[at])


# -- by a bracket ----------------------------------------------------------------------------------


def _by_bracket(pool: list[Array], k: int, n: int) -> tuple[float, float] | None:
    """None if the rank is not inside the bracket, or too many entries are."""
    low, high = _bracket(pool, k, n)
    inside, counted, sums, peak = [], 0, 0.0, 0
    for bits in pool:
        count = parts(bits.size)
        room = bits.size // (8 * count) + 2 * BLOCK
        kept, found, square = np.empty((count, room), np.uint32), np.zeros((3, count), np.int64), np.zeros(count)
        spread(_collect, bits.size, (bits, bits.view(np.float32), low, high, kept, found, square))
        if (found[1] > room).any():
            return None
        inside += [row[:size] for row, size in zip(kept, found[1])]
        counted, sums, peak = counted + int(found[0].sum()), sums + square.sum(), max(peak, int(found[2].max()))
    if peak >= INFINITE32:
        return NOT_FINITE
    keys = np.concatenate(inside)
    return _narrowed(keys, k - counted, float(sums)) if 0 < k - counted <= keys.size else None


def _narrowed(keys: Array, k: int, above: float) -> tuple[float, float]:
    """Settle among the thousandth of some keys that has the rank: counting is five times faster than partitioning."""
    offsets = keys - keys.min()
    shift = max(0, int(offsets.max()).bit_length() - 12)
    counts = np.zeros((1, 1 << 12), np.int64)
    _count(0, 0, keys.size, (offsets, SPAN32, np.uint32(shift), counts))
    at, left = _rank(counts[0], k)
    bins = offsets >> np.uint32(shift)
    over = keys[bins > at].view(np.float32).astype(np.float64)
    return _settle(keys[bins == at], left, torch.float32, above + float((over * over).sum()))


def _bracket(pool: list[Array], k: int, n: int) -> tuple[np.uint32, np.uint32]:
    size = min(SAMPLE, n // 8)
    drawn = []
    for bits in pool:
        sample = np.empty(-(-bits.size * size // n), np.uint32)
        spread(_draw, sample.size, (bits, sample), ALONE // 8)
        drawn.append(sample)
    keys = np.concatenate(drawn)
    rank, share = keys.size * (n - k) / n, k / n
    margin = WIDTH * (keys.size * share * (1 - share)) ** 0.5 + WIDTH
    low, high = int(rank - margin), int(rank + margin)
    keys.partition((max(low, 0), min(high, keys.size - 1)))
    return keys[low] if low > 0 else np.uint32(0), keys[high] if high < keys.size else np.uint32(INFINITE32 - 1)


def _settle(keys: Array, k: int, dtype: torch.dtype, above: float = 0.0) -> tuple[float, float]:
    """The k-th largest of some magnitudes' bits; `above` is the sum of the squares of those not among them."""
    at = keys.size - k
    keys = np.partition(keys, at)
    cut = keys[at]
    reached = np.concatenate([keys[:at][keys[:at] == cut], keys[at:]])
    values = reached.view(np.float32).astype(np.float64) if dtype == torch.float32 else _magnitudes(dtype)[reached]
    return float(values[values.size - k]), above + float((values * values).sum())


# -- compiled --------------------------------------------------------------------------------------


@compiled()
def _draw(part: int, start: int, stop: int, arrays: Any) -> None:
    """One entry at random from each of equal stretches: a fixed distance could follow one column."""
    bits, sample = arrays
    for i in range(start, stop):
        first, last = i * bits.size // sample.size, (i + 1) * bits.size // sample.size
        offset = ((hash64(np.uint64(i), np.uint64(bits.size)) >> HALF) * np.uint64(last - first)) >> HALF
        sample[i] = bits[first + np.int64(offset)] & SPAN32


@compiled(fastmath={"reassoc"})
def _look(bits: Array, values: Array, low: Any, high: Any, flags: Array) -> Any:
    """Of one block: entries above the bracket, their squares, the largest; and a flag for each that is inside."""
    above, square, peak = np.uint32(0), 0.0, np.uint32(0)
    for i in range(bits.size):
        key = np.uint32(bits[i] & SPAN32)
        over = key > high
        flags[i] = np.uint8((key >= low) & (key <= high))
        above += np.uint32(over)
        x = np.float64(values[i] if over else np.float32(0))
        square += x * x
        peak = max(peak, key)
    return above, square, peak


@compiled()
def _collect(part: int, start: int, stop: int, arrays: Any) -> None:
    bits, values, low, high, kept, found, square = arrays
    kept, flags = kept[part], np.zeros(BLOCK, np.uint8)
    above, filled, total, peak = np.int64(0), 0, 0.0, np.uint32(0)
    for at in range(start, stop, BLOCK):
        block = bits[at : min(at + BLOCK, stop)]
        more, squares, top = _look(block, values[at : at + block.size], low, high, flags)
        flags[block.size :] = 0
        above, total, peak = above + more, total + squares, max(peak, top)
        filled = _take(block, flags, kept, filled)
    found[0, part], found[1, part], found[2, part], square[part] = above, filled, peak, total


@compiled()
def _take(bits: Array, flags: Array, kept: Array, filled: int) -> int:
    """Append what is flagged, looking at eight flags at a time; more than `kept` has room for, if it is full."""
    eights = flags.view(np.uint64)
    if filled + flags.size > kept.size:
        return kept.size + 1
    at = np.uint64(filled)
    for e in range(eights.size):
        word = eights[e]
        if word:
            first, last = np.uint64(8 * e), np.uint64(bits.size - 1)
            for b in range(8):  # without a branch: what is not inside is overwritten, and beyond the end nothing is
                kept[at] = bits[min(first + np.uint64(b), last)] & SPAN32
                at += np.uint64((word >> np.uint64(8 * b)) & np.uint64(1))
    return int(at)


@compiled()
def _count(part: int, start: int, stop: int, arrays: Any) -> None:
    bits, mask, shift, counts = arrays
    counts, bits = counts[part], bits[start:stop]
    for i in range(bits.size):
        counts[(bits[i] & mask) >> shift] += 1


@compiled()
def _count_low(part: int, start: int, stop: int, arrays: Any) -> None:
    bits, values, high, counts, sums = arrays
    counts, bits, values = counts[part], bits[start:stop], values[start:stop]
    for i in range(bits.size):
        key = np.uint32(bits[i] & SPAN32)
        half = np.uint32(key >> np.uint32(16))
        if half == high:
            counts[key & np.uint32(0xFFFF)] += 1
        elif half > high:
            sums[part] += np.float64(values[i]) ** 2


@compiled()
def _reached(values: Array, level: Any) -> Any:
    above, equal = np.uint32(0), np.uint32(0)
    for i in range(values.size):
        above += np.uint32(values[i] > level)
        equal += np.uint32(values[i] == level)
    return above, equal


@compiled()
def _flag_reached(values: Array, level: Any, flags: Array) -> None:
    for i in range(values.size):
        flags[i] = np.uint8(values[i] >= level)
    flags[values.size :] = 0


@compiled()
def _count_reaching(part: int, start: int, stop: int, arrays: Any) -> None:
    values, level, counts = arrays
    for at in range(start, stop, BLOCK):
        above, equal = _reached(values[at : min(at + BLOCK, stop)], level)
        counts[0, part] += above
        counts[1, part] += equal


@compiled()
def _write_reaching(part: int, start: int, stop: int, arrays: Any) -> None:
    values, level, ends, counts, above, equal = arrays
    above = above[ends[0, part] - counts[0, part] : ends[0, part]]
    equal = equal[ends[1, part] - counts[1, part] : ends[1, part]]
    a, e, flags = 0, 0, np.zeros(BLOCK, np.uint8)
    eights = flags.view(np.uint64)
    for at in range(start, stop, BLOCK):
        _flag_reached(values[at : min(at + BLOCK, stop)], level, flags)
        for j in range(eights.size):
            if eights[j]:
                for i in range(at + 8 * j, min(at + 8 * j + 8, stop)):
                    if a < above.size:  # until the last is found, without a branch on the value: the next overwrites
                        above[a] = i
                        a += int(values[i] > level)
                    if values[i] == level:
                        equal[e] = i
                        e += 1
