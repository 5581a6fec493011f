"""The tables and plots of docs/benchmarks.md, made of the rows in benchmarks/results.

    python benchmarks/tables.py

Reads steps*.csv (`steps.py`), kernels*.csv (`kernels.py`), plan*.csv (`plan_against_peaks.py`), delta_files*.csv (`delta_files.py`), delta_jobs*.csv (`delta_jobs.py`) and
switch*.csv (`switch.py`), writes every table between its pair of marks on the page (`<!-- targets -->` ... `<!-- /targets -->`)
and draws the plots (`plots.py`, where matplotlib is installed). Nothing is
averaged over runs: of the runs of one setting (hardware, model, dtype, tokens) the one with the most contenders is
shown, of equals the latest. A ratio is taken of two processes of the same round; what is shown is the median over rounds, and
the smallest and the largest. The same rows give the same bytes.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the files of this folder import each other, however they were started

from delta_tables import delta_tables, jobs_table, switch_table
from plots import PLOTS, draw, drawable
from rows import FULL, LORA, SHIRA, Group, Row, field, groups, number, read, spread, table, threads
from targets import targets_table

ROOT = Path(__file__).resolve().parents[1]
YARDSTICKS = (FULL, LORA, SHIRA)


# -- steps -----------------------------------------------------------------------------------------


def blocks(shown: list[Group], one: Callable[[Group], str]) -> str:
    """Every group's table, under the command that made it."""
    out, last = [], None
    for group in shown:
        said = (group["run"], group.place)
        if said != last:
            known = ", ".join(f"{lib} {group[lib]}" for lib in ("torch", "transformers", "peft"))
            at = f", commit {group['commit']}" if group["commit"] else ""
            out.append(f"{group.place}; {known}; {group['run'][:10]}{at}:\n\n```sh\n{group['command']}\n```")
            last = said
        rounds = len({row["round"] for row in group.rows})
        head = f"**{group.model}** ({group.weights:,} weights; {rounds} round{'s' * (rounds != 1)})"
        out.append(f"{head}\n\n{one(group)}")
    return "\n\n".join(out) or "Not measured yet."


def time_table(group: Group) -> str:
    present = [y for y in YARDSTICKS if y in group.contenders]
    head = ["", "step, s", "forward, s", "backward, s", "optimizer, s", "outside", *(f"× {y}" for y in present)]
    lines = []
    for who in group.contenders:
        parts = [number(statistics.median(group.values(who, f"{part}_s"))) for part in ("forward", "backward")]
        line = [who, spread(group.values(who, "step_s")), *parts, spread(group.values(who, "optimizer_s"))]
        line.append(f"{100 * statistics.median(group.values(who, 'outside_share')):.1f} %")
        lines.append([*line, *(spread(group.ratios(who, y, field("step_s"))) for y in present)])
    return table(head, lines)


def memory_table(group: Group) -> str:
    present = [y for y in YARDSTICKS if y in group.contenders]
    head = ["", "peak, MB", *(f"× {y}" for y in present), "state, MB", "to build, MB", "libraries, MB"]
    lines = []
    for who in group.contenders:
        line = [who, spread(group.values(who, "peak_mb"))]
        line += [spread(group.ratios(who, y, field("peak_mb"))) for y in present]
        rest = ("state_mb", "build_mb", "library_mb")
        lines.append([*line, *(number(statistics.median(group.values(who, f))) for f in rest)])
    return table(head, lines)


# -- targets ---------------------------------------------------------------------------------------


# -- kernels ---------------------------------------------------------------------------------------


def kernels_table(rows: list[Row]) -> str:
    """Fast kernel in ms; its reference and the ways of torch as multiples of it. One run of every place: the one with the most rows."""
    count = Counter((row["hardware"], row["run"]) for row in rows)
    shown = {hardware: run for (hardware, run), _ in sorted(count.items(), key=lambda item: (item[1], item[0][1]))}
    out = []
    for hardware, run in sorted(shown.items()):
        mine = [row for row in rows if row["run"] == run and row["hardware"] == hardware]
        first = mine[0]
        used = threads(first["threads"]) if first["device"] == "cpu" else ""
        at = f", commit {first['commit']}" if first["commit"] else ""
        said = f"{hardware}{used}; torch {first['torch']}; backend {first['backend']}; {run[:10]}{at}:"
        out.append(f"{said}\n\n```sh\n{first['command']}\n```")
        for op in dict.fromkeys(row["op"] for row in mine):
            out.append(_kernel(op, [row for row in mine if row["op"] == op]))
    return "\n\n".join(out) or "Not measured yet."


