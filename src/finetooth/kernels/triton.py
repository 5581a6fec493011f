"""CUDA twins of the reference's functions, in Triton, with the same names, signatures and in-place contract.

AdamW is bound by memory, so each step is one kernel that reads every operand once and writes what changes once. `masked_adamw_`
does so over a whole tensor, `adamw_at_` gathers and scatters the chosen entries on the way. Factors that change with the step are
passed as float32 numbers and compile nothing anew. Where units have ages of their own, the kernel computes 1 - beta^age in float64
from a float32 log2(beta), which is exact to 5e-8 at any age; a float32 beta of 0.999 would be off by 1e-5 at the first steps.
Division and square root are IEEE's, as torch's are, not Triton's faster approximations.

`triton_random` has the hash, rounding and noise; `triton_select` has `magnitude_cut`, `sampled_product_` and the launching.

Not taken: autotuning, which fails in the interpreter and would have to run for every shape; blocks are fixed. One kernel over many
tensors would save launches in models of many small tensors. Not covered: float64 gradients or weights in `masked_adamw_`, and
`reaching`, are the reference's. Tensors that are not contiguous are copied and copied back. Not timed: no GPU was at hand.

With TRITON_INTERPRET=1 before the first import the kernels run on CPU tensors, for tests.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetooth.kernels import reference
from finetooth.kernels.triton_random import LOW, dithered, nearest, noisy, round_stochastic, uniform
from finetooth.kernels.triton_select import INTERPRETED, block, changed, magnitude_cut, sampled_product_, written

__all__ = [
    "INTERPRETED",
    "adamw_at_",
    "magnitude_cut",
    "masked_adamw_",
    "noisy",
    "round_stochastic",
    "sampled_product_",
    "uniform",
]


@triton.jit
def _adamw(
    p: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    decay: tl.tensor,
    rise1: tl.tensor,
    beta2: tl.tensor,
    rise2: tl.tensor,
    root: tl.tensor,
    step: tl.tensor,
    eps: tl.tensor,
) -> tl.tensor:
    """`reference.adamw_` in torch's order of operations (lerp, addcmul, addcdiv)."""
    m = tl.where(rise1 < 0.5, m + rise1 * (g - m), g - (g - m) * (1.0 - rise1))
    v = v * beta2 + rise2 * g * g
    return p * decay + tl.div_rn(step * m, tl.div_rn(tl.sqrt_rn(v), root) + eps), m, v


def _factors(age: int, lr: float, betas: tuple[float, float], weight_decay: float) -> tuple[float, ...]:
    """decay, rise1, beta2, rise2, root and step of `_adamw`."""
    beta1, beta2 = betas
    root, step = (1 - beta2**age) ** 0.5, -lr / (1 - beta1**age)
    return tuple(map(float, (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, root, step)))


