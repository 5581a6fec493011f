"""What a run needs before it can train: a recipe that can be run, data, model, and the method's optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetooth import answers, evaluate, overlap, pretrained, reporting, run
from finetooth.anatomy import TARGETS
from finetooth.assemble import build, check_options, loaded_from
from finetooth.data import DataError, Prepared, documents, prepare
from finetooth.method import is_token
from finetooth.methods import METHODS
from finetooth.moments import check as check_moments
from finetooth.nearest import hint
from finetooth.optim import SelectiveAdamW
from finetooth.recipe import MethodPart, Recipe, RecipeError
from finetooth.rule import check_keep
from finetooth.spelled import choice

CALIBRATION_BATCH = 8
ASKED = ("exact_match", "choice", "bleu", "rouge")  # tasks that need a prompt
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


def check(recipe: Recipe, resume: bool) -> None:
    """Everything that can be known to be wrong before data and weights are read."""
    check_method(recipe.method)
    check_moments(recipe.optimizer.moments)
    reporting.check(recipe.train.report_to)
    check_evaluation(recipe)
    run.check(recipe, resume)
    check_context(recipe)
    pretrained.check_weights(recipe.model)


def check_context(recipe: Recipe) -> None:
    """RecipeError for a model that cannot be trained here, DataError if rows may be longer than what it was made for."""
    longest = recipe.train.max_length
    context = pretrained.context(pretrained.config(recipe.model)) or longest
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
    for pattern in [part.targets] if isinstance(part.targets, str) else part.targets or ():
        if pattern not in TARGETS and not set(pattern) & set(".*?["):  # every parameter's name has a dot
            raise RecipeError(
                f"method.targets={pattern!r}: expected {', '.join(TARGETS)}, or patterns of parameter names such as '*.mlp.*'."
                f"{hint(pattern, TARGETS)}"
            )
    named = [name for name in MethodPart.model_fields if name not in options]
    if "rows" in options:  # the texts of tokens are looked up when there is a tokenizer
        parts = options["rows"] if isinstance(options["rows"], list) else [options["rows"]]
        options = {**options, "rows": [part for part in parts if not is_token(part)] or [0]}
    check_options(part.name, options, part.keep, part.targets, part.exclude, named, "method.")
    row = METHODS[part.name]
    if row.source and part.calibration is None:
        raise RecipeError(
            f"{row.name!r} shields what matters on other data than it trains on: name a file of that in method.calibration."
        )
    if part.calibration is not None and not row.calibrated:
        raise RecipeError(f"method.calibration is not read: {row.name!r} does not measure before it chooses.")


def check_evaluation(recipe: Recipe) -> None:
    """RecipeError for a measurement that has nothing to measure."""
    how, method = recipe.evaluate, recipe.method
    for name, wanted in ((f"task: {how.task}", how.task in ASKED), ("quantized_bits", how.quantized_bits)):
        if wanted and recipe.data.eval is None:
            raise RecipeError(f"evaluate.{name} needs data.eval: there are no rows to measure on.")
    if how.choices is not None and how.task != "choice":
        raise RecipeError(f"evaluate.choices is read by task: choice, and the task is {how.task}.")
    overlap.check(how.task)
    row = METHODS.get(method.name)  # a comparison has outsiders
    rule = row.rule if row else None
    unit = choice("unit", (method.model_extra or {}).get("unit", rule.unit if rule else "matrix"))
    if how.quantized_bits and getattr(unit, "kind", unit) != "column":
        raise RecipeError(
            f"evaluate.quantized_bits={how.quantized_bits} rounds the columns that did not train, and {method.name!r} trains "
            f"by {unit}: choose gift-sw, or method.unit=column."
        )


def load(recipe: Recipe, folder: Path, training: bool = True) -> Job:
    """Tokenizer and data first, then the model: bad data should not cost the loading of the weights."""
    tokenizer = pretrained.tokenizer(recipe.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise DataError(f"the tokenizer of {recipe.model} has neither a pad nor an end-of-sequence token.")
    learn, test = read(recipe, tokenizer, training)
    general = documents(recipe.evaluate.forgetting) if recipe.evaluate.forgetting else []
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    check_ids(recipe, learn, test)
    model = pretrained.model(recipe.model, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Job(recipe, folder, tokenizer, learn, test, general, model.to(device))


def read(recipe: Recipe, tokenizer: Any, training: bool = True) -> tuple[Prepared, Prepared | None]:
    """The rows to train on, none if that is not wanted, and those to evaluate on, with what the task needs of them."""
    data, longest, task = recipe.data, recipe.train.max_length, recipe.evaluate.task
    learn = prepare(data.train, data, tokenizer, longest, data.limit) if training else Prepared()
    if training and learn.flaws["empty"] == learn.rows:
        raise DataError(
            f"{data.train}: the answer of every row is empty: there is nothing to learn but to say nothing."
        )
    if data.eval is None:
        return learn, None
    also = answers.reader(recipe.evaluate, tokenizer)
    test = prepare(data.eval, data, tokenizer, longest, data.eval_limit, also)
    if task in ASKED and not test.prompts:
        raise DataError(f"{data.eval} has texts only: {task} needs rows with a prompt, or messages.")
    return learn, test


def check_ids(recipe: Recipe, *files: Prepared | None) -> None:
    """DataError for a tokenizer that knows tokens for which the model has no embedding."""
    known = getattr(pretrained.config(recipe.model).get_text_config(), "vocab_size", None)
    largest = max((max(e.ids) for file in files if file for e in file.examples), default=0)
    if known is not None and largest >= known:
        raise DataError(
            f"the tokenizer of {recipe.model} makes the token {largest}, and the model has embeddings for {known} (0 to {known - 1}): "
            "it is another model's, or was added to. Resize the embeddings, save the model, and give that folder."
        )


def optimizer(job: Job) -> SelectiveAdamW:
    """The method's optimizer, calibrated on rows of the training data where it wants that."""
    recipe = job.recipe
    row = METHODS[recipe.method.name]
    source, longest = recipe.method.calibration, recipe.train.max_length
    measured = job.train if source is None else prepare(source, recipe.data, job.tokenizer, longest, None)
    rows = measured.examples[: recipe.method.calibration_rows]
    batches = (
        [evaluate.pad(batch, job.pad) for batch in evaluate.batched(rows, CALIBRATION_BATCH)]
        if row.calibrated
        else None
    )
    base: Any = loaded_from(job.model)
    if base is None and row.state == "dense" and row.rest.kind != "reset":  # its names are not the checkpoint's
        base = {name: p.detach().clone().cpu() for name, p in job.model.named_parameters()}
    return build(
        recipe.method.name, job.model, calibration=batches, base=base, **settings(recipe, len(job.train.examples))
    )