def _kernel(op: str, rows: list[Row]) -> str:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["entries"], row["dtype"], row["keep"]), {})[row["way"]] = row
    lines = []
    for (entries, dtype, keep), by_way in cases.items():
        fast = [float(by_way["fast"][f"{which}_ms"]) for which in ("min", "median", "max")]
        others = [number(float(by_way[w]["ratio"])) if w in by_way else "–" for w in ways[1:]]
        lines.append([f"{int(entries):,}", dtype, keep or "–", spread(fast), *others])
    head = ["entries", "dtype", "chosen", "fast, ms", *(f"× {way}" for way in ways[1:])]
    return f"`{op}`\n\n{table(head, lines)}"


# -- plans -----------------------------------------------------------------------------------------


def plan_table(lines: list[Row]) -> str:
    """Planned peak over measured peak: a line for every method, a column for every model with and without checkpointing."""
    if not lines:
        return "Not measured yet."
    cells = {(r["method"], _case(r)): r["ratio"] for r in lines}
    cases, methods = list(dict.fromkeys(map(_case, lines))), dict.fromkeys(r["method"] for r in lines)
    ratios = [float(r["ratio"]) for r in lines]
    said = f"{len(lines)} runs on {lines[0]['hardware']}: from {min(ratios):.3f} to {max(ratios):.3f}."
    body = [[f"`{method}`", *(cells.get((method, case), "–") for case in cases)] for method in methods]
    command = "```sh\npython benchmarks/plan_against_peaks.py\n```"
    return f"{said}\n\n{command}\n\n{table(['planned / measured', *cases], body)}"


def _case(row: Row) -> str:
    how = ", checkpointing" if row["checkpointing"] == "True" else ""
    return f"{row['size']} {row['dtype']} {row['tokens']}{how}"


# -- the page --------------------------------------------------------------------------------------


def tables(results: Path) -> dict[str, str]:
    """What belongs between the marks, by their names."""
    shown = groups(read(results, "steps"))
    of = {measure: [g for g in shown if g["measure"] == measure] for measure in ("time", "memory")}
    return {
        "targets": targets_table(shown),
        "time": blocks(of["time"], time_table),
        "memory": blocks(of["memory"], memory_table),
        "kernels": kernels_table(read(results, "kernels")),
        "plan": plan_table(read(results, "plan")),
        "deltas": delta_tables(read(results, "delta_files")),
        "jobs": jobs_table(read(results, "delta_jobs")),
        "switch": switch_table(read(results, "switch")),
    }


def filled(page: str, made: dict[str, str]) -> str:
    """The page with everything between the marks replaced; ValueError where a pair of marks is missing."""
    for name, text in made.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(marks.findall(page)) != 1:
            raise ValueError(f"the page must have one pair of marks <!-- {name} --> and <!-- /{name} -->.")
        page = marks.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page)  # type: ignore[misc]
    return page


def plots_text(drawn: Iterable[str], titles: dict[str, str]) -> str:
    return "\n\n".join(f"![{titles[name]}]({name})" for name in drawn) or "Nothing to draw yet."


def page(old: str, results: Path) -> str:
    """The whole page, plots linked where there are rows for them."""
    shown = groups(read(results, "steps"))
    return filled(old, tables(results) | {"plots": plots_text(drawable(shown), {n: t for n, (t, _) in PLOTS.items()})})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where benchmarks.md and the plots are")
    args = parser.parse_args()
    path = args.docs / "benchmarks.md"
    path.write_text(page(path.read_text(encoding="utf-8"), args.results), encoding="utf-8")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.stderr.write("no plots: they need matplotlib (pip install -e '.[bench]')\n")
        return
    shown = groups(read(args.results, "steps"))
    for name, svg in draw(shown).items():
        (args.docs / name).write_bytes(svg)


if __name__ == "__main__":
    main()
