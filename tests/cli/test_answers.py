"""What the tasks read of a row, and what is refused: by file and line, before a weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetooth.answers import reader
from finetooth.data import DataError, Prepared, prepare
from finetooth.recipe import EvaluatePart
from tests.cli.test_data import part, tokenizer, write

__all__ = ["tokenizer"]  # the fixture

ROW = {"prompt": "Is it red?", "completion": "yes"}


def read(folder: Path, tokenizer: Any, *rows: Any, max_length: int = 100, **how: Any) -> Prepared:
    also = reader(EvaluatePart(**how), tokenizer)
    return prepare(write(folder, *rows), part(), tokenizer, max_length, None, also)


@pytest.mark.parametrize("task", ["loss", "exact_match", "none"])
def test_other_tasks_read_nothing_more(task: str, tokenizer: Any) -> None:
    assert reader(EvaluatePart(task=task), tokenizer) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "right"),
    [
        ({"choices": ["no", "yes"]}, 1),
        ({"choices": ["no", "yes"], "label": 0}, 0),  # the label goes before the completion
        ({"choices": ["no", "yes", "perhaps"], "label": "perhaps"}, 2),
        ({"choices": ["no", "maybe"], "label": "a name", "target": "maybe"}, 1),
        ({}, 0),  # those of the recipe
    ],
)
def test_the_right_choice(more: dict[str, Any], right: int, tmp_path: Path, tokenizer: Any) -> None:
    found = read(tmp_path, tokenizer, {**ROW, **more}, task="choice", choices=["yes", "no"]).examples[0].choices
    assert found is not None and found.right == right
    texts = more.get("choices", ["yes", "no"])
    assert [tokenizer.decode(ids).strip() for ids in found.ids] == texts and found.characters == [len(t) for t in texts]


def test_a_choice_is_what_the_completion_is_without_its_end(tmp_path: Path, tokenizer: Any) -> None:
    example = read(tmp_path, tokenizer, {**ROW, "choices": ["yes", "no"]}, task="choice").examples[0]
    assert example.choices is not None
    assert example.asked + example.choices.ids[0] + [tokenizer.eos_token_id] == example.ids


def test_a_choice_that_does_not_fit_is_a_miss(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**ROW, "choices": ["yes", "no " * 40]}, {**ROW, "choices": ["yes", "no"]}]
    found = read(tmp_path, tokenizer, *rows, max_length=40, task="choice")
    assert [e.choices is None for e in found.examples] == [True, False] and found.flaws["choices cut"] == 1


def test_references(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**ROW, "references": ["yes", "it is"]}, ROW]
    for task in ("bleu", "rouge"):
        assert [e.references for e in read(tmp_path, tokenizer, *rows, task=task).examples] == [
            ["yes", "it is"],
            ["yes"],
        ]


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"task": "choice"}, "line 2: no choices.*evaluate.choices"),
    ({"choices": "yes or no"}, {"task": "choice"}, "line 2: choices = 'yes or no'"),
    ({"choices": ["yes"]}, {"task": "choice"}, "two or more"),
    ({"choices": ["yes", "yes"]}, {"task": "choice"}, "different"),
    ({"choices": ["yes", " "]}, {"task": "choice"}, "line 2: choices"),
    ({"choices": ["yes", "no"], "label": 2}, {"task": "choice"}, "label = 2, and there are 2 choices"),
    ({"choices": ["yes", "no"], "label": -1}, {"task": "choice"}, "expected 0 to 1"),
    ({"completion": "perhaps", "choices": ["yes", "no"]}, {"task": "choice"}, "nor the completion 'perhaps'"),
    ({"completion": "1", "choices": ["yes", "no"], "label": True}, {"task": "choice"}, "label = True nor"),
    ({"references": "yes"}, {"task": "bleu"}, "line 2: references = 'yes'"),
    ({"references": []}, {"task": "rouge"}, "one or more texts"),
    ({"references": ["yes", 3]}, {"task": "rouge"}, "one or more texts"),
]


@pytest.mark.parametrize(("row", "how", "message"), BAD, ids=[m for _, _, m in BAD])
def test_a_bad_row_is_named(
    row: dict[str, Any], how: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    good = {**ROW, "choices": ["yes", "no"], "references": ["yes"]}
    with pytest.raises(DataError, match=message):
        read(tmp_path, tokenizer, good, {**ROW, **row}, **how)
