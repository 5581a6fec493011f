"""The same fine-tune through every entry point, each written as a user would who wants to go on after a kill.

Each trains the embedded model, with attention dropout so that random states count, on 22 rows in batches of two, two of
which make a step: an epoch ends in the middle of an accumulation. A checkpoint is written every two steps. What an entry
returns is compared bit for bit; it is called again, in a new process, until it returns.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from safetensors.torch import load_model, save_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

import finetooth
from finetooth import embedded
from finetooth.hf import SelectiveCallback
from finetooth.recipe import load
from finetooth.train import train
from tests.laws.toy import own_score

ROWS, BATCH, ACCUMULATE, EPOCHS, EVERY = 22, 2, 2, 3, 2
PER_EPOCH = -(-ROWS // (BATCH * ACCUMULATE))  # the last step of an epoch has one batch less
STEPS = EPOCHS * PER_EPOCH
BUDGET: dict[str, Any] = {
    "gift-sw": {"keep": 8},
    **{row: {"keep": 0.05} for row in ("random", "grad", "snip", "magnitude", "own")},
    **{row: {"when": "every(3)"} for row in ("nano", "lisa", "badam")},  # choose again between two checkpoints
    "lift": {"when": "every(3)", "rank": 8},
    "spiel": {"when": "every(4)", "window": 3, "keep": 0.05, "steps": STEPS},
    "rows": {"rows": ["3-40", 300]},
}
SOURCE = {"ssu": {"calibration": "embedded:banking77/test"}}  # what a recipe says beyond that
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATE,
    "num_train_epochs": EPOCHS,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": EVERY,
    "save_total_limit": 2,
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}


class Ended(NamedTuple):
    """A model and its optimizer after the last step, and what was logged on the way."""

    model: Any
    optimizer: Any
    metrics: list[dict[str, Any]]


@cache
def rows() -> list[dict[str, str]]:
    """Prompts and completions."""
    with gzip.open(embedded.path("banking77/train"), "rt", encoding="utf-8") as file:
        return [{k: v for k, v in json.loads(line).items() if k != "label"} for line in islice(file, ROWS)]


def model_and_tokenizer() -> tuple[Any, Any]:
    source = str(embedded.path("stories260K"))
    model = AutoModelForCausalLM.from_pretrained(source, attention_dropout=0.1)
    return model, AutoTokenizer.from_pretrained(source)


def tokens(tokenizer: Any) -> list[dict[str, Any]]:
    """Every row as ids of one length."""
    texts = [f"{row['prompt']} {row['completion']}" for row in rows()]
    found = tokenizer(texts, truncation=True, padding="max_length", max_length=40)["input_ids"]
    return [{"input_ids": ids, "labels": [-100 if i == tokenizer.pad_token_id else i for i in ids]} for ids in found]


def optimizer(row: str, model: Any, tokenizer: Any) -> finetooth.SelectiveAdamW:
    ids = torch.tensor([row["input_ids"] for row in tokens(tokenizer)[:8]])
    settings = {"lr": 1e-3, "calibration": [{"input_ids": ids}], **BUDGET.get(row, {})}
    return finetooth.build(own_score if row == "own" else row, model, **settings)


def finetooth_train(row: str, out: Path) -> Ended:
    """`finetooth train RECIPE --resume`."""
    source = out / "model"
    if not (source / "config.json").is_file():
        model, tokenizer = model_and_tokenizer()
        with finetooth.saving(out / "model-0") as folder:  # complete or absent: this too may be killed
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        (out / "model-0").rename(source)
    recipe = {
        "model": str(source),
        "method": {"name": row, **BUDGET.get(row, {}), **SOURCE.get(row, {})},
        "optimizer": {"lr": 1e-3},
        "data": {"train": "embedded:banking77/train", "limit": ROWS},
        "train": {
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "accumulate": ACCUMULATE,
            "max_length": 64,
            "checkpoint_every": EVERY,
            "gradient_checkpointing": row == "gift-sw",  # its noise is made again in backward
        },
        "evaluate": {"task": "none"},
        "output": str(out / "run"),
    }
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load(out / "recipe.yaml"), resume=(out / "run" / "recipe.yaml").is_file())
    model = AutoModelForCausalLM.from_pretrained(source)
    delta = finetooth.Delta.load(out / "run" / "delta.safetensors")
    delta.apply(model)
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    checkpoint = finetooth.last_good(out / "run" / "checkpoints")
    assert checkpoint is not None
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)  # noqa: TID251 - tensors only
    return Ended(model, state, [json.loads(line) for line in lines])


def through(kind: Any, args: Any, row: str, out: Path, data: list[dict[str, Any]], **more: Any) -> Ended:
    """An unmodified trainer; `reference` in `more` is made of the model and its optimizer."""
    model, tokenizer = model_and_tokenizer()
    opt = optimizer(row, model, tokenizer)
    if reference := more.pop("reference", None):
        more["ref_model"] = reference(model, opt)
    made = kind(
        model,
        args=args,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        optimizers=(opt, None),
        callbacks=[SelectiveCallback(opt)],
        **more,
    )
    made.train(resume_from_checkpoint=finetooth.last_good(out))
    return Ended(model, opt.state_dict(), [])


def trainer(row: str, out: Path) -> Ended:
    """`transformers.Trainer`."""
    tokenizer = model_and_tokenizer()[1]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return through(Trainer, TrainingArguments(str(out), **SHARED), row, out, tokens(tokenizer), data_collator=collator)


def sft(row: str, out: Path) -> Ended:
    """`trl.SFTTrainer`, with the gradient checkpointing that is its default."""
    return through(SFTTrainer, SFTConfig(str(out), max_length=64, **SHARED), row, out, rows())


def dpo(row: str, out: Path) -> Ended:
    """`trl.DPOTrainer`, with a second model as its reference."""
    args = DPOConfig(str(out), max_length=64, **SHARED)
    return through(DPOTrainer, args, row, out, pairs(), ref_model=model_and_tokenizer()[0])


def kto(row: str, out: Path) -> Ended:
    """`trl.KTOTrainer`, whose reference is the policy with its delta taken off."""
    args = KTOConfig(str(out), max_length=64, **SHARED)
    return through(KTOTrainer, args, row, out, pairs(), reference=finetooth.Reference)


def orpo(row: str, out: Path) -> Ended:
    """`ORPOTrainer`, which has no reference."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return through(ORPOTrainer, ORPOConfig(str(out), max_length=64, **SHARED), row, out, pairs())


