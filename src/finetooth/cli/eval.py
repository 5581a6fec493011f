"""`finetooth eval`: a model as it is, or a run's model before and after, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetooth.cli import show
from finetooth.cli.train import Json, Overrides


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or the folder of a run.")],
    overrides: Overrides = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness too, with commas: arc_easy,piqa.")] = "",
    include: Annotated[Path | None, typer.Option(help="A folder with more of its tasks, as YAML.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at so many rows of the file and of each task.")] = None,
    as_json: Json = False,
) -> None:
    """Measure task quality and forgetting: of a recipe's base, or of a run before and after its delta."""
    with show.clean_errors():
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        if include is not None and not names:
            raise ValueError(f"--include {include} is read for --tasks: name the tasks.")
        show.quiet()
        from finetooth.appraisal import appraise, opened

        recipe, folder = opened(target, overrides or ())
        found = appraise(recipe, folder, names, include, limit, show.note)
        show.appraisal(found, as_json)
