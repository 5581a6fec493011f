"""What transformers' Trainer and TRL's need from us: one callback, and not even that.

    SFTTrainer(model, args, ..., optimizers=(opt, None), callbacks=[finetooth.SelectiveCallback(opt)])

The optimizer goes in by the public door and does everything a step has to do. The callback makes the rest of the trainer
tell the truth: it refuses settings that would be ignored or would break a guarantee (`settings.py`), switches the trainer's
own clipping off, because that looks at the gradients of weights that are not chosen (and at none where they are gathered),
and puts the norm of the gradients that were used, and the rate they were used with, into the logs. A checkpoint that the trainer
has finished it seals (`saved.py`), so that `last_good` can tell it from one that was being written.

transformers calls its reporters (TensorBoard, W&B) before the callbacks a user gives, and hands a callback no way to reach
the list. So this one looks up the stack for the handler that is calling it, and moves to the front. The alternative, a function to
be called on the finished trainer, would be a second line, and silent where it is forgotten.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from finetooth import generated, saved, settings, shards
from finetooth.lines import Lines
from finetooth.optim import SelectiveAdamW
from finetooth.reference import Reference

Progress = Callable[[int, int, float | None], None]  # step, steps in all, last loss

_log = logging.getLogger(__name__)


class SelectiveCallback(TrainerCallback):
    """True gradient norms, rates and skipped steps in the logs, sealed checkpoints; settings that do not go together are a ValueError.

    Args:
        opt: the optimizer that the trainer was given.
        metrics: a file to which every log is appended, as a line of JSON.
        progress: called after every step with (step, steps in all, last loss).
        seal: declare every checkpoint complete when the trainer has written it, for `finetooth.last_good`.

    Raises ValueError when the trainer is made, or at the latest when training begins, naming every such setting.
    """

    def __init__(
        self,
        opt: SelectiveAdamW,
        metrics: Path | None = None,
        progress: Progress | None = None,
        seal: bool = True,
    ) -> None:
        self._opt, self._progress, self._seal = opt, progress, seal
        self._metrics = None if metrics is None else Lines(metrics)
        self._loss: float | None = None
        self._rate: float | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the settings, before data or memory are spent on them."""
        if kwargs.get("optimizer") is not None:  # a trainer of one's own may make it later
            self._check(args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check again what may have changed, and take over clipping."""
        self._check(args, **kwargs)
        _check_checkpoints(args, state, self._opt, self._seal)
        if self._seal:
            generated.check(args, state, kwargs.get("train_dataloader"))
        generated.go_on(state, kwargs.get("train_dataloader"))
        if self._seal and args.should_save and args.save_strategy != "no":
            saved.promise(Path(args.output_dir))
        if args.max_grad_norm:
            own = f"to {self._opt.max_grad_norm}" if self._opt.max_grad_norm else "nothing, as it was built to"
            _log.warning("the optimizer clips %s; max_grad_norm of %s is set to 0.", own, type(args).__name__)
            args.max_grad_norm = 0.0  # read anew at every step
        if self._metrics is not None and state.is_world_process_zero:
            self._metrics.cut(state.global_step)  # later lines belong to what was lost

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the rate of the step: the schedule has moved on when it is logged."""
        self._rate = float(self._opt.param_groups[0]["lr"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint, when every rank has written its part."""
        if not self._seal:
            return
        shards.wait()
        if args.should_save:
            saved.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Put the optimizer's figures into a log of training, and append every log to the metrics file."""
        if logs is None:
            return
        if "learning_rate" in logs:
            figures = {"grad_norm": self._opt.grad_norm, "skipped_steps": self._opt.skipped}
            figures |= {"clipped_steps": self._opt.clipped} if self._opt.max_grad_norm else {}
            figures |= {} if self._rate is None else {"learning_rate": self._rate}
            logs.update(figures)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(figures)  # a copy, made before the callbacks are called
        self._loss = logs.get("loss", self._loss)
        self._report(state)
        if self._metrics is not None and state.is_world_process_zero:
            numbers = {k: v for k, v in logs.items() if isinstance(v, int | float)}
            self._metrics.append({"step": state.global_step, **numbers})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report progress after every optimizer step, and log the last one whatever its number."""
        control.should_log = control.should_log or state.global_step >= state.max_steps
        self._report(state)

    def _check(self, args: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        inner = optimizer
        while inner is not self._opt and hasattr(inner, "optimizer"):  # accelerate wraps it
            inner = inner.optimizer
        if inner is not self._opt:
            has = "none yet" if optimizer is None else f"a {type(optimizer).__name__}"
            raise ValueError(
                f"the trainer's optimizer is not the callback's, but {has}: give it optimizers=(opt, None)."
            )
        settings.check(args, model, self._opt)
        if (handler := _handler()) is None:
            return
        if any(isinstance(getattr(c, "ref_model", None), Reference) for c in handler.callbacks):
            raise ValueError(
                "sync_ref_model=True needs a reference model with weights of its own: leave it out, or give the trainer a "
                "second model."
            )
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)

    def _report(self, state: Any) -> None:
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps, self._loss)


def _handler() -> CallbackHandler | None:
    """The handler that is calling a callback: nothing else knows the order of the callbacks."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), CallbackHandler):
            return found
        frame = frame.f_back
    return None


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
