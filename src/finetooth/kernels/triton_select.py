"""CUDA twins, in Triton, of the reference's `magnitude_cut` and `sampled_product_`, and how every kernel here is launched.

The cut. The bits of a float without its sign, read as an integer, have the order of its magnitude. So the k-th largest
magnitude is found by counting bit patterns, not by sorting. bfloat16 and float16 have 2^15 patterns: one pass counts them, and
the sum of squares is a sum over patterns. float32 needs two passes. The first counts the upper 16 of the 31 bits and finds the
bin that holds the cut. The second counts the lower 15 bits inside that bin, and adds the squares of what lies above it in
float64. Tensors are counted one after the other into one histogram. Nothing is concatenated, and the host waits once.

Counting is an atomic addition in the L2 cache. Programs that would meet at one address are spread over COPIES histograms. Zeros,
the one pattern that real gradients repeat by the million, are counted in registers first.

The product. Both operands are transposed once, so that the tokens of a row or a column are contiguous. A program takes a block of
chosen entries and walks over the tokens. bfloat16 products are exact in float32, and so is the accumulator's type.

Not taken: tl.histogram, which costs each warp a pass over all bins; a sampled bracket of the cut, which needs the host or a second
try when the sample misjudges. Not covered: a pool that repeats one other value many million times is right but slow; float64 is
the reference's, and so is `reaching`, whose torch form is two device-wide scans already. A selection of more than a few per cent
should compute the dense product on tensor cores instead and gather from it. Not timed: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetooth.kernels import reference

INTERPRETED = bool(triton.knobs.runtime.interpret)  # kernels run on the CPU, slowly, at about 12 ms a program
COPIES = 8  # 4 MB of float32's histograms: they have to stay in the L2 cache
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0xFF00}  # its bin; NaN's bins are above


def block(n: int, size: int, interpreted: int = 1 << 18) -> int:
    """Entries per program: `size`, and where programs are slow and memory is not, all n up to a limit."""
    return min(int(triton.next_power_of_2(n)), interpreted) if INTERPRETED else size


@contextmanager
def written(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Contiguous forms of tensors that kernels write to, on their device; what had to be copied is copied back."""
    dense = [t.detach().contiguous() for t in tensors]
    with torch.cuda.device(tensors[0].get_device()):
        yield dense
    for t, d in zip(tensors, dense, strict=True):
        if t.data_ptr() != d.data_ptr():
            t.detach().copy_(d)
    changed(*tensors)


