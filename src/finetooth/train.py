"""The main job: a recipe in, a run folder out.

The loop is TRL's `SFTTrainer`. Ours are the optimizer, which goes in through `optimizers=`, the tokenization, which
training and evaluation share, and the measurements before and after. The trainer's clipping is off
(`max_grad_norm=0`), because it would look at the gradients of weights that are not chosen; the optimizer clips.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from finetooth import checkpoint, evaluate, run
from finetooth.assemble import build, check_options, loaded_from
from finetooth.base import bits
from finetooth.data import DataError, Prepared, documents, prepare
from finetooth.delta import Delta
from finetooth.hf import Progress, SelectiveCallback
from finetooth.methods import METHODS
from finetooth.moments import check as check_moments
from finetooth.optim import SelectiveAdamW
from finetooth.recipe import MethodPart, Recipe, RecipeError
from finetooth.rest import quantized_rest
from finetooth.rule import check_keep
from finetooth.spelled import choice

SAMPLES = 64  # of the evaluation rows, one is shown: the first that comes out right, if any does
CALIBRATION_BATCH = 8
# Settings of `build` that a recipe has in another section than `method`.
ELSEWHERE = {
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.max_grad_norm",
    "betas": "optimizer.betas",
    "eps": "optimizer.eps",
    "rounding": "optimizer.rounding",
    "decay_to": "optimizer.decay_to",
    "seed": "train.seed",
    "stop_after": "train.stop_after_nonfinite",
}


@dataclass
class Job:
    """Everything a run has loaded."""

    recipe: Recipe
    folder: Path
    tokenizer: Any
    train: Prepared
    eval: Prepared | None
    general: list[str]
    model: nn.Module

    @property
    def pad(self) -> int:
        """The id that padding gets."""
        return int(self.tokenizer.pad_token_id)


def train(
    recipe: Recipe,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe; the results, as they are also written to `results.json`.

    There `run` is the folder's name, here its path. `say` is told, before training starts, what a person should know
    about the data.
    """
    started = time.monotonic()
    check(recipe, resume)
    job = load(recipe, Path(recipe.output))
    folder = run.start(recipe)
    if say is not None:
        for remark in remarks(job):
            say(remark)
    before, said_before = measure(job)
    opt = optimizer(job)
    trainer = make_trainer(job, opt, progress)
    trainer.train(resume_from_checkpoint=str(run.last_checkpoint(folder)) if resume else None)
    opt.verify_frozen()
    delta = Delta.extract(job.model, opt, recipe=recipe.public().to_json(), method=recipe.method.name)
    delta.save(folder / "delta.safetensors")
    after, said_after = measure(job)
    after |= quantized(job, opt)
    results = {
        "method": recipe.method.name,
        "base": Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model,
        "before": before,
        "after": after,
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
    (folder / "README.md").write_text(run.card(recipe, results, METHODS[recipe.method.name].paper), encoding="utf-8")
    if recipe.merged:
        job.model.save_pretrained(folder / "merged")  # type: ignore[operator]
        job.tokenizer.save_pretrained(folder / "merged")
    return {**results, "run": str(folder)}


def check(recipe: Recipe, resume: bool) -> None:
    """Everything that can be known to be wrong before data and weights are read."""
    check_method(recipe.method)
    check_moments(recipe.optimizer.moments)
    check_evaluation(recipe)
    run.check(recipe, resume)
    check_context(recipe)


def check_context(recipe: Recipe) -> None:
    """DataError if rows may be longer than what the model was made for."""
    longest = recipe.train.max_length
    config = AutoConfig.from_pretrained(str(checkpoint.resolve(recipe.model)))
    context = getattr(config, "max_position_embeddings", None) or longest
    if longest > context:
        raise DataError(f"train.max_length={longest} is more than the model's context of {context} tokens.")


def check_method(part: MethodPart) -> None:
    """The row, its options and its budget; RecipeError for a setting that has its place in another section."""
    options = part.model_extra or {}
    for name in options:
        if name in ELSEWHERE:
            raise RecipeError(f"method.{name} is not read there: write {ELSEWHERE[name]}.")
    for pool, share in (part.keep if isinstance(part.keep, dict) else {"": part.keep}).items():
        if share is not None:
            check_keep(share, f"method.keep[{pool!r}]" if pool else "method.keep")
    check_options(part.name, options, keep=part.keep, targets=part.targets)


def check_evaluation(recipe: Recipe) -> None:
    """RecipeError for a measurement that has nothing to measure."""
    how, method = recipe.evaluate, recipe.method
    for name, wanted in (("task: exact_match", how.task == "exact_match"), ("quantized_bits", how.quantized_bits)):
        if wanted and recipe.data.eval is None:
            raise RecipeError(f"evaluate.{name} needs data.eval: there are no rows to measure on.")
    rule = METHODS[method.name].rule
    unit = choice("unit", (method.model_extra or {}).get("unit", rule.unit if rule else "matrix"))
    if how.quantized_bits and getattr(unit, "kind", unit) != "column":
        raise RecipeError(
            f"evaluate.quantized_bits={how.quantized_bits} rounds the columns that did not train, and {method.name!r} trains "
            f"by {unit}: choose gift-sw, or method.unit=column."
        )


def load(recipe: Recipe, folder: Path) -> Job:
    """Tokenizer and data first, then the model: bad data should not cost the loading of the weights."""
    source = str(checkpoint.resolve(recipe.model))
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise DataError(f"the tokenizer of {recipe.model} has neither a pad nor an end-of-sequence token.")
    data, longest = recipe.data, recipe.train.max_length
    learn = prepare(data.train, data, tokenizer, longest, data.limit)
    test = prepare(data.eval, data, tokenizer, longest, data.eval_limit) if data.eval else None
    if test is not None and not test.prompts and recipe.evaluate.task == "exact_match":
        raise DataError(f"{data.eval} has texts only: exact_match needs rows with a prompt, or messages.")
    general = documents(recipe.evaluate.forgetting) if recipe.evaluate.forgetting else []
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Job(recipe, folder, tokenizer, learn, test, general, model.to(device))


def optimizer(job: Job) -> SelectiveAdamW:
    """The method's optimizer, calibrated on rows of the training data where it wants that."""
    recipe = job.recipe
    row = METHODS[recipe.method.name]
    rows = job.train.examples[: recipe.method.calibration_rows]
    batches = (
        [evaluate.pad(batch, job.pad) for batch in evaluate.batched(rows, CALIBRATION_BATCH)]
        if row.calibrated
        else None
    )
    base: Any = loaded_from(job.model)
    if base is None and row.state == "dense" and row.rest.kind != "reset":  # its names are not the checkpoint's
        base = {name: p.detach().clone().cpu() for name, p in job.model.named_parameters()}
    return build(recipe.method.name, job.model, calibration=batches, base=base, **settings(recipe))


def settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says to `build`, apart from the model, calibration batches and base."""
    rate, method = recipe.optimizer, recipe.method
    return {
        "lr": rate.lr,
        "keep": method.keep,
        "targets": method.targets,
        "weight_decay": rate.weight_decay,
        "max_grad_norm": rate.max_grad_norm,
        "betas": rate.betas,
        "eps": rate.eps,
        "rounding": rate.rounding,
        "moments": rate.moments,
        "decay_to": rate.decay_to,
        "seed": recipe.train.seed,
        "stop_after": recipe.train.stop_after_nonfinite,
        **(method.model_extra or {}),
    }


class Trainer(SFTTrainer):
    """TRL's trainer without its model card, which would say of our checkpoints that their base is None."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has a card of its own."""


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
        save_total_limit=2,
        logging_steps=10,
        logging_first_step=True,
        seed=how.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=job.model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=job.tokenizer,
        optimizers=(opt, None),
        callbacks=[SelectiveCallback(opt, job.folder / "metrics.jsonl", progress)],
    )
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(callback)
    return trainer


