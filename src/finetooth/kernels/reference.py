"""The arithmetic of Finetooth in plain torch: the documentation that every faster kernel is tested against.

Shapes: `n` stands for any shape; `[k, u]` for k chosen units of u entries. All state is float32.

`adamw_` repeats the operations of `torch.optim.AdamW(foreach=False)` in their order (lerp, addcmul, addcdiv),
so that equal inputs give equal bits in float32.

Randomness is a hash of (key, position), not a generator's stream: what entry i draws depends neither on
the tensor's sharding nor on what was drawn before. The mixer is splitmix64's finaliser (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

CHUNK = 1 << 20  # positions hashed at a time: 8 MB of int64, which stays in a CPU's cache
# The golden ratio's and splitmix64's two multipliers, as signed 64-bit numbers.
GOLDEN, MIX1, MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def adamw_(
    p: Tensor,  # n or [k, u], float32, updated in place
    g: Tensor,  # like p, float32
    m: Tensor,  # like p, first moment, updated in place
    v: Tensor,  # like p, second moment, updated in place
    *,
    age: int | Tensor,  # updates these entries will have had, from 1; or [k] int32 where units differ
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    decay_to: Tensor | None = None,  # like p: decay towards this instead of zero
) -> None:
    """One AdamW step (Loshchilov & Hutter, 2019), in place.

    p <- p - lr wd (p - decay_to);  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;
    p <- p - lr m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps)
    """
    beta1, beta2 = betas
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
        if decay_to is not None:
            p.add_(decay_to, alpha=lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if isinstance(age, int):
        p.addcdiv_(m, (v.sqrt() / (1 - beta2**age) ** 0.5).add_(eps), value=-lr / (1 - beta1**age))
        return
    t = age.to(torch.float64)[:, None]
    root, step = (1 - beta2**t).sqrt().float(), (lr / (1 - beta1**t)).float()
    p.sub_(step * m / (v.sqrt() / root + eps))


def adamw_at_(
    p: Tensor,  # flat [n], any float dtype, updated in place at `index`
    index: Tensor | None,  # [k] sorted positions; None: all, k = n
    g: Tensor,  # [k], any float dtype
    m: Tensor,  # [k] float32, updated in place
    v: Tensor,  # [k] float32, updated in place
    master: Tensor | None,  # [k], updated in place: the exact values of low-precision weights, see `exact`
    *,
    scale: float = 1.0,  # the gradient is multiplied by it (clipping)
    age: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """Gather the chosen entries, one AdamW step, scatter; a master is rounded to nearest, so is p without one."""
    at = slice(None) if index is None else index.long()
    values = exact(p[at], master)
    table = [t[:, None] for t in (values, scaled(g, scale), m, v)]
    adamw_(*table, age=age, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if index is not None or p.dtype != torch.float32:  # else `values` are p
        p[at] = remembered(values, p.dtype, master)


def scaled(g: Tensor, scale: float) -> Tensor:
    """A gradient in float32, times a clipping factor; g itself where that changes nothing."""
    return g.float() if scale == 1 else g.float() * scale


def exact(x: Tensor, master: Tensor | None) -> Tensor:
    """The float32 values of weights `x` that are rounded: a master itself if it is float32, which is then not copied.
    A weight that somebody else has written in between is taken as it is.

    Of a bfloat16 weight, an int16 master holds what is missing of the bits: those of the value, less those of the
    weight with 16 zeros after them. Two bytes do what four did.
    """
    if master is None:
        return x.float()
    if master.dtype == torch.float32:
        return master.copy_(torch.where(master.to(x.dtype) == x, master, x.float()))
    return ((x.view(torch.int16).int() << 16) + master).view(torch.float32)


def remembered(values: Tensor, dtype: torch.dtype, master: Tensor | None) -> Tensor:
    """float32 values rounded to nearest even; an int16 master takes what is lost (a float32 one is `values` already).

    The weight is always that of a float32 master. The master itself moves by one last place where a value lies
    exactly between two weights and the even one is below: one time in 131,072.
    """
    x = values.to(dtype)
    if master is not None and master.dtype == torch.int16:
        master.copy_((values.view(torch.int32) - (x.view(torch.int16).int() << 16)).clamp_(max=32767))
    return x


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
    chosen: Tensor
    | None = None,  # [ceil(numel / 8)] uint8, written: bit i % 8 of byte i // 8 says that entry i was chosen
    age: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW step of a whole tensor under GMT's mask."""
    grad = scaled(g, scale)
    picked = None if cut is None else g.abs() >= cut
    if picked is not None and not strict:
        grad = grad.masked_fill(~picked, 0.0)
    if chosen is not None:
        chosen.copy_(pack(torch.ones_like(g, dtype=torch.bool) if picked is None else picked))
    x = p.clone() if p.dtype == torch.float32 else p.float()
    adamw_(x, grad, m, v, age=age, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    new = torch.empty_like(p)
    if p.dtype == torch.float32 or key is None:
        new.copy_(x)
    else:
        round_stochastic(x, p.dtype, key, new)
    p.copy_(new if picked is None or not strict else torch.where(picked, new, p))


def pack(mask: Tensor) -> Tensor:
    """Eight flags in a byte, the first in the lowest bit; the last byte is filled up with zeros."""
    flags = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flags << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first n flags again, bool [n].

    >>> unpack(pack(torch.tensor([True, False, True])), 3).tolist()
    [True, False, True]
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).flatten()[:n].bool()


