"""The main job: a recipe in, a run folder out.

The loop is TRL's `SFTTrainer`. Ours are the optimizer, which goes in through `optimizers=`, the tokenization, which
training and evaluation share, and the measurements before and after. The trainer's clipping is off
(`max_grad_norm=0`), because it would look at the gradients of weights that are not chosen; the optimizer clips.

A run may be killed at any time: `resume` goes on from the last checkpoint that is as it was saved, and ends with the bits and
metrics of a run that was not killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig

from finetooth import reporting, run
from finetooth.card import card
from finetooth.delta import Delta
from finetooth.files import room
from finetooth.guard import NonFiniteError
from finetooth.hf import Progress, SelectiveCallback
from finetooth.jobs import Job, check, load, optimizer
from finetooth.measure import forgetting, measure, notes, quantized, remarks, reverts, sample, summary
from finetooth.methods import METHODS
from finetooth.optim import SelectiveAdamW
from finetooth.recipe import Recipe
from finetooth.trainer import Trainer


def train(
    recipe: Recipe,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe; the results, as they are also written to `results.json`.

    There `run` is the folder's name, here its path. `say` is told, before training starts, what a person should know
    about the data, and about checkpoints that cannot be used.

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
        return _run(job, checkpoint, progress, started)


def _run(job: Job, checkpoint: Path | None, progress: Progress | None, started: float) -> dict[str, Any]:
    recipe, folder = job.recipe, job.folder
    before, said_before = measure(job)
    opt = optimizer(job)
    trainer = make_trainer(job, opt, progress)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
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
        "seconds": round(time.monotonic() - started, 1),
        "run": folder.name,
    }
    run.write_json(folder / "results.json", results)
    said = card(recipe, results, METHODS[recipe.method.name].paper, run.environment())
    run.write_text(folder / "README.md", said)
    if recipe.merged:
        with room(folder / "merged"):
            job.model.save_pretrained(folder / "merged")  # type: ignore[operator]
            job.tokenizer.save_pretrained(folder / "merged")
    return {**results, "run": str(folder)}


def make_trainer(job: Job, opt: SelectiveAdamW, progress: Progress | None) -> Trainer:
    """TRL's trainer on tokenized rows, with nothing of its own that would touch the optimizer's work."""
    recipe, how, rate = job.recipe, job.recipe.train, job.recipe.optimizer
    rows = [{"input_ids": e.ids, "labels": e.labels} for e in job.train.examples]
    args = SFTConfig(
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
        max_grad_norm=0.0,
        bf16=False,
        fp16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=how.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if how.gradient_checkpointing else None,
        save_strategy="steps",
        save_steps=how.checkpoint_every or 500,
        logging_steps=10,
        logging_first_step=True,
        seed=how.seed,
        report_to=list(how.report_to) or "none",
        run_name=job.folder.name,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=job.model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=job.tokenizer,
        optimizers=(opt, None),
        callbacks=[SelectiveCallback(opt, job.folder / "metrics.jsonl", progress, seal=False)],
    )
    trainer.selective = opt
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(callback)
    reporting.arrange(trainer, job.folder)
    return trainer
