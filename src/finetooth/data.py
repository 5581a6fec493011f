"""Rows of JSON lines, as tokens and labels.

A row has `prompt` and `completion`, or `messages` (chat, through the tokenizer's own template), or `text`. The loss is on
the completion, on the last assistant message, or on all of the text; everything else has label -100. Prompt and
completion are tokenized apart and joined, so that training sees exactly the prompt that generation starts from; an
end-of-sequence token follows the completion, or it would never be learnt. What is too long loses its end; a row that
loses its whole completion that way is left out and counted.

A chat is tokenized as a whole, and learnt from where it parts from the template's generation prompt. Evaluation asks
with that prompt itself, as a server does; some templates let it end in what no conversation has, such as `<think>`.

What an evaluation reads of a row beside that is in `answers.py`; what a person is told of a file, in `preflight.py`.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from finetooth.recipe import DataPart

IGNORE = -100
SHAPES = "prompt and completion, messages, or text"
# What may be wrong with a row without making it unusable; `preflight.py` has the words for a person.
Flaw = Literal[
    "prompt unread", "content unread", "tools unread", "no header", "asked otherwise", "empty", "choices cut"
]


class DataError(ValueError):
    """A row or a file that cannot be used: which one, and what was expected."""


@dataclass(frozen=True)
class Choices:
    """Answers to choose from: the tokens of each, its length in characters, and which one is right."""

    ids: list[list[int]]
    characters: list[int]
    right: int


@dataclass
class Tokens:
    """One example: ids and labels of equal length, how much of it is prompt, and the answer expected."""

    ids: list[int]
    labels: list[int]
    prompt: int
    target: str = ""
    asked: list[int] = field(default_factory=list)  # what generation starts from; empty for a text
    flaws: set[Flaw] = field(default_factory=set)
    choices: Choices | None = None
    references: list[str] = field(default_factory=list)  # texts that a generation is compared with


Also = Callable[[dict[str, Any], Tokens, str], None]  # reads more of a row into its tokens; told "FILE, line N"


@dataclass
class Prepared:
    """What became of a file: the examples, and what must be said about them before training."""

    examples: list[Tokens] = field(default_factory=list)
    lost: list[Tokens] = field(default_factory=list)  # the cut took all that bears loss
    rows: int = 0
    prompts: int = 0  # rows that have one, also of those that are lost
    truncated: int = 0
    longest: int = 0  # tokens, before the cut
    flaws: Counter[Flaw] = field(default_factory=Counter)

    @property
    def without_target(self) -> int:
        """Rows that are left out, as the cut took all that bears loss."""
        return len(self.lost)

    def add(self, tokens: Tokens, max_length: int) -> None:
        """Count a row, cut it, and keep it if it still has a token that bears loss."""
        self.rows += 1
        self.prompts += bool(tokens.asked)
        self.truncated += len(tokens.ids) > max_length
        self.longest = max(self.longest, len(tokens.ids))
        if tokens.asked and tokens.asked != tokens.ids[: tokens.prompt]:
            tokens.flaws.add("asked otherwise")
        if tokens.choices and len(tokens.asked) + max(map(len, tokens.choices.ids)) > max_length:
            tokens.choices = None  # a choice without its end would not be compared fairly
            tokens.flaws.add("choices cut")
        self.flaws.update(tokens.flaws)
        tokens.ids, tokens.labels = tokens.ids[:max_length], tokens.labels[:max_length]
        kept = any(label != IGNORE for label in tokens.labels)
        (self.examples if kept else self.lost).append(tokens)

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
        with how(file, "rt", encoding="utf-8-sig") as stream:  # Windows' editors begin with a byte order mark
            yield stream
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        kind = file.suffix if file.suffix in (".gz", ".xz") else "UTF-8 text"
        hint = "" if getattr(error, "errno", None) else " It may be cut off or damaged."
        raise DataError(f"{path} cannot be read as {kind}: {error}.{hint}") from error


def rows(path: str | Path, limit: int | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a JSON lines file, each with "FILE, line N"; DataError names that of a bad one."""
    seen = 0
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if limit is not None and seen >= limit:
                return
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error.msg}).") from error
            _check(row, where)
            seen += 1
            yield row, where
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


def prepare(
    path: str | Path,
    part: DataPart,
    tokenizer: Any,
    max_length: int,
    limit: int | None = None,
    also: Also | None = None,
) -> Prepared:
    """Tokenize a file; DataError if not one row keeps a token that bears loss."""
    out = Prepared()
    for row, where in rows(path, limit):
        tokens = tokenize(row, part, tokenizer)
        if also is not None:
            also(row, tokens, where)
        out.add(tokens, max_length)
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
    flaws = _flaws({"prompt unread": row["prompt"] not in prompt, "empty": not row["completion"].strip()})
    target = str(row.get("target", row["completion"]))
    return Tokens(before + answer, [IGNORE] * len(before) + answer, len(before), target, before, flaws)


def _flaws(found: dict[Flaw, bool]) -> set[Flaw]:
    return {name for name, true in found.items() if true}


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
    asking = _template(tokenizer, context, True)
    text = _template(tokenizer, row["messages"], False)
    said = [m[key].strip() for m in row["messages"] for key in m if key != "role" and isinstance(m[key], str)]
    flaws = _flaws(
        {
            "content unread": any(part not in text for part in said),
            "tools unread": bool(row.get("tools")),
            "no header": asking == _template(tokenizer, context, False),
            "empty": not answer["content"].strip(),
        }
    )
    before, whole = (list(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (asking, text))
    start = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    target = str(row.get("target", answer["content"]))
    return Tokens(whole, [IGNORE] * start + whole[start:], start, target, before, flaws)


def _template(tokenizer: Any, messages: list[dict[str, str]], generate: bool) -> str:
    from jinja2 import TemplateError  # transformers wants jinja2 for chat templates only

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    except TemplateError as error:
        roles = ", ".join(str(m["role"]) for m in messages)
        raise DataError(f"the chat template refuses a row with the roles {roles}: {error}.") from error


def documents(path: str | Path) -> list[str]:
    """The documents of a general text, separated by lines `<|endoftext|>`."""
    with opened(path) as file:
        found = [doc.strip() for doc in file.read().split("<|endoftext|>")]
    if not any(found):
        raise DataError(f"{path} holds no text.")
    return [doc for doc in found if doc]
