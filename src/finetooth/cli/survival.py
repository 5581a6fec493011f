"""`finetooth delta survives`: what quantization leaves of a delta.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetooth.cli import show
from finetooth.cli.delta import DeltaFile, Json


class To(StrEnum):
    """What to quantize to."""

    int8 = "int8"
    nf4 = "nf4"


def survives(
    delta: DeltaFile,
    base: Annotated[str, typer.Option("--base", help="The checkpoint that DELTA was made for: a folder or a hub id.")],
    to: Annotated[To, typer.Option("--to", help="A scale for every row, or for every 64 weights.")] = To.int8,
    text: Annotated[Path | None, typer.Option(help="Also the loss on this text, of four models.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Also what this recipe, or run folder, measures, of four models.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how many of the weights that DELTA changes still differ when base and tuned model are quantized.

    The linear weights of the blocks are quantized. Moved are weights that DELTA does not change and that differ all the same:
    they share a scale with one that it does.
    """
    with show.clean_errors():
        if text is not None and not text.is_file():
            raise FileNotFoundError(f"there is no text at {text}.")
        show.quiet()
        from finetooth import survival
        from finetooth.delta import Delta

        change = Delta.load(delta)
        found = survival.survival(change, base, str(to))
        if text is not None:
            found["text"] = survival.losses(change, base, str(to), text)
        if recipe is not None:
            from finetooth.appraisal import opened

            read = opened(recipe)[0].model_copy(update={"model": base})
            found["recipe"] = survival.recipe_losses(change, read, str(to))
        show.survival(found, as_json)
