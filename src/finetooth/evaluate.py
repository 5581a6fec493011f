"""Task quality and forgetting, as numbers.

    task loss      mean cross-entropy over the tokens that bear loss
    exact match    share of greedy generations that equal the expected answer, among all rows with a prompt: one that
                   loses its whole completion to train.max_length is a miss
    forgetting     mean token cross-entropy on a general text, after minus before

All in eval mode and without gradients; the mode is put back. Benchmarks of lm-evaluation-harness are not wired in yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetooth.data import IGNORE, Tokens

WINDOW_BATCH = 16


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def pad(examples: Sequence[Tokens], pad_id: int) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each `[batch, tokens]` int64."""
    width = max(len(e.ids) for e in examples)
    fill = [width - len(e.ids) for e in examples]
    return {
        "input_ids": torch.tensor([e.ids + [pad_id] * n for e, n in zip(examples, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(e.ids) + [0] * n for e, n in zip(examples, fill, strict=True)]),
        "labels": torch.tensor([e.labels + [IGNORE] * n for e, n in zip(examples, fill, strict=True)]),
    }


def batched(examples: Sequence[Tokens], size: int) -> Iterator[list[Tokens]]:
    """Batches of examples of like length, longest first."""
    order = sorted(examples, key=lambda e: -len(e.ids))
    for start in range(0, len(order), size):
        yield list(order[start : start + size])


def task_loss(model: nn.Module, examples: Sequence[Tokens], pad_id: int, batch_size: int = 64) -> float:
    """Mean cross-entropy of the tokens that bear loss, in nats."""
    total, count = 0.0, 0
    with _quiet(model):
        device = next(model.parameters()).device
        for batch in batched(examples, batch_size):
            full = {k: v.to(device) for k, v in pad(batch, pad_id).items()}
            labels = full.pop("labels")
            loss, n = _cross_entropy(model(**full).logits, labels)
            total, count = total + loss, count + n
    return total / max(count, 1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    shifted = labels[:, 1:].reshape(-1)
    flat = logits[:, :-1].float().reshape(-1, logits.shape[-1])
    loss = nn.functional.cross_entropy(flat, shifted, ignore_index=IGNORE, reduction="sum")
    return float(loss), int((shifted != IGNORE).sum())


def general_loss(model: nn.Module, tokenizer: Any, documents: Sequence[str], context: int) -> float:
    """Mean token cross-entropy on documents, each cut into windows of at most `context` tokens, in nats."""
    windows = []
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        for start in range(0, max(len(ids) - 1, 1), context):
            window = ids[start : start + context]
            if len(window) > 1:
                windows.append(Tokens(window, list(window), 0))
    if not windows:
        raise ValueError("the general text has no document of two tokens or more: there is nothing to measure.")
    return task_loss(model, windows, 0, WINDOW_BATCH)


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy continuations, left-padded in batches; special tokens are left out of the text."""
    out: dict[int, str] = {}
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with _quiet(model):
        device = next(model.parameters()).device
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[fill] * (width - len(prompts[i])) + prompts[i] for i in batch], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
            made = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=fill
            )
            texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
            out.update(zip(batch, texts, strict=True))
    return [out[i] for i in range(len(prompts))]


def answer(text: str, extract: str | None) -> str:
    """The answer in a generation: all of it, or what the first group of a regular expression finds.

    >>> answer(" so 2+2 = 4\\n#### 4 ", r"####\\s*(\\S+)")
    '4'
    """
    if extract is None:
        return text.strip()
    found = re.search(extract, text)
    return found.group(1 if found.re.groups else 0).strip() if found else ""


def exact_match(
    generations: Sequence[str], examples: Sequence[Tokens], extract: str | None, rows: int | None = None
) -> float:
    """The share of generations whose answer equals the target.

    `rows` is how many were to be answered, where some could not be asked: those are misses.
    """
    hits = sum(answer(g, extract) == e.target.strip() for g, e in zip(generations, examples, strict=True))
    return hits / max(len(examples) if rows is None else rows, 1)
