"""The longest batch of a recipe: its shape for a plan, its rows for a trial."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetooth import pretrained
from finetooth.data import Tokens, prepare
from finetooth.recipe import Recipe

READ = 16 << 20  # bytes of a training file that is read to find its longest row: some ten seconds of tokenizing


@dataclass(frozen=True)
class Batch:
    """The shape of a batch; ragged: some row is padded; packed: one long row with positions instead of a mask."""

    rows: int
    tokens: int
    ragged: bool
    packed: bool
    source: str  # where the number of tokens comes from
    known: int = 0  # rows of the training file, where it was read

    def inputs(self) -> dict[str, Tensor]:
        """What the trainer's collator would give, all tokens bearing loss."""
        if self.packed:
            ids = torch.ones((1, self.rows * self.tokens), dtype=torch.int64)
            return {"input_ids": ids, "labels": ids.clone(), "position_ids": ids.clone()}
        ids = torch.ones((self.rows, self.tokens), dtype=torch.int64)
        mask = {"attention_mask": ids.clone()} if self.ragged else {}
        return {"input_ids": ids, "labels": ids.clone(), **mask}


def batch_of(recipe: Recipe) -> Batch:
    """The longest batch that training may meet; reads the training file if that is quick."""
    data, how = recipe.data, recipe.train
    if data.packing:
        return Batch(how.batch_size, how.max_length, False, True, "packed to train.max_length")
    if Path(data.train).stat().st_size > READ:
        return Batch(
            how.batch_size, how.max_length, how.batch_size > 1, False, "train.max_length: the file is not read"
        )
    tokenizer = pretrained.tokenizer(recipe.model)
    found = prepare(data.train, data, tokenizer, how.max_length, data.limit)
    lengths = [len(e.ids) for e in found.examples]
    rows = min(how.batch_size, len(lengths))
    ragged = rows > 1 and min(lengths) < max(lengths)
    return Batch(rows, max(lengths), ragged, False, f"the longest of {len(lengths):,} rows", len(lengths))


def rows_of(examples: list[Tokens], recipe: Recipe, batches: int) -> list[Tokens]:
    """Rows, in order, of which a trainer makes so many of that batch."""
    how = recipe.train
    if not recipe.data.packing:
        return longest_rows(examples, how.batch_size) * batches
    needed, rows = how.batch_size * how.max_length * batches * 5 // 4, list[Tokens]()  # the last ones may not be full
    full = longest_rows(examples, how.batch_size)[: max(1, how.batch_size - 1)]
    while sum(len(row.ids) for row in rows) < needed:
        rows += full
    return rows


def longest_rows(examples: list[Tokens], size: int) -> list[Tokens]:
    """Rows of that batch: the longest, and the shortest one of all, which is padded."""
    order = sorted(examples, key=lambda e: -len(e.ids))
    return order[: size - 1] + order[-1:] if len(order) >= size > 1 else order[:size]
