"""The tables and plots of docs/benchmarks.md, made of the rows in benchmarks/results.

    python benchmarks/tables.py

Reads steps*.csv (`steps.py`) and kernels*.csv (`kernels.py`), writes every table between its pair of marks on the page
(`<!-- targets -->` ... `<!-- /targets -->`) and draws the plots (`plots.py`, where matplotlib is installed). Nothing is
averaged over runs: of the runs of one setting (hardware, model, dtype, tokens) the one with the most contenders is
shown, of equals the latest. A ratio is taken of two processes of the same round; what is shown is the median over rounds, and
the smallest and the largest. The same rows give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FULL, LORA, SHIRA = "AdamW(fused)", "LoRA r16", "SHiRA"
YARDSTICKS = (FULL, LORA, SHIRA)
BYTES = {"fp32": 4, "bf16": 2}
SETTING = ("measure", "hardware", "threads", "size", "dtype", "tokens", "checkpointing")
Row = dict[str, str]


# -- rows ------------------------------------------------------------------------------------------


def read(folder: Path, stem: str) -> list[Row]:
    """All rows of stem*.csv, file by file."""
    rows: list[Row] = []
    for path in sorted(folder.glob(f"{stem}*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


@dataclass(frozen=True)
class Group:
    """The processes of one run in one setting."""

    rows: tuple[Row, ...]

    def __getitem__(self, field: str) -> str:
        return self.rows[0][field]

    @property
    def contenders(self) -> list[str]:
        """In the order in which they ran."""
        return list(dict.fromkeys(row["contender"] for row in self.rows))

    def values(self, contender: str, field: str) -> list[float]:
        """One for every round."""
        return [float(row[field]) for row in self.rows if row["contender"] == contender]

    def ratios(self, contender: str, other: str, value: Callable[[Row], float]) -> list[float]:
        """Of two contenders, round by round."""
        mine, its = ({r["round"]: value(r) for r in self.rows if r["contender"] == who} for who in (contender, other))
        return [mine[n] / its[n] for n in mine if its.get(n)]

    @property
    def on_cpu(self) -> bool:
        return "cores" in self["hardware"]

    @property
    def place(self) -> str:
        """Where it was measured."""
        return self["hardware"] + (threads(self["threads"]) if self.on_cpu else "")

    @property
    def tokens(self) -> int:
        rows, length = self["tokens"].split("x")
        return int(rows) * int(length)

    @property
    def weights(self) -> int:
        return int(self["weights"])

    @property
    def model(self) -> str:
        """What was trained, on what."""
        more = ", gradient checkpointing" if self["checkpointing"] == "True" else ""
        return f"{self['size']}, {self['dtype']}, {self['tokens']} tokens{more}"


def groups(rows: Iterable[Row]) -> list[Group]:
    """One of every setting, the largest models last."""
    runs: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        runs.setdefault(tuple(row[f] for f in SETTING), {}).setdefault(row["run"], []).append(row)
    shown = []
    for found in runs.values():
        every = [Group(tuple(of_run)) for of_run in found.values()]
        shown.append(max(every, key=lambda g: (len(g.contenders), g["run"])))
    return sorted(shown, key=lambda g: (g.place, g["dtype"], g["checkpointing"], g.tokens, g.weights))


# -- numbers ---------------------------------------------------------------------------------------


def number(x: float) -> str:
    """Three significant digits.

    >>> number(1234.5), number(12.345), number(0.4), number(0)
    ('1,234', '12.3', '0.400', '0')
    """
    if x == 0 or abs(x) >= 99.95:
        return f"{x:,.0f}"
    return f"{x:#.3g}"


def threads(n: str) -> str:
    return f", {n} thread{'s' * (n != '1')}"


def spread(values: list[float]) -> str:
    """Median (smallest – largest)."""
    if not values:
        return "–"
    low, middle, high = number(min(values)), number(statistics.median(values)), number(max(values))
    return middle if low == middle == high else f"{middle} ({low}–{high})"


def table(head: list[str], lines: Iterable[list[str]], numbers: bool = True) -> str:
    left = [f"| {' | '.join(head)} |", f"|---{('|---:' if numbers else '|---') * (len(head) - 1)}|"]
    return "\n".join([*left, *(f"| {' | '.join(line)} |" for line in lines)])


def field(name: str) -> Callable[[Row], float]:
    return lambda row: float(row[name])


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


def total(row: Row) -> float:
    """Peak memory with the weights."""
    return float(row["peak_mb"]) + int(row["weights"]) * BYTES[row["dtype"]] / 2**20


@dataclass(frozen=True)
class Target:
    """What a row is to reach: at most (or, `at_least`) a multiple of another contender's value, or a number of MB."""

    text: str
    contenders: tuple[str, ...]
    measure: str
    value: Callable[[Row], float]
    limit: float
    than: str | None = FULL  # None: `limit` is in MB
    at_least: bool = False
    where: Callable[[Group], bool] = lambda group: True

    def reached(self, group: Group, who: str) -> list[float]:
        if self.than is None:
            return [self.value(row) for row in group.rows if row["contender"] == who]
        if self.at_least:
            return group.ratios(self.than, who, self.value)
        return group.ratios(who, self.than, self.value)

    def more(self, group: Group, who: str) -> str:
        """What a number of MB leaves out."""
        if self.than is not None:
            return ""
        library = statistics.median(group.values(who, "library_mb"))
        return f", and {number(library)} for its libraries" if library >= 1 else ""

    @property
    def said(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.limit:g} MB" if self.than is None else f"{sign} {self.limit:g} × {self.than}"

    def met(self, values: list[float]) -> bool:
        """By the median over rounds."""
        middle = statistics.median(values)
        return middle >= self.limit if self.at_least else middle <= self.limit


