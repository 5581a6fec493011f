"""Tasks of lm-evaluation-harness on a model that is in memory: base plus delta, and no merged copy on disk.

The harness's own class `HFLM` takes the loaded model and tokenizer, and its `evaluate` does the rest, so that a number means what
it means elsewhere: prompts, few-shot examples, metrics and normalisation are the task's. Its names are looked up, and the
data of its tasks is read, before a weight is: that is where a task fails that is misspelt, or that has no network to come from.

Not taken: `simple_evaluate`, which seeds every global generator unless told not to, asks git for a commit and pip for all versions,
and loads the tasks again for every model. What it does to a task before, `suite` does here.

The harness is the extra `eval`. Not covered: chat templates around the harness's prompts, and several devices.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

FEWSHOT_SEED = 1234  # the harness's own: the same examples as everybody's


@dataclass(frozen=True)
class Suite:
    """Tasks that exist, loaded, with their data."""

    names: tuple[str, ...]
    loaded: Any

    def measure(self, model: nn.Module, tokenizer: Any, batch_size: int, limit: int | None) -> dict[str, float]:
        """`{"arc_easy/acc": 0.3, "arc_easy/acc_stderr": 0.01, ...}`, on `limit` rows of each task, or all."""
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        held = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = evaluate(lm=held, task_dict=self.loaded, limit=limit, log_samples=False)
        return _flat(found["results"])


def suite(names: Sequence[str], include: Path | None = None) -> Suite:
    """The tasks of these names; `include` is a folder with task files of one's own.

    Raises ValueError for a name that there is not, with the nearest one, and without the extra `eval`.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("tasks of lm-evaluation-harness need lm_eval: pip install 'finetooth[eval]'.") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include is not None and not include.is_dir():
        raise ValueError(f"--include {include} is no folder: give one with the harness's task files (.yaml).")
    index = TaskManager(include_path=None if include is None else str(include))
    found = dict.fromkeys(name for given in names for name in _matching(given, index, include))
    loaded = index.load(list(found))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return Suite(tuple(found), loaded)


def _matching(given: str, index: Any, include: Path | None) -> list[str]:
    found = sorted(index.match_tasks([given]))
    if not found:
        near = difflib.get_close_matches(given, index.all_tasks, 3, cutoff=0.6)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        where = "lm_eval has none of this name" + ("" if include is None else f", and {include} neither")
        raise ValueError(f"--tasks {given!r}: {where}.{hint} `lm_eval ls tasks` lists all {len(index.all_tasks)}.")
    return found


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The harness writes "acc,none": the metric and the filter it was taken after."""
    out = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if comma and isinstance(value, int | float):
                out[f"{task}/{metric}" + ("" if kind == "none" else f" ({kind})")] = float(value)
    return out
