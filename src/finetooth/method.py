"""What a row of METHODS is made of, and what its own options change of it.

A row is data. `options` are what a row takes beyond the fields every row has (`keep`, `unit`, `pool`, `targets`, `when`, `rest`);
`configure` turns them into the fields they change. `calibration` names what `probe` must measure before training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetooth import scores
from finetooth.optim import Mask, State
from finetooth.rest import Rest, frozen, noise, reset
from finetooth.rule import Exchange, Rule, cosine, linear
from finetooth.when import When, once

DECAYS = {"linear": linear, "cosine": cosine}


# By the share that trains: the smallest and the largest of the best learning rates in studies/, in those of full fine-tuning.
Rates = Mapping[float, tuple[float, float]]


def span(rates: Sequence[float]) -> str:
    """The smallest and the largest, in words.

    >>> span((9, 27)), span((3, 3))
    ('9 to 27', '3')
    """
    return " to ".join(f"{rate:g}" for rate in dict.fromkeys(rates))


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
    rates: Rates = field(default_factory=dict)
    calibration: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    configure: Callable[..., dict[str, Any]] | None = None
    source: bool = False  # calibration is on what must not be forgotten, instead of on training data
    required: tuple[str, ...] = ()  # options that have no default
    pools: Callable[..., Callable[[str], str]] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether `build` wants calibration batches."""
        return bool(self.calibration)

    def rates_near(self, keep: Any = None) -> tuple[float, tuple[float, float]] | None:
        """Of the budgets whose best learning rates are known the nearest to `keep`, or to this row's own, with its rates.

        None where there is none, or where `keep` is a count and there are several.

        >>> from finetooth.methods import METHODS
        >>> METHODS["hft"].rates_near()
        (0.5, (1, 3))
        """
        share = self.defaults["keep"] if keep is None else keep
        if not isinstance(share, float):
            return next(iter(self.rates.items())) if len(self.rates) == 1 else None
        return min(self.rates.items(), key=lambda item: abs(math.log(item[0] / share)), default=None)

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
        return words | {"when": getattr(self.when, "__name__", "own")} | dict(self.options)


def gift_sw(
    bits: int = 4, gamma: float = 1.0, tau: float = scores.INFINITY, rho: float = scores.INFINITY
) -> dict[str, Any]:
    """What the options of `gift-sw` change."""
    return {
        "score": scores.saliency(bits, gamma, tau, rho),
        "rest": noise(bits),
        "calibration": (scores.input_norm(rho),),
    }


def lift(rank: int = 128) -> dict[str, Any]:
    """What the options of `lift` change."""
    return {"score": scores.principal(rank)}


def spiel(turnover: float = 0.2, decay: str = "linear", steps: int | None = None, window: int = 5) -> dict[str, Any]:
    """What the options of `spiel` change."""
    if decay not in DECAYS:
        raise ValueError(f"decay={decay!r} is unknown: choose one of {', '.join(DECAYS)}.")
    if not 0 <= turnover <= 1:
        raise ValueError(
            f"turnover={turnover} is out of range: give the share of the chosen that is exchanged, 0 to 1."
        )
    if window < 1:
        raise ValueError(
            f"window={window} is out of range: give the steps before a selection whose gradients count, at least 1."
        )
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps={steps!r}: expected the number of optimizer steps of the run, or nothing.")
    share = DECAYS[decay](turnover, steps)
    return {"exchange": Exchange(scores.moved, share, window)}


def badam(order: str = "random") -> dict[str, Any]:
    """What the options of `badam` change."""
    return {"score": scores.turn(order)}


def rows(rows: Any = ()) -> dict[str, Any]:
    """What the options of `rows` change: `rows` are numbers, `range`s, or texts such as "32000-32063", both ends included.

    >>> rows([5, range(2, 4), "7-8"])["keep"]
    5
    """
    ids = sorted({n for part in ([rows] if isinstance(rows, int | str) else rows) for n in _numbers(part)})
    return {"score": scores.listed(ids), "keep": len(ids)}


def is_token(part: Any) -> bool:
    """Whether an entry of `rows` is the text of a token, which takes a tokenizer."""
    return isinstance(part, str) and re.fullmatch(r"\d+-\d+", part) is None


def _numbers(part: Any) -> Iterable[int]:
    if is_token(part):
        raise ValueError(
            f"rows: {part!r} is the text of a token, which takes a tokenizer: give tokenizer.convert_tokens_to_ids({part!r}), or write it "
            "in a recipe."
        )
    if isinstance(part, str):
        first, last = (int(n) for n in part.split("-"))
        part = range(first, last + 1)
    found = part if isinstance(part, range) else [part]
    if isinstance(part, bool) or any(not hasattr(n, "__index__") or n < 0 for n in found) or not found:
        raise ValueError(f"rows: {part!r} names no row: give numbers from 0, ranges, or texts such as '32000-32063'.")
    return (int(n) for n in found)


def dst(relative: bool = True, zero_moments: bool = False) -> dict[str, Any]:
    """What the options of `dst` change."""
    return {"score": scores.distance(relative), "rest": reset(zero_moments)}
