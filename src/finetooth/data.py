"""Rows of JSON lines, as tokens and labels.

A row has `prompt` and `completion`, or `messages` (chat, through the tokenizer's own template), or `text`. The loss is on
the completion, on the last assistant message, or on all of the text; everything else has label -100. Prompt and
completion are tokenized apart and joined, so that training sees exactly the prompt that generation starts from; an
end-of-sequence token follows the completion, or it would never be learnt. What is too long loses its end; a row that
loses its whole completion that way is left out and counted.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from finetooth.recipe import DataPart

IGNORE = -100
SHAPES = "prompt and completion, messages, or text"


class DataError(ValueError):
    """A row or a file that cannot be used: which one, and what was expected."""


@dataclass
class Tokens:
    """One example: ids and labels of equal length, how much of it is prompt, and the answer expected."""

    ids: list[int]
    labels: list[int]
    prompt: int
    target: str = ""


@dataclass
class Prepared:
    """What became of a file: the examples, and what must be said about them before training."""

    examples: list[Tokens] = field(default_factory=list)
    rows: int = 0
    truncated: int = 0
    without_target: int = 0

    def remarks(self, eos: int | None) -> list[str]:
        """What a person should know before training starts, if anything."""
        out = []
        if self.truncated:
            out.append(f"{self.truncated} of {self.rows} training rows are cut to train.max_length.")
        if self.without_target:
            out.append(f"{self.without_target} rows lose their whole completion that way and are left out.")
        if not any(eos in e.labels for e in self.examples):
            out.append("no row teaches the end-of-sequence token: generations will not stop by themselves.")
        return out

    @property
    def learnt(self) -> int:
        """Tokens that bear loss."""
        return sum(label != IGNORE for e in self.examples for label in e.labels)


def opened(path: str | Path) -> IO[str]:
    """Open text, .gz and .xz alike."""
    file = Path(path)
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return lzma.open(file, "rt", encoding="utf-8") if file.suffix == ".xz" else file.open(encoding="utf-8")


def rows(path: str | Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file; DataError names the file and line of a bad one."""
    seen = 0
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if limit is not None and seen >= limit:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg}).") from error
            _check(row, f"{path}, line {number}")
            seen += 1
            yield row
    if not seen:
        raise DataError(f"{path} has no rows: expected JSON lines with {SHAPES}.")


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, expected an object with {SHAPES}.")
    if "messages" in row:
        messages = row["messages"]
        good = (
            isinstance(messages, list)
            and messages
            and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
        )
        if not good or messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: messages must be a list of {{role, content}} that ends with the assistant's.")
        return
    fields = ("prompt", "completion") if "prompt" in row or "completion" in row else ("text",)
    for name in fields:
        if not isinstance(row.get(name), str):
            given = f"the keys {sorted(row)}" if name not in row else f"{name} = {row[name]!r}"
            raise DataError(f"{where}: {given}, expected {SHAPES} (strings).")


def prepare(path: str | Path, part: DataPart, tokenizer: Any, max_length: int, limit: int | None = None) -> Prepared:
    """Tokenize a file; DataError if not one row keeps a token that bears loss."""
    out = Prepared()
    for row in rows(path, limit):
        tokens = tokenize(row, part, tokenizer)
        out.rows += 1
        out.truncated += len(tokens.ids) > max_length
        tokens.ids, tokens.labels = tokens.ids[:max_length], tokens.labels[:max_length]
        if all(label == IGNORE for label in tokens.labels):
            out.without_target += 1
            continue
        out.examples.append(tokens)
    if not out.examples:
        raise DataError(
            f"{path}: after cutting to max_length={max_length} tokens, none of the {out.rows} rows has a token left to learn. "
            "Raise train.max_length or shorten the prompts."
        )
    return out


def tokenize(row: dict[str, Any], part: DataPart, tokenizer: Any) -> Tokens:
    """One row as ids and labels."""
    if "messages" in row:
        return _chat(row, tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "text" in row and "prompt" not in row:
        ids = _plain(tokenizer, row["text"]) + eos
        return Tokens(ids, list(ids), 0)
    prompt = prompt_of(row, part)
    before = list(tokenizer(prompt)["input_ids"])
    if eos and before[-1:] == eos:  # a tokenizer that closes every text would end it before the answer
        before = before[:-1]
    answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + eos
    return Tokens(
        before + answer, [IGNORE] * len(before) + answer, len(before), str(row.get("target", row["completion"]))
    )


def prompt_of(row: dict[str, Any], part: DataPart) -> str:
    """The text that generation starts from: the template, and the separator where nothing else parts the two."""
    try:
        prompt = part.template.format(**row)
    except (KeyError, IndexError) as error:
        raise DataError(f"data.template={part.template!r} names {error}: the row has {sorted(row)}.") from error
    glued = not prompt[-1:].isspace() and not row["completion"][:1].isspace()
    return prompt + part.separator if glued else prompt


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _chat(row: dict[str, Any], tokenizer: Any) -> Tokens:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the data has messages, and the tokenizer has no chat template: use prompt and completion rows."
        )
    *context, answer = row["messages"]
    before = _template(tokenizer, context, True)
    whole = _template(tokenizer, row["messages"], False)
    start = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    target = str(row.get("target", answer["content"]))
    return Tokens(whole, [IGNORE] * start + whole[start:], start, target)


def _template(tokenizer: Any, messages: list[dict[str, str]], generate: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def documents(path: str | Path) -> list[str]:
    """The documents of a general text, separated by lines `<|endoftext|>`."""
    with opened(path) as file:
        found = [doc.strip() for doc in file.read().split("<|endoftext|>")]
    if not any(found):
        raise DataError(f"{path} holds no text.")
    return [doc for doc in found if doc]