STEP, OPTIMIZER, PEAK = field("step_s"), field("optimizer_s"), field("peak_mb")
ELEMENTS, LINES, COLUMNS = ("random 1%", "grad 1%"), ("columns 1%", "rows 1%"), ("gift-sw 128", "gift-sw 3%")


def long(group: Group) -> bool:
    return group.tokens >= 2048


def small(dtype: str) -> Callable[[Group], bool]:
    return lambda g: g.on_cpu and (g["size"], g["tokens"], g["dtype"]) == ("107M", "2x128", dtype)


TARGETS = (
    Target("`gmt`, whole step, from 2048 tokens", ("gmt",), "time", STEP, 1.05, where=long),
    Target("`gmt`, optimizer step", ("gmt",), "time", OPTIMIZER, 1.3),
    Target("`gmt`, optimizer step, times faster", ("gmt",), "time", OPTIMIZER, 4, "topk-GMT", at_least=True),
    Target("1 % of the elements, step, CPU", ELEMENTS, "time", STEP, 1, LORA, where=lambda g: g.on_cpu),
    Target("1 % of the elements, step", ELEMENTS, "time", STEP, 0.7, SHIRA),
    Target("1 % of the elements, peak memory", ELEMENTS, "memory", PEAK, 1, LORA),
    Target("1 % of the elements, peak memory", ELEMENTS, "memory", PEAK, 0.45),
    Target("1 % of the elements, peak, 107M fp32", ELEMENTS, "memory", PEAK, 420, None, where=small("fp32")),
    Target("1 % of the elements, peak, 107M bf16", ELEMENTS, "memory", PEAK, 220, None, where=small("bf16")),
    Target("1 % of columns or rows, peak, 107M fp32", LINES, "memory", PEAK, 390, None, where=small("fp32")),
    Target("1 % of columns or rows, peak, 107M bf16", LINES, "memory", PEAK, 195, None, where=small("bf16")),
    Target("`gift-sw`, 128 columns or 3 %, step", COLUMNS, "time", STEP, 0.95, LORA),
    Target("`gift-sw`, 128 columns or 3 %, peak memory", COLUMNS, "memory", PEAK, 1, LORA),
    Target("`hft`, step", ("hft",), "time", STEP, 0.8),
    Target("`dst`, step", ("dst",), "time", STEP, 1.15),
    Target("`dst`, memory with the weights", ("dst",), "memory", total, 1.03),
)


def targets_table(shown: list[Group]) -> str:
    """A line for every target, contender and kind of place; all that was measured there, and how much of it holds."""
    plain = [g for g in shown if g["checkpointing"] != "True"]
    lines = [line for target in TARGETS for line in _target_lines(target, plain)]
    return table(["target", "limit", "measured as", "reached: median (smallest–largest)", "met"], lines, numbers=False)


def _target_lines(target: Target, shown: list[Group]) -> Iterator[list[str]]:
    fit = [g for g in shown if g["measure"] == target.measure and target.where(g)]
    for who in target.contenders:
        places = dict.fromkeys(g.place for g in fit)
        found = {place: [(g, v) for g in fit if g.place == place and (v := target.reached(g, who))] for place in places}
        for place, values in found.items():
            if values:
                met = [target.met(v) for _, v in values]
                word = "yes" if all(met) else "no" if not any(met) else f"{sum(met)} of {len(met)}"
                reached = "; ".join(
                    f"{g['size']} {g['dtype']} {g['tokens']}: {spread(v)}{target.more(g, who)}" for g, v in values
                )
                yield [target.text, target.said, f"{who}, {place}", reached, word]
        if not any(found.values()):
            yield [target.text, target.said, who, "not measured", "–"]


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
    import_path()
    from plots import PLOTS, drawable

    shown = groups(read(results, "steps"))
    return filled(old, tables(results) | {"plots": plots_text(drawable(shown), {n: t for n, (t, _) in PLOTS.items()})})


def import_path() -> None:
    """The files of this folder import each other, however they were started."""
    if (here := str(Path(__file__).parent)) not in sys.path:
        sys.path.insert(0, here)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where benchmarks.md and the plots are")
    args = parser.parse_args()
    path = args.docs / "benchmarks.md"
    path.write_text(page(path.read_text(encoding="utf-8"), args.results), encoding="utf-8")
    import_path()
    from plots import draw

    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.stderr.write("no plots: they need matplotlib (pip install -e '.[bench]')\n")
        return
    shown: list[Any] = groups(read(args.results, "steps"))
    for name, svg in draw(shown).items():
        (args.docs / name).write_bytes(svg)


if __name__ == "__main__":
    main()
