"""The `finetooth` command. Nothing heavy is imported before a verb needs it: `--help` is instant."""

from __future__ import annotations

from typing import Annotated

import typer

from finetooth.cli import delta, demo, methods, plan, push, survival, train
from finetooth.cli import eval as evaluation

app = typer.Typer(
    name="finetooth",
    help="Fine-tune only the weights of a language model that matter, and prove what changed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(plan.plan)
app.command()(train.train)
app.command(name="eval")(evaluation.evaluate)
app.command()(methods.methods)
app.command()(push.push)
delta.app.command()(survival.survives)
app.add_typer(delta.app)
app.add_typer(train.data)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("finetooth"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune only the weights of a language model that matter, and prove what changed."""


def main() -> None:
    """The entry point."""
    app()
