"""What has a random part or belongs to it, on a CPU: GIFT-SW's noise and the steps of its size, stochastic rounding, draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetooth.kernels import reference
from finetooth.kernels.numba_core import (
    ALONE,
    Array,
    compiled,
    flat,
    flat_,
    hash64,
    known,
    narrow,
    rounded,
    spread,
    unsigned,
    widen,
    written,
)

BLOCK = 4096  # entries at a time: their hashes stay in the first cache


def best_steps(
    w: Tensor,  # [r, in] float32
    full: Tensor,  # [r, 1] float32: the step that clips nothing
    fractions: Sequence[float],  # of it, to choose from
    top: int,  # the largest level
) -> Tensor:
    """By row, the step that rounds w with the smallest squared error; sums are taken in whatever order is fast."""
    best = torch.empty_like(full)
    arrays = (flat(w), flat(full), np.array(fractions, np.float32), np.float32(top), w.shape[1], flat_(best))
    spread(_best_steps, w.shape[0], arrays, ALONE // max(1, w.shape[1]), grain=1)
    return best


def noisy(
    w: Tensor,  # [r, in]: some rows of a weight
    half_step: Tensor,  # [r, 1] float32: the standard deviation of every row
    kept: Tensor,  # [in] bool: columns without noise
    key: int,
    first: int,  # the position in the whole weight of w's first entry
    out: Tensor,  # [r, in], w's dtype: written in place
) -> None:
    """w + half_step * N(0, 1) on the columns that are not kept, drawn by position (see `reference.normal`)."""
    if not known(w):
        reference.noisy(w, half_step, kept, key, first, out)
        return
    table = reference.normal_table().numpy()
    arrays = (flat(w), flat(half_step), flat(kept), table, unsigned(key), first, flat_(out))
    spread(_noisy, w.shape[0], arrays, ALONE // max(1, w.shape[1]), grain=1)
    written([out])


def uniform(n: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """n numbers in [0, 1) with 24 random bits each, float32 [n].

    >>> uniform(3, 7).equal(reference.uniform(3, 7))
    True
    """
    out = np.empty(n, np.float32)
    spread(_uniform, n, (unsigned(key), out))
    return torch.from_numpy(out)


def round_stochastic(
    x: Tensor,  # n, float32
    dtype: torch.dtype,  # bfloat16 or float16
    key: int,
    out: Tensor,  # n, dtype: the result, written in place
) -> None:
    """Round to a neighbour with a probability such that the mean is x (see `reference.round_stochastic`)."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"stochastic rounding to {dtype} is not defined: use torch.bfloat16 or torch.float16.")
    spread(_round, x.numel(), (flat(x), unsigned(key), flat_(out)))
    written([out])


# -- compiled --------------------------------------------------------------------------------------


@compiled()
def _best_steps(part: int, start: int, stop: int, arrays: Any) -> None:
    w, full, fractions, top, width, best = arrays
    for r in range(start, stop):
        row, least = w[r * width : (r + 1) * width], np.float32(np.inf)
        best[r] = full[r]
        for i in range(fractions.size):
            step = full[r] * fractions[i]
            error = _error(row, step, max(step, np.float32(1.1754944e-38)), top)
            if error < least:
                best[r], least = step, error


@compiled(fastmath={"reassoc", "contract"})
def _error(row: Array, step: Any, divisor: Any, top: Any) -> Any:
    total = np.float32(0)
    for i in range(row.size):
        level = min(max(np.rint(row[i] / divisor), -top), top)
        miss = level * step - row[i]
        total += miss * miss
    return total


@compiled()
def _noisy(part: int, start: int, stop: int, arrays: Any) -> None:
    """Block by block: hashes of groups of four, then their 16-bit quarters, the lowest first, into the table."""
    w, half_step, kept, table, key, first, out = arrays
    width, hashes = kept.size, np.empty(BLOCK // 4 + 1, np.uint64)
    for r in range(start, stop):
        for at in range(0, width, BLOCK):
            end = min(at + BLOCK, width)
            position = first + r * width + at
            for i in range((end - at + 6) // 4):
                hashes[i] = hash64(np.uint64((position >> 2) + i), key)
            draws = hashes.view(np.uint16)[position & 3 :]
            row = slice(r * width + at, r * width + end)
            _add(w[row], kept[at:end], half_step[r], table, draws, out[row])


@compiled()
def _add(w: Array, kept: Array, half_step: Any, table: Array, draws: Array, out: Array) -> None:
    for i in range(w.size):
        n = table[draws[i]] * half_step
        out[i] = narrow(widen(w[i]) + (np.float32(0) if kept[i] else n), out)


@compiled()
def _uniform(part: int, start: int, stop: int, arrays: Any) -> None:
    key, out = arrays
    first, out = np.uint64(start), out[start:stop]
    for i in range(out.size):
        bits = hash64(first + np.uint64(i), key) >> np.uint64(40)
        out[i] = np.float32(np.int32(bits)) * np.float32(2.0**-24)


@compiled()
def _round(part: int, start: int, stop: int, arrays: Any) -> None:
    x, key, out = arrays
    first, x, out = np.uint64(start), x[start:stop], out[start:stop]
    for i in range(x.size):
        out[i] = rounded(x[i], key, first + np.uint64(i), out)