def changed(*tensors: Tensor) -> None:
    """Tell autograd of writes, so that a backward that needs the old values fails instead of using the new ones."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


@triton.jit
def _count(histogram: tl.tensor, bins: tl.tensor, mask: tl.tensor) -> None:
    tl.atomic_add(histogram + bins, 1, mask=mask & (bins != 0), sem="relaxed")
    tl.atomic_add(histogram, tl.sum((mask & (bins == 0)).to(tl.int32)), sem="relaxed")


@triton.jit
def _count_patterns(
    x: tl.tensor,  # [n], int16 or int32: the bits of floats
    histograms: tl.tensor,  # [COPIES, BINS] int64
    n: tl.tensor,
    MAGNITUDE: tl.constexpr,  # all bits but the sign
    DROP: tl.constexpr,  # low bits that are not counted
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    bits = tl.load(x + at, mask=mask, other=0).to(tl.int32) & MAGNITUDE
    _count(histograms + (program % COPIES) * BINS, bits >> DROP, mask)


@triton.jit
def _count_within(
    x: tl.tensor,  # [n], int32: the bits of floats
    histograms: tl.tensor,  # [COPIES, 2^15] int64, of the low bits of what is in the bin
    squares: tl.tensor,  # [programs] float64: the sum of squares of what is above the bin
    wanted: tl.tensor,  # [1]: the bin
    n: tl.tensor,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    bits = tl.load(x + at, mask=mask, other=0) & 0x7FFFFFFF
    high, chosen = bits >> 15, tl.load(wanted).to(tl.int32)
    _count(histograms + (program % COPIES) * 32768, bits & 0x7FFF, mask & (high == chosen))
    value = bits.to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(squares + program, tl.sum(tl.where(mask & (high > chosen), value * value, 0.0)))


def magnitude_cut(gs: Sequence[Tensor], k: int) -> tuple[float, float]:
    """See `reference.magnitude_cut`; k out of range is refused."""
    dtype, device, n = gs[0].dtype, gs[0].device, sum(g.numel() for g in gs)
    if dtype not in BITS or any(g.dtype != dtype for g in gs):
        return reference.magnitude_cut(gs, k)
    if not 1 <= k <= n:
        raise ValueError(f"k={k} is out of range: the tensors have {n} entries.")
    flat = [g.detach().reshape(-1).view(BITS[dtype]) for g in gs if g.numel()]
    programs = [block(x.numel(), 4096) for x in flat]
    wide = dtype == torch.float32
    with torch.cuda.device(gs[0].get_device()):
        counts = torch.zeros((COPIES, 1 << (16 if wide else 15)), dtype=torch.int64, device=device)
        for x, size in zip(flat, programs, strict=True):
            _count_patterns[(triton.cdiv(x.numel(), size),)](
                x,
                counts,
                x.numel(),
                MAGNITUDE=0x7FFFFFFF if wide else 0x7FFF,
                DROP=15 if wide else 0,
                BINS=counts.shape[1],
                COPIES=COPIES,
                BLOCK=size,
                num_warps=8,
            )
        count = counts.sum(0)
        bad = count[INFINITY[dtype] :].sum()
        at, left = _kth(count, torch.full((1,), k, dtype=torch.int64, device=device))
        pattern = torch.arange(1 << 15, dtype=torch.int32, device=device)
        if wide:
            counts = torch.zeros((COPIES, 1 << 15), dtype=torch.int64, device=device)
            above = []
            for x, size in zip(flat, programs, strict=True):
                above.append(torch.empty(triton.cdiv(x.numel(), size), dtype=torch.float64, device=device))
                _count_within[(len(above[-1]),)](
                    x, counts, above[-1], at, x.numel(), COPIES=COPIES, BLOCK=size, num_warps=8
                )
            count, pattern = counts.sum(0), (at.int() << 15) | pattern
            at, _ = _kth(count, left)
            values, square = pattern.view(torch.float32).double(), torch.cat(above).sum()
        else:
            values, square = pattern.to(torch.int16).view(dtype).double(), torch.zeros((), device=device)
        kept = (torch.arange(1 << 15, device=device) >= at) & (count > 0)
        square = square + torch.where(kept, values.square() * count, 0.0).sum()
        cut, square, bad = torch.stack([values[at][0], square.double(), bad.double()]).tolist()
    return (float("nan"), float("nan")) if bad else (cut, square)


def _kth(count: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of the k-th largest, and its rank inside this bin, both [1], without a word to the host."""
    reached = count.flip(0).cumsum(0)  # entries in this bin or a larger one, from the largest bin on
    index = torch.searchsorted(reached, k)
    return len(count) - 1 - index, k - reached[index] + count[len(count) - 1 - index]


@triton.jit
def _sampled_product(
    acc: tl.tensor,  # [k] float32
    left: tl.tensor,  # [out, t]
    right: tl.tensor,  # [in, t]
    rows: tl.tensor,  # [k]
    columns: tl.tensor,  # [k]
    k: tl.tensor,
    t: tl.tensor,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < k
    a = left + tl.load(rows + at, mask=mask, other=0).to(tl.int64)[:, None] * t
    b = right + tl.load(columns + at, mask=mask, other=0).to(tl.int64)[:, None] * t
    total = tl.zeros([BLOCK, TOKENS], tl.float32)
    for start in range(0, t, TOKENS):
        token = start + tl.arange(0, TOKENS)[None, :]
        inside = mask[:, None] & (token < t)
        total += tl.load(a + token, mask=inside, other=0.0).to(tl.float32) * tl.load(
            b + token, mask=inside, other=0.0
        ).to(tl.float32)
    tl.store(acc + at, tl.load(acc + at, mask=mask, other=0.0) + tl.sum(total, axis=1), mask=mask)


def sampled_product_(acc: Tensor, dy: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> None:
    """See `reference.sampled_product_`."""
    k, t = acc.numel(), dy.shape[0]
    if not k or not t:
        return
    size = block(k, 32, 4096)
    with written(acc) as (out,):
        _sampled_product[(triton.cdiv(k, size),)](
            out,
            dy.detach().t().contiguous(),
            x.detach().t().contiguous(),
            rows.contiguous(),
            columns.contiguous(),
            k,
            t,
            BLOCK=size,
            TOKENS=64,
            num_warps=4,
        )
