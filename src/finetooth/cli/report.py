"""`finetooth report`: a run or a comparison as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetooth.cli import show
from finetooth.cli.train import Json


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN|COMPARISON", help="A folder of `train` or of `compare`.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write; report.html in the folder by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a page that shows how a run went, or how methods compare: one file, which fetches nothing."""
    with show.clean_errors():
        show.quiet()
        from finetooth.reporter import write

        show.report(write(folder, out), as_json)
