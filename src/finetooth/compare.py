"""Methods, learning rates and seeds on one recipe: every run a process of its own, and an interruption loses none that ended.

    base     measured once
    sweep    every contender at every learning rate, with the first seed; a best one at an end of its rates is followed outwards
    finals   every contender at its own best learning rate, with all seeds

The best learning rates of methods differ by an order of magnitude, so that one rate for all compares rates. "Best" is the smallest
task loss on `select`, which should be other rows than those that are reported; without it, on the recipe's own.

    OUT/compare.json  inputs.json  recipes/  logs/  base/  runs/NAME/  runs.csv  summary.csv  pareto.svg

Calling it again goes on: runs with results are read, one that was interrupted is resumed, and contenders, rates and seeds that were added are run.

The alternative, a grid of everything, costs as many runs again for each seed as there are rates, and most of them at rates nobody would use.

Not covered: several machines; two comparisons at a time in one folder.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from finetooth import inputs, outsiders, run, scatter, tally
from finetooth.contest import Contender, Entry, contenders
from finetooth.files import whole
from finetooth.recipe import Recipe, RecipeError

Stage = Literal["base", "sweep", "final"]
State = Literal["waits", "runs", "ended", "failed"]
# The run, its stage, what has become of it, and its task loss; None is the measuring of the base.
Progress = Callable[[Entry | None, Stage, State, float | None], None]
_GENERATING = ("exact_match", "bleu", "rouge")  # tasks whose number needs more than a forward pass


@dataclass(frozen=True)
class Plan:
    """What is to be compared, on what, and where it is written."""

    common: Recipe
    contenders: list[Contender]
    rates: list[float]
    seeds: list[int]
    out: Path
    select: str | None = None  # rows that the sweep is judged on
    widen: int = 0  # how often a best rate at an end is followed
    runner: Path | None = None  # a protocol of its own, see `entrant.py`
    jobs: int = 1
    threads: int | None = None


def planned(
    common: Recipe,
    wanted: Mapping[str, str],
    *,
    seeds: int = 3,
    select: Path | None = None,
    runner: Path | None = None,
    out: Path,
    **how: Any,
) -> Plan:
    """A plan from words with commas (`methods`, `lr`, `keep`); RecipeError for whatever of it cannot be run, before anything is.

    `how`: `widen`, `jobs` and `threads` of a Plan.
    """
    _check(common, select, runner)
    rates, keeps = _numbers("lr", wanted["lr"]) or [common.optimizer.lr], _numbers("keep", wanted["keep"])
    if any(rate <= 0 for rate in rates):
        raise RecipeError(f"--lr {wanted['lr']}: learning rates are above 0.")
    for name, given in (("widen", how.get("widen")), ("select", select)):
        if given and len(rates) < 2:
            raise RecipeError(f"--{name} is about a sweep, and --lr has one learning rate: give two or more.")
    names = [name for name in wanted["methods"].split(",") if name.strip()]
    if not names:
        raise RecipeError("--methods names none.")
    found = contenders(names, keeps, common.method)
    for one in found:
        if one.method.name in outsiders.NAMES:
            outsiders.check(one.method, common.merged)
    first = common.train.seed
    where = str(select.resolve()) if select else None
    return Plan(common, found, sorted(rates), list(range(first, first + seeds)), out, where, runner=runner, **how)


def _check(common: Recipe, select: Path | None, runner: Path | None) -> None:
    if common.data.eval is None or common.evaluate.task == "none":
        raise RecipeError("a comparison needs data.eval and an evaluate.task: there is nothing to compare by.")
    for name, file in (("select", select), ("runner", runner)):
        if file is not None and not file.is_file():
            raise RecipeError(f"--{name}: there is no file {file}.")
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


def _silent(entry: Entry | None, stage: Stage, state: State, loss: float | None) -> None:
    pass


def compare(plan: Plan, progress: Progress = _silent) -> dict[str, Any]:
    """Run what is missing and put the results together; also in the files of `plan.out`.

    A run that fails, or ends without a finite loss, is a row with its error, and the others go on. Raises RecipeError, before anything
    runs, where `plan.out` has runs of another recipe or of files with another content, and RuntimeError if the base cannot be measured.
    """
    for folder in ("recipes", "logs", "base", "runs"):
        (plan.out / folder).mkdir(parents=True, exist_ok=True)
    select = None if plan.select is None else Path(plan.select)
    inputs.require_same(inputs.digests(plan.common, select=select, runner=plan.runner), plan.out / "inputs.json")
    rows = _swept(plan, progress) if len(plan.rates) > 1 else []
    best = tally.best(rows) if rows else {c.label: plan.rates[0] for c in plan.contenders}
    # Seeds outside: a machine that gets slower in the meantime does so for all contenders.
    finals = [Entry(c, best[c.label], seed) for seed in plan.seeds for c in plan.contenders if c.label in best]
    rows += _all(plan, finals, "final", progress)
    return _written(plan, rows)


def _swept(plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    """Every contender at every rate, and at those that a best one at an end leads to."""
    wanted = [Entry(c, lr, plan.seeds[0]) for c in plan.contenders for lr in plan.rates]
    rows = _all(plan, wanted, "sweep", progress)
    for _ in range(plan.widen):
        further = tally.further(rows)
        more = [Entry(c, further[c.label], plan.seeds[0]) for c in plan.contenders if c.label in further]
        rows += _all(plan, more, "sweep", progress)
    return rows


def _all(plan: Plan, entries: Sequence[Entry], stage: Stage, progress: Progress) -> list[dict[str, Any]]:
    """Every entry's row, in their order; `plan.jobs` of them at a time."""
    for entry in entries:
        _prepared(plan, entry, stage)
        progress(entry, stage, "waits", None)
    if not entries:
        return []

    def one(entry: Entry) -> dict[str, Any]:
        if not _ended(plan, entry, stage):
            progress(entry, stage, "runs", None)
        row = _row(plan, entry, stage)
        progress(entry, stage, "failed" if row["error"] else "ended", row.get("task_loss"))
        return row

    if not all(_ended(plan, entry, stage) for entry in entries):
        _measured(plan, entries[0], stage, progress)
    with ThreadPoolExecutor(plan.jobs) as pool:
        return list(pool.map(one, entries))


