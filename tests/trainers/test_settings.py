"""Settings that do not go together are refused before training, by name, with what to do instead."""

from pathlib import Path
from typing import Any

import pytest
import torch

import finetooth
from finetooth import settings

from .cases import build, load, trainer

REFUSED = [
    ("gmt", {"learning_rate": 5e-4}, "learning_rate=0.0005 .* lr=0.001"),
    ("gmt", {"weight_decay": 0.1}, "weight_decay=0.1 .* weight_decay=0.0"),
    ("gmt", {"adam_beta2": 0.95}, r"adam_beta2=0.95 .* betas\[1\]=0.999"),
    ("gmt", {"max_grad_norm": 0.3}, "max_grad_norm=0.3 .* max_grad_norm=1.0"),
    ("gmt", {"optim": "adafactor"}, "optim='adafactor'"),
    (
        "dst",
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
        "load_best_model_at_end",
    ),
    ("gmt", {"bf16_full_eval": True}, "bf16_full_eval=True casts"),
    (
        "grad",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "enable_input_require_grads",
    ),
]


@pytest.mark.parametrize(
    ("row", "given", "said"), REFUSED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None
)
def test_refused(row: str, given: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = load()
    opt = build(row, model)
    more: dict[str, Any] = {"callbacks": [finetooth.SelectiveCallback(opt)]}
    if "eval_strategy" in given:
        more["eval_dataset"] = [{"input_ids": [1], "labels": [1]}]
    with pytest.raises(ValueError, match=said):
        trainer("trainer", model, opt, tmp_path, more, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": 1e-3},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 1.0, "weight_decay": 0.0},
        {"gradient_checkpointing": True},
        {"torch_compile": False, "bf16": True},
    ],
    ids=str,
)
def test_what_says_the_same_is_fine(given: dict[str, Any], tmp_path: Path) -> None:
    model = load()
    opt = build("grad", model)
    trainer("trainer", model, opt, tmp_path, {"callbacks": [finetooth.SelectiveCallback(opt)]}, **given)


class Args:
    """Settings that need a GPU or DeepSpeed to be made for real."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fp16": True}, "fp16=True .* bf16=True, or build with gradients='dense'"),
        ({"deepspeed": "zero3.json"}, "deepspeed .* FSDP2"),
        ({"n_gpu": 2}, "2 GPUs .* CUDA_VISIBLE_DEVICES"),
    ],
)
def test_refused_without_the_hardware(given: dict[str, Any], said: str) -> None:
    model = load()
    with pytest.raises(ValueError, match=said):
        settings.check(Args(**given), model, build("grad", model))


def test_fp16_with_dense_gradients_is_fine() -> None:
    model = load()
    settings.check(Args(fp16=True), model, build("grad", model, gradients="dense"))
    settings.check(Args(fp16=True), model, build("gmt", model))


def test_another_model_and_no_optimizer(tmp_path: Path) -> None:
    opt = build("gmt", load())
    callback = finetooth.SelectiveCallback(opt)
    with pytest.raises(ValueError, match="built for another model"):
        trainer("trainer", load(), opt, tmp_path, {"callbacks": [callback]})
    made = trainer("trainer", load(), None, tmp_path, {"callbacks": [callback]})
    with pytest.raises(ValueError, match=r"give it optimizers=\(opt, None\)"):
        made.train()


def test_a_model_that_was_changed_after_build() -> None:
    model = load()
    opt = build("grad", model)
    model.requires_grad_(False)  # as PEFT does
    with pytest.raises(ValueError, match="peft_config"):
        settings.check(Args(), model, opt)
    model = load()
    opt = build("gmt", model)
    model.resize_token_embeddings(600)
    with pytest.raises(RuntimeError, match=r"\[600, 64\] and was torch.float32 \[512, 64\]"):
        settings.check(Args(), model, opt)


def test_all_at_once() -> None:
    model = load()
    with pytest.raises(ValueError, match=r"fp16(.|\n)*deepspeed"):
        settings.check(Args(fp16=True, deepspeed="x"), model, build("grad", model))


def test_a_reference_that_follows_the_policy_is_refused(tmp_path: Path) -> None:
    model = load()
    opt = build("grad", model)
    more = {"ref_model": finetooth.Reference(model, opt), "callbacks": [finetooth.SelectiveCallback(opt)]}
    made = trainer("dpo", model, opt, tmp_path, more, sync_ref_model=True)
    with pytest.raises(ValueError, match="sync_ref_model=True"):
        made.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), load().parameters(), strict=True))
