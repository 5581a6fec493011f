"""Rows of JSON lines, as tokens and labels.

A row has `prompt` and `completion`, or `messages` (chat, through the tokenizer's own template), or `text`. The loss is on
the completion, on the last assistant message, or on all of the text; everything else has label -100. Prompt and
completion are tokenized apart and joined, so that training sees exactly the prompt that generation starts from; an
end-of-sequence token follows the completion, or it would never be learnt. What is too long loses its end; a row that
loses its whole completion that way is left out and counted.

A chat is tokenized as a whole, and learnt from where it parts from the template's generation prompt. Evaluation asks
with that prompt itself, as a server does; some templates let it end in what no conversation has, such as `<think>`.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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
    asked: list[int] = field(default_factory=list)  # what generation starts from; empty for a text

    @property
    def asked_as_learnt(self) -> bool:
        """Whether generation starts from just what training sees before the answer."""
        return not self.asked or self.asked == self.ids[: self.prompt]


@dataclass
class Prepared:
    """What became of a file: the examples, and what must be said about them before training."""

    examples: list[Tokens] = field(default_factory=list)
    rows: int = 0
    prompts: int = 0  # rows that have one, also of those that are left out
    truncated: int = 0
    without_target: int = 0
    asked_otherwise: int = 0

    def add(self, tokens: Tokens, max_length: int) -> None:
        """Count a row, cut it, and keep it if it still has a token that bears loss."""
        self.rows += 1
        self.prompts += bool(tokens.asked)
        self.truncated += len(tokens.ids) > max_length
        self.asked_otherwise += not tokens.asked_as_learnt
        tokens.ids, tokens.labels = tokens.ids[:max_length], tokens.labels[:max_length]
        if all(label == IGNORE for label in tokens.labels):
            self.without_target += 1
        else:
            self.examples.append(tokens)

    def remarks(self, eos: int | None, of: str = "training") -> list[str]:
        """What a person should know before training starts, if anything, about training or evaluation rows."""
        out = []
        if self.truncated:
            out.append(f"cut to train.max_length: {self.truncated} of {self.rows} {of} rows.")
        if self.without_target:
            counted = "" if of == "training" else "; exact match counts them as misses"
            out.append(
                f"left out, as the cut takes all that bears loss: {self.without_target} of {self.rows} {of} rows{counted}."
            )
        if of == "training" and not any(eos in e.labels for e in self.examples):
            out.append("no row teaches the end-of-sequence token: generations will not stop by themselves.")
        if self.asked_otherwise:
            out.append(
                "the chat template's generation prompt is not, token for token, what stands before the answers: evaluation "
                "asks with it, as a server does, and training does not see all of it."
            )
        return out

    def counts(self) -> dict[str, int]:
        """Rows, cut ones, ones left out, tokens that bear loss."""
        return {
            "rows": self.rows,
            "truncated": self.truncated,
            "without_target": self.without_target,
            "tokens_learnt": self.learnt,
        }

    @property
    def learnt(self) -> int:
        """Tokens that bear loss."""
        return sum(label != IGNORE for e in self.examples for label in e.labels)


@contextmanager
def opened(path: str | Path) -> Iterator[IO[str]]:
    """Open text, .gz and .xz alike; DataError names the file if it cannot be read to its end."""
    file = Path(path)
    how: Any = {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)
    try:
        with how(file, "rt", encoding="utf-8") as stream:
            yield stream
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        kind = file.suffix if file.suffix in (".gz", ".xz") else "UTF-8 text"
        hint = "" if getattr(error, "errno", None) else " It may be cut off or damaged."
        raise DataError(f"{path} cannot be read as {kind}: {error}.{hint}") from error


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
        _check_messages(row["messages"], where)
        return
    fields = ("prompt", "completion") if "prompt" in row or "completion" in row else ("text",)
    for name in fields:
        if not isinstance(row.get(name), str):
            given = f"the keys {sorted(row)}" if name not in row else f"{name} = {row[name]!r}"
            raise DataError(f"{where}: {given}, expected {SHAPES} (strings).")


def _check_messages(messages: Any, where: str) -> None:
    good = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    if not good or not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: messages must be a list of {{role, content}} that ends with the assistant's.")
    if len(messages) == 1:
        raise DataError(f"{where}: there is no message before the assistant's: nothing is asked.")
    for message in messages:
        if not isinstance(message["content"], str):
            given = f"{type(message['content']).__name__} in the message of {message['role']!r}"
            raise DataError(
                f"{where}: content is a {given}, expected a string: parts, images and tool calls are not read."
            )


def prepare(path: str | Path, part: DataPart, tokenizer: Any, max_length: int, limit: int | None = None) -> Prepared:
    """Tokenize a file; DataError if not one row keeps a token that bears loss."""
    out = Prepared()
    for row in rows(path, limit):
        out.add(tokenize(row, part, tokenizer), max_length)
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
    target = str(row.get("target", row["completion"]))
    return Tokens(before + answer, [IGNORE] * len(before) + answer, len(before), target, before)


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
    return Tokens(whole, [IGNORE] * start + whole[start:], start, target, before)


def _template(tokenizer: Any, messages: list[dict[str, str]], generate: bool) -> list[int]:
    from jinja2 import TemplateError  # transformers wants jinja2 for chat templates only

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        roles = ", ".join(str(m["role"]) for m in messages)
        raise DataError(f"the chat template refuses a row with the roles {roles}: {error}.") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def documents(path: str | Path) -> list[str]:
    """The documents of a general text, separated by lines `<|endoftext|>`."""
    with opened(path) as file:
        found = [doc.strip() for doc in file.read().split("<|endoftext|>")]
    if not any(found):
        raise DataError(f"{path} holds no text.")
    return [doc for doc in found if doc]
