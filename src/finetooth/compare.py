"""Methods, learning rates and seeds on one recipe: every run a process of its own, and an interruption loses none that ended.

    sweep    every contender at every learning rate, with the first seed
    finals   every contender at its own best learning rate, with all seeds

The best learning rates of methods differ by an order of magnitude, so that one rate for all compares rates. "Best" is the smallest
task loss on `select`, which should be other rows than those that are reported; without it, on the recipe's own.

    OUT/compare.json  recipes/  logs/  runs/NAME/  runs.csv  summary.csv  pareto.svg

Calling it again goes on: runs with results are read, one that was interrupted is resumed, and contenders, rates and seeds that were added are run.

The alternative, a grid of everything, costs as many runs again for each seed as there are rates, and most of them at rates nobody would use.

Not covered: several machines.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetooth import outsiders, run, scatter, tally
from finetooth.contest import Contender, Entry, contenders
from finetooth.files import whole
from finetooth.recipe import Recipe, RecipeError

Progress = Callable[[int, int, float | None], None]  # runs that have ended, runs in all, the last one's task loss


@dataclass(frozen=True)
class Plan:
    """What is to be compared, on what, and where it is written."""

    common: Recipe
    contenders: list[Contender]
    rates: list[float]
    seeds: list[int]
    out: Path
    select: str | None = None  # rows that the sweep is judged on
    jobs: int = 1
    threads: int | None = None


def planned(
    common: Recipe,
    wanted: Mapping[str, str],
    *,
    seeds: int = 3,
    select: Path | None = None,
    out: Path,
    jobs: int = 1,
    threads: int | None = None,
) -> Plan:
    """A plan from words with commas (`methods`, `lr`, `keep`); RecipeError for whatever of it cannot be run, before anything is."""
    _check(common, select)
    rates, keeps = _numbers("lr", wanted["lr"]) or [common.optimizer.lr], _numbers("keep", wanted["keep"])
    if any(rate <= 0 for rate in rates):
        raise RecipeError(f"--lr {wanted['lr']}: learning rates are above 0.")
    names = [name for name in wanted["methods"].split(",") if name.strip()]
    if not names:
        raise RecipeError("--methods names none.")
    found = contenders(names, keeps, common.method)
    first = common.train.seed
    where = str(select.resolve()) if select else None
    return Plan(common, found, rates, list(range(first, first + seeds)), out, where, jobs, threads)


def _check(common: Recipe, select: Path | None) -> None:
    if common.data.eval is None or common.evaluate.task == "none":
        raise RecipeError("a comparison needs data.eval and an evaluate.task: there is nothing to compare by.")
    if select is not None and not select.is_file():
        raise RecipeError(f"--select: there is no file {select}.")
    missing = [name for name in ("matplotlib", "scipy") if find_spec(name) is None]
    if missing:
        raise RecipeError(f"a comparison needs {' and '.join(missing)}: pip install 'finetooth[compare]'.")


def _numbers(option: str, text: str) -> list[float | int]:
    """Numbers with commas; a whole number is a count."""
    try:
        found = [int(n) if n.strip().isdigit() else float(n) for n in text.split(",") if n.strip()]
    except ValueError as error:
        raise RecipeError(f"--{option} {text}: give numbers with commas between them.") from error
    if len(set(found)) != len(found):
        raise RecipeError(f"--{option} {text}: a number is there twice.")
    return found


def _silent(done: int, total: int, loss: float | None) -> None:
    pass


def compare(plan: Plan, progress: Progress = _silent) -> dict[str, Any]:
    """Run what is missing and put the results together; also in the files of `plan.out`.

    A run that fails is a row with its error, and the others go on. Raises RecipeError, before anything runs, where `plan.out` has runs of
    another recipe.
    """
    for folder in ("recipes", "logs", "runs"):
        (plan.out / folder).mkdir(parents=True, exist_ok=True)
    swept = [Entry(c, lr, plan.seeds[0]) for c in plan.contenders for lr in plan.rates]
    total = len(swept) + len(plan.contenders) * (len(plan.seeds) - (plan.select is None))
    done = _Done(progress, total)
    rows = _all(plan, swept, "sweep", done) if len(plan.rates) > 1 or plan.select else []
    best = tally.best(rows) if rows else {c.label: plan.rates[0] for c in plan.contenders}
    finals = [Entry(c, best[c.label], seed) for c in plan.contenders if c.label in best for seed in plan.seeds]
    rows += _all(plan, finals, "final", done)
    return _written(plan, rows)


@dataclass
class _Done:
    """Counts what has ended."""

    progress: Progress
    total: int
    n: int = 0

    def __call__(self, row: dict[str, Any]) -> None:
        self.n += 1
        self.progress(self.n, max(self.total, self.n), row.get("task_loss"))


def _all(plan: Plan, entries: Sequence[Entry], stage: str, done: _Done) -> list[dict[str, Any]]:
    """Every entry's row, in their order; `plan.jobs` of them at a time."""

    def one(entry: Entry) -> dict[str, Any]:
        row = _row(plan, entry, stage)
        done(row)
        return row

    for entry in entries:
        _prepared(plan, entry, stage)
    with ThreadPoolExecutor(plan.jobs) as pool:
        return list(pool.map(one, entries))


