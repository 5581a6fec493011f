"""Rows of a comparison put together: the best learning rate, mean and spread over seeds, paired differences, the Pareto front.

    difference of a and b = mean over seeds of (a - b at that seed), with Student's 95 % interval

Runs with one seed see the same rows in the same order, so the difference within a seed is less noisy than that of the means.

Not covered: a correction for many comparisons; twelve contenders against one will show a difference at 95 % by chance about every other time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HIGHER = (
    "exact_match",
    "choice_accuracy",
    "choice_accuracy_per_character",
    "bleu",
    "rouge1",
    "rouge2",
    "rougeL",
    "preference_accuracy",
)
COSTS = ("share", "delta_bytes", "state_bytes", "seconds", "train_peak_bytes", "peak_bytes")
# Of a row, what is no measurement after training.
_OTHER = {"contender", "method", "keep", "lr", "seed", "stage", "run", "error", "changed", "general_loss", *COSTS}
Row = Mapping[str, Any]


def flat(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a table needs of a `results.json`.

    >>> flat({"before": {"task_loss": 6.0}, "after": {"task_loss": 1.0}, "forgetting": 0.5, "seconds": 3.0})
    {'task_loss_before': 6.0, 'task_loss': 1.0, 'forgetting': 0.5, 'seconds': 3.0}
    """
    if not results:
        return {}
    costs = {k: results[k] for k in ("changed", *COSTS, "train_seconds") if k in results}
    return {
        **{f"{k}_before": v for k, v in results["before"].items()},
        **results["after"],
        "forgetting": results["forgetting"],
        **{k: v.get("gpu", v.get("host")) if isinstance(v, Mapping) else v for k, v in costs.items()},
    }


def quality(rows: Iterable[Row]) -> str:
    """What learning is measured by: the task's own number where there is one, else its loss.

    >>> quality([{"task_loss": 1.0, "bleu": 30.0}])
    'bleu'
    """
    known = {key for row in rows for key in row}
    return next((key for key in HIGHER if key in known), "task_loss")


def best(rows: Iterable[Row]) -> dict[str, float]:
    """The learning rate with the smallest task loss, of every contender that has one; where it is also measured in few bits, that.

    >>> best([{"contender": "a", "lr": lr, "task_loss": lr, "task_loss_at_4_bits": -lr} for lr in (0.1, 0.2)])
    {'a': 0.2}
    """
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        loss = next((row[key] for key in row if key.startswith("task_loss_at_")), row.get("task_loss"))
        label = row["contender"]
        if loss is not None and math.isfinite(loss) and (label not in found or loss < found[label][0]):
            found[label] = (loss, row["lr"])
    return {label: lr for label, (_, lr) in found.items()}


def further(rows: Sequence[Row]) -> dict[str, float]:
    """For every contender whose best rate is the least or the greatest that it was tried at, the next one outwards.

    >>> rows = [{"contender": "a", "lr": lr, "task_loss": loss} for lr, loss in ((1e-3, 3.0), (3e-3, 2.0))]
    >>> further(rows)
    {'a': 0.009}
    """
    found = {}
    for label, lr in best(rows).items():
        tried = sorted({row["lr"] for row in rows if row["contender"] == label})
        if len(tried) > 1 and lr in (tried[0], tried[-1]):
            beside = tried[1] if lr == tried[0] else tried[-2]
            found[label] = float(f"{lr * lr / beside:.2g}")
    return found


def distinct(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every run once, with its stages: without rows to choose by, the best run of a sweep is the first of the final ones.

    >>> distinct([{"run": "a", "stage": "sweep"}, {"run": "b", "stage": "sweep"}, {"run": "a", "stage": "final"}])
    [{'run': 'a', 'stage': 'sweep, final'}, {'run': 'b', 'stage': 'sweep'}]
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        stages = [found[row["run"]]["stage"]] if row["run"] in found else []
        found[row["run"]] = {**row, "stage": ", ".join([*stages, row["stage"]])}
    return list(found.values())


def summary(rows: Sequence[Row], against: str | None = None) -> list[dict[str, Any]]:
    """One line for every contender: means and standard deviations, differences from one contender, the first by default, costs."""
    labels = list(dict.fromkeys(row["contender"] for row in rows))
    known = dict.fromkeys(k for row in rows for k in row if k not in _OTHER and not k.endswith("_before"))
    numbers = dict.fromkeys(("task_loss", *known, "forgetting", "train_seconds"))
    return [_line(label, against or labels[0], rows, tuple(numbers)) for label in labels]


def _line(label: str, against: str, rows: Sequence[Row], numbers: Sequence[str]) -> dict[str, Any]:
    own = {r["seed"]: r for r in rows if r["contender"] == label and not r["error"]}
    other = {r["seed"]: r for r in rows if r["contender"] == against and not r["error"]}
    lr = next((r["lr"] for r in rows if r["contender"] == label), None)
    line: dict[str, Any] = {"contender": label, "lr": lr, "runs": len(own)}
    for key in numbers:
        values = _numbers(own.values(), key)
        line[key] = statistics.fmean(values) if values else None
        line[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        pairs = [(own[s].get(key), other[s].get(key)) for s in own if s in other and label != against]
        line |= difference(key, [a - b for a, b in pairs if a is not None and b is not None])
    for key in COSTS:
        values = _numbers(own.values(), key)
        line[key] = statistics.median(values) if values else None
    return line


def _numbers(rows: Iterable[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def difference(key: str, pairs: Sequence[float]) -> dict[str, float | None]:
    """Mean of differences, one for each seed, and half the width of their interval; a single pair has none."""
    names = (f"{key}_difference", f"{key}_interval")
    if not pairs:
        return dict.fromkeys(names)
    if len(pairs) == 1:
        return {names[0]: pairs[0], names[1]: None}
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return {names[0]: statistics.fmean(pairs), names[1]: half}


def front(lines: Iterable[Row], key: str) -> list[str]:
    """Contenders that nobody beats in both learning and forgetting, from the one that learns least.

    >>> lines = [{"contender": n, "task_loss": x, "forgetting": y} for n, x, y in [("a", 1.0, 3.0), ("b", 2.0, 1.0), ("c", 2.0, 2.0)]]
    >>> front(lines, "task_loss")
    ['b', 'a']
    """
    sign = 1 if key in HIGHER else -1
    points = [
        (sign * r[key], r["forgetting"], r["contender"]) for r in lines if None not in (r.get(key), r.get("forgetting"))
    ]
    kept = [p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q[:2] != p[:2] for q in points)]
    return [label for _, _, label in sorted(kept, key=lambda p: p[:2])]


def remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table must know."""
    said = []
    failed = [r for r in distinct(rows) if r["error"]]
    if failed:
        said.append(
            f"{len(failed)} of {len(distinct(rows))} runs failed; the first, {failed[0]['run']}: {failed[0]['error']}"
        )
    swept = [r for r in rows if r["stage"] == "sweep"]
    edge = [f"{label} ({lr:g})" for label, lr in best(swept).items() if label in further(swept)]
    if edge:
        said.append(
            f"the best learning rate is at an end of the sweep, so a better one may lie outside it: {', '.join(edge)}."
        )
    if 0 < len({r["seed"] for r in rows if r["stage"] == "final"}) < 3:
        said.append("with fewer than three seeds a difference says little.")
    return said
