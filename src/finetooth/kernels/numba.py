"""The CPU's fast twins of the reference kernels, compiled by numba at the first call of each.

One pass over memory for each: an entry is read, updated and written while it is in a register, whatever its dtype, where
the reference makes a pass for every operation. `numba_core` has the threads, the conversions and the hash,
`numba_select` and `numba_flags` the selections, `numba_noise` what is drawn. The order of operations is the reference's, so that results differ in last places
only; integers, hashes and stochastically rounded bits are equal.

`sampled_product_` reads both operands transposed, so that an entry is a dot product of two contiguous rows, summed in
whatever order is fast. Not taken: the dense product and a gather, which computes a hundred entries for each chosen one.

Not covered: float64 operands, and `adamw_` itself, which is the reference's. In-place tensors must be contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from finetooth.kernels import reference
from finetooth.kernels.numba_core import (
    ALONE,
    Array,
    compiled,
    exact,
    flat,
    flat_,
    known,
    narrow,
    remember,
    rounded,
    spread,
    unsigned,
    widen,
    written,
)
from finetooth.kernels.numba_flags import flagged, positions
from finetooth.kernels.numba_noise import best_steps, noisy, round_stochastic, uniform
from finetooth.kernels.numba_select import magnitude_cut, reaching

__all__ = [
    "adamw_at_",
    "best_steps",
    "flagged",
    "magnitude_cut",
    "masked_adamw_",
    "noisy",
    "positions",
    "reaching",
    "round_stochastic",
    "sampled_product_",
    "uniform",
]

BLOCK = 4096  # entries of a whole tensor at a time: their flags stay in the first cache
TOKENS = 512  # of two operands transposed at a time: 8 MB of float32 for 4096 features


def adamw_at_(
    p: Tensor,  # flat [n], any float dtype, updated in place at `index`
    index: Tensor | None,  # [k] sorted positions; None: all, k = n
    g: Tensor,  # [k], any float dtype
    m: Tensor,  # [k] float32, updated in place
    v: Tensor,  # [k] float32, updated in place
    master: Tensor | None,  # [k], updated in place: the exact values of low-precision weights, see `reference.exact`
    *,
    scale: float = 1.0,  # the gradient is multiplied by it (clipping)
    age: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """Gather the chosen entries, one AdamW step, scatter; a master is rounded to nearest, so is p without one."""
    if not known(p):
        rate: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        reference.adamw_at_(p, index, g, m, v, master, scale=scale, age=age, **rate)
        return
    ages, roots, steps = _by_age(age, lr, betas)
    rates = _rates(lr, betas, eps, weight_decay)
    masters = None if master is None else flat_(master)
    at, grad = None if index is None else flat(index), flat(g if known(g) else g.float())
    arrays = (flat_(p), at, grad, flat_(m), flat_(v), masters, rates, np.float32(scale), ages, roots, steps)
    spread(_at, g.numel(), arrays, ALONE // 4)
    written([p, m, v] if master is None else [p, m, v, master])


def masked_adamw_(
    p: Tensor,  # n, float32, bfloat16 or float16, updated in place
    g: Tensor,  # like p in shape, any float dtype, read only
    m: Tensor,  # n, float32, updated in place
    v: Tensor,  # n, float32, updated in place
    *,
    cut: float | None,  # entries with |g| >= cut are chosen; None: all
    strict: bool,  # False: the gradient is masked. True: the moments see all of it, p is written where chosen
    scale: float,  # the gradient is multiplied by it (clipping), after `cut` was compared
    key: int | None,  # stochastic rounding of a low-precision p; None: to nearest
    chosen: Tensor | None = None,  # [ceil(numel / 8)] uint8, written: the choice as `reference.pack` packs it
    age: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW step of a whole tensor under GMT's mask."""
    rates = _rates(lr, betas, eps, weight_decay)
    _, root, step = _by_age(age, lr, betas)
    mask = np.array((cut or 0.0, scale), np.float32)
    arrays = (flat_(p), flat(g if known(g) else g.float()), flat_(m), flat_(v))
    packed = None if chosen is None else flat_(chosen)
    spread(_masked, p.numel(), (*arrays, packed, rates, root, step, mask, unsigned(key), cut is None, strict))
    written([p, m, v] if chosen is None else [p, m, v, chosen])


