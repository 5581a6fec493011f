"""What an evaluation needs of a row beside its prompt: answers to choose from, or texts to compare a generation with.

    choice        `choices`, two or more texts, and which is right: the index `label`, or the text among them that is the row's
                  `label`, completion or `target`. Rows that bring none share `evaluate.choices`.
    bleu, rouge   `references`, one or more texts; without them the completion is the only one

A choice is tokenized as a completion is, apart from the prompt and after the same separator, but without the end-of-sequence
token. Rows are checked as they are read, before the weights are: an error names the file and the line.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from finetooth.data import Also, Choices, DataError, Tokens
from finetooth.recipe import EvaluatePart


def reader(how: EvaluatePart, tokenizer: Any) -> Also | None:
    """What `evaluate.task` has to read of every evaluation row, if anything."""

    @cache  # labels of a classification are the same in every row
    def encoded(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def choose(row: dict[str, Any], tokens: Tokens, where: str) -> None:
        tokens.choices = _choices(row, row.get("choices", how.choices), where, encoded)

    def compare(row: dict[str, Any], tokens: Tokens, where: str) -> None:
        tokens.references = _references(row, where)

    return {"choice": choose, "bleu": compare, "rouge": compare}.get(how.task)


def _choices(row: dict[str, Any], given: Any, where: str, encoded: Callable[[str], tuple[int, ...]]) -> Choices:
    good = isinstance(given, list) and all(isinstance(text, str) and text.strip() for text in given)
    if not good or len(set(given)) != len(given) or len(given) < 2:
        what = "no choices" if given is None else f"choices = {given!r}"
        raise DataError(
            f"{where}: {what}. evaluate.task: choice needs a list of two or more different texts in every row, or "
            "evaluate.choices for the rows that have none."
        )
    ids = [list(encoded(text)) for text in given]
    return Choices(ids, [len(text) for text in given], _right(row, given, where))


def _right(row: dict[str, Any], given: list[str], where: str) -> int:
    label = row.get("label")
    if isinstance(label, int) and not isinstance(label, bool):
        if 0 <= label < len(given):
            return label
        raise DataError(
            f"{where}: label = {label}, and there are {len(given)} choices: expected 0 to {len(given) - 1}."
        )
    said = [label, _completion(row), row.get("target")]
    found = [given.index(text) for text in said if text in given]
    if not found:
        raise DataError(
            f"{where}: neither label = {label!r} nor the completion {_completion(row)!r} is one of the {len(given)} choices: "
            "give the index of the right one as label."
        )
    return found[0]


def _references(row: dict[str, Any], where: str) -> list[str]:
    given = row.get("references", [_completion(row)])
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise DataError(f"{where}: references = {given!r}, expected a list of one or more texts.")
    return given


def _completion(row: dict[str, Any]) -> Any:
    """The answer in a row; a text has none, and is not asked."""
    return row["messages"][-1]["content"] if "messages" in row else row.get("completion", "")
