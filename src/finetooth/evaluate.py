"""Task quality and forgetting, as numbers.

    task loss         mean cross-entropy over the tokens that bear loss, in nats
    exact match       share of greedy generations that equal the expected answer, among all rows with a prompt: one that
                      loses its whole completion to train.max_length is a miss
    choice accuracy   share of rows whose right choice is the likeliest after the prompt, by the sum of the log-likelihoods of
                      its tokens; and by that sum for each character, as long choices are unlikely for their length alone.
                      lm-evaluation-harness calls the two acc and acc_norm
    general loss      mean token cross-entropy on a general text, in nats
    forgetting        general loss after minus before: what the fine-tune cost on a text it was not made for

Forgetting is as in the method comparison of PEFT (pull requests 2925 of November 2025 and 3419 of July 2026): logits are held against
the *next* token, all tokens weigh the same whatever document they are in, padding counts for nothing, and "before" is the
base itself, not a model with an untrained adapter on it. One difference: a document longer than the context is measured in
windows to its end, where PEFT measures its first 768 tokens.

All in eval mode and without gradients; the mode is put back. Logits become float32 a row at a time: of a large vocabulary,
those of a whole batch would be the most that is held. Texts are compared in `overlap.py`, other people's benchmarks
are run by `harness.py`.

Not covered: the prompt of a row is read anew for each of its choices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetooth.data import IGNORE, Tokens
from finetooth.probe import uncached

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
    count = sum(label != IGNORE for e in examples for label in e.labels[1:])
    return sum(summed_losses(model, examples, pad_id, batch_size)) / max(count, 1)


def summed_losses(model: nn.Module, examples: Sequence[Tokens], pad_id: int, batch_size: int) -> list[float]:
    """For every example, in order, the summed cross-entropy of its tokens that bear loss, in nats."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    out = [0.0] * len(examples)
    with _quiet(model):
        device = next(model.parameters()).device
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            full = {k: v.to(device) for k, v in pad([examples[i] for i in batch], pad_id).items()}
            labels = full.pop("labels")
            for i, loss in zip(batch, by_row(model(**full, **uncached(model)).logits, labels).tolist(), strict=True):
                out[i] = loss
    return out


def by_row(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy of each row of a batch.

    logits: [rows, tokens, vocabulary], of the next token; labels: [rows, tokens], IGNORE where nothing is expected.
    Returns [rows] float32.
    """
    pairs = zip(logits[:, :-1], labels[:, 1:], strict=True)
    return torch.stack(
        [nn.functional.cross_entropy(a.float(), b, ignore_index=IGNORE, reduction="sum") for a, b in pairs]
    )


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


def choice_accuracy(
    model: nn.Module, examples: Sequence[Tokens], pad_id: int, batch_size: int, rows: int | None = None
) -> dict[str, float]:
    """How often the right choice is the likeliest: by its log-likelihood, and by its log-likelihood for each character.

    `rows` is how many were to be answered, where some could not be asked: those are misses.
    """
    asked = [(e.asked, e.choices) for e in examples if e.choices is not None]
    whole = [Tokens(a + c, [IGNORE] * len(a) + c, len(a)) for a, choices in asked for c in choices.ids]
    losses = iter(summed_losses(model, whole, pad_id, batch_size))
    plain = normalized = 0
    for _, choices in asked:
        found = [(next(losses), n) for n in choices.characters]
        plain += _least([loss for loss, _ in found]) == choices.right
        normalized += _least([loss / n for loss, n in found]) == choices.right
    of = max(len(examples) if rows is None else rows, 1)
    return {"choice_accuracy": plain / of, "choice_accuracy_per_character": normalized / of}


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


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
