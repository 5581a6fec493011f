"""What `finetooth compare` says at its end: contenders, one a row."""

from __future__ import annotations

import sys
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetooth.cli.show import dump, folder, note


def comparison(found: dict[str, Any], as_json: bool) -> None:
    """Contenders, one a row, as a table or as JSON on stdout."""
    if as_json:
        dump(found)
        return
    console = Console(file=sys.stdout)
    if found["summary"]:  # else no rate of a sweep was left
        _contenders(console, found["summary"])
        console.print("* nobody is better in both numbers.")
    console.print("All of it: " + folder(found["folder"]), highlight=False)
    for remark in found["remarks"]:
        note(remark)


def _contenders(console: Console, lines: list[dict[str, Any]]) -> None:
    from finetooth.tally import HIGHER, front, quality

    key = quality(lines)
    best = front(lines, key)
    table = Table(
        title=f"mean ± standard deviation; below it the difference from {lines[0]['contender']} ± 95 % interval",
        title_justify="left",
        box=SIMPLE,
    )
    name = key.replace("_", " ") + (" ↑" if key in HIGHER else " ↓")
    costs = Table(
        "", title="medians: what is stored, training alone, and its process at most", title_justify="left", box=SIMPLE
    )
    for one, heads in ((table, ("", "lr", name, "forgetting ↓")), (costs, ("runs", "changed", "bytes", "s", "MB"))):
        for head in heads:
            one.add_column(head, **({"justify": "right", "no_wrap": True} if head else {"overflow": "fold"}))
    for line in lines:
        label = Text(f"{line['contender']}{' *' if line['contender'] in best else ''}")
        pairs = [
            f"{_pm(line, k, f'{k}_sd')}\n{_pm(line, f'{k}_difference', f'{k}_interval', '+')}".rstrip()
            for k in (key, "forgetting")
        ]
        table.add_row(label, f"{line['lr']:g}", *pairs)
        costs.add_row(label, str(line["runs"]), *_costs(line))
    console.print(table)
    console.print(costs)


def _pm(line: dict[str, Any], key: str, spread: str, sign: str = "") -> str:
    if line.get(key) is None:
        return ""
    around = "" if line.get(spread) is None else f" ± {line[spread]:.3f}"
    return f"{line[key]:{sign}.3f}{around}"


def _costs(line: dict[str, Any]) -> list[str]:
    """Share changed, bytes of the delta, seconds, peak memory; blank where no run ended."""
    share, size, seconds, peak = (line[k] for k in ("share", "delta_bytes", "train_seconds", "train_peak_bytes"))
    return [
        "" if share is None else f"{share:.1%}",
        "" if size is None else f"{size:,.0f}",
        "" if seconds is None else f"{seconds:.0f}",
        "" if peak is None else f"{peak / 1e6:,.0f}",
    ]
