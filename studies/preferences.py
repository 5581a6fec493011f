"""DPO for a comparison: `finetooth compare … --runner studies/preferences.py`.

TRL's DPOTrainer on rows with a prompt, the completion that was chosen and the one that was rejected. The reference model is the policy
with its delta taken off; for LoRA and SHiRA, with its adapter off.

    task loss              of DPO, on the pairs of data.eval; ln 2 for the base
    preference accuracy    how often the chosen completion gained more log-likelihood than the rejected one; the base has none
    margin                 by how much, times β

TRL means these over batches of 16 pairs, the last of which may be smaller and counts as much.

Not covered: resuming; a run that was interrupted begins anew.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from finetooth import Delta, Reference, SelectiveCallback, evaluate, jobs, outsiders, run
from finetooth.measure import forgetting, summary
from finetooth.recipe import Recipe
from finetooth.train import fitted, peak_bytes

SAID = {"eval_loss": "task_loss", "eval_rewards/accuracies": "preference_accuracy", "eval_rewards/margins": "margin"}


def base(recipe: Recipe) -> tuple[dict[str, float], list[str]]:
    """What is measured before."""
    return {"task_loss": math.log(2), "general_loss": general(jobs.load(recipe, Path(recipe.output), False))}, []


def general(job: jobs.Job) -> float:
    return evaluate.general_loss(job.model, job.tokenizer, job.general, job.recipe.train.max_length)


def train(recipe: Recipe, before: tuple[dict[str, float], list[str]]) -> None:
    """One run, as `finetooth train` would write it."""
    started = time.monotonic()
    shutil.rmtree(recipe.output, ignore_errors=True)
    folder = run.start(recipe)
    job = jobs.load(recipe, folder)
    outside = recipe.method.name in outsiders.NAMES
    if outside:
        job.model = outsiders.wrapped(job.model, recipe.method, recipe.train.seed)
    opt: Any = outsiders.adamw(job.model, recipe) if outside else jobs.optimizer(job)
    trainer = made(job, opt, outside)
    costs = fitted(trainer)
    found = trainer.evaluate()
    if outside:
        job.model.save_pretrained(folder / "adapter")
        sizes = outsiders.size(job.model, folder)
    else:
        opt.verify_frozen()
        delta = Delta.extract(job.model, opt)
        delta.save(folder / "delta.safetensors")
        sizes = {**summary(job, delta, folder), "state_bytes": opt.state_bytes()}
    after = {name: found[key] for key, name in SAID.items()} | {"general_loss": general(job)}
    results = {
        "method": recipe.method.name,
        "before": before[0],
        "after": after,
        "forgetting": forgetting(before[0], after),
        **sizes,
        **costs,
        "peak_bytes": peak_bytes(),
        "seconds": round(time.monotonic() - started, 1),
    }
    run.write_json(folder / "results.json", results)


def made(job: jobs.Job, opt: Any, outside: bool) -> DPOTrainer:
    """TRL's trainer with the settings of the recipe."""
    recipe, how, rate = job.recipe, job.recipe.train, job.recipe.optimizer
    args = DPOConfig(
        str(job.folder / "checkpoints"),
        max_steps=how.max_steps or -1,
        num_train_epochs=how.epochs,
        per_device_train_batch_size=how.batch_size,
        gradient_accumulation_steps=how.accumulate,
        per_device_eval_batch_size=16,
        max_length=how.max_length,
        learning_rate=rate.lr,
        lr_scheduler_type=rate.schedule,
        warmup_steps=rate.warmup_steps,
        max_grad_norm=(rate.max_grad_norm or 0.0) if outside else 0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=10,
        seed=how.seed,
        report_to="none",
        disable_tqdm=True,
    )
    return DPOTrainer(
        job.model,
        ref_model=None if outside else Reference(job.model, opt),
        args=args,
        train_dataset=pairs(recipe.data.train, recipe.data.separator, recipe.data.limit),
        eval_dataset=pairs(recipe.data.eval or "", recipe.data.separator, recipe.data.eval_limit),
        processing_class=job.tokenizer,
        optimizers=(opt, None),
        callbacks=[] if outside else [SelectiveCallback(opt, job.folder / "metrics.jsonl", seal=False)],
    )


def pairs(file: str, separator: str, limit: int | None) -> Dataset:
    """Rows as TRL takes them."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()][:limit]
    return Dataset.from_list(
        [{"prompt": r["prompt"] + separator, "chosen": r["completion"], "rejected": r["rejected"]} for r in rows]
    )