def measure(job: Job) -> tuple[dict[str, float], list[str]]:
    """What the recipe asks for, on the model as it is, and a few generations."""
    how, out, said = job.recipe.evaluate, dict[str, float](), list[str]()
    if job.eval is not None and how.task != "none":
        out["task_loss"] = evaluate.task_loss(job.model, job.eval.examples, job.pad, how.batch_size)
    if job.eval is not None:
        exact = how.task == "exact_match"
        asked = [e for e in job.eval.examples if e.asked][: None if exact else SAMPLES]
        prompts = [e.asked for e in asked]
        said = evaluate.generate(job.model, job.tokenizer, prompts, how.max_new_tokens, how.batch_size)
        if exact:
            out["exact_match"] = evaluate.exact_match(said, asked, how.extract, job.eval.prompts)
    if job.general:
        out["general_loss"] = evaluate.general_loss(job.model, job.tokenizer, job.general, _context(job))
    return out, said


def _context(job: Job) -> int:
    return int(min(getattr(job.model.config, "max_position_embeddings", 1024), 1024))


def quantized(job: Job, opt: SelectiveAdamW) -> dict[str, float]:
    """The task loss with the columns that did not train in a few bits, where the recipe asks for it."""
    how = job.recipe.evaluate
    width = how.quantized_bits
    if width is None or job.eval is None:
        return {}
    columns = {n: s for n, s in opt.selections().items() if s.unit.kind in ("column", "row")}  # rows: stored transposed
    with quantized_rest(job.model, columns, width):
        loss = evaluate.task_loss(job.model, job.eval.examples, job.pad, how.batch_size)
    return {f"task_loss_at_{width}_bits": loss}


