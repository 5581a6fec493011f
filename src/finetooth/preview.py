"""Rows as the model sees them: context, what is learnt, and what would be lost."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from finetooth import checkpoint
from finetooth.data import IGNORE, prepare
from finetooth.recipe import Recipe


def preview(recipe: Recipe, rows: int) -> dict[str, Any]:
    """The first rows as text in two parts, and the counts over the whole training file."""
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.resolve(recipe.model)))
    found = prepare(recipe.data.train, recipe.data, tokenizer, recipe.train.max_length, recipe.data.limit)
    shown = []
    for example in found.examples[:rows]:
        start = next(i for i, label in enumerate(example.labels) if label != IGNORE)
        parts = tokenizer.decode(example.ids[:start]), tokenizer.decode(example.ids[start:])
        ends = example.ids[-1] == tokenizer.eos_token_id
        shown.append({"context": parts[0], "learnt": parts[1], "tokens": len(example.ids), "ends_with_eos": ends})
    counts = {"rows": found.rows, "truncated": found.truncated, "without_target": found.without_target}
    return {
        "rows": shown,
        **{"of": counts},
        "tokens_learnt": found.learnt,
        "longest": max(len(e.ids) for e in found.examples),
    }
