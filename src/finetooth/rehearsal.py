"""A training run without values: the model from its config, its batches as shapes, live bytes counted as they come and go.

    calibrate and choose    statistics, dense gradients where a row measures them
    forward and backward    weights, state, gradients, what autograd holds; logits a tile at a time, as TRL's loss makes them
    step                    gradients, and what the optimizer holds beside its state
    evaluate                no gradients, but whole logits of `evaluate.batch_size` rows

Attention, checkpointing and dtypes are those of a CPU. A GPU's fused attention holds the same tensors; its loss does not:
TRL has kernels there that work in one tile of logits, where a CPU makes some ten copies of it (`gpu=True`).

Not covered: generation's key and value cache, writing checkpoints, several devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer import add_fused_lm_head

from finetooth import checkpoint, pretrained
from finetooth.assemble import arranged, loaded_from
from finetooth.evaluate import WINDOW_BATCH, by_row
from finetooth.jobs import CALIBRATION_BATCH, settings
from finetooth.longest import Batch
from finetooth.meter import Meter, unique_bytes
from finetooth.methods import METHODS
from finetooth.recipe import Recipe, RecipeError
from finetooth.understudy import Understudy

TILE = (4096, 32768)  # tokens and vocabulary entries of TRL's tile


@dataclass
class Rehearsal:
    """What was counted, in bytes, and the model and optimizer it was counted on, which have no values."""

    model: nn.Module
    opt: Understudy
    weights: int
    phases: dict[str, int] = field(default_factory=dict)
    gradients: int = 0  # alive after backward
    activations: int = 0  # what forward leaves for backward


def rehearse(recipe: Recipe, batch: Batch, gpu: bool) -> Rehearsal:
    """Build, two steps, and the evaluation that the recipe asks for; RecipeError for a model that looks at values to know its shapes."""
    meter = Meter(whole=gpu)
    with _without_values(recipe), FakeTensorMode():
        model = bare(recipe)
        weights = meter.hold([*model.parameters(), *model.buffers()])
        with meter:
            found = Rehearsal(model, _optimizer(recipe, model, batch, gpu), weights)
            found.phases["calibrate and choose"] = meter.peak
            _train(recipe, found, batch, meter, gpu)
            found.phases |= _evaluate(recipe, model, batch, meter)
    return found


@contextmanager
def _without_values(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise RecipeError(
            f"{recipe.model} cannot be planned: its forward looks at values to know its shapes ({error}), as some mixtures of experts do, and a "
            "plan has none. `finetooth train` with train.max_steps=2 says what it takes."
        ) from error


def bare(recipe: Recipe) -> nn.Module:
    """The model of a recipe without values, from its config alone, in the dtype that training loads."""
    config = AutoConfig.from_pretrained(str(checkpoint.resolve(recipe.model)))
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _optimizer(recipe: Recipe, model: nn.Module, batch: Batch, gpu: bool) -> Understudy:
    """As `jobs.optimizer`: calibrated on eight rows at a time, the base from the folder or a copy in the host's memory."""
    row = METHODS[recipe.method.name]
    base: Any = loaded_from(model)
    if base is None and row.state == "dense" and row.rest.kind != "reset":
        base = {name: p.detach() if gpu else p.detach().clone() for name, p in model.named_parameters()}
    rows = min(CALIBRATION_BATCH, recipe.method.calibration_rows, batch.known or CALIBRATION_BATCH)
    masked = batch.ragged and "grad" in row.calibration  # norms of inputs leave padding out by value
    calibration = [Batch(rows, batch.tokens, masked, False, "").inputs()] if row.calibrated else None
    asked = {**settings(recipe), "exclude": None}  # it says which units train, and of how many only where few are left
    return Understudy(**arranged(row, model, calibration=calibration, base=base, **asked))


def _train(recipe: Recipe, found: Rehearsal, batch: Batch, meter: Meter, gpu: bool) -> None:
    """Two steps, since the first makes the state; of each two micro-batches, since the first makes the gradients."""
    model, opt, phases = found.model, found.opt, {"forward and backward": 0, "step": 0}
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if not gpu:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    for _ in range(2):
        meter.mark()
        for _ in range(min(2, recipe.train.accumulate)):
            before = meter.now
            loss = _loss(model, batch, gpu)
            found.activations = max(found.activations, meter.now - before)
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
        phases["forward and backward"] = max(phases["forward and backward"], meter.peak)
        grads = opt.gathered()
        found.gradients = max(found.gradients, unique_bytes(grads.values()))
        meter.mark()
        opt.spend(grads)
        phases["step"] = max(phases["step"], meter.peak)
        del grads
        opt.zero_grad()
    found.phases |= phases


def _loss(model: Any, batch: Batch, gpu: bool) -> Tensor:
    inputs = batch.inputs()
    if not gpu:
        return -model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum()  # type: ignore[no-any-return]
    del inputs["labels"]
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _Tiled.apply(flat, model.get_output_embeddings().weight)  # type: ignore[no-any-return, no-untyped-call]


class _Tiled(torch.autograd.Function):
    """What TRL's loss holds on a GPU: one tile of logits, made again in backward; gradients add up in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        tile = hidden.new_zeros((min(len(hidden), TILE[0]), TILE[1]))
        per_token = [hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(10)]
        ctx.save_for_backward(hidden, weight, *per_token[:3])
        del tile
        return per_token[0].sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors[:2]
        made = [torch.zeros_like(t, dtype=torch.float32) for t in (hidden, weight)[: 1 + ctx.needs_input_grad[1]]]
        tile = hidden.new_zeros((min(len(hidden), TILE[0]), TILE[1]))
        out = tuple(m.to(t.dtype) for m, t in zip(made, (hidden, weight), strict=False))
        del tile
        return out if len(out) == 2 else (*out, None)


def _evaluate(recipe: Recipe, model: nn.Module, batch: Batch, meter: Meter) -> dict[str, int]:
    """The logits of a whole batch, and those of one row as float32; cross-entropy makes one more of a row."""
    how = recipe.evaluate
    wanted = [(how.batch_size, batch.tokens)] if recipe.data.eval and how.task != "none" else []
    context = min(pretrained.context(model.config) or 1024, 1024)
    wanted += [(WINDOW_BATCH, context)] if how.forgetting else []
    model.eval()
    meter.mark()
    with torch.no_grad():
        for rows, tokens in wanted:
            inputs = Batch(rows, tokens, True, False, "").inputs()
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            by_row(logits, labels)
            del logits
    return {"evaluate": meter.peak} if wanted else {}