def flagged(index: Tensor, n: int) -> Tensor:
    """Sorted positions as packed flags of n entries.

    >>> flagged(torch.tensor([0, 9]), 11).tolist()
    [1, 2]
    """
    mask = torch.zeros(n, dtype=torch.bool, device=index.device)
    mask[index.long()] = True
    return pack(mask)


def positions(packed: Tensor, n: int) -> Tensor:
    """The positions of the flags that are set, sorted, int32 where n allows."""
    return unpack(packed, n).nonzero().flatten().to(torch.int32 if n < 2**31 else torch.int64)


def magnitude_cut(gs: Sequence[Tensor], k: int) -> tuple[float, float]:
    """Of all entries of some tensors of one float dtype: the exact k-th largest magnitude (1 <= k <= n), and the sum
    of the squares of the entries that reach it, which is not finite if any entry is not."""
    magnitudes = torch.cat([g.detach().reshape(-1).abs() for g in gs])
    if not bool(torch.isfinite(magnitudes).all()):
        return float("nan"), float("nan")
    cut = torch.kthvalue(magnitudes, magnitudes.numel() - k + 1).values
    return float(cut), float(magnitudes[magnitudes >= cut].double().square().sum())


def reaching(x: Tensor, cut: float) -> tuple[Tensor, Tensor]:
    """Positions in a flat non-negative tensor: those above `cut`, and those equal to it, both sorted, int64."""
    return (x > cut).nonzero().flatten(), (x == cut).nonzero().flatten()


