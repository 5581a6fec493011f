"""The tables of the study as a page: what `tables.csv` has, for readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetooth import tally

Row = Mapping[str, Any]
TOLD = {
    "differences": "Differences from the first line.",
    "curve": "Differences from the first line.",
    "bins": "Differences from the `random` whose file is nearest in size, if it differs by no more than half, and if both train embeddings or neither does; **bold** is on the front of its bin. Hollow marks are of those that do not train embeddings.",
    "rates": "Each run of the sweeps, the first seed, on the rows by which a rate is chosen; **bold** is on the front of all of them.",
    "equal": "How much more it forgets at the same task loss than `{}`, from runs at several rates.",
}


def page(table: Sequence[Row], questions: Mapping[str, Any], size: str, steps: int, across: str) -> str:
    """What was asked on every task, then every question with its tables, one for each recipe."""
    parts = [
        "# The tables of the study\n",
        f"Size `{size}`: {steps} steps of each run. Mean ± standard deviation over seeds; after a semicolon, the mean of differences within a seed "
        "with its 95 % interval. Losses and forgetting are in nats a token, less is better. `lr`: the best rate by the task loss on other rows.\n",
        f"`python studies/figures.py --out runs/study/{size} --to studies/results` writes this page.\n",
        "## Across tasks\n",
        "Mean of differences within a seed, with its 95 % interval; less is better for the first. **Bold**: the interval leaves out 0.\n",
        across,
    ]
    for question, asked in questions.items():
        own = [row for row in table if row["question"] == question]
        if own:
            parts.append(f"## {question[0]}. {asked['question']}\n")
        for name, recipe in dict.fromkeys((row["table"], row["recipe"]) for row in own):
            how = asked[name]
            rows = [row for row in own if (row["table"], row["recipe"]) == (name, recipe)]
            parts.append(f"### {name}, {recipe}\n")
            parts.append(
                f"{TOLD[how['kind']].format(how.get('contenders', [''])[0])} [Figure]({question}-{name}.svg)\n"
            )
            parts.append(_table(rows, how.get("number", "task_loss"), how["kind"]))
    return "\n".join(parts)


def _table(rows: Sequence[Row], number: str, kind: str) -> str:
    if kind == "equal":
        lines = [f"| {row['contender']} | {row['runs']} | {difference(row, 'forgetting')} |" for row in rows]
        return joined(["contender", "runs compared", "forgetting: difference"], lines, left=1)
    more = [k for k in tally.HIGHER if any(row.get(k) is not None for row in rows)][:1]
    keys = list(dict.fromkeys([number, "task_loss", *more, "forgetting"]))
    lines = []
    for row in rows:
        label = f"**{row['contender']}**" if row.get("front") else row["contender"]
        cells = [label, f"{row['lr']:g}", str(row["runs"]), *(_cell(row, key) for key in keys)]
        cells.append("–" if row.get("delta_bytes") is None else f"{row['delta_bytes'] / 1e3:,.0f}")
        if kind == "bins":
            cells = [str(row["bin"]), cells[0], row["against"] or "–", *cells[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    first = ["bin", "contender", "beside"] if kind == "bins" else ["contender"]
    heads = [*first, "lr", "seeds", *(key.replace("_", " ") for key in keys), "stored kB"]
    return joined(heads, lines, left=len(first))


def joined(heads: Sequence[str], lines: Sequence[str], left: int) -> str:
    """A table; the first `left` columns are words."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'|'.join(rule)}|", *lines]) + "\n"


def _cell(row: Row, key: str) -> str:
    """Mean and spread, then the difference.

    >>> _cell({"x": 1.0, "x_sd": 0.25, "x_difference": -0.5, "x_interval": 0.125}, "x")
    '1.000 ± 0.250; −0.500 ± 0.125'
    """
    if row.get(key) is None:
        return "–"
    spread = "" if row.get(f"{key}_sd") is None else f" ± {_short(row[f'{key}_sd'])}"
    apart = "" if row.get(f"{key}_difference") is None else f"; {difference(row, key)}"
    return f"{_short(row[key])}{spread}{apart}"


def difference(row: Row, key: str) -> str:
    """A mean difference and half the width of its interval."""
    half = row.get(f"{key}_interval")
    return _short(row[f"{key}_difference"]) + ("" if half is None else f" ± {_short(half)}")


def _short(number: float) -> str:
    digits = 3 if abs(number) < 10 else 1
    return f"{number:.{digits}f}".replace("-", "−")
