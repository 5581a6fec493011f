"""Where a run's logs go besides `metrics.jsonl`: the trainer's own reporters, TensorBoard, W&B and others.

They are transformers' callbacks, chosen by name (`train.report_to`). They show the rate and the norm that the optimizer used, because
`SelectiveCallback` puts itself before them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetooth.nearest import hint
from finetooth.recipe import RecipeError


def check(names: Sequence[str]) -> None:
    """RecipeError for a reporter that transformers does not know, or whose package is not installed."""
    if not names:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near, known = hint(name, INTEGRATION_TO_CALLBACK), ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise RecipeError(f"train.report_to: {name!r} is unknown.{near} transformers has: {known}.")
    missing = [name for name in names if name not in get_available_reporting_integrations()]
    if missing:
        raise RecipeError(
            f"train.report_to: {missing[0]!r} is not installed: install its package (pip install {missing[0]}), or "
            "leave it out. The same figures are in metrics.jsonl."
        )


def arrange(trainer: Any, folder: Path) -> None:
    """TensorBoard's files into the run folder; the variable TENSORBOARD_LOGGING_DIR, which transformers reads, goes before it."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and "TENSORBOARD_LOGGING_DIR" not in os.environ:
            callback.logging_dir = str(folder / "tensorboard")


def finish(trainer: Any) -> None:
    """End the run that W&B's reporter began; it would last as long as the process, and say goodbye on stdout."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "WandbCallback":
            callback._wandb.finish()
