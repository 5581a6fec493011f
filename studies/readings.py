"""What the study says, as numbers: runs of the pool put together for one table of a question.

    differences   every contender, and its paired differences from the first that is named
    curve         every budget of some methods
    bins          contenders by their stored bytes: who is on the front of its bin, and the differences from `random` in it
    equal         forgetting at the same task loss: a second contender against a first, both trained at several rates
    rates         every run of the sweeps: what is learnt and forgotten from rate to rate

A table is rows of one shape, whatever its kind; every difference is within a seed.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetooth import tally
from finetooth.methods import METHODS

TEXTS = (
    "part",
    "recipe",
    "contender",
    "method",
    "stage",
    "run",
    "error",
)  # the columns of `runs.csv` that are no numbers
Row = dict[str, Any]
Lines = dict[str, list[Row]]  # recipe -> a line for each contender


def every(out: Path, pool: Mapping[str, Any], kept: Path) -> list[Row]:
    """All runs, part by part: those of the comparisons in `out`, and of the others what a `runs.csv` has of them."""
    rows = saved(kept) if kept.is_file() else []
    found = []
    for part, recipe in ((part, recipe) for part, made in pool.items() for recipe in made["recipes"]):
        file = out / part / recipe / "compare.json"
        if file.is_file():
            own = json.loads(file.read_text(encoding="utf-8"))["runs"]
            found += [{"part": part, "recipe": recipe, **row} for row in own]
        else:
            found += [row for row in rows if (row["part"], row["recipe"]) == (part, recipe)]
    return found


def saved(file: Path) -> list[Row]:
    """The rows of a `runs.csv`."""
    with file.open(newline="", encoding="utf-8") as stream:
        return [{k: v if k in TEXTS else _number(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def _number(text: str) -> float | int | None:
    """What a cell says.

    >>> [_number(text) for text in ("", "480123", "0.25", "3e-05")]
    [None, 480123, 0.25, 3e-05]
    """
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)


def runs(rows: Sequence[Row], parts: Sequence[str], recipe: str, stage: str = "final") -> list[Row]:
    """The runs of a stage of a recipe that ended well; one that several parts have is there once."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in (r for part in parts for r in rows if (r["part"], r["recipe"]) == (part, recipe)):
        if row["stage"] == stage and not row["error"]:
            own = {k: v for k, v in row.items() if k not in ("part", "recipe")}
            found.setdefault((row["contender"], row["lr"], row["seed"]), own)
    return list(found.values())


