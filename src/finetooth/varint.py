"""Gaps as numbers of seven bits a byte, the lowest first; the highest bit says that the number goes on (LEB128). numpy only.

Where chosen ids come in clusters most gaps are short and a few are long, and bytes of 255 for each 255 left out, as in `gap8`,
are what those few cost most. Here a gap below 128 takes a byte and one below 16,384 two: 1.08 to 1.17 bytes an id of trained
deltas where `gap8` takes 1.2 to 1.3, but 1.27 instead of 1.08 where 1 % is spread evenly. `coding.py` takes the smaller.

Numbers are put together from their ends backwards, for all numbers of a piece at once, so no loop looks at entries. Nothing is
believed: numbers without an end, with a last byte of zero (an encoder leaves it out) or of more than six bytes raise ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]
PIECE = 1 << 16  # bytes, and a number more: what is worked on stays in the cache
LONGEST = 6  # bytes of a number: 42 bits, of which as many as a piece has add up in 64


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
    lengths = np.ones(gaps.size, np.intp)
    for more in range(1, LONGEST):
        if int(gaps.max(initial=0)) >> 7 * more:
            lengths += gaps >= 1 << 7 * more
    starts = np.add.accumulate(lengths) - lengths
    stream = np.empty(int(lengths.sum()), np.uint8)
    left = np.arange(gaps.size)
    for place in range(LONGEST):
        goes_on = lengths[left] > place + 1
        stream[starts[left] + place] = (gaps[left] >> 7 * place & 127).astype(np.uint8) | goes_on.astype(np.uint8) << 7
        left = left[goes_on]
    return stream


def numbers(stream: Ints) -> Iterator[Ints]:
    """The gaps, int64, a piece at a time. ValueError where the stream is none."""
    at = 0
    while at < stream.size:
        end = min(at + PIECE, stream.size)
        while stream[end - 1] > 127:
            end += 1
            if end > stream.size:
                raise ValueError("ends in the middle of a gap.")
            if end > at + PIECE + LONGEST:
                raise ValueError(f"has a gap of more than {LONGEST} bytes.")
        yield _numbers(stream[at:end])
        at = end


def _numbers(piece: Ints) -> Ints:
    ends = np.flatnonzero(piece < 128)
    lengths = np.diff(ends, prepend=-1)
    if int(lengths.max()) > LONGEST:
        raise ValueError(f"has a gap of more than {LONGEST} bytes.")
    out = piece[ends].astype(np.int64)
    if bool((out[lengths > 1] == 0).any()):
        raise ValueError("has a gap that is longer than it needs to be.")
    left = np.flatnonzero(lengths > 1)
    for back in range(1, LONGEST):
        if not left.size:
            break
        out[left] = out[left] << 7 | piece[ends[left] - back] & 127
        left = left[lengths[left] > back + 1]
    return out


def extent(stream: Ints) -> tuple[int, int, int]:
    """How many ids the gaps are of, the first and the last."""
    n, total, low = 0, 0, -1
    for gaps in numbers(stream):
        low = int(gaps[0]) if low < 0 else low
        n, total = n + gaps.size, total + int(gaps.sum())
    return n, low, total + n - 1


def into(stream: Ints, out: Ints) -> None:
    """The ids of a stream that was looked through: `out` [n] has room for all, and they fit into its type."""
    n, last = 0, -1
    for gaps in numbers(stream):
        gaps += 1
        gaps[0] += last
        out[n : n + gaps.size] = np.add.accumulate(gaps, out=gaps)
        n, last = n + gaps.size, int(gaps[-1])
