"""Three plots of benchmark rows, as small SVGs: `tables.py` calls it.

The same rows give the same bytes with the same matplotlib: ids are salted with a constant, text stays text, and no date is
written. matplotlib's version is (`Creator`), so that a test can tell another version's drawing from a stale one.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from typing import Any

PEERS = ("AdamW(fused)", "topk-GMT", "half-frozen", "LoRA r16", "SHiRA")
BLUE, GREY = "#1f5fa8", "#8a8a8a"
MARKS = "osD^vP*Xph<>d8H1"


def step_time(shown: list[Any]) -> list[Any]:
    """The groups of the setting with the most model sizes: one for every size."""
    sets: dict[tuple[str, ...], list[Any]] = {}
    for group in shown:
        if group["measure"] == "time" and group["checkpointing"] != "True":
            sets.setdefault((group.place, group["dtype"], group["tokens"]), []).append(group)
    best = max(sets.values(), key=len, default=[])
    return best if len(best) > 1 else []


def peak_memory(shown: list[Any]) -> list[Any]:
    """One group for each dtype: on a CPU if there is one, then the one with the most contenders, then the largest model."""
    found = [g for g in shown if g["measure"] == "memory" and g["checkpointing"] != "True"]
    best = [
        max((g for g in found if g["dtype"] == dtype), key=lambda g: (g.on_cpu, len(g.contenders), g.weights))
        for dtype in dict.fromkeys(g["dtype"] for g in found)
    ]
    return sorted(best, key=lambda g: g["dtype"], reverse=True)


def outside(shown: list[Any]) -> list[Any]:
    """The largest model with the most contenders."""
    found = [g for g in shown if g["measure"] == "time" and g["checkpointing"] != "True"]
    return [max(found, key=lambda g: (g.on_cpu, len(g.contenders), g.weights, g.tokens))] if found else []


def _step_time(axes: Any, found: list[Any]) -> None:
    everyone = list(dict.fromkeys(name for g in found for name in g.contenders))
    ours = [name for name in everyone if name not in PEERS]
    for i, name in enumerate(everyone):
        peer = name in PEERS
        points = [(g.weights, statistics.median(g.values(name, "step_s"))) for g in found if name in g.contenders]
        color = GREY if peer else f"C{ours.index(name) % 10}"
        style = {"color": color, "linestyle": "--" if peer else "-", "marker": MARKS[i % len(MARKS)]}
        axes.loglog(*zip(*points, strict=True), label=name, linewidth=1, markersize=4, **style)
    axes.set_xlabel("weights")
    axes.set_ylabel("seconds a step")
    axes.legend(fontsize=7, ncols=2, frameon=False)
    axes.set_title(f"{found[0]['dtype']}, {found[0]['tokens']} tokens, {found[0].place}", fontsize=8)


def _bars(axes: Any, found: list[Any], value: Callable[[Any, str], list[float]], unit: str) -> None:
    """A bar for every contender, side by side for the groups, with a line from the smallest to the largest."""
    names = list(dict.fromkeys(name for g in found for name in g.contenders))
    height = 0.8 / len(found)
    for i, group in enumerate(found):
        for at, name in enumerate(names):
            if name in group.contenders:
                values, y = value(group, name), at + (i - (len(found) - 1) / 2) * height
                color = GREY if name in PEERS else BLUE
                label = group.model if name == names[-1] else None
                axes.barh(y, statistics.median(values), height * 0.9, color=color, alpha=1 - 0.5 * i, label=label)
                axes.plot([min(values), max(values)], [y, y], color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    if len(found) > 1:
        axes.legend(fontsize=7, frameon=False)
    else:
        axes.set_title(found[0].model, fontsize=8)


def _peak_memory(axes: Any, found: list[Any]) -> None:
    _bars(axes, found, lambda g, name: g.values(name, "peak_mb"), "peak memory over the loaded model, MB")


def _outside(axes: Any, found: list[Any]) -> None:
    share = "time of a step outside forward and backward, %"
    _bars(axes, found, lambda g, name: [100 * x for x in g.values(name, "outside_share")], share)


PLOTS: dict[str, tuple[str, Callable[[Any, list[Any]], None]]] = {
    "benchmarks-step-time.svg": ("Seconds a step against the size of the model", _step_time),
    "benchmarks-memory.svg": ("Peak memory over the loaded model", _peak_memory),
    "benchmarks-outside.svg": ("Share of a step outside forward and backward", _outside),
}
FINDS: dict[str, Callable[[list[Any]], list[Any]]] = dict(zip(PLOTS, (step_time, peak_memory, outside), strict=True))


def drawable(shown: list[Any]) -> list[str]:
    """The plots for which there are rows."""
    return [name for name in PLOTS if FINDS[name](shown)]


def draw(shown: list[Any]) -> dict[str, bytes]:
    """SVG bytes by file name."""
    import matplotlib
    from matplotlib.figure import Figure

    out = {}
    with matplotlib.rc_context({"svg.hashsalt": "finetooth", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for name in drawable(shown):
            figure = Figure(figsize=(7, 4.2), layout="constrained")
            axes = figure.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            PLOTS[name][1](axes, FINDS[name](shown))
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            text = buffer.getvalue().decode()
            out[name] = "\n".join(line.rstrip() for line in text.splitlines()).encode() + b"\n"
    return out