def summary(job: Job, delta: Delta, folder: Path) -> dict[str, Any]:
    """How much changed, and what it takes on disk."""
    info, weights = delta.info(), sum(p.numel() for p in job.model.parameters())
    size = (folder / "delta.safetensors").stat().st_size
    return {"changed": info["changed"], "weights": weights, "share": info["changed"] / weights, "delta_bytes": size}


@torch.no_grad()
def reverts(job: Job, delta: Delta) -> bool:
    """Take the delta off and compare every parameter with a fresh load of the base, bit for bit."""
    fresh = AutoModelForCausalLM.from_pretrained(str(checkpoint.resolve(job.recipe.model)), dtype=job.model.dtype)
    expected = dict(fresh.named_parameters())
    with delta.reverted(job.model):
        return all(torch.equal(bits(p.cpu()), bits(expected[name])) for name, p in job.model.named_parameters())


def sample(job: Job, before: list[str], after: list[str]) -> dict[str, str]:
    """One evaluation row with what the model said before and says now."""
    asked = [e for e in job.eval.examples if e.asked] if job.eval is not None else []
    if not asked or not after:
        return {}
    shown = range(min(SAMPLES, len(after)))
    right = [i for i in shown if evaluate.answer(after[i], job.recipe.evaluate.extract) == asked[i].target.strip()]
    at = right[0] if right else 0
    prompt = job.tokenizer.decode(asked[at].asked, skip_special_tokens=True)
    return {
        "prompt": prompt.strip(),
        "before": before[at].strip(),
        "after": after[at].strip(),
        "expected": asked[at].target,
    }


def notes(job: Job) -> dict[str, dict[str, int] | None]:
    """What must be known about the data, counted for each file."""
    return {"train": job.train.counts(), "eval": job.eval.counts() if job.eval is not None else None}


def remarks(job: Job) -> list[str]:
    """What a person should know about both files, each thing once."""
    eos = job.tokenizer.eos_token_id
    said = job.train.remarks(eos) + (job.eval.remarks(eos, "evaluation") if job.eval is not None else [])
    return list(dict.fromkeys(said))
