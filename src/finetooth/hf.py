"""What transformers' Trainer and TRL's need from us: one callback.

The optimizer goes in by the public door, `optimizers=(opt, None)`. Its own clipping replaces the trainer's, so
the norm in the logs is taken from it: it is the norm of the gradients that were used.

A checkpoint that the trainer has finished is sealed (`saved.py`), so that `last_good` can tell it from one that was being written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetooth import saved, shards
from finetooth.files import room, whole
from finetooth.optim import SelectiveAdamW
from finetooth.run import to_json

Progress = Callable[[int, int, float | None], None]  # step, steps in all, last loss


class SelectiveCallback(TrainerCallback):
    """True gradient norms and skipped steps in the logs, sealed checkpoints, a metrics file, and progress."""

    def __init__(
        self,
        opt: SelectiveAdamW,
        metrics: Path | None = None,
        progress: Progress | None = None,
        seal: bool = True,
    ) -> None:
        self._opt, self._metrics, self._progress, self._seal, self._loss = opt, metrics, progress, seal, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run continues the metrics file from its checkpoint: later lines belong to what was lost.

        A line that is not whole is one that the run was killed in.
        """
        _check_checkpoints(args, state, self._opt, self._seal)
        if self._seal and args.should_save and args.save_strategy != "no":
            saved.promise(Path(args.output_dir))
        if self._metrics is None or not self._metrics.exists() or not state.is_world_process_zero:
            return
        lines = self._metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _step(line) <= state.global_step]
        with whole(self._metrics) as temp:
            temp.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint, when every rank has written its part."""
        if not self._seal:
            return
        shards.wait()
        if args.should_save:
            saved.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Put the optimizer's figures into the log and append it to the metrics file."""
        if logs is None:
            return
        logs["grad_norm"], logs["skipped_steps"] = self._opt.grad_norm, self._opt.skipped
        self._loss = logs.get("loss", self._loss)
        self._report(state)
        if self._metrics is not None and state.is_world_process_zero:
            line = {"step": state.global_step, **{k: v for k, v in logs.items() if isinstance(v, int | float)}}
            with room(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report progress after every optimizer step, and log the last one whatever its number."""
        control.should_log = control.should_log or state.global_step >= state.max_steps
        self._report(state)

    def _report(self, state: Any) -> None:
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps, self._loss)


def _check_checkpoints(args: Any, state: Any, opt: SelectiveAdamW, seal: bool) -> None:
    """ValueError for a run that goes on without its optimizer state or after its end, or deletes before it knows what it has."""
    if state.global_step and not opt.steps + opt.skipped:
        raise ValueError(
            f"this run goes on at step {state.global_step}, and its checkpoint had no optimizer state: it was saved with "
            "save_only_model=True, which nothing can be resumed from."
        )
    if seal and state.global_step >= state.max_steps and (state.epoch or 0) < state.num_train_epochs:
        raise ValueError(
            f"the checkpoint is the end of this training (step {state.global_step} of {state.max_steps}), and transformers "
            "would train one step more: take its weights, or raise max_steps."
        )
    if seal and args.save_total_limit == 1:
        raise ValueError("save_total_limit=1 deletes the last good checkpoint before the new one is sealed: give 2.")


def _step(line: str) -> float:
    """The step of a line of metrics; infinity for a line that is not whole, and for the summary, which is written again."""
    try:
        found = json.loads(line)
        return math.inf if "train_runtime" in found else float(found["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
