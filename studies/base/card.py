"""The card of the base model and the curve of its loss, from what pretraining and measuring left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# A small base for studies of fine-tuning

A Llama of {parameters:,} weights (hidden size {hidden}, {layers} layers, {heads} heads of which {kv} for keys and values, {vocabulary:,} tokens, tied
embeddings), pretrained so that fine-tuning has something to forget. It writes grammatical English and knows little. It is for experiments
with methods, not for use.

## How it was made

`python studies/base/pretrain.py --data ../shared/data --out runs/base`, then the same with `--finish`: {steps:,} steps of 16 windows of {window} tokens, {tokens:,}
million tokens, seed {seed}; AdamW, learning rate 2e-3, 100 steps of warm-up, then a cosine to a tenth, weight decay 0.1, betas 0.9 and 0.95;
bf16 autocast, weights rounded to bf16 at the end; on {device}.
The last logged training loss is {loss:.3f} nats a token.

![training loss](loss.svg)

## What it was made of

| text | licence |
|---|---|
| English novels of before 1930, two collections | public domain (ELTeC's markup, CC BY 4.0, was taken off) |
| Python enhancement proposals, those that say so | public domain or CC0-1.0 |
| Rust RFCs | MIT or Apache-2.0 |
| CIA World Factbook | public domain, CC0-1.0 |
| TinyStories, a part | CDLA-Sharing-1.0, which asks nothing of what is computed from the data |
| Shakespeare, a part | public domain |

No text under a share-alike licence that reaches what is made from it was trained on: WikiText-2 and the dialogues below are only measured on. The
weights are given under Apache-2.0. The novels hold the slurs of their time, and the model has read them.

## Held-out text

Not trained on, whole windows of {window} tokens, at most 400 of each, bf16.

| text | nats a token | perplexity | tokens |
|---|---|---|---|
{rows}

`training.json` has these numbers and the whole curve.
"""


def write(out: Path, config: Any, parameters: int, told: dict[str, Any]) -> None:
    """README.md and loss.svg; `told` is what is in training.json, and steps, seed, window and device."""
    curve = told["curve"]
    rows = "\n".join(
        f"| {name} | {line['nats_per_token']:.3f} | {line['perplexity']:.1f} | {line['tokens']:,} |"
        for name, line in told["held_out"].items()
    )
    text = CARD.format(
        parameters=parameters,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        steps=told["steps"],
        window=told["window"],
        tokens=round(told["steps"] * 16 * told["window"] / 1e6),
        seed=told["seed"],
        device=told["device"],
        loss=curve[-1]["loss"],
        rows=rows,
    )
    (out / "README.md").write_text(text, encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "finetooth", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(6, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([line["step"] for line in curve], [line["loss"] for line in curve], lw=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats a token")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(out / "loss.svg", metadata={"Date": None})
