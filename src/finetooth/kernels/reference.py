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
        bits = hash64(torch.arange(start, stop, device=device), key)
        out[start:stop] = _shift(bits, 40).float() * 2.0**-24
    return out


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
