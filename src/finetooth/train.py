"""The main job: a recipe in, a run folder out.

The loop is TRL's `SFTTrainer`. Ours are the optimizer, which goes in through `optimizers=`, the tokenization, which
training and evaluation share, and the measurements before and after. The trainer's clipping is off
(`max_grad_norm=0`), because it would look at the gradients of weights that are not chosen; the optimizer clips.

A run may be killed at any time: `resume` goes on from the last checkpoint that is as it was saved, and ends with the bits and
metrics of a run that was not killed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import SFTConfig

from finetooth import reporting, run
from finetooth.card import card
from finetooth.delta import Delta
from finetooth.files import room
from finetooth.guard import NonFiniteError
from finetooth.hf import Progress, SelectiveCallback
from finetooth.history import History
from finetooth.jobs import Job, check, load, optimizer
from finetooth.measure import (
    Measured,
    forgetting,
    measure,
    notes,
    quantized,
    remarks,
    reverts,
    sample,
    samples,
    summary,
)
from finetooth.methods import METHODS
from finetooth.optim import SelectiveAdamW
from finetooth.recipe import Recipe
from finetooth.trainer import Trainer


def train(
    recipe: Recipe,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    before: Measured | None = None,
) -> dict[str, Any]:
    """Run a recipe; the results, as they are also written to `results.json`.

    There `run` is the folder's name, here its path. `say` is told, before training starts, what a person should know
    about the data, and about checkpoints that cannot be used. `before` is what `measure` said of the base, where it is known.

    Raises NotWritten if the disk is full, and NonFiniteError after `train.stop_after_nonfinite` bad steps in a row: the last
    complete checkpoint is unharmed, and named.
    """
    started = time.monotonic()
    check(recipe, resume)
    folder = Path(recipe.output)
    checkpoint = run.resumed(folder, say) if resume else None
    job = load(recipe, folder)
    if say is not None:
        for remark in remarks(job):
            say(remark)
    with run.kept(folder):
        run.start(recipe)
        return _run(job, checkpoint, progress, started, before or measure(job))


def _run(
    job: Job, checkpoint: Path | None, progress: Progress | None, started: float, base: Measured
) -> dict[str, Any]:
    recipe, folder = job.recipe, job.folder
    before, said_before = base
    opt = optimizer(job)
    trainer = make_trainer(job, opt, progress)
    costs = fitted(trainer, checkpoint)
    reporting.finish(trainer)
    if not opt.steps:
        raise NonFiniteError(
            f"none of the {opt.skipped} steps had a finite gradient: nothing was trained, nothing is saved."
        )
    opt.verify_frozen()
    delta = Delta.extract(job.model, opt, recipe=recipe.public().to_json(), method=recipe.method.name)
    delta.save(folder / "delta.safetensors")
    after, said_after = measure(job)
    after |= quantized(job, opt)
    results = {
        "method": recipe.method.name,
        "base": Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model,
        "revision": delta.base.revision,
        "before": before,
        "after": after,
        "forgetting": forgetting(before, after),
        **summary(job, delta, folder),
        "reverted": reverts(job, delta),
        "sample": sample(job, said_before, said_after),
        "data": notes(job),
        "skipped_steps": opt.skipped,
        "state_bytes": opt.state_bytes(),
        **costs,
        "peak_bytes": peak_bytes(),
        "seconds": round(time.monotonic() - started, 1)
        if checkpoint is None
        else None,  # of one process, not of the run
        "run": folder.name,
    }
    run.write_json(folder / run.SAMPLES, samples(job, said_before, said_after))
    run.write_json(folder / run.RESULTS, results)
    said = card(recipe, results, METHODS[recipe.method.name].paper, run.environment())
    run.write_text(folder / "README.md", said)
    if recipe.merged:
        with room(folder / "merged"):
            job.model.save_pretrained(folder / "merged")  # type: ignore[operator]
            job.tokenizer.save_pretrained(folder / "merged")
    return {**results, "run": str(folder)}


def make_trainer(job: Job, opt: SelectiveAdamW, progress: Progress | None) -> Trainer:
    """TRL's trainer on tokenized rows, with nothing of its own that would touch the optimizer's work."""
    ours = SelectiveCallback(opt, job.folder / run.METRICS, progress, seal=False)
    trainer = Trainer(
        model=job.model,
        args=arguments(job),
        train_dataset=dataset(job),
        processing_class=job.tokenizer,
        optimizers=(opt, None),
        callbacks=[ours, History(opt, job.folder)],
    )
    trainer.selective = opt
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(callback)
    reporting.arrange(trainer, job.folder)
    return trainer


def fitted(trainer: transformers.Trainer, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train. How many seconds that took without checkpoints, which nobody knows of a run that was resumed, and the most memory held by its end."""
    began = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    saving = getattr(trainer, "saving_seconds", 0.0)  # ours knows it
    seconds = round(time.monotonic() - began - saving, 2) if checkpoint is None else None
    return {"train_seconds": seconds, "train_peak_bytes": peak_bytes()}


def dataset(job: Job) -> Dataset:
    """The training rows as the trainer takes them."""
    return Dataset.from_list([{"input_ids": e.ids, "labels": e.labels} for e in job.train.examples])


def arguments(job: Job, clip: float = 0.0, save: bool = True) -> SFTConfig:
    """The trainer's settings; it clips to `clip`, which a selective optimizer does itself."""
    recipe, how, rate = job.recipe, job.recipe.train, job.recipe.optimizer
    return SFTConfig(
        output_dir=str(job.folder / "checkpoints"),
        num_train_epochs=how.epochs,
        max_steps=how.max_steps or -1,
        per_device_train_batch_size=how.batch_size,
        gradient_accumulation_steps=how.accumulate,
        max_length=how.max_length,
        packing=recipe.data.packing,
        learning_rate=rate.lr,
        lr_scheduler_type=rate.schedule,
        warmup_steps=rate.warmup_steps,
        max_grad_norm=clip,
        bf16=False,
        fp16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=how.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if how.gradient_checkpointing else None,
        save_strategy="steps" if save else "no",
        save_steps=how.checkpoint_every or 500,
        logging_steps=10,
        logging_first_step=True,
        seed=how.seed,
        report_to=list(how.report_to) or "none",
        run_name=job.folder.name,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def peak_bytes() -> dict[str, int]:
    """The most that this process has held: of the host's memory, and of the GPU's."""
    found = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.max_memory_allocated()
    return found
