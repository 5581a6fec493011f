"""Hashed randomness and rounding for the CUDA twins, in Triton: `uniform`, `noisy`, `round_stochastic`, and what they share.

The hash is the reference's splitmix64, in uint64, where shifts are logical and products wrap. So uniform numbers and
stochastically rounded bits are equal to the reference's. `noisy` adds the row's step times a normal: 16 bits of the hash of
position // 4 are an index into the reference's table of 2^16 quantiles, which is 256 KB and stays in the caches.

Rounding to bfloat16 is done on the bits: a cast truncates in Triton's interpreter, and one code has to be right in both.

Not taken: tl.rand and tl.randn, whose numbers are not the reference's; one hash for four neighbours, which saves arithmetic where
the table's reads are the limit. Not covered: rounding to other types than bfloat16 and float16 is refused by the reference. Not
timed: no GPU was at hand.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetooth.kernels import reference
from finetooth.kernels.triton_select import block, written

LOW = {torch.bfloat16: 16, torch.float16: 13}  # float32's mantissa bits that a dtype does not have
GOLDEN = tl.constexpr(reference.GOLDEN & 0xFFFFFFFFFFFFFFFF)
MIX1 = tl.constexpr(reference.MIX1 & 0xFFFFFFFFFFFFFFFF)
MIX2 = tl.constexpr(reference.MIX2 & 0xFFFFFFFFFFFFFFFF)


@triton.jit
def hash64(position: tl.tensor, key: tl.tensor) -> tl.tensor:
    x = position.to(tl.uint64, bitcast=True) * GOLDEN + key.to(tl.int64).to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * MIX1
    x = (x ^ (x >> 27)) * MIX2
    return x ^ (x >> 31)


@triton.jit
def nearest(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """To nearest, ties to even."""
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def dithered(x: tl.tensor, position: tl.tensor, key: tl.tensor, LOW: tl.constexpr) -> tl.tensor:
    """Random bits added below the kept mantissa, which is then cut off."""
    noise = (hash64(position, key) >> (64 - LOW)).to(tl.int32)
    return ((x.to(tl.int32, bitcast=True) + noise) & -(1 << LOW)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["key"])
def _round_stochastic(
    x: tl.tensor, out: tl.tensor, n: tl.tensor, key: tl.int64, LOW: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rounded = dithered(tl.load(x + at, mask=at < n, other=0.0), at, key, LOW)
    tl.store(out + at, nearest(rounded, out.dtype.element_ty), mask=at < n)


def round_stochastic(x: Tensor, dtype: torch.dtype, key: int, out: Tensor) -> None:
    """See `reference.round_stochastic`; bits are equal."""
    if dtype not in LOW or out.dtype != dtype or x.dtype != torch.float32:
        return reference.round_stochastic(x, dtype, key, out)
    n = x.numel()
    if not n:
        return None
    size = block(n, 2048)
    with written(out) as (dense,):
        _round_stochastic[(triton.cdiv(n, size),)](
            x.detach().contiguous(), dense, n, key, LOW=LOW[dtype], BLOCK=size, num_warps=8
        )
    return None


@triton.jit(do_not_specialize=["key"])
def _uniform(out: tl.tensor, n: tl.tensor, key: tl.int64, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, (hash64(at, key) >> 40).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08, mask=at < n)


def uniform(n: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """See `reference.uniform`; bits are equal."""
    out = torch.empty(n, dtype=torch.float32, device=device)
    if n:
        size = block(n, 2048)
        with torch.cuda.device(out.get_device()):
            _uniform[(triton.cdiv(n, size),)](out, n, key, BLOCK=size, num_warps=8)
    return out


@triton.jit(do_not_specialize=["key", "first"])
def _noisy(
    w: tl.tensor,  # [rows, width]
    half_step: tl.tensor,  # [rows] float32
    kept: tl.tensor,  # [width] uint8
    table: tl.tensor,  # [2^16] float32
    out: tl.tensor,  # [rows, width]
    rows: tl.tensor,
    width: tl.tensor,
    key: tl.int64,
    first: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    position = first + at
    bits = hash64(position >> 2, key) >> ((position & 3) << 4).to(tl.uint64)
    noise = (
        tl.load(table + (bits & 0xFFFF).to(tl.int32)) * tl.load(half_step + row, mask=row < rows, other=0.0)[:, None]
    )
    quiet = tl.load(kept + column, mask=column < width, other=1)[None, :] != 0
    x = tl.load(w + at, mask=mask, other=0.0).to(tl.float32) + tl.where(quiet, 0.0, noise)
    tl.store(out + at, nearest(x, out.dtype.element_ty), mask=mask)


@cache
def _normal_table(device: torch.device) -> Tensor:
    return reference.normal_table().to(device)


def noisy(w: Tensor, half_step: Tensor, kept: Tensor, key: int, first: int, out: Tensor) -> None:
    """See `reference.noisy`."""
    if not w.numel():
        return
    rows, width = w.shape
    columns = block(width, 256, 4096)
    lines = block(rows, 8, (1 << 18) // columns)
    with written(out) as (dense,):
        _noisy[(triton.cdiv(rows, lines), triton.cdiv(width, columns))](
            w.detach().contiguous(),
            half_step.detach().reshape(-1).contiguous(),
            kept.contiguous().view(torch.uint8),
            _normal_table(w.device),
            dense,
            rows,
            width,
            key,
            first,
            ROWS=lines,
            COLUMNS=columns,
            num_warps=4,
        )
