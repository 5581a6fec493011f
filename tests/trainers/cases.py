"""The embedded model in every trainer, a few steps long: what the tests of trainers share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

import finetooth
from finetooth import embedded

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO lives there, and says so at every import

from trl.experimental.orpo import ORPOConfig, ORPOTrainer

SOURCE = str(embedded.path("stories260K"))
TEXTS = [
    ("Once upon a time, ", "there was a little girl.", "a a a a."),
    ("Lily saw a ", "big dog in the park.", "the of and."),
    ("Tom was ", "sad, but then he smiled.", "Tom Tom."),
    ("The sun ", "was warm.", "ran very sad and big and then the."),
]
KEEP: dict[str, Any] = {"gift-sw": 8, "grad": 0.05, "snip": 0.05, "magnitude": 0.05, "random": 0.05}


def load(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(SOURCE, dtype=dtype)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SOURCE)


def build(row: str, model: PreTrainedModel, **given: Any) -> finetooth.SelectiveAdamW:
    batch = dict(tokenizer()([prompt + good for prompt, good, _ in TEXTS[:1]], return_tensors="pt"))
    settings = {"lr": 1e-3, "keep": KEEP.get(row), "calibration": [{**batch, "labels": batch["input_ids"]}], **given}
    return finetooth.build(row, model, **settings)


def preferences(n: int = 16) -> Dataset:
    rows = [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in TEXTS]
    return Dataset.from_list(rows * (n // len(rows)))


def _rows(kind: str, n: int) -> Any:
    if kind == "trainer":
        ids = [tokenizer()(p + good)["input_ids"][:8] for p, good, _ in TEXTS]
        return [{"input_ids": i, "labels": i} for i in ids] * (n // len(ids))
    if kind == "sft":
        return Dataset.from_list([{"prompt": p, "completion": good} for p, good, _ in TEXTS] * (n // len(TEXTS)))
    if kind == "kto":
        good = [{"prompt": p, "completion": c, "label": True} for p, c, _ in TEXTS]
        return Dataset.from_list(
            (good + [{"prompt": p, "completion": r, "label": False} for p, _, r in TEXTS]) * (n // 8)
        )
    if kind == "grpo":
        return Dataset.from_list([{"prompt": p} for p, _, _ in TEXTS] * (n // len(TEXTS)))
    return preferences(n)


def length(completions: list[str], **_: Any) -> list[float]:
    """A reward: short words are good."""
    return [-len(c) / max(1, len(c.split())) for c in completions]


KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "trainer": (Trainer, TrainingArguments, {}),
    "sft": (SFTTrainer, SFTConfig, {}),
    "dpo": (DPOTrainer, DPOConfig, {"max_length": 48}),
    "kto": (KTOTrainer, KTOConfig, {"max_length": 48}),
    "orpo": (ORPOTrainer, ORPOConfig, {"max_length": 48}),
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "max_completion_length": 8}),
}


def trainer(
    kind: str, model: PreTrainedModel, opt: Any, folder: Path, more: dict[str, Any] | None = None, **given: Any
) -> Any:
    """A trainer with its own defaults, but for its length and where it writes; `given` goes into its arguments."""
    made, config, own = KINDS[kind]
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        **own,
        **given,
    }
    args = config(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **settings)
    words = {
        "model": model,
        "args": args,
        "train_dataset": _rows(kind, 16),
        "processing_class": tokenizer(),
        **(more or {}),
    }
    if kind == "grpo":
        words["reward_funcs"] = length
    return made(optimizers=(opt, None), **words)
