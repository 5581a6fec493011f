"""Choices as words, for recipes and command lines: "every(5)", "noise(4)", "block(32)", "magnitude".

Every function here takes the thing itself or its word, and raises ValueError with the choices for any other word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from finetooth import rest, scores, when
from finetooth.nearest import hint
from finetooth.rule import POOLS
from finetooth.units import KINDS, Unit

WHENS: dict[str, Callable[..., Any]] = {
    "once": lambda: when.once,
    "every": when.every,
    "at": lambda *steps: when.at(steps),
    "warmup": when.warmup,
}
RESTS: dict[str, Callable[..., Any]] = {
    "frozen": rest.frozen,
    "reset": rest.reset,
    "noise": rest.noise,
    "quantized": rest.quantized,
}
UNITS: dict[str, Callable[..., Any]] = {kind: lambda *size, kind=kind: Unit(kind, *size) for kind in KINDS}
SCORES = {f.__name__: f for f in (scores.gradient, scores.snip, scores.magnitude, scores.random, scores.smallest)}


def choice(name: str, given: Any) -> Any:
    """What a field of a row is given as: a word becomes what it stands for, anything else stays.

    >>> choice("unit", "block(32)")
    Unit(kind='block', size=32)
    >>> [step for step in range(8) if choice("when", "at(1, 5)")(step)]
    [1, 5]
    """
    if not isinstance(given, str):
        _check_kind(name, given)
        return given
    if name in ("pool", "score"):
        return _one_of(name, given, POOLS if name == "pool" else SCORES)
    if name == "threshold":
        raise ValueError(f"threshold={given!r}: expected one of true, false.")
    if name in ("when", "rest", "unit"):
        return _called(name, given, {"when": WHENS, "rest": RESTS, "unit": UNITS}[name])
    return given


def _check_kind(name: str, given: Any) -> None:
    """What is no word must be the thing itself."""
    kinds: dict[str, tuple[Any, Iterable[str]]] = {
        "unit": (Unit, UNITS),
        "rest": (rest.Rest, RESTS),
        "threshold": (bool, ("true", "false")),
    }
    kinds |= {"pool": (Callable, POOLS), "score": (Callable, SCORES), "when": (Callable, WHENS)}
    kind, known = kinds.get(name, (object, ()))
    if not isinstance(given, kind):
        raise ValueError(f"{name}={given!r}: expected one of {', '.join(known)}.")


def _one_of(name: str, given: str, table: Mapping[str, Any]) -> Any:
    if given not in table:
        own = "" if name == "unit" else ", or give a function"
        raise ValueError(f"{name}={given!r} is unknown: choose one of {', '.join(table)}{own}.{hint(given, table)}")
    return table[given]


def _called(name: str, given: str, table: Mapping[str, Callable[..., Any]]) -> Any:
    """`word` or `word(1, 2)`."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*([\d\s,]*)\))?\s*", given)
    make = _one_of(name, match.group(1) if match else given, table)
    numbers = [int(n) for n in re.findall(r"\d+", (match.group(2) if match else None) or "")]
    try:
        return make(*numbers)
    except TypeError:
        raise ValueError(
            f"{name}={given!r} has the wrong number of arguments: write it like every(5), at(1, 5) or noise(4)."
        ) from None
