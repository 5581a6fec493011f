"""The named methods: one row of choices each, with its paper, its defaults and where it deviates.

A row is data. To add a method, write its score in `scores.py` and its row here. `options` are what a row
takes beyond the fields every row has (`keep`, `unit`, `pool`, `targets`, `when`, `rest`); `configure` turns them
into the fields they change. `calibration` names what `probe` must measure before training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from finetooth import scores
from finetooth.halves import halves, sub_blocks
from finetooth.optim import Mask, State
from finetooth.rest import Rest, frozen, noise, reset
from finetooth.rule import Rule, stem
from finetooth.units import Unit
from finetooth.when import When, every, once


@dataclass(frozen=True)
class Method:
    """One row: what is chosen, when, what happens to the rest, and where it comes from."""

    name: str
    summary: str
    paper: str
    rule: Rule | None
    when: When = once
    rest: Rest = field(default_factory=frozen)
    state: State = "compact"
    mask: Mask = "gradient"
    deviations: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    configure: Callable[..., dict[str, Any]] | None = None
    pools: Callable[..., Callable[[str], str]] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether `build` wants calibration batches."""
        return bool(self.calibration)

    @property
    def defaults(self) -> dict[str, Any]:
        """The choices of this row in words, for tables and pages."""
        rule = self.rule
        if rule is None:
            return {"keep": 1.0, "targets": "all", "state": self.state}
        keep = rule.keep if isinstance(rule.keep, int | float) else getattr(rule.keep, "__name__", "per pool")
        words = {
            "keep": keep,
            "unit": str(rule.unit),
            "targets": rule.targets,
            "rest": self.rest.kind,
            "state": self.state,
        }
        return words | {"when": "once" if self.when is once else "every step"} | dict(self.options)


def _gift_sw(
    bits: int = 4, gamma: float = 1.0, tau: float = scores.INFINITY, rho: float = scores.INFINITY
) -> dict[str, Any]:
    return {
        "score": scores.saliency(bits, gamma, tau, rho),
        "rest": noise(bits),
        "calibration": (scores.input_norm(rho),),
    }


def _dst(relative: bool = False, zero_moments: bool = False) -> dict[str, Any]:
    return {"score": scores.distance(relative), "rest": reset(zero_moments)}


_GMT = Rule(scores.gradient, keep=0.2, targets="all", threshold=True)
_GMT_POINTS = (
    "The paper writes plain SGD and leaves the moments open.",
    "Ties at the threshold are kept (|g| >= T), as the paper defines it: a tensor most of whose gradient is zero, "
    "such as an embedding, keeps more than its share.",
    "The mask is made once per optimizer step from the accumulated gradient, per tensor; pool='model' is the global variant.",
)
_STATIC = (
    "Targets are the linear, Conv1D and expert weights of the blocks; keep is a share of each tensor (pool='model': of all).",
)
_GRADS = (
    "|g| is the magnitude of the mean gradient over the calibration batches, in eval mode. "
    "Without calibration=, the first optimizer step's accumulated gradient takes its place.",
)

