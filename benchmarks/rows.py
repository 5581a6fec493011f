"""Rows of benchmarks/results as the tables and plots see them: grouped by run and setting, ratios taken within a round."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

FULL, LORA, SHIRA = "AdamW(fused)", "LoRA r16", "SHiRA"
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