def grpo(row: str, out: Path) -> Ended:
    """`trl.GRPOTrainer`, which samples its texts from the policy."""
    args = GRPOConfig(str(out), num_generations=2, max_completion_length=8, **SHARED)
    prompts = [{"prompt": row["prompt"][:40]} for row in rows()]
    return through(GRPOTrainer, args, row, out, prompts, reward_funcs=different_letters)


def different_letters(completions: list[str], **_: Any) -> list[float]:
    """A reward."""
    return [float(len(set(text))) for text in completions]


def pairs() -> list[dict[str, str]]:
    """Every prompt with its completion, and with that of another."""
    return [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
        for a, b in zip(rows(), rows()[1:] + rows()[:1], strict=True)
    ]


def bare(row: str, out: Path) -> Ended:
    """A loop in plain PyTorch, with a schedule; the order of an epoch is a function of its number."""
    torch.manual_seed(0)
    model, tokenizer = model_and_tokenizer()
    opt = optimizer(row, model, tokenizer)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, STEPS)
    data = {k: torch.tensor([row[k] for row in tokens(tokenizer)]) for k in ("input_ids", "labels")}
    done = 0
    if (folder := finetooth.last_good(out)) is not None:
        load_model(model, folder / "model.safetensors")
        state = torch.load(folder / "state.pt", weights_only=True)  # noqa: TID251 - tensors only
        opt.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        done = state["done"]
    model.train()
    for step in range(done, STEPS):
        epoch, at = divmod(step, PER_EPOCH)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
        for batch in order[at * BATCH * ACCUMULATE :][: BATCH * ACCUMULATE].split(BATCH):
            (model(**{k: v[batch] for k, v in data.items()}).loss / ACCUMULATE).backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        if (step + 1) % EVERY == 0:
            state = {"optimizer": opt.state_dict(), "schedule": schedule.state_dict()}
            with finetooth.saving(out / f"step-{step + 1}", keep=2) as folder:
                save_model(model, str(folder / "model.safetensors"))
                torch.save({**state, "random": torch.get_rng_state(), "done": step + 1}, folder / "state.pt")
    return Ended(model, opt.state_dict(), [])


def accelerate(row: str, out: Path) -> Ended:
    """`accelerate`, its own accumulation, `save_state` and `load_state`."""
    torch.manual_seed(0)
    model, tokenizer = model_and_tokenizer()
    opt = optimizer(row, model, tokenizer)
    tool = Accelerator(
        cpu=True,
        gradient_accumulation_steps=ACCUMULATE,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    shuffled = DataLoader(
        Dataset.from_list(tokens(tokenizer)).with_format("torch"),
        BATCH,
        shuffle=True,
        generator=torch.Generator(),  # its own: starting an epoch leaves torch's global state alone
    )
    model, opt, loader = tool.prepare(model, opt, shuffled)
    done, per_epoch = 0, -(-len(loader) // ACCUMULATE)  # steps
    if (folder := finetooth.last_good(out)) is not None:
        tool.load_state(folder)
        done = int(folder.name.rpartition("-")[2])
    model.train()
    for epoch in range(done // per_epoch, EPOCHS):
        loader.set_epoch(epoch)
        skipped = done % per_epoch * ACCUMULATE if epoch == done // per_epoch else 0
        for batch in tool.skip_first_batches(loader, skipped) if skipped else loader:
            with tool.accumulate(model):
                tool.backward(model(**batch).loss)
                opt.step()
                opt.zero_grad()
            if tool.sync_gradients:
                done += 1
                if done % EVERY == 0:
                    with finetooth.saving(out / f"step-{done}", keep=2) as folder:
                        tool.save_state(folder)
    return Ended(model, opt.state_dict(), [])


ENTRIES: dict[str, Callable[[str, Path], Ended]] = {
    "finetooth train": finetooth_train,
    "transformers.Trainer": trainer,
    "trl.SFTTrainer": sft,
    "trl.DPOTrainer": dpo,
    "trl.KTOTrainer": kto,
    "ORPOTrainer": orpo,
    "trl.GRPOTrainer": grpo,
    "bare PyTorch": bare,
    "accelerate": accelerate,
}


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Everything in a nested state, by its path."""
    if isinstance(value, dict):
        return dict(chain.from_iterable(flat(v, f"{at}/{k}").items() for k, v in value.items()))
    if isinstance(value, list | tuple):
        return flat(dict(enumerate(value)), at)
    return {at: value}