def parts(pool: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The parts that are read: those that are named, or the main ones and all budgets, and `more`.

    >>> pool = dict.fromkeys(("core", "sparse", "budgets-half", "forms", "time"))
    >>> parts(pool, {}), parts(pool, {"more": ["forms"]}), parts(pool, {"parts": ["time"]})
    (['core', 'sparse', 'budgets-half'], ['core', 'sparse', 'budgets-half', 'forms'], ['time'])
    """
    main = [part for part in pool if part in ("core", "sparse", "middle") or part.startswith("budgets")]
    return asked.get("parts") or [*main, *asked.get("more", ())]


def read(rows: Sequence[Row], pool: Mapping[str, Any], asked: Mapping[str, Any]) -> Lines:
    """A table of a question, as far as it has been run."""
    named = parts(pool, asked)
    recipes = asked.get("recipes") or dict.fromkeys(recipe for part in named for recipe in pool[part]["recipes"])
    stage = "sweep" if asked["kind"] == "rates" else "final"
    found = {recipe: runs(rows, named, recipe, stage) for recipe in recipes}
    lines = {recipe: _table(own, asked) for recipe, own in found.items() if own}
    return {recipe: own for recipe, own in lines.items() if own}


def _table(rows: list[Row], asked: Mapping[str, Any]) -> list[Row]:
    named = asked.get("contenders")
    if asked["kind"] == "equal":
        return equal(rows, *named)
    if asked["kind"] == "bins":
        return bins(rows, asked["edges"])
    if named:
        rows = sorted((r for r in rows if r["contender"] in named), key=lambda r: named.index(r["contender"]))
    if "methods" in asked:
        rows = [r for r in rows if r["method"] in asked["methods"]]
    if asked["kind"] == "rates":
        return rates(rows)
    if named and rows and rows[0]["contender"] != named[0]:
        return []  # what the others are compared with has not been run
    lines = known(rows, tally.summary(rows))
    return lines if len(lines) > 1 else []


def known(rows: Iterable[Row], lines: Iterable[Row]) -> list[Row]:
    """Lines with the method and the budget of their contender."""
    about = {row["contender"]: {"method": row["method"], "keep": row["keep"]} for row in rows}
    return [{**about[line["contender"]], **line} for line in lines]


def bins(rows: Sequence[Row], edges: Sequence[float]) -> list[Row]:
    """Lines of contenders bin by bin of their stored bytes, with the front of each.

    Differences are from the `random` of the nearest size, named as `against`, if its file and theirs differ by no more than half, and
    if both train embeddings or neither does.

    >>> made = [("random:keep=0.1", 2.0), ("grad:keep=0.1", 1.5), ("gmt", 1.0)]
    >>> rows = [{"contender": c, "method": c.split(":")[0], "keep": None, "lr": 1.0, "seed": 0, "error": "", "task_loss": x,
    ...          "forgetting": 1.0, "delta_bytes": 9e6 if c == "gmt" else 1e5} for c, x in made]
    >>> [(r["contender"], r["bin"], r["front"], r["against"], r.get("task_loss_difference")) for r in bins(rows, [0, 1e6, 1e9])]
    [('random:keep=0.1', 0, False, None, None), ('grad:keep=0.1', 0, True, 'random:keep=0.1', -0.5), ('gmt', 1, True, None, None)]
    """
    size = {line["contender"]: line["delta_bytes"] for line in tally.summary(rows)} if rows else {}
    chance = [c for c in size if c.startswith("random:") and "unit=" not in c]
    found = []
    for i, (least, most) in enumerate(pairwise(edges)):
        own = [r for r in rows if least <= size[r["contender"]] < most]
        lines = [
            _beside(rows, label, nearest(size, label, [c for c in chance if embeddings(c) == embeddings(label)]))
            for label in dict.fromkeys(r["contender"] for r in own)
        ]
        front = tally.front(lines, "task_loss")
        found += [{"bin": i, "front": line["contender"] in front, **line} for line in known(own, lines)]
    return found


def embeddings(label: str) -> bool:
    """Whether a contender trains embeddings.

    >>> [embeddings(label) for label in ("gmt:keep=0.1", "gmt:targets=linear", "random", "random:targets=all", "lora:embeddings=true")]
    [True, False, False, True, True]
    """
    name, *options = label.split(":")
    given, row = dict(option.split("=", 1) for option in options), METHODS.get(name)
    usual = "linear" if row is None else "all" if row.rule is None else row.rule.targets
    return given.get("targets", usual) == "all" or given.get("embeddings") == "true"


def nearest(size: Mapping[str, float], label: str, others: Sequence[str], within: float = 1.5) -> str | None:
    """Of `others` the one whose size is nearest to that of `label`, if it is within that factor.

    >>> nearest({"a": 10.0, "b": 14.0, "c": 30.0}, "a", ["b", "c"]), nearest({"a": 10.0, "c": 30.0}, "a", ["c"])
    ('b', None)
    """
    apart = {other: abs(math.log(size[other] / size[label])) for other in others}
    best = min(apart, key=lambda other: apart[other], default=None)
    return best if best is not None and label not in others and apart[best] <= math.log(within) else None


def _beside(rows: Sequence[Row], label: str, other: str | None) -> Row:
    """The line of one contender, with its differences from another one, if there is one."""
    lines = tally.summary([r for r in rows if r["contender"] in (label, other)], other or label)
    return {"against": other, **next(line for line in lines if line["contender"] == label)}


def rates(rows: Sequence[Row]) -> list[Row]:
    """A line for each run, by contender and rate; on the front are those that no other one beats in both numbers.

    >>> made = [("a", 2, 1.0, 3.0), ("a", 1, 2.0, 1.0), ("b", 1, 2.0, 2.0)]
    >>> rows = [{"contender": c, "method": c, "keep": None, "lr": lr, "task_loss": x, "forgetting": y, "delta_bytes": 9} for c, lr, x, y in made]
    >>> [(line["contender"], line["lr"], line["front"]) for line in rates(rows)]
    [('a', 1, True), ('a', 2, True), ('b', 1, False)]
    """
    keys = ("contender", "method", "keep", "lr", "task_loss", "forgetting", "delta_bytes")
    lines = [{**{key: row[key] for key in keys}, "runs": 1} for row in rows]
    ends = tally.front([{**line, "contender": i} for i, line in enumerate(lines)], "task_loss")
    labels = list(dict.fromkeys(line["contender"] for line in lines))
    found = [{**line, "front": i in ends} for i, line in enumerate(lines)]
    return sorted(found, key=lambda line: (labels.index(line["contender"]), line["lr"]))


def equal(rows: Sequence[Row], first: str, second: str) -> list[Row]:
    """How much more the second forgets than the first does at the same task loss, per seed, then with its interval.

    The first one's forgetting is interpolated between its runs, by the logarithm of the task loss; rates above its best one are left out, as
    they forget more for a worse loss. A run of the second whose loss lies outside says nothing.

    >>> def made(c, lr, loss, forgotten): return {"contender": c, "lr": lr, "seed": 0, "task_loss": loss, "forgetting": forgotten}
    >>> rows = [made("full", 1, 4.0, 0.0), made("full", 2, 1.0, 2.0), made("hft", 2, 2.0, 0.75)]
    >>> line, = equal(rows, "full", "hft"); line["runs"], round(line["forgetting_difference"], 3)
    (1, -0.25)
    """
    means, count = [], 0
    for seed in sorted({row["seed"] for row in rows}):
        line, others = (rising([r for r in rows if (r["seed"], r["contender"]) == (seed, c)]) for c in (first, second))
        found = [(r["forgetting"], between(line, r["task_loss"])) for r in others]
        if pairs := [forgotten - at for forgotten, at in found if at is not None]:
            means.append(sum(pairs) / len(pairs))
            count += len(pairs)
    return [{"contender": second, "runs": count, **tally.difference("forgetting", means)}] if means else []


def rising(rows: Sequence[Row]) -> list[Row]:
    """Runs by their rate, up to the one with the smallest loss."""
    ordered = sorted(rows, key=lambda r: r["lr"])
    best = min(ordered, key=lambda r: r["task_loss"], default=None)
    return ordered[: ordered.index(best) + 1] if best is not None else []


def between(line: Sequence[Row], loss: float) -> float | None:
    """The forgetting of a line of runs at a task loss; None outside of it."""
    for a, b in pairwise(line):
        low, high, at = math.log(b["task_loss"]), math.log(a["task_loss"]), math.log(loss)
        if low <= at <= high and low < high:
            return float(a["forgetting"] + (b["forgetting"] - a["forgetting"]) * (high - at) / (high - low))
    return None
