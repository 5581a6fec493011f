"""How to choose, as data: a score, a unit, a budget, the pools that have one, and the parameters that take part.

`keep` is always the share that trains. As a fraction of n units it is k = max(1, round(keep * n)); as a count it
is k = min(keep, n). A pool is what has one budget: a tensor, a module (`silo`: a weight and its bias), a layer or
the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from finetooth.nearest import hint
from finetooth.units import Unit
from finetooth.weight import Score

Budget = Callable[[Mapping[str, int], int], Mapping[str, int]]


def stem(name: str) -> str:
    """The module a parameter belongs to: a weight and its bias have the same stem.

    >>> stem("model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj'
    """
    for tail in (".weight", ".bias", "_bias"):
        if name.endswith(tail):
            return name[: -len(tail)]
    return name


def layer(name: str) -> str:
    """The block a parameter belongs to, by the first number in its name; '' outside the blocks.

    >>> layer("model.layers.0.mlp.up_proj.weight")
    'model.layers.0'
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def by_tensor(name: str) -> str:
    """Pool: every tensor has a budget of its own."""
    return name


def by_model(name: str) -> str:
    """Pool: one budget for the whole model."""
    return "model"


def module_kind(name: str) -> str:
    """Pool: modules of one kind in all layers; a module outside the blocks has a pool of its own.

    >>> module_kind("model.layers.3.mlp.up_proj.weight"), module_kind("lm_head.weight")
    ('mlp.up_proj', 'lm_head')
    """
    return stem(name).removeprefix(layer(name)).removeprefix(".")


def inside(name: str) -> str:
    """Pool: everything inside the blocks, and everything outside.

    >>> inside("model.layers.3.mlp.up_proj.weight"), inside("lm_head.weight")
    ('inside', 'outside')
    """
    return "inside" if layer(name) else "outside"


POOLS: dict[str, Callable[[str], str]] = {"tensor": by_tensor, "silo": stem, "layer": layer, "model": by_model}
POOLS |= {"kind": module_kind, "inside": inside}


@dataclass(frozen=True)
class Exchange:
    """Drop and grow: the chosen units that score least by `stay` make room for the best of the others by the rule's own score.

    turnover: optimizer step -> the share of the chosen units that is replaced. window: in so many steps before a selection the gradients
    of the units most likely to be grown are added up, as many of them as are chosen; a score reads the sums as `w.window`.
    """

    stay: Score
    turnover: Callable[[int], float]
    window: int = 0


def linear(start: float, steps: int | None) -> Callable[[int], float]:
    """A share that falls evenly to 0 over the run; without its length, one that stays.

    >>> [linear(0.2, 4)(step) for step in range(5)], linear(0.2, None)(7)
    ([0.2, 0.15000000000000002, 0.1, 0.05, 0.0], 0.2)
    """
    return lambda step: start * (max(0.0, 1 - step / steps) if steps else 1.0)


def cosine(start: float, steps: int | None) -> Callable[[int], float]:
    """The same along half a cosine."""
    return lambda step: start * (0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) if steps else 1.0)


@dataclass(frozen=True)
class Rule:
    """How to choose: which score, in which units, how many in each pool, among which parameters.

    keep: a fraction in (0, 1] or a count of units per pool, a mapping pool -> either, or a function of the
    number of units in every pool and the seed. targets: "all", "blocks" (everything inside the transformer
    blocks), "linear" (the linear, Conv1D and expert weights of the blocks), a list of glob patterns of
    parameter names, or a function name -> bool. What does not take part is frozen.
    threshold: keep everything that reaches the k-th score, ties included, instead of exactly k.
    exchange: from the second selection on, replace a share of the chosen units instead of choosing all anew.
    exclude: parameter name -> sorted ids of entries, row-major in storage, that must not train: a unit that holds one is
    never chosen. It counts as a unit all the same, so that a budget is what it would be, as far as there are others.
    """

    score: Score
    unit: Unit = field(default_factory=Unit)
    keep: float | int | Mapping[str, float | int] | Budget = 0.01
    pool: Callable[[str], str] = by_tensor
    targets: str | Iterable[str] | Callable[[str], bool] = "linear"
    threshold: bool = False
    exchange: Exchange | None = None
    exclude: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __new__(cls, *args: Any, **given: Any) -> Rule:
        """Names are checked here, so that an unknown one is told the nearest."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"Rule has no {name!r}.{hint(name, known)} There are: {', '.join(known)}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str) and not callable(self.targets):
            object.__setattr__(self, "targets", tuple(self.targets))  # an iterator would be empty the second time
        if isinstance(self.keep, int | float):
            check_keep(self.keep, "keep")
        elif isinstance(self.keep, Mapping):
            for pool, share in self.keep.items():
                check_keep(share, f"keep[{pool!r}]")

    def excluded(self) -> str | None:
        """A hash of what is excluded; None for nothing."""
        if not self.exclude:
            return None
        digest = hashlib.sha256()
        for name, entries in sorted(self.exclude.items()):
            digest.update(f"{name} {entries.numel()}\n".encode())
            digest.update(entries.long().cpu().numpy().data)
        return f"sha256:{digest.hexdigest()}"

    def budgets(self, units: Mapping[str, int], seed: int) -> dict[str, int]:
        """The number of units to keep in every pool, given how many units each has."""
        keep = self.keep
        if isinstance(keep, Mapping) or callable(keep):
            wanted = keep if isinstance(keep, Mapping) else keep(units, seed)
            if unknown := sorted(set(wanted) - set(units)):
                raise ValueError(
                    f"keep names the pool {unknown[0]!r}, which no target belongs to: there are {list(units)[:5]} …"
                )
            return {pool: count(wanted.get(pool, 0), n) for pool, n in units.items()}
        return {pool: count(keep, n) for pool, n in units.items()}


def check_keep(keep: float | int, what: str) -> None:
    """Raise ValueError unless `keep` is a fraction in (0, 1] or a count of units."""
    fraction = isinstance(keep, float)
    if isinstance(keep, bool) or (fraction and not 0 < keep <= 1) or keep < 0:
        raise ValueError(
            f"{what}={keep} is out of range: give a fraction in (0, 1] (a float) or a count of units (an int)."
        )


def count(keep: float | int, n: int) -> int:
    """`keep` of n units: a fraction is max(1, round(keep * n)), a count is at most n; 0 stays 0.

    >>> count(0.2, 10), count(0.01, 10), count(128, 64), count(0, 10)
    (2, 1, 64, 0)
    """
    if n == 0 or keep == 0:
        return 0
    return min(n, max(1, round(keep * n)) if isinstance(keep, float) else keep)
