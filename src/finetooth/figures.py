"""Figures of a report: matplotlib's, as SVG that stands in the page and takes its colours from it.

A figure is drawn once, in colours that stand for the page's (`INK`): in the SVG they become `currentColor` and CSS variables, so light
and dark are the page's business, and a figure is not there twice. Panels are small, so that a narrow screen shows one across
and a wide one several, in letters of one size. Text stays text. The same numbers give the same bytes with the same matplotlib.

Not taken: a plotting library of the browser, which is a megabyte of script in every page, and a page that may run scripts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]  # x, y

FRONT, GRID, SOFT, ON_DEEP = (
    "#010001",
    "#010002",
    "#010003",
    "#010004",
)  # text, grid, what is behind, text on deep cells
SERIES = tuple(
    f"#0200{i:02x}" for i in range(1, 7)
)  # colours that people with any colour vision tell apart, see page.css
INK = {
    FRONT: "currentColor",
    GRID: "var(--grid)",
    SOFT: "var(--soft)",
    ON_DEEP: "var(--on-deep)",
    **{color: f"var(--c{i})" for i, color in enumerate(SERIES, 1)},
}
MARKS = "osD^vP"
DASHES = ("-", "--", ":", "-.")
PANEL, WIDE, SMALL = (4.6, 2.7), (5.4, 3.5), (2.9, 2.0)  # inches, of 72 points
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.parse_math": False,  # a name with dollar signs is a name
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FRONT,
    "axes.titlesize": 9.0,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FRONT,
    "ytick.color": FRONT,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "text.color": FRONT,
    "lines.linewidth": 1.6,
    "axes.formatter.useoffset": False,
}


def require() -> None:
    """ValueError without matplotlib, which draws."""
    if find_spec("matplotlib") is None:
        raise ValueError("a report needs matplotlib: pip install 'finetooth[report]'.")


@contextmanager
def _figure(size: tuple[float, float], salt: str) -> Iterator[tuple[Figure, Axes, list[str]]]:
    """A figure to draw into, and a list that holds its SVG afterwards."""
    import matplotlib
    from matplotlib.figure import Figure

    out: list[str] = []
    style: Any = {**_STYLE, "svg.hashsalt": f"finetooth {salt}"}  # matplotlib types it by the names there are
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.add_subplot(), out
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        out.append(_inline(buffer.getvalue().decode()))


def _inline(svg: str) -> str:
    """SVG as a part of a page: without what makes it a file, and in the page's colours."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"', "", svg)
    svg = re.sub(r'<g id="[\w.]+"', "<g", svg)  # no one refers to them, and each figure has the same
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg ', '<svg aria-hidden="true" ', svg, count=1)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"(?<=: )#0[12]00\w\w", lambda found: INK[found[0]], svg)
    return "\n".join(line.strip() for line in svg.splitlines())


def lines(
    salt: str,
    series: Mapping[str, Points],
    x: str,
    y: str,
    *,
    log: bool = False,
    top: float | None = None,
    bottom: float | None = None,
    percent: bool = False,
    level: tuple[float, str] | None = None,
) -> str:
    """Lines over steps, each named at its end; `level` is a horizontal one, with what it is."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with _figure(PANEL, salt) as (_, axes, out):
        for i, (_name, points) in enumerate(series.items()):
            style: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "linestyle": DASHES[i % len(DASHES)]}
            axes.plot(*zip(*points, strict=True), **style, marker="o" if len(points) < 3 else "", markersize=4)
        if level is not None:
            axes.axhline(level[0], color=FRONT, linewidth=0.8, linestyle=(0, (4, 3)))
        if log:
            _logarithmic(axes)
        axes.set_ylim(bottom=bottom, top=top)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if level is not None:
            axes.annotate(level[1], (1, level[0]), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
        if len(series) > 1:
            _named(axes, {name: points[-1] for name, points in series.items()}, PANEL[1])
    return out[0]


def _logarithmic(axes: Axes) -> None:
    """Powers of ten, and twos and fives where there are few of them, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _named(axes: Axes, ends: Mapping[str, tuple[float, float]], height: float) -> None:
    """Names at the right, each at the height of its point, or as near as the others let it be, with a thin line to it."""
    axes.get_ylim()  # makes the limits that matplotlib has put off, without which a point has no place yet
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = {name: float(to_axes.transform(point)[1]) for name, point in ends.items()}
    high = 11 / (height * 72 * 0.8)  # a line of text, as a share of the axes
    order = sorted(wanted, key=lambda name: wanted[name])
    at = _apart([wanted[name] for name in order], high)
    for name, y in zip(order, at, strict=True):
        arrow = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "linestyle": ":", "shrinkA": 1, "shrinkB": 3}
        axes.annotate(name, ends[name], xytext=(1.04, y), textcoords="axes fraction", va="center", fontsize=8, color=FRONT, arrowprops=arrow, annotation_clip=False)  # fmt: skip