_ROWS = (
    Method(
        "full",
        "Every weight trains: the yardstick.",
        "AdamW, arXiv 1711.05101",
        None,
        state="dense",
        deviations=(
            "bf16 weights have float32 moments and are rounded stochastically; torch.optim.AdamW keeps bf16 moments.",
        ),
    ),
    Method(
        "gmt",
        "Zero the small gradients, then AdamW.",
        "Gradient-Mask Tuning, arXiv 2406.15330",
        _GMT,
        when=every(1),
        state="dense",
        mask="gradient",
        deviations=(
            *_GMT_POINTS,
            "This row masks the gradient and then runs AdamW, as everyone does: an entry that is not chosen still moves "
            "by its momentum and by weight decay. For the literal reading take gmt-strict.",
            "Clipping is to the norm of the masked gradient.",
        ),
    ),
    Method(
        "gmt-strict",
        "GMT, and what is not chosen at a step does not move at that step.",
        "Gradient-Mask Tuning, arXiv 2406.15330",
        _GMT,
        when=every(1),
        state="dense",
        mask="update",
        deviations=(
            *_GMT_POINTS,
            "This row masks the update: moments see the whole gradient, and only chosen entries are written (decay included).",
            "Clipping is to the norm of the whole gradient, which is what the moments see.",
        ),
    ),
    Method(
        "dst",
        "After every step, only the entries that moved furthest keep their step; the others are the base.",
        "Dynamic Subset Tuning, arXiv 2411.08610",
        Rule(scores.distance(), keep=0.1, pool=stem, targets="blocks"),
        when=every(1),
        rest=reset(),
        state="dense",
        mask="update",
        options={"relative": False, "zero_moments": False},
        configure=_dst,
        deviations=(
            "A silo is one module in one layer, its bias included. The budget is round(keep * |S|), exactly.",
            "Distances are float32 differences of the proposed weight and the base. Where Adam's first step makes them tie, "
            "the larger |g| wins, then the smaller index.",
            "Relative distance divides by |base| + 1e-8; the constant is ours.",
            "Moments of entries that are reset are kept (zero_moments=True clears them): the paper leaves it open.",
            "Embeddings and head take part on request (targets='all').",
            "bf16: the selection is made on float32 proposals, which are then rounded stochastically, so that a chosen entry may "
            "equal the base.",
        ),
    ),
    Method(
        "gift-sw",
        "Salient input columns train; the others are seen with quantization-sized noise.",
        "GIFT-SW, arXiv 2408.15300",
        Rule(scores.saliency(), Unit("column"), keep=128, targets="dense-linear"),
        rest=noise(4),
        calibration=(scores.input_norm(scores.INFINITY),),
        options={"bits": 4, "gamma": 1.0, "tau": scores.INFINITY, "rho": scores.INFINITY},
        configure=_gift_sw,
        deviations=(
            "128 columns of every linear of the blocks, or all of them where a matrix has fewer: give keep for small models.",
            "The saliency's Q is fitted on all columns, since what is salient is not known yet; the noise's step leaves the "
            "chosen columns out.",
            "The clipping value is searched on 80 steps of 1 % of the row's largest magnitude, by squared error.",
            "Noise is fresh in every forward of the model in training mode. A draw is one of the 65,536 equally likely quantiles of "
            "N(0, 1), scaled to a variance of 1, by a hash of the position; the largest is 4.3.",
            "Expert tensors do not take part: the inputs of single experts cannot be observed by a module hook.",
        ),
    ),
    Method(
        "hft",
        "A random half of the matrices trains, balanced by category and layer.",
        "Half Fine-Tuning, arXiv 2404.18466",
        Rule(scores.random, Unit("matrix"), keep=halves, targets="all"),
        pools=sub_blocks,
        deviations=(
            "A module's bias goes with its matrix. Where a category has an odd number of modules (3 FFN matrices), a random half "
            "of the layers trains the larger part and the others the smaller.",
            "Embeddings, head and the final norm always train.",
            "A round is one run: another seed, another half. Frozen modules have requires_grad=False.",
        ),
    ),
    Method(
        "random",
        "A random share of the weights: the control.",
        "the control of SHiRA-Rand, arXiv 2406.13175",
        Rule(scores.random),
        deviations=(*_STATIC, "Chosen by a hash of (seed, name, unit), the same on every device."),
    ),
    Method(
        "grad",
        "The weights with the largest gradient on calibration batches.",
        "SHiRA-Grad, arXiv 2406.13175; SIFT, arXiv 2312.11875",
        Rule(scores.gradient),
        calibration=("grad",),
        deviations=(*_STATIC, *_GRADS),
    ),
    Method(
        "snip",
        "The weights with the largest |gradient * weight| on calibration batches.",
        "SHiRA-SNIP, arXiv 2406.13175; SNIP, arXiv 1810.02340",
        Rule(scores.snip),
        calibration=("grad",),
        deviations=(*_STATIC, *_GRADS),
    ),
    Method(
        "magnitude",
        "The largest weights.",
        "SHiRA-WM, arXiv 2406.13175; arXiv 2412.13488",
        Rule(scores.magnitude),
        deviations=_STATIC,
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
