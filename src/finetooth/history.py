"""What a run notes as it goes, beside its metrics: which weights are chosen, and the time and memory that it takes.

    selection.jsonl   `turnover.Turnover`'s lines; a selection that is made once has one
    resources.jsonl   seconds of training, and the most memory held since the line before, when all gradients of a step are there

A line with every line of the log, so that a run that goes on from a checkpoint continues both. Time and memory have a file of their
own: a resumed run's metrics are those of a run that was not killed, bit for bit, and these two are not.

Not covered: what an operation holds for a moment within forward or backward; the peak of the process is in results.json.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from finetooth import run, shards
from finetooth.lines import Lines
from finetooth.optim import SelectiveAdamW
from finetooth.turnover import Turnover
from finetooth.when import once


class History(TrainerCallback):
    """Writes both files into a run folder; give it to the trainer after `SelectiveCallback`."""

    def __init__(self, opt: SelectiveAdamW, folder: Path) -> None:
        self._opt, self._turnover, self._process = opt, Turnover(opt), psutil.Process()
        self._selection, self._resources = Lines(folder / run.SELECTION), Lines(folder / run.RESOURCES)
        self._most = dict[str, int]()
        self._began, self._noted = 0.0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on behind the checkpoint."""
        if not state.is_world_process_zero:
            return
        seen, took = self._selection.cut(state.global_step), self._resources.cut(state.global_step)
        self._turnover.go_on(seen)
        self._noted = bool(seen)
        self._began = time.monotonic() - (took[-1]["seconds"] if took else 0.0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what is held while all gradients are there."""
        for name, held in self._held().items():
            self._most[name] = max(held, self._most.get(name, 0))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write a line into each file."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        seconds = round(time.monotonic() - self._began, 3)
        self._resources.append({"step": state.global_step, "seconds": seconds, **self._most})
        self._most.clear()
        if self._is_due():
            self._selection.append({"step": state.global_step, **self._turnover.line(self._opt.when is not once)})
            self._noted = True

    def _is_due(self) -> bool:
        """Once something is selected, unless that was for good; a warm-up is not a selection."""
        opt = self._opt
        if any(shards.sharded(p) for group in opt.param_groups for p in group["params"]):
            return False
        if opt.rule is None or opt.when is once:
            return not self._noted and opt.steps > 0
        return self._noted or any(opt.when(step) for step in range(opt.steps))

    def _held(self) -> dict[str, int]:
        held = {"host_bytes": int(self._process.memory_info().rss)}
        return {**held, "gpu_bytes": torch.cuda.memory_allocated()} if torch.cuda.is_available() else held
