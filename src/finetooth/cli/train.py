"""`finetooth train` and `finetooth data preview`: a recipe, run or looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetooth.cli import show

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see examples/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Changes to the recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]

data = typer.Typer(name="data", help="Look at the data a recipe trains on.", no_args_is_help=True)


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the recipe's output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: a folder with the delta, metrics, results and a model card."""
    with show.clean_errors():
        from finetooth.recipe import load

        wanted = load(recipe, overrides or ())
        show.quiet()
        from finetooth.train import train as run

        with show.bar(wanted.method.name) as progress:
            found = run(wanted, resume=resume, progress=progress, say=show.note)
        show.results(found, as_json)


@data.command()
def preview(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="How many rows to show.")] = 2,
    as_json: Json = False,
) -> None:
    """Show rows as the model sees them: what is context, and what is learnt."""
    with show.clean_errors():
        from finetooth.recipe import load

        wanted = load(recipe, overrides or ())
        show.quiet()
        from finetooth.preview import preview as look

        found = look(wanted, rows)
        show.preview(found, as_json)
