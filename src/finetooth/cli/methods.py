"""`finetooth methods`: the rows, their papers, defaults and deviations."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from finetooth.cli import show


def methods(
    name: Annotated[str | None, typer.Argument(help="One row in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """List the methods, or tell all about one."""
    with show.clean_errors():
        from finetooth.assemble import row_named
        from finetooth.methods import METHODS

        if name is not None:
            row_named(name)
        rows = [_row(m) for m in METHODS.values() if name in (None, m.name)]
        if as_json:
            typer.echo(json.dumps(rows if name is None else rows[0], indent=2, ensure_ascii=False))
        elif name is None:
            _table(rows)
        else:
            _page(rows[0])


def _row(m: Any) -> dict[str, Any]:
    defaults = {
        k: v if isinstance(v, int | float | str | bool) and v != float("inf") else str(v) for k, v in m.defaults.items()
    }
    return {
        "name": m.name,
        "summary": m.summary,
        "paper": m.paper,
        "defaults": defaults,
        "rates": {f"{keep:g}": list(rates) for keep, rates in m.rates.items()},
        "calibration": m.calibrated,
        "deviations": list(m.deviations),
    }


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=False)
    for column in ("name", "what it does", "keep", "unit", "takes part", "paper"):
        table.add_column(column, overflow="fold")
    for row in rows:
        d = row["defaults"]
        table.add_row(
            row["name"], row["summary"], str(d["keep"]), str(d.get("unit", "-")), str(d["targets"]), row["paper"]
        )
    console = Console(file=sys.stdout)
    console.print(table)
    console.print("What does not take part is frozen. `finetooth methods NAME` tells the defaults and the deviations.")


def _page(row: dict[str, Any]) -> None:
    typer.echo(f"{row['name']}: {row['summary']}\npaper: {row['paper']}\n")
    typer.echo("defaults")
    for key, value in row["defaults"].items():
        typer.echo(f"  {key}: {value}")
    typer.echo(f"  calibration batches: {'yes' if row['calibration'] else 'no'}\n")
    if row["rates"]:
        from finetooth.method import span

        best = ", ".join(f"{span(rates)} with keep={keep}" for keep, rates in row["rates"].items())
        typer.echo(f"learning rate: the best ones of our study, as multiples of that of full fine-tuning: {best}\n")
    typer.echo("where it deviates from the paper, or the paper leaves a point open")
    for point in row["deviations"]:
        typer.echo(f"  - {point}")
