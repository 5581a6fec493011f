"""Rows as the model sees them: context, what is learnt, what would be lost, and what a run would say before it starts."""

from __future__ import annotations

from typing import Any

from finetooth import pretrained
from finetooth.data import IGNORE
from finetooth.jobs import read
from finetooth.preflight import in_both, remarks, stops
from finetooth.recipe import Recipe


def preview(recipe: Recipe, rows: int) -> dict[str, Any]:
    """The first rows as text in two parts, the counts over both files, and all remarks on them."""
    tokenizer = pretrained.tokenizer(recipe.model)
    learn, test = read(recipe, tokenizer)
    shown = []
    for example in learn.examples[:rows]:
        start = next(i for i, label in enumerate(example.labels) if label != IGNORE)
        parts = tokenizer.decode(example.ids[:start]), tokenizer.decode(example.ids[start:])
        ends = example.ids[-1] == tokenizer.eos_token_id
        shown.append({"context": parts[0], "learnt": parts[1], "tokens": len(example.ids), "ends_with_eos": ends})
    counts = {"rows": learn.rows, "truncated": learn.truncated, "without_target": learn.without_target}
    return {
        "rows": shown,
        "of": counts,
        "tokens_learnt": learn.learnt,
        "longest": learn.longest,
        "eval": None if test is None else {**test.counts(), "in_training": in_both(learn, test)},
        "remarks": remarks(learn, test, stops(recipe.model, tokenizer)),
    }
