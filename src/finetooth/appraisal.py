"""What `finetooth eval` says: a base as it is, or the base and what a run made of it, side by side.

The delta is applied to the base in memory, which refuses another base, and taken off again for the length of the first
measurement: nothing is merged and nothing but `eval.json` is written. The evaluation rows and the general text are those of the run's
recipe, changed by what is given; the training file is not read.

Not covered: `evaluate.quantized_bits`, which needs to know what was chosen, not what has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from finetooth import harness, preflight, run
from finetooth.delta import Delta
from finetooth.jobs import Job, check_context, check_evaluation, check_method, load
from finetooth.measure import forgetting, measure
from finetooth.recipe import Recipe, RecipeError
from finetooth.recipe import load as read

WRITTEN = "eval.json"


def opened(target: Path, overrides: Iterable[str] = ()) -> tuple[Recipe, Path | None]:
    """A recipe file, or the recipe of a run folder and that folder; RecipeError for a run that has not ended."""
    if not target.is_dir():
        return read(target, overrides), None
    for name in ("recipe.yaml", "delta.safetensors"):
        if not (target / name).is_file():
            raise RecipeError(f"there is no finished run in {target}: it has no {name}.")
    return read(target / "recipe.yaml", overrides), target


def appraise(
    recipe: Recipe,
    folder: Path | None = None,
    tasks: Sequence[str] = (),
    include: Path | None = None,
    limit: int | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure the recipe's model, and with a run's folder that run's delta on it as well.

    Returns `before` (the base), `after` (the tuned model, or None), `forgetting` and what they were measured on, as it is also
    written to `eval.json` in the folder; there `run` is the folder's name, here its path. `tasks` are names of
    lm-evaluation-harness's, `include` a folder with more of them; `limit` rows of the evaluation file and of each task are looked
    at. `say` is told what a person should know about the rows.
    """
    recipe = _limited(recipe, limit)
    _check(recipe, tasks)
    suite = harness.suite(tasks, include) if tasks else None
    delta = None if folder is None else Delta.load(folder / "delta.safetensors")
    job = load(recipe, Path(recipe.output), training=False)
    if say is not None and job.eval is not None:
        for remark in preflight.about(job.eval, "evaluation"):
            say(remark)
    before, after = _measured(job, delta, suite, limit)
    found = {
        "method": delta.method if delta else None,
        "base": Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model,
        "before": before,
        "after": after,
        "forgetting": forgetting(before, after) if after else None,
        "data": job.eval.counts() if job.eval else None,
        "evaluate": recipe.public().evaluate.model_dump(mode="json"),
        "tasks": list(suite.names) if suite else [],
        "limit": limit,
        "environment": run.environment(),
        "run": folder.resolve().name if folder else None,
    }
    if folder is not None:
        run.write_json(folder / WRITTEN, found)
    return {**found, "run": str(folder) if folder else None}


def _measured(
    job: Job, delta: Delta | None, suite: harness.Suite | None, limit: int | None
) -> tuple[dict[str, float], dict[str, float] | None]:
    """The base's numbers, and the tuned model's where there is a delta."""

    def numbers() -> dict[str, float]:
        out, size = measure(job, samples=0)[0], job.recipe.evaluate.batch_size
        return out if suite is None else {**out, **suite.measure(job.model, job.tokenizer, size, limit)}

    if delta is None:
        return numbers(), None
    delta.apply(job.model)
    with delta.reverted(job.model):
        before = numbers()
    return before, numbers()


def _limited(recipe: Recipe, limit: int | None) -> Recipe:
    if limit is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval_limit": limit})})


def _check(recipe: Recipe, tasks: Sequence[str]) -> None:
    check_method(recipe.method)
    check_evaluation(recipe)
    check_context(recipe)
    rows = recipe.data.eval is not None and recipe.evaluate.task != "none"
    if not (rows or recipe.evaluate.forgetting or tasks):
        raise RecipeError(
            "there is nothing to measure: give data.eval with an evaluate.task, evaluate.forgetting, or --tasks."
        )
