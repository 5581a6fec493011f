"""What is said of a run: quality and forgetting before and after, what changed, and that it comes off again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetooth import checkpoint, evaluate, overlap, preflight, pretrained
from finetooth.base import bits
from finetooth.data import Prepared, Tokens
from finetooth.delta import Delta
from finetooth.jobs import Job
from finetooth.method import span
from finetooth.methods import METHODS
from finetooth.optim import SelectiveAdamW
from finetooth.rest import quantized_rest

SAMPLES, SHOWN = 64, 8  # evaluation rows that are answered whatever the task is, and those of them that are kept
Measured = tuple[dict[str, float], list[str]]  # numbers, and what was generated
GENERATED = ("exact_match", "bleu", "rouge")  # tasks that need a generation for every row


def measure(job: Job, samples: int = SAMPLES) -> Measured:
    """What the recipe asks for, on the model as it is, and a few generations, or as many as the task needs."""
    how, out, said = job.recipe.evaluate, dict[str, float](), list[str]()
    if job.eval is not None and how.task != "none":
        out["task_loss"] = evaluate.task_loss(job.model, job.eval.examples, job.pad, how.batch_size)
    if job.eval is not None:
        asked = [e for e in job.eval.examples if e.asked][: None if how.task in GENERATED else samples]
        prompts = [e.asked for e in asked]
        said = evaluate.generate(job.model, job.tokenizer, prompts, how.max_new_tokens, how.batch_size)
        out |= _quality(job, job.eval, said, asked)
    if job.general:
        out["general_loss"] = evaluate.general_loss(job.model, job.tokenizer, job.general, _context(job))
    return out, said


def _quality(job: Job, rows: Prepared, said: list[str], asked: list[Tokens]) -> dict[str, float]:
    """What the task is about; a row that the cut left nothing of is a miss, or an empty text."""
    how = job.recipe.evaluate
    if how.task == "exact_match":
        return {"exact_match": evaluate.exact_match(said, asked, how.extract, rows.prompts)}
    if how.task == "choice":
        return evaluate.choice_accuracy(job.model, rows.examples, job.pad, how.batch_size, rows.prompts)
    if how.task in ("bleu", "rouge"):
        lost = [e for e in rows.lost if e.asked]
        texts = [evaluate.answer(text, how.extract) for text in said] + [""] * len(lost)
        references = [e.references for e in asked + lost]
        return {"bleu": overlap.bleu(texts, references)} if how.task == "bleu" else overlap.rouge(texts, references)
    return {}


def forgetting(before: dict[str, float], after: dict[str, float]) -> float | None:
    """General loss after minus before, in nats (see `evaluate.py`); None without a general text."""
    return after["general_loss"] - before["general_loss"] if "general_loss" in after else None


def _context(job: Job) -> int:
    return min(pretrained.context(job.model.config) or 1024, 1024)


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
    """One evaluation row with what the model said before and says now: the first that comes out right, if any does."""
    rows = _told(job, before, after)
    right = [row for row in rows if row["right"]]
    return {key: (right or rows)[0][key] for key in ("prompt", "before", "after", "expected")} if rows else {}


def samples(job: Job, before: list[str], after: list[str], most: int = SHOWN) -> list[dict[str, Any]]:
    """Some evaluation rows with what the model said before and says now, spread over the file; `right`: as the task asks."""
    rows = _told(job, before, after)
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else rows


def _told(job: Job, before: list[str], after: list[str]) -> list[dict[str, Any]]:
    """The first rows that were asked, with their answers."""
    asked = [e for e in job.eval.examples if e.asked] if job.eval is not None else []
    return [
        {
            "prompt": job.tokenizer.decode(e.asked, skip_special_tokens=True).strip(),
            "before": was.strip(),
            "after": now.strip(),
            "expected": e.target,
            "right": evaluate.answer(now, job.recipe.evaluate.extract) == e.target.strip(),
        }
        for e, was, now in list(zip(asked, before, after, strict=False))[:SAMPLES]
    ]


def notes(job: Job) -> dict[str, Any]:
    """What must be known about the data, counted for each file, and how many evaluation rows are training rows as well."""
    if job.eval is None:
        return {"train": job.train.counts(), "eval": None}
    return {
        "train": job.train.counts(),
        "eval": job.eval.counts(),
        "in_both": preflight.in_both(job.train, job.eval),
    }


def remarks(job: Job) -> list[str]:
    """What a person should know about both files, each thing once."""
    how, rows = job.recipe.train, len(job.train.examples)
    taken = how.batch_size * how.accumulate
    more = [f"a step takes {taken} rows and there are {rows}: every epoch is one step."] if taken > rows else []
    rate, row = job.recipe.optimizer, METHODS[job.recipe.method.name]
    near = row.rates_near(job.recipe.method.keep)
    if "lr" not in rate.model_fields_set and near is not None and near[1][0] > 1:
        more.append(
            f"optimizer.lr is left at {rate.lr:g}, which is one for full fine-tuning: in our study {row.name} with keep={near[0]:g} did best at "
            f"{span(near[1])} times its rate."
        )
    return preflight.remarks(job.train, job.eval, preflight.stops(job.recipe.model, job.tokenizer)) + more
