"""One pure function for each criterion: `Weight` -> non-negative tensor, larger = train it.

A score with parameters is a function that returns one. A score whose ties must fall in a stated way carries
the second key as its `tie` attribute. To add a criterion, add a function here and a row in `methods.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetooth.kernels import reference
from finetooth.quantize import quantized
from finetooth.selection import group_of
from finetooth.units import WHOLE
from finetooth.weight import Score, Weight

INFINITY = float("inf")


def gradient(w: Weight) -> Tensor:
    """|g|: the magnitude of the mean gradient (GMT, arXiv 2406.15330; SHiRA-Grad, arXiv 2406.13175; SIFT)."""
    return w.grad.abs()


gradient.by_entry = True  # type: ignore[attr-defined]  # see `Weight`


def snip(w: Weight) -> Tensor:
    """|g * w|: the first-order change of the loss if the weight were removed (SNIP, arXiv 1810.02340)."""
    return (w.grad.float() * w.value.float()).abs()


snip.by_entry = True  # type: ignore[attr-defined]


def magnitude(w: Weight) -> Tensor:
    """|w|: the largest pretrained weights (SHiRA-WM, arXiv 2406.13175)."""
    return w.value.abs()


magnitude.by_entry = True  # type: ignore[attr-defined]


def random(w: Weight) -> Tensor:
    """Uniform in [0, 1), a hash of (seed, name, unit): the same on every device and under every sharding.

    Whole tensors are hashed by the name of their group, so that a bias goes with its matrix.
    """
    shape, unit = w.stored
    name = group_of(unit, w.name) if unit.kind in WHOLE else w.name
    return reference.uniform(unit.count(shape), reference.key(w.seed, "random", name), w.value.device)


def distance(relative: bool = False) -> Score:
    """|proposed - base|, how far a dense step would take the weight from the base (DST, arXiv 2411.08610).

    relative: divided by |base| + 1e-8 (the constant is ours: the paper leaves the zero weight open).
    Ties fall to the larger |g|.
    """

    def score(w: Weight) -> Tensor:
        base = w.base.float()
        moved = (w.proposed - base).abs_()
        return moved.div_(base.abs() + 1e-8) if relative else moved

    score.tie, score.by_entry = gradient, True  # type: ignore[attr-defined]
    return score


def saliency(bits: int = 4, gamma: float = 1.0, tau: float = INFINITY, rho: float = INFINITY) -> Score:
    """s_j = ||W_:j - Q(W)_:j||_tau * ||X_j||_rho ^ gamma, one value per input column (GIFT-SW, arXiv 2408.15300).

    tau, rho: norms, one of inf, 2, 1; gamma: 0.5, 1 or 2. X_j are the inputs of column j over all calibration
    tokens. Published special cases, by what they measure: QUIK takes the inputs' largest magnitude alone;
    OWQ is close to tau=2, rho=2, gamma=2 (quantization error times the input's energy); Wanda's |w| * ||x||_2
    is the same product with the weight in the place of its quantization error (rho=2).
    """
    for name, norm in (("tau", tau), ("rho", rho)):
        if norm not in (INFINITY, 2, 1):
            raise ValueError(f"{name}={norm} is not a norm of GIFT-SW: choose inf, 2 or 1.")
    if gamma <= 0:
        raise ValueError(f"gamma={gamma} is out of range: give a positive exponent (0.5, 1 and 2 are the paper's).")

    def score(w: Weight) -> Tensor:
        if w.value.ndim != 2 or w.unit.kind != "column":
            raise ValueError(
                f"the GIFT-SW score chooses columns of matrices: {w.name!r} is {tuple(w.value.shape)}, unit {w.unit}."
            )
        error: Tensor = torch.linalg.vector_norm(w.value.float() - quantized(w.value, bits), ord=tau, dim=0)
        inputs: Tensor = w.stat(input_norm(rho)).pow(gamma)
        return inputs * error

    score.__name__ = "saliency"
    return score


def input_norm(rho: float) -> str:
    """The name of the calibration statistic ||X_j||_rho.

    >>> input_norm(2.0)
    'input_norm_2'
    """
    return f"input_norm_{rho:g}"
