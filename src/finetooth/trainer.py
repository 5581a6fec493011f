"""TRL's trainer, as `finetooth train` uses it: checkpoints that are complete or absent, and logs that a kill does not change.

transformers saves and restores what the weights depend on. What it forgets is bookkeeping: the losses added up since the last
line of the log, the mean loss of the run, and TRL's count of tokens. The first is mended by writing a line with every checkpoint, the others
are made again from the log, which is saved. It writes a checkpoint at its final name and deletes old ones before the new one is
known to be whole; here it is given a folder aside, and `saving` does the rest.

A loss that is not finite may have finite gradients, of an answer that is masked out for one; here it has none, so that the
optimizer skips the step. While steps are skipped no checkpoint is saved: the weights are those of the last one that was made, and
what led there may be in them, so the older checkpoints are worth more. One that was due is saved after the next good step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from finetooth.optim import SelectiveAdamW
from finetooth.saved import saving

KEPT = 2  # checkpoints: if the newest is damaged there is another


class Trainer(SFTTrainer):
    """Without a model card: TRL's would say of our checkpoints that their base is None, and the run folder has one."""

    _aside: str | None = None  # where a checkpoint is being written
    _due = False  # a checkpoint that was not saved yet
    saving_seconds = 0.0  # that checkpoints have taken
    # The optimizer, which accelerate wraps; none where torch's trains (`outsiders.py`).
    selective: SelectiveAdamW | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """TRL's, without what it leaves in the config of a mixture of experts for good: `generate` and the saved model would have it too.

        It asks for router logits at every training step besides.
        """
        model = kwargs["model"]
        config = model.config.get_text_config()
        asked = getattr(config, "output_router_logits", None)
        super().__init__(*args, **kwargs)
        if asked is not None:
            config.output_router_logits = asked

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; where it is not finite, neither are its gradients."""
        found = super().compute_loss(*args, **kwargs)
        return (telling(found[0]), *found[1:]) if isinstance(found, tuple) else telling(found)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As it is, with the mean loss of the whole run at its end, not of what was left of it."""
        if "train_loss" in logs:
            logs["train_loss"] = mean_loss(self.state.log_history)
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed after its last step: transformers would do one more
            self.control.should_training_stop = True

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._due = self._due or self.control.should_save
        self.control.should_save = self._due and not (self.selective and self.selective.bad_steps)
        self._due = self._due and not self.control.should_save
        self.control.should_log = self.control.should_log or self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        target, began = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}", time.monotonic()
        with saving(target, keep=KEPT) as unfinished:
            self._aside = str(unfinished.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
        self.saving_seconds += time.monotonic() - began

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        seen = [line["num_tokens"] for line in self.state.log_history if "num_tokens" in line]
        self._total_train_tokens = int(seen[-1]) if seen else 0


def telling(loss: Tensor) -> Tensor:
    """The loss, times 1; times NaN where it is not finite, which its gradients then are too.

    >>> x = torch.tensor([1.0, float("-inf")], requires_grad=True)
    >>> telling(-x.log_softmax(0)[1]).backward()
    >>> x.grad
    tensor([nan, nan])
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)


def mean_loss(history: Iterable[Mapping[str, Any]]) -> float:
    """The mean loss of all steps, from lines that each have the mean since the line before.

    >>> mean_loss([{"step": 1, "loss": 4.0}, {"step": 3, "loss": 1.0}])
    2.0
    """
    total, last = 0.0, 0
    for line in history:
        if "loss" in line:
            total, last = total + line["loss"] * (line["step"] - last), line["step"]
    return total / max(last, 1)
