"""The tables and figures of a question, from what its comparisons wrote.

tables.csv          a row for each part, recipe and contender: means, standard deviations, differences with their 95 % interval
PART.svg            paired differences of learning and of forgetting, an interval each
PART-curve.svg      learning and forgetting over a budget, where the part has `curve`
RECIPE/pareto.svg   of each comparison, by `finetooth compare`
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure

from finetooth import tally

Lines = dict[str, list[dict[str, Any]]]  # recipe -> a line for each contender
STYLE = {"svg.hashsalt": "finetooth", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8}


@matplotlib.rc_context(STYLE)
def draw(question: Path, out: Path) -> list[str]:
    """Write them; their names."""
    table: list[dict[str, Any]] = []
    written = [out / "tables.csv"]
    for name, part in yaml.safe_load(question.read_text(encoding="utf-8"))["parts"].items():
        found = {
            r: json.loads(f.read_text()) for r in part["recipes"] if (f := out / name / r / "compare.json").is_file()
        }
        lines = {recipe: summary(one["runs"], part.get("equal") == "keep") for recipe, one in found.items()}
        lines = {recipe: own for recipe, own in lines.items() if own}
        if not lines:
            continue
        table += [{"part": name, "recipe": recipe, **line} for recipe, own in lines.items() for line in own]
        written.append(intervals(lines, part.get("number", "task_loss"), out / f"{name}.svg"))
        if "curve" in part:
            written.append(curves(lines, part["curve"], out / f"{name}-curve.svg"))
    if not table:
        return []
    with written[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)))
        writer.writeheader()
        writer.writerows(table)
    return [str(file) for file in written if file.is_file()]


def summary(runs: Sequence[dict[str, Any]], equal: bool) -> list[dict[str, Any]]:
    """A line for each contender; differences from the first, or from `random` with the same budget where there is one."""
    rows = [row for row in runs if row["stage"] == "final" and not row["error"]]
    about = {row["contender"]: {"method": row["method"], "keep": row["keep"]} for row in rows}
    lines = tally.summary(rows) if rows else []
    if equal:
        budgets = {known["keep"] for known in about.values()} - {None}
        for keep in budgets:
            against = next((c for c, known in about.items() if known == {"method": "random", "keep": keep}), None)
            if against is not None:
                own = {line["contender"]: line for line in tally.summary(rows, against)}
                lines = [own[x["contender"]] if about[x["contender"]]["keep"] == keep else x for x in lines]
        lines = [x if about[x["contender"]]["keep"] in budgets else _alone(x) for x in lines]
    return [{**about[line["contender"]], **line} for line in lines]


def _alone(line: dict[str, Any]) -> dict[str, Any]:
    return {k: None if k.endswith(("_difference", "_interval")) else v for k, v in line.items()}


def intervals(lines: Lines, number: str, file: Path) -> Path:
    """Differences in the number and in forgetting; left of the line is better, as both are less when better."""
    known = (x["contender"] for own in lines.values() for x in own if x.get(f"{number}_difference") is not None)
    labels = list(dict.fromkeys(known))
    figure = Figure(figsize=(7.5, 1 + 0.16 * len(labels) * len(lines)), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), (number, "forgetting"), strict=True):
        for i, (recipe, own) in enumerate(lines.items()):
            shown = [x for x in own if x["contender"] in labels and x.get(f"{key}_difference") is not None]
            y = [labels.index(x["contender"]) + 0.7 * (i + 0.5) / len(lines) - 0.35 for x in shown]
            spread = [x[f"{key}_interval"] or 0.0 for x in shown]
            axes.errorbar([x[f"{key}_difference"] for x in shown], y, xerr=spread, fmt="o", ms=3, lw=0.8, label=recipe)
        axes.axvline(0, color="black", lw=0.6)
        axes.set_xlabel(f"{key.replace('_', ' ')}: difference, 95 % interval")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _saved(figure, file)


def curves(lines: Lines, over: str, file: Path) -> Path:
    """Task loss and forgetting over `keep` or stored bytes, a line for each method; a method without budgets is a point."""
    figure = Figure(figsize=(7.5, 2.2 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), 2, squeeze=False)
    for pair, (recipe, own) in zip(grid, lines.items(), strict=True):
        for axes, key in zip(pair, ("task_loss", "forgetting"), strict=True):
            for i, method in enumerate(dict.fromkeys(x["method"] for x in own)):
                shown = [x for x in own if x["method"] == method and x[key] is not None]
                shown = sorted(({**x, over: x[over] or x["share"]} for x in shown), key=lambda x: x[over])
                at, values = [x[over] for x in shown], [x[key] for x in shown]
                spread = [x[f"{key}_sd"] or 0.0 for x in shown]
                axes.errorbar(
                    at, values, spread, color=f"C{i % 10}", marker="osD^vP*Xph"[i % 10], ms=3, lw=0.8, label=method
                )
            axes.set_xscale("log")
            axes.set_xlabel(over.replace("_", " "))
            axes.set_ylabel(f"{recipe}: {key.replace('_', ' ')}")
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _saved(figure, file)


def _saved(figure: Figure, file: Path) -> Path:
    figure.savefig(file, metadata={"Date": None})
    return file