def _apart(wanted: Sequence[float], least: float) -> list[float]:
    """Heights in rising order at least so far apart, as near to what is wanted as one pass up and one down make them.

    >>> _apart([0.5, 0.5, 0.9], 0.25)
    [0.5, 0.75, 1.0]
    """
    out = list(wanted)
    for i in range(1, len(out)):
        out[i] = max(out[i], out[i - 1] + least)
    limit = max(1.0, wanted[-1] if wanted else 1.0)
    for i in reversed(range(len(out))):
        out[i] = min(out[i], limit if i == len(out) - 1 else out[i + 1] - least)
        limit = out[i]
    return out


def heat(salt: str, rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], float]) -> str:
    """Shares (0 to 1) by row and column, deeper is more, each with its number; a cell that is not there stays empty."""
    from matplotlib.patches import Rectangle

    top = max(cells.values(), default=0.0) or 1.0
    high = 0.27 if len(rows) <= 16 else 0.2
    with _figure((0.9 + 0.42 * len(columns), 1.0 + high * len(rows)), salt) as (_, axes, out):
        for (row, column), share in cells.items():
            i, j = rows.index(row), columns.index(column)
            depth = 0.04 + 0.96 * share / top
            axes.add_patch(Rectangle((j + 0.03, i + 0.03), 0.94, 0.94, facecolor=SERIES[0], alpha=depth, linewidth=0))
            color = ON_DEEP if depth > 0.55 else FRONT
            axes.text(j + 0.5, i + 0.54, _percent(share), ha="center", va="center", fontsize=7.5, color=color)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks([j + 0.5 for j in range(len(columns))], columns, rotation=55, ha="left", rotation_mode="anchor")
        axes.xaxis.tick_top()
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        axes.set_ylabel("layer")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return out[0]


def _percent(share: float) -> str:
    """Two digits that count.

    >>> _percent(0.2), _percent(0.00123), _percent(0.0), _percent(1.0)
    ('20', '.12', '0', '100')
    """
    number = 100 * share
    if number >= 9.95 or not number:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 0.95 else "<.01" if number < 0.005 else f"{number:.2f}".lstrip("0")


def pareto(
    points: Mapping[str, tuple[float, float, float, float]], front: Sequence[str], x: str, y: str, more: bool
) -> str:
    """Points (x, y, and the spread of each), named, and the front that nobody beats; `more`: whether more of x is better."""
    with _figure(WIDE, "pareto") as (_, axes, out):
        axes.plot(
            *zip(*(points[name][:2] for name in front), strict=True),
            color=FRONT,
            linewidth=0.9,
            linestyle=(0, (4, 3)),
            zorder=1,
        )
        for i, (name, (a, b, da, db)) in enumerate(points.items()):
            color = SERIES[i % len(SERIES)]
            mark: dict[str, Any] = {
                "marker": MARKS[i % len(MARKS)],
                "markersize": 7,
                "markerfacecolor": color if name in front else "none",
            }
            axes.errorbar(a, b, xerr=da or None, yerr=db or None, color=color, elinewidth=0.9, **mark)
        axes.margins(0.08)
        if not more:
            axes.invert_xaxis()
        axes.set_xlabel(f"{x} → better")
        axes.set_ylabel(y)
        _named(axes, {name: point[:2] for name, point in points.items()}, WIDE[1])
    return out[0]


def sweep(
    salt: str, mine: Points, others: Sequence[Points], best: float | None, y: str, span: tuple[float, float]
) -> str:
    """A contender's measure over learning rates, the others' behind it; the rate it was given in the end is filled."""
    with _figure(SMALL, salt) as (_, axes, out):
        for points in others:
            axes.plot(*zip(*points, strict=True), color=SOFT, linewidth=1.0, zorder=1)
        axes.plot(*zip(*mine, strict=True), color=SERIES[0], marker="o", markersize=4, markerfacecolor="none", zorder=2)
        chosen = [point for point in mine if point[0] == best]
        axes.plot([a for a, _ in chosen], [b for _, b in chosen], color=SERIES[0], marker="o", markersize=6, zorder=3)
        axes.set_xscale("log")
        axes.set_ylim(*span)
        axes.minorticks_off()
        axes.set_xticks([rate for rate, _ in mine], [f"{rate:g}" for rate, _ in mine])
        axes.set_xlabel("learning rate")
        axes.set_ylabel(y)
    return out[0]
