"""One run of a comparison, in a process of its own that ends when the comparison does.

    python -m finetooth.entrant RECIPE BEFORE.json             # train; the base's numbers are read
    python -m finetooth.entrant RECIPE BEFORE.json --measure   # measure the base, and write them

The base is the same for every method, rate and seed, so that it is measured once. Checkpoints are for going on with a run,
and are removed when it has ended.

A killed process cannot end its children, and a run that lived on would write into the folder in which the next comparison goes on
with it. So the comparison holds a pipe to each, and a run ends when its pipe does. The alternative, a lock on the folder, would leave a
user to find out who holds it.

`--runner FILE.py` has another protocol than `finetooth train`, as two functions:

    base(recipe: Recipe) -> tuple[dict[str, float], list[str]]     what is measured before
    train(recipe: Recipe, before) -> None                          writes results.json into recipe.output; called again after an interruption
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from finetooth import run
from finetooth.recipe import Recipe, RecipeError
from finetooth.recipe import load as read

if TYPE_CHECKING:
    from finetooth.measure import Measured


class Runner(NamedTuple):
    """How the base is measured and a recipe is run."""

    base: Callable[[Recipe], Measured]
    train: Callable[[Recipe, Measured], Any]


def base(recipe: Recipe) -> Measured:
    """What the recipe wants to know of the base."""
    from finetooth import jobs  # a runner of one's own may need none of it, nor does the comparison itself
    from finetooth.measure import measure

    return measure(jobs.load(recipe, Path(recipe.output), training=False))


def fine_tune(recipe: Recipe, before: Measured) -> None:
    """A row's run, gone on with if it was interrupted; an outsider's, anew."""
    from finetooth import outsiders
    from finetooth.train import train

    if recipe.method.name in outsiders.NAMES:
        outsiders.train(recipe, before)
    else:
        begun = (Path(recipe.output) / "recipe.yaml").is_file()
        train(recipe, resume=begun, say=lambda text: typer.echo(text, err=True), before=before)


def runner(file: Path | None) -> Runner:
    """What runs recipes: this module, or the functions `base` and `train` of a file; RecipeError where they are not."""
    if file is None:
        return Runner(base, fine_tune)
    if not file.is_file():
        raise RecipeError(f"--runner: there is no file {file}.")
    found = runpy.run_path(str(file))
    if missing := [name for name in Runner._fields if not callable(found.get(name))]:
        raise RecipeError(
            f"--runner {file}: it has no function {missing[0]!r}: it needs base(recipe) and train(recipe, before)."
        )
    return Runner(found["base"], found["train"])


def _until_the_end_of(pipe: int) -> None:
    """End this process when whoever holds the other side of the pipe, a file descriptor, has gone."""

    def wait() -> None:
        while os.read(pipe, 1):  # not through sys.stdin, whose lock this thread would hold when Python ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False
)  # the last line of a plain traceback is the error


@app.command()
def main(
    recipe: Path,
    before: Path,
    measure: Annotated[bool, typer.Option("--measure")] = False,
    runner_file: Annotated[Path | None, typer.Option("--runner")] = None,
) -> None:
    """Run, or measure the base."""
    _until_the_end_of(0)
    wanted, how = read(recipe), runner(runner_file)
    if measure:
        run.write_json(before, how.base(wanted))
        return
    numbers, said = json.loads(before.read_text(encoding="utf-8"))
    how.train(wanted, (numbers, said))
    shutil.rmtree(Path(wanted.output) / run.CHECKPOINTS, ignore_errors=True)


if __name__ == "__main__":
    app()