@triton.jit
def _adamw_at(
    p: tl.tensor,
    index: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    master: tl.tensor,
    age: tl.tensor,
    k: tl.tensor,
    stride: tl.tensor,
    lr: tl.tensor,
    log1: tl.tensor,
    log2: tl.tensor,
    decay: tl.tensor,
    rise1: tl.tensor,
    beta2: tl.tensor,
    rise2: tl.tensor,
    root: tl.tensor,
    step: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    EVERY: tl.constexpr,  # there is no index
    MASTER: tl.constexpr,  # 0: none; 1: float32; 2: int16, what the bits of a bfloat16 weight lack
    AGES: tl.constexpr,  # every entry has its own age: `root` and `step` are not used
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < k
    position = at * stride if EVERY else tl.load(index + at, mask=mask, other=0).to(tl.int64) * stride
    before = tl.load(p + position, mask=mask, other=0.0)
    x = before.to(tl.float32)
    if MASTER == 1:
        held = tl.load(master + at, mask=mask, other=0.0)
        x = tl.where(nearest(held, p.dtype.element_ty) == before, held, x)
    if MASTER == 2:
        low = tl.load(master + at, mask=mask, other=0).to(tl.int32)
        x = (x.to(tl.int32, bitcast=True) + low).to(tl.float32, bitcast=True)
    if AGES:
        t = tl.load(age + at, mask=mask, other=1).to(tl.float64)
        root = tl.sqrt(1.0 - tl.exp2(t * log2)).to(tl.float32)
        step = (-lr / (1.0 - tl.exp2(t * log1))).to(tl.float32)
    m1, v1 = tl.load(m + at, mask=mask, other=0.0), tl.load(v + at, mask=mask, other=0.0)
    grad = tl.load(g + at, mask=mask, other=0.0).to(tl.float32) * scale
    x, m1, v1 = _adamw(x, grad, m1, v1, decay, rise1, beta2, rise2, root, step, eps)
    tl.store(m + at, m1, mask=mask)
    tl.store(v + at, v1, mask=mask)
    new = nearest(x, p.dtype.element_ty)
    tl.store(p + position, new, mask=mask)
    if MASTER == 1:
        tl.store(master + at, x, mask=mask)
    if MASTER == 2:
        low = x.to(tl.int32, bitcast=True) - new.to(tl.float32).to(tl.int32, bitcast=True)
        tl.store(master + at, tl.minimum(low, 32767).to(tl.int16), mask=mask)


def adamw_at_(
    p: Tensor,
    index: Tensor | None,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    master: Tensor | None,
    *,
    scale: float = 1.0,
    age: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """See `reference.adamw_at_`."""
    k = g.numel()
    if not k:
        return
    size = block(k, 1024)
    ages = None if isinstance(age, int) else age.contiguous()
    log1, log2 = (math.log2(b) if b else -math.inf for b in betas)
    with written(m, v, *([] if master is None else [master])) as state:
        _adamw_at[(triton.cdiv(k, size),)](
            p,
            p if index is None else index.contiguous(),
            g.detach().contiguous(),
            state[0],
            state[1],
            state[-1],
            p if ages is None else ages,
            k,
            p.stride(0),
            float(lr),
            log1,
            log2,
            *_factors(age if isinstance(age, int) else 1, lr, betas, weight_decay),
            float(eps),
            float(scale),
            EVERY=index is None,
            MASTER=0 if master is None else 1 if master.dtype == torch.float32 else 2,
            AGES=ages is not None,
            BLOCK=size,
            num_warps=4,
        )
    changed(p)


@triton.jit(do_not_specialize=["key"])
def _masked_adamw(
    p: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    chosen: tl.tensor,  # [ceil(n / 8)] uint8
    n: tl.tensor,
    cut: tl.tensor,
    scale: tl.tensor,
    key: tl.int64,
    decay: tl.tensor,
    rise1: tl.tensor,
    beta2: tl.tensor,
    rise2: tl.tensor,
    root: tl.tensor,
    step: tl.tensor,
    eps: tl.tensor,
    CUT: tl.constexpr,
    STRICT: tl.constexpr,
    PACK: tl.constexpr,  # write `chosen`
    LOW: tl.constexpr,  # the bits that stochastic rounding cuts off, or 0
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    raw = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
    m1, v1 = tl.load(m + at, mask=mask, other=0.0), tl.load(v + at, mask=mask, other=0.0)
    x = tl.load(p + at, mask=mask, other=0.0).to(tl.float32)
    grad, picked, write = raw * scale, mask, mask
    if CUT:
        picked = mask & (tl.abs(raw) >= cut)
        if STRICT:
            write = picked
        else:
            grad = tl.where(picked, grad, 0.0)
    if PACK:
        byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        flags = tl.reshape(picked.to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
        tl.store(chosen + byte, tl.sum(flags, axis=1).to(tl.uint8), mask=byte * 8 < n)
    x, m1, v1 = _adamw(x, grad, m1, v1, decay, rise1, beta2, rise2, root, step, eps)
    if LOW:
        x = dithered(x, at, key, LOW)
    tl.store(m + at, m1, mask=mask)
    tl.store(v + at, v1, mask=mask)
    tl.store(p + at, nearest(x, p.dtype.element_ty), mask=write)


def masked_adamw_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    cut: float | None,
    strict: bool,
    scale: float,
    key: int | None,
    chosen: Tensor | None = None,
    age: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """See `reference.masked_adamw_`."""
    rates: dict[str, Any] = {"age": age, "lr": lr, "betas": betas, "weight_decay": weight_decay}
    if torch.float64 in (p.dtype, g.dtype):
        return reference.masked_adamw_(
            p, g, m, v, cut=cut, strict=strict, scale=scale, key=key, chosen=chosen, eps=eps, **rates
        )
    n = p.numel()
    if not n:
        return None
    size = max(8, block(n, 2048))
    # torch compares in the gradient's own dtype
    bound = 0.0 if cut is None else float(torch.tensor(cut, dtype=g.dtype))
    with written(p, m, v, *([] if chosen is None else [chosen])) as state:
        _masked_adamw[(triton.cdiv(n, size),)](
            state[0],
            g.detach().contiguous(),
            state[1],
            state[2],
            state[-1],
            n,
            bound,
            float(scale),
            key or 0,
            *_factors(**rates),
            float(eps),
            CUT=cut is not None,
            STRICT=strict,
            PACK=chosen is not None,
            LOW=0 if key is None else LOW.get(p.dtype, 0),
            BLOCK=size,
            num_warps=8,
        )
    return None
