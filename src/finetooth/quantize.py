"""Symmetric uniform quantization per output row: the `Q` of GIFT-SW, and its step for the noise; and what servers use.

Q(w) = D * clamp(round(w / D), -(2^(b-1) - 1), 2^(b-1) - 1) with D = a / (2^(b-1) - 1), one D for each output
row. The clipping value a is found by a grid: 80 fractions of the row's largest magnitude, in steps of 1 %
from 100 % down, the one with the smallest squared error (arXiv 2408.15300 leaves the grid open).

`int8` and `nf4` are the plain forms of LLM.int8() and QLoRA, whose scale is the largest magnitude: what a delta has to outlive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetooth.kernels import pick

SHRINK_STEPS, SHRINK = 80, 0.01


def _round(w: Tensor, step: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    level: Tensor = (w / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-top, top)
    return level * step  # a row of zeros has step 0 and stays zero


def steps(
    w: Tensor,  # [out, in]
    bits: int,
    kept: Tensor | None = None,  # [in] bool: columns left out of the fit
) -> Tensor:  # [out, 1] float32
    """The quantization step of every output row, fitted on the columns that are not kept."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is out of range: give 2 to 8.")
    w = w.float() if kept is None else w.float()[:, ~kept]
    if w.shape[1] == 0:
        return torch.zeros(w.shape[0], 1, device=w.device)
    fit, top = pick("best_steps", w.device), 2 ** (bits - 1) - 1
    fractions = [1 - SHRINK * i for i in range(SHRINK_STEPS)]
    best: Tensor = fit(w, w.abs().amax(1, keepdim=True) / top, fractions, top)
    return best


def quantized(w: Tensor, bits: int, kept: Tensor | None = None) -> Tensor:
    """Q(w) `[out, in]` in float32; the kept columns pass through."""
    q = _round(w.float(), steps(w, bits, kept), bits)
    return q if kept is None else torch.where(kept, w.float(), q)


def int8(w: Tensor) -> Tensor:
    """What is left of `w` `[out, in]` in eight bits with a scale for every output row, in its dtype.

    The scale is the row's largest magnitude over 127, as in LLM.int8() (arXiv 2208.07339). torchao's weight-only form divides by
    127.5 and has one level more below zero. Nothing is clipped, and a row of zeros stays zero.

    >>> int8(torch.tensor([[127.0, 0.6, -3.4]]))
    tensor([[127.,   1.,  -3.]])
    """
    x = w.float()
    return _round(x, x.abs().amax(1, keepdim=True) / 127, 8).to(w.dtype)


# The levels of NormalFloat4: quantiles of a normal distribution, with an exact zero (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK, _BLOCKS_AT_ONCE = 64, 1 << 14


def nf4(w: Tensor) -> Tensor:
    """What is left of `w` in four bits, `NF4` times the largest magnitude of each run of 64 entries, in its dtype.

    A last run may be shorter. QLoRA also rounds the scales to eight bits; here they are float32, as its error is small beside.

    >>> nf4(torch.tensor([[2.0, 0.1, -1.9]]))
    tensor([[ 2.0000,  0.1592, -2.0000]])
    """
    levels = torch.tensor(NF4, device=w.device)
    between = (levels[1:] + levels[:-1]) / 2
    flat = w.reshape(-1)
    out = torch.empty_like(flat)
    step = NF4_BLOCK * _BLOCKS_AT_ONCE
    for part, to in zip(
        torch.split(flat, step), torch.split(out, step), strict=True
    ):  # codes take more room than weights
        x = torch.nn.functional.pad(part.float(), (0, -part.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
        scale = x.abs().amax(1, keepdim=True)
        code = torch.bucketize(x / scale.clamp_min(torch.finfo(torch.float32).tiny), between, out_int32=True)
        to.copy_((levels[code] * scale).view(-1)[: part.numel()])
    return out.view(w.shape)
