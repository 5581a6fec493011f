"""Pretrain the base model of the studies: a small Llama on public-domain and permissively licensed text.

    python studies/base/pretrain.py --data ../shared/data --out runs/base            # hours on two cores; call it again to go on
    python studies/base/pretrain.py --data ../shared/data --out runs/base --finish   # perplexities, bf16 weights, card

Text under share-alike licences (dialogues_sgd, WikiText-2) is left out of training, and is only measured on. Documents are
tokenized, joined with an end-of-text token in between and cut into windows; what remains of a domain is dropped. The order of windows,
the initial weights and the split are functions of the seed. Everything else is transformers' Trainer.
"""

from __future__ import annotations

import json
import math
import os
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import card
import torch
import transformers
import typer
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from finetooth.data import documents

TRAINED_ON = ("novels", "novels_eltec", "peps", "rust_rfcs", "factbook", "tinystories", "tinyshakespeare")
MEASURED_ON = ("novels", "novels_eltec", "peps", "rust_rfcs", "factbook", "tinystories", "dialogues_sgd", "wikitext2")
WINDOW = 512


def windows(file: Path, tokenizer: Any) -> Dataset:
    """The text of a file as windows of tokens."""
    texts = Dataset.from_dict({"text": documents(file)})

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = list(
            chain.from_iterable([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in batch["text"])
        )
        return {"input_ids": [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]}

    return texts.map(cut, batched=True, batch_size=len(texts), remove_columns=["text"])


def model_of(tokenizer: Any, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def labelled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Windows have one length and no padding: every token is learnt."""
    batch = default_data_collator(rows)
    return {**batch, "labels": batch["input_ids"]}


@torch.no_grad()
def nats(model: Any, rows: Dataset, limit: int = 400) -> tuple[float, int]:
    """Mean cross-entropy over the first windows of a text, and over how many tokens."""
    model.eval()
    ids = torch.tensor(rows[:limit]["input_ids"])
    losses = [float(model(input_ids=b, labels=b).loss) * len(b) for b in ids.split(8)]
    return sum(losses) / len(ids), len(ids) * (WINDOW - 1)


def main(
    data: Annotated[Path, typer.Option(help="The folder with lm/ and tokenizers/.")],
    out: Path = Path("runs/base"),
    steps: Annotated[int, typer.Option(help="Of 16 windows; one pass over the text is about 4,000.")] = 3000,
    seed: int = 0,
    finish: Annotated[bool, typer.Option("--finish", help="Measure the last checkpoint and write the model.")] = False,
) -> None:
    """Train, or go on from the last checkpoint; with --finish measure and write."""
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "bpe4096")
    tokenizer.model_max_length = 10**9  # whole documents are tokenized, then cut
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    if finish:
        if last is None:
            raise typer.BadParameter(f"{out} has no checkpoint: train first.")
        write(Path(last), tokenizer, data, out / "model", seed)
        return
    lm = data / "lm"
    files = [next(f for f in (lm / f"{n}.train.txt.xz", lm / f"{n}.txt.xz") if f.is_file()) for n in TRAINED_ON]
    rows = concatenate_datasets([windows(f, tokenizer) for f in files])
    typer.echo(f"{len(rows):,} windows of {WINDOW} tokens", err=True)
    args = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=100,
        bf16=True,
        torch_compile=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=20,
        save_steps=100,
        save_total_limit=2,
        seed=seed,
        report_to="none",
    )
    model = model_of(tokenizer, seed)
    typer.echo(f"{model.num_parameters():,} parameters", err=True)
    Trainer(model, args, labelled, rows).train(resume_from_checkpoint=last)


def write(checkpoint: Path, tokenizer: Any, data: Path, out: Path, seed: int) -> None:
    """bf16 weights, the tokenizer, the loss curve, perplexities of text that was not trained on, and the card."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    found = {}
    for name in MEASURED_ON:
        file = data / "lm" / f"{name}.valid.txt.xz"
        loss, tokens = nats(model, windows(file, tokenizer))
        found[name] = {"nats_per_token": loss, "perplexity": math.exp(loss), "tokens": tokens}
    model.config.max_position_embeddings = tokenizer.model_max_length = WINDOW
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    curve = [
        {k: float(line[k]) for k in ("step", "loss", "learning_rate")}
        for line in state["log_history"]
        if "loss" in line
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    told = {"held_out": found, "curve": curve, "steps": state["global_step"], "window": WINDOW, "seed": seed}
    told |= {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    (out / "training.json").write_text(json.dumps(told, indent=1) + "\n")
    card.write(out, model.config, model.num_parameters(), told)
    for name, line in found.items():
        typer.echo(f"{name:16} {line['nats_per_token']:.3f} nats, perplexity {line['perplexity']:.1f}")


if __name__ == "__main__":
    typer.run(main)
