"""Selections on a CPU as flags, eight to a byte, and as positions: each from the other in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetooth.kernels import reference
from finetooth.kernels.numba_core import ALONE, compiled, flat, parts, spread


def flagged(index: Tensor, n: int) -> Tensor:
    """Sorted positions as packed flags: every part writes bytes of its own."""
    packed, places = torch.zeros(-(-n // 8), dtype=torch.uint8), flat(index)
    spread(_flag, packed.numel(), (places, flat(packed)), ALONE)
    return packed


def positions(packed: Tensor, n: int) -> Tensor:
    """The positions of the flags that are set: counted, then written, part by part."""
    if n >= 2**31:
        return reference.positions(packed, n)
    flags = flat(packed)
    counts = np.zeros(parts(flags.size), np.int64)
    spread(_count_flags, flags.size, (flags, counts))
    ends = counts.cumsum()
    out = np.empty(int(ends[-1]), np.int32)
    spread(_write_flags, flags.size, (flags, ends - counts, ends, out))
    return torch.from_numpy(out)


@compiled()
def _flag(part: int, start: int, stop: int, arrays: Any) -> None:
    places, packed = arrays
    for i in range(np.searchsorted(places, 8 * start), places.size):
        if places[i] >= 8 * stop:
            break
        packed[places[i] >> 3] |= np.uint8(1 << (places[i] & 7))


@compiled()
def _count_flags(part: int, start: int, stop: int, arrays: Any) -> None:
    packed, counts = arrays
    total = np.int64(0)
    for i in range(start, stop):
        x = packed[i]
        x = x - ((x >> np.uint8(1)) & np.uint8(0x55))
        x = (x & np.uint8(0x33)) + ((x >> np.uint8(2)) & np.uint8(0x33))
        total += np.int64((x + (x >> np.uint8(4))) & np.uint8(0x0F))
    counts[part] = total


@compiled()
def _write_flags(part: int, start: int, stop: int, arrays: Any) -> None:
    packed, starts, ends, out = arrays
    at, end = starts[part], ends[part]
    for i in range(start, stop):
        x = packed[i]
        if x:
            for bit in range(8):
                if at < end:  # without a branch on the flag: the next one overwrites
                    out[at] = 8 * i + bit
                    at += (x >> bit) & 1