def _name(plan: Plan, entry: Entry, stage: Stage) -> str:
    """A sweep on other rows is another run."""
    return f"{entry.name}-select" if stage == "sweep" and plan.select else entry.name


def _ended(plan: Plan, entry: Entry, stage: Stage) -> bool:
    return (plan.out / "runs" / _name(plan, entry, stage) / "results.json").is_file()


def _recipe(plan: Plan, entry: Entry, stage: Stage) -> Recipe:
    name = _name(plan, entry, stage)
    recipe = entry.recipe(plan.common, (plan.out / "runs" / name).resolve())
    if not name.endswith("-select"):
        return recipe
    update: dict[str, Any] = {"data": recipe.data.model_copy(update={"eval": plan.select})}
    if recipe.evaluate.task in _GENERATING:  # the loss decides
        update["evaluate"] = recipe.evaluate.model_copy(update={"task": "loss"})
    return recipe.model_copy(update=update)


def _prepared(plan: Plan, entry: Entry, stage: Stage) -> None:
    """Write the recipe of a run; RecipeError if its folder was made with another."""
    name, recipe = _name(plan, entry, stage), _recipe(plan, entry, stage)
    made = plan.out / "runs" / name / "recipe.yaml"
    if made.is_file() and made.read_text(encoding="utf-8") != recipe.to_yaml():
        raise RecipeError(f"{made.parent} was run with another recipe: give another --out, or compare it with {made}.")
    run.write_text(plan.out / "recipes" / f"{name}.yaml", recipe.to_yaml())


def _before(plan: Plan, entry: Entry, stage: Stage) -> Path:
    """Where the base's numbers are: by what they depend on, which the method, the rate and the seed are not part of."""
    recipe = _recipe(plan, entry, stage)
    data = recipe.data.model_dump(exclude={"limit"})
    asked = recipe.evaluate.model_dump(exclude={"quantized_bits"})
    told = [recipe.model, data, asked, recipe.train.max_length, recipe.train.precision, str(plan.runner)]
    return plan.out / "base" / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.json"


def _measured(plan: Plan, entry: Entry, stage: Stage, progress: Progress) -> None:
    """The base's numbers, if they are not there yet; RuntimeError if that fails, as then every run would."""
    before = _before(plan, entry, stage)
    if before.is_file():
        return
    progress(None, "base", "runs", None)
    name = _name(plan, entry, stage)
    error = _ran(plan, [plan.out / "recipes" / f"{name}.yaml", before, "--measure"], f"base-{before.stem}")
    if error:
        raise RuntimeError(f"the base could not be measured: {error} ({plan.out / 'logs' / f'base-{before.stem}.txt'})")
    progress(None, "base", "ended", None)


def _row(plan: Plan, entry: Entry, stage: Stage) -> dict[str, Any]:
    name = _name(plan, entry, stage)
    results, error = plan.out / "runs" / name / "results.json", ""
    if not results.is_file():
        error = _ran(plan, [plan.out / "recipes" / f"{name}.yaml", _before(plan, entry, stage)], name)
    found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    loss = found["after"].get("task_loss", 0.0) if found else 0.0
    if stage == "final" and (loss is None or not math.isfinite(loss)):
        error = "it diverged: the task loss is not finite"
    part = entry.contender.method
    who = {"contender": entry.contender.label, "method": part.name, "keep": part.keep}
    return {**who, "lr": entry.lr, "seed": entry.seed, "stage": stage, "run": name, **tally.flat(found), "error": error}


def _ran(plan: Plan, words: Sequence[object], name: str) -> str:
    """Run `entrant.py`; what went wrong, or nothing. It ends with its stdin, which is held open for it."""
    own = ["--runner", plan.runner] if plan.runner else []
    command = [sys.executable, "-m", "finetooth.entrant", *map(str, [*words, *own])]
    env = {**os.environ, **({"OMP_NUM_THREADS": str(plan.threads)} if plan.threads else {})}
    log = plan.out / "logs" / f"{name}.txt"
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        code = process.wait()
    if not code:
        return ""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), f"exit code {code}")


def _written(plan: Plan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The files of the comparison, and what they say."""
    summary = tally.summary([r for r in rows if r["stage"] == "final"], plan.contenders[0].label)
    _csv(plan.out / "runs.csv", rows)
    _csv(plan.out / "summary.csv", summary)
    found = {"recipe": plan.common.public().to_json(), "runs": rows, "summary": summary, "remarks": tally.remarks(rows)}
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