def _name(plan: Plan, entry: Entry, stage: str) -> str:
    """A sweep on other rows is another run."""
    return f"{entry.name}-select" if stage == "sweep" and plan.select else entry.name


def _prepared(plan: Plan, entry: Entry, stage: str) -> None:
    """Write the recipe of a run; RecipeError if its folder was made with another."""
    name = _name(plan, entry, stage)
    folder = plan.out / "runs" / name
    recipe = entry.recipe(plan.common, folder.resolve())
    if name.endswith("-select"):
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": plan.select})})
    made = folder / "recipe.yaml"
    if made.is_file() and made.read_text(encoding="utf-8") != recipe.to_yaml():
        raise RecipeError(f"{folder} was run with another recipe: give another --out, or compare it with {made}.")
    run.write_text(plan.out / "recipes" / f"{name}.yaml", recipe.to_yaml())


def _row(plan: Plan, entry: Entry, stage: str) -> dict[str, Any]:
    name = _name(plan, entry, stage)
    results, error = plan.out / "runs" / name / "results.json", ""
    if not results.is_file():
        error = _ran(plan, name, entry.contender.method.name)
    found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    same = {"contender": entry.contender.label, "lr": entry.lr, "seed": entry.seed, "stage": stage, "run": name}
    return {**same, **tally.flat(found), "error": error}


def _ran(plan: Plan, name: str, method: str) -> str:
    """Run one recipe in a process of its own; what went wrong, or nothing."""
    recipe = str(plan.out / "recipes" / f"{name}.yaml")
    ours = [
        "finetooth",
        "train",
        recipe,
        *(["--resume"] if (plan.out / "runs" / name / "recipe.yaml").is_file() else []),
    ]
    command = [sys.executable, "-m", *(["finetooth.outsiders", recipe] if method in outsiders.NAMES else ours)]
    env = {**os.environ, **({"OMP_NUM_THREADS": str(plan.threads)} if plan.threads else {})}
    log = plan.out / "logs" / f"{name}.txt"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if not code:
        return ""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), f"exit code {code}")


def _written(plan: Plan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The files of the comparison, and what they say."""
    summary = tally.summary([r for r in rows if r["stage"] == "final"])
    _csv(plan.out / "runs.csv", rows)
    _csv(plan.out / "summary.csv", summary)
    remarks = tally.remarks(rows, plan.rates)
    found = {"recipe": plan.common.public().to_json(), "runs": rows, "summary": summary, "remarks": remarks}
    run.write_json(plan.out / "compare.json", found)
    if any(line["forgetting"] is not None for line in summary):
        with whole(plan.out / "pareto.svg") as temp:
            temp.write_bytes(scatter.pareto(found))
    return {**found, "folder": str(plan.out)}


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole(path) as temp, temp.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
