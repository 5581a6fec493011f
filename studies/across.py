"""The differences that are asked for on every task, side by side: `across.yaml` says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pages import difference, joined
from readings import Row, parts, runs

from finetooth import tally

NUMBERS = ("task_loss", "forgetting")


def page(rows: Sequence[Row], pool: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """A table for each number: a line for every pair, a column for every task that has one. Bold where the interval leaves out 0. Then the rates."""
    named = parts(pool, asked)
    recipes = dict.fromkeys(recipe for part in named for recipe in pool[part]["recipes"])
    own = {recipe: found for recipe in recipes if (found := runs(rows, named, recipe))}
    told = []
    for number in NUMBERS:
        lines: list[list[str]] = []
        for question, pairs in asked["pairs"].items():
            for first, second in pairs:
                cells = [_cell(found, first, second, number) for found in own.values()]
                if any(cell != "–" for cell in cells):
                    lines.append([str(question), f"`{first}` − `{second}`", *cells])
        heads = ["question", f"{number.replace('_', ' ')}: the first less the second", *own]
        told.append(joined(heads, [f"| {' | '.join(line)} |" for line in lines], left=2))
    return "\n".join([*told, _rates(own)])


def _rates(own: Mapping[str, Sequence[Row]]) -> str:
    """The best rate of every contender on every task."""
    best = {recipe: {row["contender"]: f"{row['lr']:g}" for row in rows} for recipe, rows in own.items()}
    labels = dict.fromkeys(label for found in best.values() for label in found)
    lines = [f"| `{label}` | {' | '.join(found.get(label, '–') for found in best.values())} |" for label in labels]
    return joined(["best rate by the task loss", *own], lines, left=1)


def _cell(rows: Sequence[Row], first: str, second: str, number: str) -> str:
    """The mean difference within a seed, with its interval.

    >>> rows = [{"contender": c, "seed": s, "lr": 1.0, "error": "", "task_loss": x + s} for c, x in (("a", 1.0), ("b", 3.0)) for s in (0, 1)]
    >>> _cell(rows, "a", "b", "task_loss"), _cell(rows, "a", "c", "task_loss")
    ('**−2.000 ± 0.000**', '–')
    """
    line = next((x for x in tally.summary(rows, second) if x["contender"] == first), {})
    if (mean := line.get(f"{number}_difference")) is None:
        return "–"
    half = line[f"{number}_interval"]
    return f"**{difference(line, number)}**" if half is not None and abs(mean) > half else difference(line, number)
