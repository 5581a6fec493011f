"""The tables and figures of the study, from what its comparisons wrote; `readings.py` has the numbers.

    python studies/figures.py --out runs/study/small                          # draws what is there
    python studies/figures.py --out runs/study/small --to studies/results     # elsewhere, with what is in runs.csv there of comparisons that are not in --out

tables.md           for readers, `pages.py`
tables.csv          a row for each question, table, recipe and contender
runs.csv            every run of the pool, those of the sweeps too
QUESTION-TABLE.svg  differences with their 95 % interval; over a budget; or learning against forgetting, a column for each bin of bytes or a line for each sweep
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import across
import matplotlib
import pages
import typer
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from readings import Lines, Row, embeddings, every, read, saved

HERE = Path(__file__).parent
STYLE = {"svg.hashsalt": "finetooth", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8}
MARKS = "osD^vP*Xph<>d8H1"


def main(
    out: Annotated[Path, typer.Option(help="The folder of a size of the study, as runs/study/small.")],
    to: Annotated[Path | None, typer.Option(help="Where to write, if not there.")] = None,
) -> None:
    """Draw what has been run."""
    if out.name not in (sizes := source("sizes")):
        raise typer.BadParameter(
            f"--out must end in the name of a size, one of {', '.join(sizes)}, not in {out.name!r}."
        )
    typer.echo("\n".join(draw(out, to)))


def source(name: str) -> dict[str, Any]:
    """What is asked for, in a YAML file beside this one."""
    found: dict[str, Any] = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def tenth(steps: int, found: Any) -> Any:
    """What was read of YAML, with a tenth of the steps in place of `TENTH`."""
    return json.loads(json.dumps(found).replace("TENTH", str(max(1, steps // 10))))


@matplotlib.rc_context(STYLE)
def draw(out: Path, to: Path | None = None) -> list[str]:
    """Write them; their names."""
    steps, to = source("sizes")[out.name]["steps"], to or out
    pool, questions, pairs = (tenth(steps, source(name)) for name in ("pool", "questions", "across"))
    to.mkdir(parents=True, exist_ok=True)
    if not (rows := every(out, pool, to / "runs.csv")):
        return []
    rows = saved(_csv(to / "runs.csv", rows))  # as rounded there, so that the tables can be made again from it
    table: list[Row] = []
    figures: list[Path] = []
    for question, asked in questions.items():
        for name, how in asked.items():
            if name == "question" or not (lines := read(rows, pool, how)):
                continue
            file = to / f"{question}-{name}.svg"
            table += [
                {"question": question, "table": name, "recipe": recipe, **line}
                for recipe, own in lines.items()
                for line in own
            ]
            figure = _figure(lines, how)
            figure.savefig(file, metadata={"Date": None})
            file.write_text("".join(f"{line.rstrip()}\n" for line in file.read_text("utf-8").splitlines()), "utf-8")
            figures.append(file)
    told = pages.page(table, questions, out.name, steps, across.page(rows, pool, pairs))
    (to / "tables.md").write_text(told, encoding="utf-8")
    return [str(file) for file in (to / "runs.csv", _csv(to / "tables.csv", table), to / "tables.md", *figures)]


def _figure(lines: Lines, how: dict[str, Any]) -> Figure:
    if how["kind"] == "curve":
        return curves(lines, how["over"])
    if how["kind"] == "bins":
        return fronts(lines, len(how["edges"]) - 1)
    if how["kind"] == "rates":
        return sweeps(lines)
    numbers = ("forgetting",) if how["kind"] == "equal" else (how.get("number", "task_loss"), "forgetting")
    first = how["contenders"][0] if "contenders" in how else next(iter(lines.values()))[0]["contender"]
    return intervals(lines, numbers, first)


def _csv(file: Path, rows: list[Row]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return file


def intervals(lines: Lines, numbers: Iterable[str], first: str) -> Figure:
    """Differences from the first; left of the line is better, as all of these numbers are less when better."""
    numbers = list(numbers)
    known = (x["contender"] for own in lines.values() for x in own if x.get(f"{numbers[0]}_difference") is not None)
    labels = list(dict.fromkeys(known))
    figure = Figure(figsize=(7.5, 1 + 0.16 * max(2, len(labels)) * len(lines)), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0], numbers, strict=True):
        for i, (recipe, own) in enumerate(lines.items()):
            shown = [x for x in own if x["contender"] in labels and x.get(f"{key}_difference") is not None]
            y = [labels.index(x["contender"]) + 0.7 * (i + 0.5) / len(lines) - 0.35 for x in shown]
            spread = [x[f"{key}_interval"] or 0.0 for x in shown]
            axes.errorbar([x[f"{key}_difference"] for x in shown], y, xerr=spread, fmt="o", ms=3, lw=0.8, label=recipe)
        axes.axvline(0, color="black", lw=0.6)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(key.replace("_", " "))
        _plain(axes)
        axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    figure.suptitle(f"Differences from {first}, with their 95 % intervals: left of 0 is better", fontsize=8)
    _legend(axes)
    return figure


def curves(lines: Lines, over: str) -> Figure:
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
                axes.errorbar(at, values, spread, color=f"C{i % 10}", marker=MARKS[i % 16], ms=3, lw=0.8, label=method)
            axes.set_xscale("log")
            axes.set_xlabel(over.replace("_", " "))
            axes.set_ylabel(f"{recipe}: {key.replace('_', ' ')}")
            _plain(axes)
    _legend(grid[0][1])
    return figure


def fronts(lines: Lines, count: int) -> Figure:
    """Learning against forgetting: a row for each recipe, a column for each bin of stored bytes that has somebody, its front dashed.

    Marks are hollow where embeddings do not train.
    """
    used = [i for i in range(count) if any(x["bin"] == i for own in lines.values() for x in own)]
    figure = Figure(figsize=(2.1 * len(used) + 1.9, 2.0 * len(lines) + 0.3), layout="constrained")
    methods = list(dict.fromkeys(x["method"] for own in lines.values() for x in own))
    grid = figure.subplots(len(lines), len(used), squeeze=False, sharex="row", sharey="row")
    for pair, (recipe, own) in zip(grid, lines.items(), strict=True):
        for axes, i in zip(pair, used, strict=True):
            for x in (x for x in own if x["bin"] == i):
                at, inside = methods.index(x["method"]), None if embeddings(x["contender"]) else "white"
                mark = {"color": f"C{at % 10}", "marker": MARKS[at % 16], "markerfacecolor": inside}
                axes.plot(x["task_loss"], x["forgetting"], ms=4, ls="", **mark)
            ends = sorted((x for x in own if x["bin"] == i and x["front"]), key=lambda x: x["task_loss"])
            axes.plot([x["task_loss"] for x in ends], [x["forgetting"] for x in ends], color="black", lw=0.6, ls="--")
            sizes = [x["delta_bytes"] for own_ in lines.values() for x in own_ if x["bin"] == i]
            axes.set_title(f"{min(sizes) / 1e3:,.0f} to {max(sizes) / 1e3:,.0f} kB", fontsize=7)
            axes.set_xlabel("task loss", fontsize=7)
            _plain(axes)
        pair[0].set_ylabel(f"{recipe}: forgetting", fontsize=7)
    for at, method in enumerate(methods):
        grid[0][-1].plot([], [], color=f"C{at % 10}", marker=MARKS[at % 16], ms=4, ls="", label=method)
    _legend(grid[0][-1])
    return figure


def sweeps(lines: Lines) -> Figure:
    """Learning against forgetting from rate to rate, a line for each contender; the front of all is dashed."""
    figure = Figure(figsize=(7.5, 3.2 * len(lines)), layout="constrained")
    labels = list(dict.fromkeys(x["contender"] for own in lines.values() for x in own))
    for axes, (recipe, own) in zip(figure.subplots(len(lines), squeeze=False)[:, 0], lines.items(), strict=True):
        for i, label in enumerate(labels):
            shown = [x for x in own if x["contender"] == label]
            at, values = [x["task_loss"] for x in shown], [x["forgetting"] for x in shown]
            axes.plot(at, values, color=f"C{i % 10}", marker=MARKS[i % 16], ms=3, lw=0.8, label=label)
        ends = sorted((x for x in own if x["front"]), key=lambda x: x["task_loss"])
        axes.plot([x["task_loss"] for x in ends], [x["forgetting"] for x in ends], color="black", lw=0.6, ls="--")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("task loss")
        axes.set_ylabel(f"{recipe}: forgetting")
        _plain(axes)
        _legend(axes)
    return figure


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


if __name__ == "__main__":
    typer.run(main)
