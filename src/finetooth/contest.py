"""What a comparison runs: contenders, learning rates and seeds, as recipes of their own.

A contender is a method with options, written `gift-sw:bits=3:keep=0.03`; `lora` and `shira` are PEFT's, for a look over the fence
(`outsiders.py`). Everything else (data, steps, schedule, evaluation) is the recipe's, and the same for all.

Not covered: settings outside of the method that differ between contenders, apart from the learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetooth import outsiders
from finetooth.jobs import check_method
from finetooth.methods import METHODS
from finetooth.recipe import MethodPart, Recipe, RecipeError


@dataclass(frozen=True)
class Contender:
    """A method and what is changed of it."""

    label: str  # as it was given
    method: MethodPart


@dataclass(frozen=True)
class Entry:
    """One run of a comparison."""

    contender: Contender
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """A name for its folder.

        >>> Entry(contender("gmt:keep=0.5"), 2e-3, 1).name
        'gmt-keep-0.5-lr-0.002-seed-1'
        """
        label = re.sub(r"[^\w.+-]+", "-", self.contender.label).strip("-")
        return f"{label}-lr-{self.lr:g}-seed-{self.seed}"

    def recipe(self, common: Recipe, folder: Path) -> Recipe:
        """The common recipe with this method, rate, seed and output."""
        return common.model_copy(
            update={
                "method": self.contender.method,
                "optimizer": common.optimizer.model_copy(update={"lr": self.lr}),
                "train": common.train.model_copy(update={"seed": self.seed}),
                "output": str(folder),
            }
        )


def contender(text: str, common: MethodPart | None = None) -> Contender:
    """`NAME[:key=value…]`; RecipeError for a name, an option or a budget that does not exist.

    The options that the recipe has for a method stand for that method, unless they are given.

    >>> contender("gift-sw:bits=3").method.model_extra
    {'bits': 3}
    """
    name, *options = text.strip().split(":")
    if name not in METHODS and name not in outsiders.NAMES:
        raise RecipeError(f"--methods: {name!r} is unknown: there are {', '.join([*METHODS, *outsiders.NAMES])}.")
    given: dict[str, Any] = common.model_dump() if common is not None and common.name == name else {"name": name}
    for option in options:
        key, sign, value = option.partition("=")
        if not sign or not key:
            raise RecipeError(f"--methods: {text!r} has the option {option!r}: write key=value, such as keep=0.1.")
        given[key] = yaml.safe_load(value)
    part = MethodPart.model_validate(given)
    if name in outsiders.NAMES:
        outsiders.check(part)
    else:
        check_method(part)
    return Contender(text.strip(), part)


def contenders(methods: Sequence[str], keeps: Sequence[float | int], common: MethodPart) -> list[Contender]:
    """Every method, at every budget if it has one and names none itself."""
    found: list[Contender] = []
    for text in methods:
        one = contender(text, common)
        row = METHODS.get(one.method.name)
        if not keeps or "keep=" in text or row is None or row.rule is None or callable(row.rule.keep):
            found.append(one)
        else:
            found += [contender(f"{text}:keep={keep:g}", common) for keep in keeps]
    twice = {c.label for c in found if [d.label for d in found].count(c.label) > 1}
    if twice:
        raise RecipeError(f"--methods: {min(twice)!r} is there twice.")
    return found