def sampled_product_(
    acc: Tensor,  # [k] float32, added to in place
    dy: Tensor,  # [t, out], any float dtype
    x: Tensor,  # [t, in], like dy
    rows: Tensor,  # [k] int32 or int64, sorted
    columns: Tensor,  # [k], like rows
) -> None:
    """acc_e += sum_t dy[t, rows_e] x[t, columns_e]: the chosen entries of dy^T x, and no others."""
    left, right = dy.t().contiguous(), x.t().contiguous()
    size = max(1, CHUNK // max(1, dy.shape[0]))
    for start in range(0, acc.numel(), size):
        part = slice(start, start + size)
        acc[part] += torch.linalg.vecdot(left[rows[part].long()].float(), right[columns[part].long()].float())


def best_steps(
    w: Tensor,  # [r, in] float32
    full: Tensor,  # [r, 1] float32: the step that clips nothing
    fractions: Sequence[float],  # of it, to choose from
    top: int,  # the largest level
) -> Tensor:
    """By row, the step that rounds w with the smallest squared error; the earlier one of equals. [r, 1] float32."""
    best = full.clone()
    rows = max(1, CHUNK // 4 // max(1, w.shape[1]))  # at a time: what is read eighty times stays in a CPU's cache
    for part, step, out in zip(*(torch.split(t, rows) for t in (w, full, best)), strict=True):
        error = torch.full_like(step, float("inf"))
        for fraction in fractions:
            tried = step * fraction
            levels = (part / tried.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-top, top)
            e = levels.mul_(tried).sub_(part).square_().sum(1, keepdim=True)
            out.copy_(torch.where(e < error, tried, out))
            error = torch.minimum(e, error)
    return best


def noisy(
    w: Tensor,  # [r, in]: some rows of a weight
    half_step: Tensor,  # [r, 1] float32: the standard deviation of every row
    kept: Tensor,  # [in] bool: columns without noise
    key: int,
    first: int,  # the position in the whole weight of w's first entry
    out: Tensor,  # [r, in], w's dtype: written in place
) -> None:
    """w + half_step * N(0, 1) on the columns that are not kept, drawn by position (see `normal`)."""
    n = normal(first, w.numel(), key, w.device).view(w.shape)
    out.copy_(w.float() + (n * half_step).masked_fill_(kept, 0.0))


def key(seed: int, *parts: object) -> int:
    """A signed 64-bit key of a seed and anything that has a stable text, such as a name and a step."""
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # a logical shift: int64's own keeps the sign


def hash64(position: Tensor, key: int) -> Tensor:
    """64 well mixed bits for every int64 position, as int64."""
    x = position * GOLDEN + key
    x = (x ^ _shift(x, 30)) * MIX1
    x = (x ^ _shift(x, 27)) * MIX2
    return x ^ _shift(x, 31)


def uniform(n: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """n numbers in [0, 1) with 24 random bits each, float32 [n].

    >>> uniform(3, key(0, "a")).tolist() == uniform(5, key(0, "a"))[:3].tolist()
    True
    """
    out = torch.empty(n, dtype=torch.float32, device=device)
    for start in range(0, n, CHUNK):
        stop = min(n, start + CHUNK)
        out[start:stop] = uniform_at(torch.arange(start, stop, device=device), key)
    return out


def uniform_at(position: Tensor, key: int) -> Tensor:
    """The numbers that `uniform` has at these int64 positions, float32.

    >>> uniform_at(torch.tensor([2]), key(0, "a")) == uniform(3, key(0, "a"))[2]
    tensor([True])
    """
    return _shift(hash64(position, key), 40).float() * 2.0**-24


def normal(first: int, n: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """Draws first ... first + n - 1 of a sequence of N(0, 1), float32 [n]: one of 2^16 quantiles each, 16 bits of the
    hash of position // 4, scaled to a variance of exactly 1 (the largest is 4.3).

    >>> normal(2, 3, key(0, "a")).tolist() == normal(0, 9, key(0, "a"))[2:5].tolist()
    True
    """
    table = normal_table().to(device)
    position = torch.arange(first, first + n, device=device)
    bits = hash64(position >> 2, key) >> ((position & 3) << 4)
    return table[bits & 0xFFFF]


@cache
def normal_table() -> Tensor:
    """The mid-point quantiles of N(0, 1) at 2^16 levels, float32, with variance 1."""
    level = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    z = torch.special.ndtri(level)
    scaled: Tensor = z / z.square().mean().sqrt()
    return scaled.float()


def round_stochastic(
    x: Tensor,  # n, float32
    dtype: torch.dtype,  # bfloat16 or float16
    key: int,
    out: Tensor,  # n, dtype: the result, written in place
) -> None:
    """Round to a neighbour with a probability such that the mean is x.

    Random bits are added below the kept mantissa and cut off: 16 of them for bfloat16, 13 for float16
    (exact in float16's normal range; below 6e-5 its last rounding is to nearest).
    """
    low = {torch.bfloat16: 16, torch.float16: 13}.get(dtype)
    if low is None:
        raise ValueError(f"stochastic rounding to {dtype} is not defined: use torch.bfloat16 or torch.float16.")
    flat, result = x.view(-1), out.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        stop = min(flat.numel(), start + CHUNK)
        noise = _shift(hash64(torch.arange(start, stop, device=x.device), key), 64 - low).to(torch.int32)
        bits = (flat[start:stop].contiguous().view(torch.int32) + noise) & -(1 << low)
        result[start:stop] = bits.view(torch.float32).to(dtype)
