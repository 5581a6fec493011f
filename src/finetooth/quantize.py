"""Symmetric uniform quantization per output row: the `Q` of GIFT-SW, and its step for the noise.

Q(w) = D * clamp(round(w / D), -(2^(b-1) - 1), 2^(b-1) - 1) with D = a / (2^(b-1) - 1), one D for each output
row. The clipping value a is found by a grid: 80 fractions of the row's largest magnitude, in steps of 1 %
from 100 % down, the one with the smallest squared error (arXiv 2408.15300 leaves the grid open).
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
