"""Learning against forgetting, as a plot: a point for every contender with its spread, its sweep as a line, and the Pareto front.

The same rows give the same bytes with the same matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from finetooth import tally

MARKS = "osD^vP*Xph<>d8H1"


def pareto(found: Mapping[str, Any]) -> bytes:
    """An SVG of what `compare` returned; without a general text nothing is forgotten, and there is nothing to draw."""
    import matplotlib
    from matplotlib.figure import Figure

    lines, key = found["summary"], tally.quality(found["summary"])
    with matplotlib.rc_context({"svg.hashsalt": "finetooth", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        for i, line in enumerate(lines):
            _contender(axes, i, line, [r for r in found["runs"] if r["contender"] == line["contender"]], key)
        ends = [next(r for r in lines if r["contender"] == label) for label in tally.front(lines, key)]
        axes.plot([r[key] for r in ends], [r["forgetting"] for r in ends], color="black", linewidth=0.8, linestyle="--")
        axes.set_xlabel(
            key.replace("_", " ") + (", more is better" if key in tally.HIGHER else ", nats a token, less is better")
        )
        if key not in tally.HIGHER:
            axes.invert_xaxis()
        axes.set_ylabel("forgetting, nats a token")
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().decode().splitlines()).encode() + b"\n"


def _contender(axes: Any, i: int, line: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], key: str) -> None:
    """Mean and standard deviation of the final runs; the sweep, thin, behind them, if it was measured on the same rows: then one run is both."""
    if line[key] is None or line["forgetting"] is None:
        return
    swept = sorted((r for r in runs if r["stage"] == "sweep" and r.get(key) is not None), key=lambda r: r["lr"])
    if not {r["run"] for r in swept} & {r["run"] for r in runs if r["stage"] == "final"}:
        swept = []
    color = f"C{i % 10}"
    axes.plot([r[key] for r in swept], [r["forgetting"] for r in swept], color=color, linewidth=0.6, alpha=0.5)
    spread = {"xerr": line[f"{key}_sd"], "yerr": line["forgetting_sd"], "elinewidth": 0.8}
    axes.errorbar(line[key], line["forgetting"], **spread, marker=MARKS[i % 16], color=color, label=line["contender"])
