"""Gaps as numbers of seven bits a byte, the lowest first; the highest bit says that the number goes on (LEB128). numpy only.

Where chosen ids come in clusters most gaps are short and a few are long, and bytes of 255 for each 255 left out, as in `gap8`,
are what those few cost most. Here a gap below 128 takes a byte and one below 16,384 two: 1.08 to 1.17 bytes an id of trained
deltas where `gap8` takes 1.2 to 1.3, but 1.27 instead of 1.08 where 1 % is spread evenly. `coding.py` takes the smaller.

Every byte adds its seven bits, shifted by its place in its number, to a sum that is read where numbers end, so no loop looks at
entries. Nothing is believed: numbers without an end, with a last byte of zero (an encoder leaves it out) or of more than six bytes raise ValueError.
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
    at = np.add.accumulate(lengths)
    stream = np.empty(int(at[-1]) if at.size else 0, np.uint8)
    at -= lengths
    while gaps.size:
        stream[at] = (gaps & 127).astype(np.uint8) | (gaps > 127).astype(np.uint8) << 7
        left = np.flatnonzero(gaps > 127)
        gaps, at = gaps[left] >> 7, at[left] + 1
    return stream


def pieces(stream: Ints) -> Iterator[tuple[Ints, Ints]]:
    """What each byte adds, int64, and the places where numbers end, a piece at a time. ValueError where the stream is none."""
    at = 0
    while at < stream.size:
        end = min(at + PIECE, stream.size)
        while stream[end - 1] > 127:
            end += 1
            if end > stream.size:
                raise ValueError("ends in the middle of a gap.")
            if end > at + PIECE + LONGEST:
                raise ValueError(f"has a gap of more than {LONGEST} bytes.")
        yield _adds(stream[at:end]), np.flatnonzero(stream[at:end] < 128)
        at = end


def _adds(piece: Ints) -> Ints:
    adds, inside = (piece & 127).astype(np.int64), np.zeros(piece.size, bool)
    np.greater(piece[:-1], 127, out=inside[1:])  # the byte before goes on
    if bool((inside & (piece == 0)).any()):
        raise ValueError("has a gap that is longer than it needs to be.")
    deep = inside
    for _ in range(1, LONGEST):
        if not deep.any():
            return adds
        adds <<= deep.astype(np.int64) * 7
        deeper = np.zeros_like(deep)
        np.logical_and(deep[:-1], inside[1:], out=deeper[1:])
        deep = deeper
    if deep.any():
        raise ValueError(f"has a gap of more than {LONGEST} bytes.")
    return adds


def extent(stream: Ints) -> tuple[int, int, int]:
    """How many ids the gaps are of, the first and the last."""
    n, total, low = 0, 0, -1
    for adds, ends in pieces(stream):
        low = int(adds[: ends[0] + 1].sum()) if low < 0 else low
        n, total = n + ends.size, total + int(adds.sum())
    return n, low, total + n - 1


def into(stream: Ints, out: Ints) -> None:
    """The ids of a stream that was looked through: `out` [n] has room for all, and they fit into its type."""
    n, last = 0, -1
    for adds, ends in pieces(stream):
        adds[ends] += 1
        adds[0] += last
        out[n : n + ends.size] = np.add.accumulate(adds, out=adds)[ends]
        n, last = n + ends.size, int(adds[-1])
