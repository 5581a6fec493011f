"""`finetooth plan`: what a recipe will take, before a weight is read."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from finetooth.cli import show
from finetooth.cli.train import Json, Overrides, RecipeFile


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model, take two steps of the longest batch, compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what trains and what memory it takes, before anything is loaded."""
    with show.clean_errors():
        from finetooth.recipe import load

        wanted = load(recipe, overrides or ())
        show.quiet()
        from finetooth.plan import plan as rehearse

        facts = rehearse(wanted).facts()
        if probe:
            from finetooth.trial import trial

            facts["measured"] = trial(wanted)
            facts["measured_peak"] = max(facts["measured"].values())
        if as_json:
            typer.echo(json.dumps(facts))
        else:
            table(facts)


def table(facts: dict[str, Any]) -> None:
    """For people."""
    from rich.console import Console
    from rich.table import Table

    console, batch = Console(file=sys.stdout), facts["batch"]
    kinds = Table(title=f"{facts['method']} in {facts['dtype']}: what trains", title_justify="left")
    for column in ("kind of layer", "tensors", "weights", "train at a step", "share", "state"):
        kinds.add_column(column, justify="left" if column == "kind of layer" else "right")
    for kind, n in [*facts["kinds"].items(), ("all", _sums(facts["kinds"]))]:
        share = f"{n['chosen'] / n['weights']:.2%}" if n["chosen"] else "frozen"
        kinds.add_row(kind, str(n["tensors"]), f"{n['weights']:,}", f"{n['chosen']:,}", share, size(n["state"]))
    console.print(kinds)
    memory = Table(title="memory", title_justify="left", show_header=False)
    for word in ("weights", "state", "gradients", "activations"):
        memory.add_row(word, size(facts[word]))
    memory.add_section()
    for phase, bytes_ in facts["phases"].items():
        memory.add_row(f"peak: {phase}", size(bytes_))
    memory.add_section()
    memory.add_row("delta file, at most", size(facts["delta"]))
    if "measured" in facts:
        ratio = facts["training_peak"] / facts["measured_peak"]
        memory.add_row("training: planned", size(facts["training_peak"]))
        memory.add_row("training: measured", f"{size(facts['measured_peak'])} (planned / measured {ratio:.2f})")
    console.print(memory)
    rows = f"{batch['rows']} rows of {batch['tokens']} tokens ({batch['source']})"
    console.print(f"The longest batch: {rows}.")
    cards = Table(title=f"fits on a card of (on a GPU: {size(facts['gpu'])})", title_justify="left")
    for name in facts["cards"]:
        cards.add_column(name.removesuffix(" GB"), justify="right")
    cards.add_row(*("yes" if fits else "no" for fits in facts["cards"].values()))
    console.print(cards)
    for remark in facts["notes"]:
        console.print(f"Note: {remark}")


def _sums(kinds: dict[str, dict[str, int]]) -> dict[str, int]:
    return {key: sum(line[key] for line in kinds.values()) for key in next(iter(kinds.values()))}


def size(n: float) -> str:
    """Bytes as a person reads them.

    >>> size(1536), size(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:,.1f} GiB"
