"""Gaps as numbers of seven bits a byte, the lowest first; the highest bit says that the number goes on (LEB128).

Where chosen ids come in clusters most gaps are short and a few are long, and bytes of 255 for each 255 left out, as in `gap8`,
are what those few cost most. Here a gap below 128 takes a byte and one below 16,384 two: 1.08 to 1.17 bytes an id of trained
deltas where `gap8` takes 1.2 to 1.3, but 1.27 instead of 1.08 where 1 % is spread evenly. `coding.py` takes the smaller.

The bytes where numbers end are as many as there are numbers. The few that have more are put together for themselves, byte by
byte and all at once, so no loop looks at entries. Nothing is believed: numbers without an end, with a last byte of zero (an
encoder leaves it out) or of more than six bytes raise ValueError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetooth.twins import twin

Ints = NDArray[Any]
PIECE = 1 << 16  # bytes, and a number more: what is worked on stays in the cache
LONGEST = 6  # bytes of a number: 42 bits, of which as many as a piece has add up in 64
_TOO_LONG = f"has a gap of more than {LONGEST} bytes."
_NOT_SHORTEST = "has a gap that is longer than it needs to be."


def size(gaps: Ints) -> int:
    """Bytes of the gaps [k].

    >>> size(np.array([0, 127, 128, 20000]))
    7
    """
    longest, n = int(gaps.max(initial=0)), gaps.size
    for more in range(1, LONGEST):
        if longest >> 7 * more:
            n += int(np.count_nonzero(gaps >= 1 << 7 * more))
    return n


def encode(gaps: Ints) -> Ints:
    """The stream of gaps [k].

    >>> encode(np.array([1, 200, 0]))
    array([  1, 200,   1,   0], dtype=uint8)
    """
    first = (gaps & 127).astype(np.uint8)
    long = np.flatnonzero(gaps > 127)
    first[long] |= 128
    left = gaps[long]
    more = sum(left >= 1 << 7 * place for place in range(1, LONGEST)) + np.zeros(long.size, np.intp)
    ends = np.add.accumulate(more)
    starts = np.ones(gaps.size + int(more.sum()), bool)
    stream = np.empty(starts.size, np.uint8)
    at = long + ends - more
    while at.size:
        at += 1
        left >>= 7
        stream[at] = (left & 127).astype(np.uint8) | (left > 127).astype(np.uint8) << 7
        starts[at] = False
        at, left = at[left > 127], left[left > 127]
    stream[starts] = first
    return stream


def cuts(stream: Ints) -> list[slice]:
    """Pieces of the stream that end where a number does. ValueError where the last has no end, or one is too long."""
    found, at = list[slice](), 0
    while at < stream.size:
        end = min(at + PIECE, stream.size)
        while stream[end - 1] > 127:
            end += 1
            if end > stream.size:
                raise ValueError("ends in the middle of a gap.")
            if end > at + PIECE + LONGEST:
                raise ValueError(_TOO_LONG)
        found.append(slice(at, end))
        at = end
    return found


def measure(piece: Ints) -> tuple[int, int]:
    """How many ids a piece has, and over how many units. ValueError where it is none."""
    if fast := twin("gap7_extent", piece.size):
        found, far, wrong = fast(piece)
        if wrong:
            raise ValueError(_NOT_SHORTEST if wrong == 1 else _TOO_LONG)
        return found, far
    ends = piece < 128
    n = int(np.count_nonzero(ends))
    return n, n + int((piece * ends).sum(dtype=np.uint32)) + int(_long(piece, ends)[1].sum())


def into(piece: Ints, out: Ints, start: int) -> None:
    """The ids of a piece that was measured, counted from unit `start`, into `out`, which has their number and a type they fit into."""
    if out.dtype == np.int32 and (fast := twin("of_gap7", piece.size)):
        fast(piece, out, start)
        return
    ends = piece < 128
    gaps = piece[ends].astype(out.dtype)
    which, more = _long(piece, ends)
    gaps[which] += more.astype(out.dtype)
    gaps += 1
    gaps[0] += start - 1
    np.add.accumulate(gaps, out=out)


def _long(piece: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Which of a piece's numbers have several bytes, and by how much these numbers are more than their last bytes."""
    on = np.flatnonzero(~ends)  # bytes after which a number goes on
    first = np.empty(on.size, bool)
    first[:1], first[1:] = True, on[1:] != on[:-1] + 1
    at = on[first]
    which = at - np.flatnonzero(first)
    more, still = (piece[at] & 127).astype(np.int64), np.arange(at.size)
    for place in range(1, LONGEST):
        if not still.size:
            break
        at += 1
        byte = piece[at]
        if not byte.all():  # a last byte of zero; 128 goes on
            raise ValueError(_NOT_SHORTEST)
        goes_on = byte > 127
        more[still] += (byte & 127).astype(np.int64) << 7 * place
        last = ~goes_on
        more[still[last]] -= byte[last]
        at, still = at[goes_on], still[goes_on]
    if still.size:
        raise ValueError(_TOO_LONG)
    return which, more
