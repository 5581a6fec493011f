"""Tasks of lm-evaluation-harness on a model that is in memory: base plus delta, and no merged copy on disk.

The harness's own class `HFLM` takes the loaded model and tokenizer, and `simple_evaluate` does the rest, so that a number means
what it means elsewhere: prompts, few-shot examples, metrics and normalisation are the task's. Its names are looked up, and the
data of its tasks is read, before a weight is: that is where a task fails that is misspelt, or that has no network to come from.

The harness is the extra `eval`. It is told to seed no global generator, which it does unless it is told.

Not covered: chat templates around the harness's prompts, and several devices.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

SEEDS = {"random_seed": None, "numpy_random_seed": None, "torch_random_seed": None}


@dataclass(frozen=True)
class Suite:
    """Tasks that exist, and the harness's index that has them."""

    names: tuple[str, ...]
    index: Any

    def measure(self, model: nn.Module, tokenizer: Any, batch_size: int, limit: int | None) -> dict[str, float]:
        """`{"arc_easy/acc": 0.3, "arc_easy/acc_stderr": 0.01, ...}`, on `limit` rows of each task, or all."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        held = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            held, tasks=list(self.names), task_manager=self.index, limit=limit, log_samples=False, **SEEDS
        )
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
    found = tuple(name for given in names for name in _matching(given, index, include))
    names = tuple(dict.fromkeys(found))
    index.load(list(names))  # what is missing is missed here, not after the model is loaded
    return Suite(names, index)


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