def sampled_product_(
    acc: Tensor,  # [k] float32, added to in place
    dy: Tensor,  # [t, out], any float dtype
    x: Tensor,  # [t, in], like dy
    rows: Tensor,  # [k] int32 or int64, sorted
    columns: Tensor,  # [k], like rows
) -> None:
    """acc_e += sum_t dy[t, rows_e] x[t, columns_e]: the chosen entries of dy^T x, and no others."""
    sums, entries = flat_(acc), (flat(rows), flat(columns))
    for start in range(0, dy.shape[0], TOKENS):
        part = slice(start, start + TOKENS)
        left, right = (t[part].detach().float().t().contiguous().numpy() for t in (dy, x))
        spread(_dots, acc.numel(), (sums, left, right, *entries), ALONE // max(1, left.shape[1]))
    written([acc])


# -- what a step is told ---------------------------------------------------------------------------


def _rates(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Array:
    return np.array((1 - lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1], eps), np.float32)


def _by_age(age: int | Tensor, lr: float, betas: tuple[float, float]) -> tuple[Array | None, Array, Array]:
    """Where to look up each entry's age (None: all have the first), and both bias corrections by age."""
    at: Array | None = None
    if isinstance(age, int):
        t = np.array((age,), np.float64)
    else:
        ages = flat(age)
        low, high = int(ages.min(initial=age.numel() and int(age[0]))), int(ages.max(initial=1))
        few = high - low < ages.size  # a table of every age there may be, else one line for each entry
        at, t = (ages - low, np.arange(low, high + 1.0)) if few else (np.arange(ages.size), ages.astype(np.float64))
    root, step = np.sqrt(1 - betas[1] ** t), -lr / (1 - betas[0] ** t)
    return at, root.astype(np.float32), step.astype(np.float32)


# -- compiled --------------------------------------------------------------------------------------


@compiled()
def _moments(g: Any, m: Any, v: Any, w1: Any, b2: Any, w2: Any) -> Any:
    """Both moments, rounded as torch's lerp and addcmul round."""
    apart = g - m
    m = m + w1 * apart if w1 < np.float32(0.5) else g - apart * (np.float32(1) - w1)
    return m, v * b2 + w2 * g * g


@compiled()
def _masked(part: int, start: int, stop: int, arrays: Any) -> None:
    p, g, m, v, packed, rates, roots, steps, mask, key, everything, strict = arrays
    cut = np.float32(-1) if everything else widen(narrow(mask[0], g))  # in the gradient's precision, as torch compares
    flags = np.zeros(BLOCK, np.uint8)
    for at in range(start, stop, BLOCK):
        end = min(at + BLOCK, stop)
        block = (p[at:end], g[at:end], m[at:end], v[at:end])
        _step(block, rates, roots[0], steps[0], mask[1], cut, key, np.uint64(at), everything, strict)
        _pack(packed, at, block[1], cut, everything, flags)  # the block's gradients are at hand now


@compiled()
def _step(
    block: Any,
    rates: Array,
    root: Any,
    step: Any,
    scale: Any,
    cut: Any,
    key: Any,
    first: Any,
    everything: bool,
    strict: bool,
) -> None:
    p, g, m, v = block
    decay, w1, b2, w2, eps = rates[0], rates[1], rates[2], rates[3], rates[4]
    for i in range(p.size):
        raw = widen(g[i])
        chosen = everything | (abs(raw) >= cut)
        grad = raw * scale if chosen | strict else np.float32(0)
        mean, square = _moments(grad, m[i], v[i], w1, b2, w2)
        x = widen(p[i]) * decay + step * mean / (np.sqrt(square) / root + eps)
        m[i], v[i] = mean, square
        p[i] = rounded(x, key, first + np.uint64(i), p) if chosen | (not strict) else p[i]


@compiled()
def _pack(packed: Any, start: int, g: Array, cut: Any, everything: bool, flags: Array) -> None:
    """Flags as bytes first: a product then moves the lowest bits of eight bytes into one."""
    if packed is not None:
        for i in range(g.size):
            flags[i] = np.uint8(everything | (abs(widen(g[i])) >= cut))
        flags[g.size : -(-g.size // 8) * 8] = 0
        eights, into = flags.view(np.uint64), packed[start // 8 : (start + g.size + 7) // 8]
        for i in range(into.size):
            into[i] = np.uint8((eights[i] * np.uint64(0x0102040810204080)) >> np.uint64(56))


@compiled()
def _place(index: Any, i: Any) -> Any:
    return i if index is None else index[i]


@compiled()
def _slot(ages: Any, i: Any) -> Any:
    return 0 if ages is None else ages[i]


@compiled()
def _at(part: int, start: int, stop: int, arrays: Any) -> None:
    p, index, g, m, v, master, rates, scale, ages, roots, steps = arrays
    decay, w1, b2, w2, eps = rates[0], rates[1], rates[2], rates[3], rates[4]
    for i in range(start, stop):
        at, age = _place(index, i), _slot(ages, i)
        mean, square = _moments(widen(g[i]) * scale, m[i], v[i], w1, b2, w2)
        x = exact(p[at], master, i) * decay + steps[age] * mean / (np.sqrt(square) / roots[age] + eps)
        m[i], v[i] = mean, square
        p[at] = narrow(x, p)
        remember(x, p[at], master, i)


@compiled(fastmath={"reassoc", "contract"})
def _dot(a: Array, b: Array) -> Any:
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@compiled()
def _dots(part: int, start: int, stop: int, arrays: Any) -> None:
    acc, left, right, rows, columns = arrays
    for e in range(start, stop):
        acc[e] += _dot(left[rows[e]], right[columns[e]])
