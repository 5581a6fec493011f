"""`finetooth compare`: methods, learning rates and seeds on one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetooth.cli import board, contenders, show
from finetooth.cli.train import Json, Overrides, RecipeFile


def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="With commas: gmt,gift-sw:bits=3,lora:r=8. The others are compared with the first.")
    ] = "full,gmt,random",
    lr: Annotated[str, typer.Option(help="Learning rates to sweep, with commas; by default the recipe's alone.")] = "",
    keep: Annotated[str, typer.Option(help="Budgets, for every method that has one and names none itself.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from the recipe's on.")] = 3,
    select: Annotated[
        Path | None, typer.Option(help="Rows by which the sweep is judged, other than those that are reported.")
    ] = None,
    widen: Annotated[
        int, typer.Option(min=0, help="How many steps a best rate at an end of --lr is followed outwards.")
    ] = 0,
    runner: Annotated[
        Path | None,
        typer.Option(help="A Python file with a protocol of its own: base(recipe) and train(recipe, before)."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where all of it lies; call it again to go on.")] = Path(
        "runs/compare"
    ),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each.")] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune by several methods, each at its own best learning rate, and put learning, forgetting and costs side by side.

    An interruption loses no run that has ended: the same command goes on.
    """
    with show.clean_errors():
        from finetooth.recipe import load

        common = load(recipe, overrides or ())
        show.quiet()
        from finetooth.compare import compare as run
        from finetooth.compare import planned

        wanted = {"methods": methods, "lr": lr, "keep": keep}
        how = {"widen": widen, "jobs": jobs, "threads": threads}
        plan = planned(common, wanted, seeds=seeds, select=select, runner=runner, out=out, **how)
        with board.board() as progress:
            found = run(plan, progress)
        contenders.comparison(found, as_json)
    if any(row["error"] for row in found["runs"]):
        raise typer.Exit(show.FAILED)
