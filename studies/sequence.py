"""Three tasks one after the other, for a comparison: `finetooth compare … --runner studies/sequence.py`.

Each is a run of its own, which begins with the whole model that the one before it wrote. Data are the recipe's for the first task, and the
files of the same name beside them for the others. Every task has another seed, so that rows which choose at random choose anew.

    task loss        mean over the three tasks, at the end
    first learnt     task loss of the first task after its own training
    first left       the same at the end
    first lost       the difference: what the two later tasks took
    forgetting       of the general text, at the end
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from finetooth import jobs, outsiders, run
from finetooth.measure import forgetting, measure
from finetooth.recipe import Recipe
from finetooth.train import train as fine_tune

ORDER = ("banking77", "e2e", "tatoeba")
Numbers = dict[str, float]


def of(recipe: Recipe, task: str, **changes: Any) -> Recipe:
    """The recipe on another task's files; only the first task's has answers to be matched."""
    data = recipe.data
    there = {
        k: str(Path(v).parents[1] / task / Path(v).name) for k, v in (("train", data.train), ("eval", data.eval or ""))
    }
    kind = recipe.evaluate.task if task == ORDER[0] else "loss"
    evaluate = recipe.evaluate.model_copy(update={"task": kind, "forgetting": None})
    return recipe.model_copy(update={"data": data.model_copy(update=there), "evaluate": evaluate, **changes})


def base(recipe: Recipe) -> tuple[Numbers, list[str]]:
    """What is measured before."""
    return measured(recipe, recipe.model), []


def measured(recipe: Recipe, model: str) -> Numbers:
    """The losses of all three tasks and of the general text."""
    found: Numbers = {}
    for task in ORDER:
        wanted = of(recipe, task, model=model)
        if task == ORDER[-1]:
            wanted = wanted.model_copy(
                update={"evaluate": wanted.evaluate.model_copy(update={"forgetting": recipe.evaluate.forgetting})}
            )
        numbers, _ = measure(jobs.load(wanted, Path(recipe.output), training=False), samples=0)
        found[f"{task}_loss"] = numbers.pop("task_loss")
        found |= {f"first_{k}" if k != "general_loss" else k: v for k, v in numbers.items()}
    return {"task_loss": statistics.fmean(found[f"{task}_loss"] for task in ORDER), **found}


def train(recipe: Recipe, before: tuple[Numbers, list[str]]) -> None:
    """What is missing of the three runs, then their end."""
    folder, model, stages = Path(recipe.output), recipe.model, []
    run.start(recipe)
    for i, task in enumerate(ORDER):
        own = folder / f"{i + 1}-{task}"
        seed = recipe.train.model_copy(update={"seed": 10 * recipe.train.seed + i})
        stages.append(stage(of(recipe, task, model=model, output=str(own), train=seed, merged=True)))
        model = str(own / "merged")
    after = measured(recipe, model)
    learnt, left = stages[0]["after"]["task_loss"], after[f"{ORDER[0]}_loss"]
    after |= {"first_learnt": learnt, "first_left": left, "first_lost": left - learnt}
    seconds = [s["train_seconds"] for s in stages]
    results = {
        "method": recipe.method.name,
        "before": before[0],
        "after": after,
        "forgetting": forgetting(before[0], after),
        "changed": stages[-1]["changed"],
        "share": stages[-1]["share"],
        "delta_bytes": sum(s["delta_bytes"] for s in stages),
        "state_bytes": stages[-1]["state_bytes"],
        "train_seconds": None if None in seconds else sum(seconds),
        "train_peak_bytes": stages[0]["train_peak_bytes"],  # those of one process
        "seconds": sum(s["seconds"] for s in stages),
    }
    run.write_json(folder / "results.json", results)
    for i, task in enumerate(ORDER):
        for rest in ("merged", run.CHECKPOINTS):
            shutil.rmtree(folder / f"{i + 1}-{task}" / rest, ignore_errors=True)


def stage(recipe: Recipe) -> dict[str, Any]:
    """One task's run, begun, gone on with, or read; its whole model is the last thing it writes."""
    folder = Path(recipe.output)
    if (folder / "results.json").is_file() and (folder / "merged" / "tokenizer.json").is_file():
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if recipe.method.name in outsiders.NAMES:
        return outsiders.train(recipe)
    return fine_tune(recipe, resume=(folder / "recipe.yaml").is_file())
