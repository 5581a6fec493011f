"""One pure function for each criterion: `Weight` -> non-negative tensor, larger = train it.

A score with parameters is a function that returns one. A score whose ties must fall in a stated way carries
the second key as its `tie` attribute. To add a criterion, add a function here and a row in `methods.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from finetooth.kernels import reference
from finetooth.quantize import quantized
from finetooth.selection import by_unit, group_of
from finetooth.units import WHOLE
from finetooth.weight import Score, Weight

INFINITY = float("inf")
LARGEST = 0x7F7FFFFF  # the bits of the largest float32
ORDERS = ("random", "ascending", "descending")


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


random.blind = True  # type: ignore[attr-defined]  # it reads no values: a plan knows the choice


def distance(relative: bool = False) -> Score:
    """|proposed - base|, how far a dense step would take the weight from the base (DST, arXiv 2411.08610).

    relative: divided by |base| + 1e-8 (the constant is ours: the paper leaves the zero weight open).
    Ties fall to the larger |g|.
    """

    def score(w: Weight) -> Tensor:
        base = w.base.float()
        moved = (w.proposed - base).abs_()
        return moved.div_(base.abs().add_(1e-8)) if relative else moved

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


def smallest(w: Weight) -> Tensor:
    """The smallest |w|, of units the smallest sum of |w| (NanoAdam, arXiv 2506.21374)."""
    return _least(by_unit(w.value.float().abs(), w))


smallest.by_entry = True  # type: ignore[attr-defined]


def _least(sizes: Tensor) -> Tensor:
    """Non-negative numbers in the opposite order, exactly: float32 counts up as its bits do, so the bits are counted down."""
    return (LARGEST - sizes.contiguous().view(torch.int32)).view(torch.float32)


def moved(w: Weight) -> Tensor:
    """|w - base|: how far a weight is from its pretrained value now (SpIEL's reason to stay, arXiv 2401.16405)."""
    return (w.value.float() - w.base.float()).abs_()


moved.by_entry = True  # type: ignore[attr-defined]


def grown(w: Weight) -> Tensor:
    """A random start; later |sum of g| over the window before the selection (SpIEL's reason to grow, arXiv 2401.16405)."""
    return w.window.abs() if w.turn else random(w)


def fisher(w: Weight) -> Tensor:
    """The sum over calibration rows of the squared gradient of each: the diagonal of the empirical Fisher information, up to
    a factor (FISH, arXiv 2111.09839)."""
    return w.squares


fisher.by_entry = True  # type: ignore[attr-defined]


def principal(rank: int = 128) -> Score:
    """|W_r|, W_r the nearest matrix of this rank to the weight, by a singular value decomposition (LIFT, arXiv 2506.00772).

    Experts are decomposed one by one; a vector is its own.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} is out of range: give the rank of the approximation, at least 1.")

    def score(w: Weight) -> Tensor:
        x = w.value.float()
        if x.ndim < 2 or rank >= min(x.shape[-2:]):
            return x.abs()
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        nearest: Tensor = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
        return nearest.abs()

    score.__name__ = "principal"
    return score


def shield(w: Weight) -> Tensor:
    """Input columns that matter least on the calibration data: the smallest sum_i |W_ij| * ||X_j||_2 (SSU, arXiv 2512.04844).

    |w| * ||x||_2 is the score of Wanda; here what it ranks highest is kept from training.
    """
    if w.value.ndim != 2:
        raise ValueError(f"the SSU score ranks columns of matrices: {w.name!r} is {tuple(w.value.shape)}.")
    return _least(by_unit(w.value.float().abs() * w.stat(input_norm(2.0)), w))


def signal_to_noise(w: Weight) -> Tensor:
    """The signal-to-noise ratio of a matrix's singular values, one number (Spectrum, arXiv 2406.06623).

        snr = sum_{s > t} s / sum_{s <= t} s / max s;   t = sigma (1 + sqrt(min(m, n) / max(m, n))),
        sigma = (the interquartile range of s) / 1.349

    t is the edge that the Marchenko-Pastur law gives the singular values of noise, as the published code scales it. Without any
    noise the denominator is 1. Of experts the mean.
    """
    if w.unit.kind not in WHOLE:
        raise ValueError(f"the Spectrum score ranks whole matrices: {w.name!r} is cut into units of {w.unit}.")
    x = w.value.float()
    s = torch.linalg.svdvals(x if x.ndim > 1 else x[None])
    low, high = (torch.quantile(s, q, dim=-1, keepdim=True) for q in (0.25, 0.75))
    edge = (high - low) / 1.349 * (1 + math.sqrt(min(x.shape[-2:]) / max(x.shape[-2:])) if x.ndim > 1 else 1.0)
    signal, noise = (torch.where(part, s, 0.0).sum(-1) for part in (s > edge, s <= edge))
    ratio: Tensor = signal / torch.where(noise > 0, noise, 1.0) / s[..., 0].clamp_min(torch.finfo(s.dtype).tiny)
    return ratio.mean().reshape(1)


def listed(ids: Iterable[int]) -> Score:
    """1 for the rows with these numbers (token ids, of embeddings and heads), 0 for the others."""
    wanted = torch.tensor(sorted(set(ids)), dtype=torch.int64)

    def score(w: Weight) -> Tensor:
        shape, unit = w.stored
        if len(wanted) and int(wanted[-1]) >= shape[0]:
            raise ValueError(
                f"row {int(wanted[-1])} is not in {w.name!r}, which has {shape[0]} rows: resize the embeddings to the tokenizer "
                "first (model.resize_token_embeddings)."
            )
        rows = torch.zeros(shape[0], device=w.value.device)
        rows[wanted.to(rows.device)] = 1.0
        if unit.kind == "row" and len(shape) == 2:
            return rows
        marked = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        return marked.transpose(-1, -2) if w.transposed else marked

    score.__name__ = "listed"
    return score


def lottery(w: Weight) -> Tensor:
    """Uniform in [0, 1), another draw for every selection: a hash of (seed, selection, module or layer) (LISA, arXiv 2403.17919)."""
    name = group_of(w.unit, w.name) if w.unit.kind in WHOLE else w.name
    return reference.uniform(
        w.stored[1].count(w.stored[0]), reference.key(w.seed, "lottery", w.turn, name), w.value.device
    )


lottery.blind = True  # type: ignore[attr-defined]


def turn(order: str = "random") -> Score:
    """Modules or layers in turn, one further at every selection (BAdam, arXiv 2404.02827).

    order: "ascending" from the first to the last, "descending", or "random": drawn again for each round, every one once in a round.
    With a budget of several a selection is the next so many, of which all but the first come again.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown: choose one of {', '.join(ORDERS)}.")

    def score(w: Weight) -> Tensor:
        peers = list(w.peers or (w.name,))
        n, mine = len(peers), group_of(w.unit, w.name) if w.peers else w.name
        if order == "random":
            peers.sort(key=lambda peer: reference.key(w.seed, "turn", w.turn // n, peer))
        place = peers.index(mine) if order != "descending" else n - 1 - peers.index(mine)
        last = n - (place - w.turn) % n
        return torch.full((w.stored[1].count(w.stored[0]),), float(last), device=w.value.device)

    score.__name__, score.blind = "turn", True  # type: ignore[attr-defined]
    return score


def input_norm(rho: float) -> str:
    """The name of the calibration statistic ||X_j||_rho.

    >>> input_norm(2.0)
    'input_norm_2'
    """
    return f"input_norm_{rho:g}"
