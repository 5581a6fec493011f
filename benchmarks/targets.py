"""What the rows of Finetooth are to reach beside their peers, and whether they do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rows import FULL, LORA, SHIRA, Group, Row, field, number, spread, table

BYTES = {"fp32": 4, "bf16": 2}


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
