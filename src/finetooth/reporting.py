"""Where a run's logs go besides `metrics.jsonl`: the trainer's own reporters, TensorBoard, W&B and others.

They are transformers' callbacks, chosen by name (`train.report_to`). transformers calls its own callbacks first, in the
order of its list, and hands all of them the same dictionary. So ours has to stand before the reporters: else they write
the gradient norm that the trainer measured, of all gradients, and not the one that the optimizer used.

Not covered: `trainer.state.log_history`, which the trainer writes before any callback is asked.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetooth.hf import SelectiveCallback
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
            near = difflib.get_close_matches(name, list(INTEGRATION_TO_CALLBACK), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise RecipeError(f"train.report_to: {name!r} is unknown.{hint} transformers has: {known}.")
    missing = [name for name in names if name not in get_available_reporting_integrations()]
    if missing:
        raise RecipeError(
            f"train.report_to: {missing[0]!r} is not installed: install its package (pip install {missing[0]}), or "
            "leave it out. The same figures are in metrics.jsonl."
        )


def ours_first(trainer: Any) -> None:
    """Put our callback before all others of a trainer, so that they are shown the figures it puts into the log.

    For a trainer of your own: `Trainer(..., callbacks=[SelectiveCallback(opt)])`, then `ours_first(trainer)`.
    """
    trainer.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, SelectiveCallback))


def arrange(trainer: Any, folder: Path) -> None:
    """Our callback first, and TensorBoard's files into the run folder.

    The variable TENSORBOARD_LOGGING_DIR, which transformers reads, goes before the run folder.
    """
    ours_first(trainer)
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and "TENSORBOARD_LOGGING_DIR" not in os.environ:
            callback.logging_dir = str(folder / "tensorboard")