def settings(recipe: Recipe, rows: int | None = None) -> dict[str, Any]:
    """What a recipe says to `build`, apart from the model, calibration batches and base; rows: of the training data, where known."""
    rate, method = recipe.optimizer, recipe.method
    return {
        "lr": rate.lr,
        "keep": method.keep,
        "targets": method.targets,
        "exclude": method.exclude,
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
        **_numbered(recipe),
    } | _length(recipe, rows)


def _length(recipe: Recipe, rows: int | None) -> dict[str, int]:
    """`steps` of the run, for a row that takes them and was not told."""
    how, given = recipe.train, recipe.method.model_extra or {}
    if "steps" not in METHODS[recipe.method.name].options or given.get("steps") is not None:
        return {}
    if how.max_steps is not None:
        return {"steps": how.max_steps}
    batches = None if rows is None or recipe.data.packing else math.ceil(rows / how.batch_size)
    return {} if batches is None else {"steps": math.ceil(how.epochs * math.ceil(batches / how.accumulate))}


def _numbered(recipe: Recipe) -> dict[str, Any]:
    """`method.rows` with the number of a token in the place of its text."""
    given = (recipe.method.model_extra or {}).get("rows")
    parts = given if isinstance(given, list) else [given]
    if not any(is_token(part) for part in parts):
        return {}
    tokenizer = pretrained.tokenizer(recipe.model)
    found = [tokenizer.convert_tokens_to_ids(part) if is_token(part) else part for part in parts]
    for part, number in zip(parts, found, strict=True):
        if number is None or (is_token(part) and number == tokenizer.unk_token_id and part != tokenizer.unk_token):
            raise RecipeError(f"method.rows: the tokenizer of {recipe.model} has no token {part!r}.")
    return {"rows": found}
