"""Rows to tokens: what is learnt, what is refused, and what is counted."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetooth import embedded
from finetooth.cli.main import app
from finetooth.data import IGNORE, DataError, documents, prepare, rows
from finetooth.recipe import DataPart, Recipe, RecipeError, load, parse

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded.path("stories260K"))


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    file = folder / name
    if name.endswith(".gz"):
        with gzip.open(file, "wt") as out:
            out.write(text)
    else:
        file.write_text(text)
    return file


def part(**fields: Any) -> DataPart:
    return DataPart(train="unused", **fields)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_only_the_completion_is_learnt(name: str, tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path, {"prompt": "Where is my card?", "completion": "card arrival"}, name=name)
    example = prepare(file, part(), tokenizer, 100).examples[0]
    assert tokenizer.decode(example.ids[: example.prompt], skip_special_tokens=True) == "Where is my card?\n"
    learnt = [i for i in example.labels if i != IGNORE]
    assert learnt == example.ids[example.prompt :] and learnt[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learnt, skip_special_tokens=True) == "card arrival"


def test_template_and_separator(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path, {"prompt": "Hello", "tone": "kind", "completion": "there"})
    given = part(template="({tone}) {prompt}", separator=" -> ")
    example = prepare(file, given, tokenizer, 100).examples[0]
    assert tokenizer.decode(example.ids[: example.prompt], skip_special_tokens=True) == "(kind) Hello -> "
    with pytest.raises(DataError, match="'mood'"):
        prepare(file, part(template="{mood}"), tokenizer, 100)


def test_chat_learns_the_last_answer(tmp_path: Path, tokenizer: Any) -> None:
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    file = write(tmp_path, {"messages": [{"role": r, "content": c} for r, c in turns]})
    with pytest.raises(DataError, match="no chat template"):
        prepare(file, part(), tokenizer, 100)
    tokenizer.chat_template = TEMPLATE
    try:
        example = prepare(file, part(), tokenizer, 200).examples[0]
    finally:
        tokenizer.chat_template = None
    learnt = tokenizer.decode([i for i in example.labels if i != IGNORE])
    assert "four" in learnt and "three" not in learnt and learnt.rstrip().endswith("</s>")


def test_evaluation_asks_with_the_generation_prompt(tmp_path: Path, tokenizer: Any) -> None:
    """Some templates end it in what no conversation has: then the two differ, and that is said."""
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    file = write(tmp_path, *[{"messages": turns}] * 3)
    thinking = TEMPLATE.replace("<assistant>{% endif", "<assistant><think>\n{% endif")
    for template, differs in ((TEMPLATE, False), (thinking, True)):
        tokenizer.chat_template = template
        try:
            found = prepare(file, part(), tokenizer, 200)
        finally:
            tokenizer.chat_template = None
        example = found.examples[0]
        assert tokenizer.decode(example.asked).endswith("<think>\n" if differs else "<assistant>")
        assert (example.asked != example.ids[: example.prompt]) is differs
        assert sum("generation prompt" in remark for remark in found.remarks(tokenizer.eos_token_id)) == differs


def test_what_a_template_refuses_is_a_data_error(tmp_path: Path, tokenizer: Any) -> None:
    turns = [{"role": "system", "content": "be kind"}, {"role": "assistant", "content": "yes"}]
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    try:
        with pytest.raises(DataError, match="refuses a row with the roles system: no system role"):
            prepare(write(tmp_path, {"messages": turns}), part(), tokenizer, 100)
    finally:
        tokenizer.chat_template = None


DAMAGES = [(kind, how) for kind in ("gz", "xz") for how in ("cut", "not it", "not text")] + [("jsonl", "not text")]


@pytest.mark.parametrize(("kind", "how"), DAMAGES)
def test_a_damaged_file_is_named(kind: str, how: str, tmp_path: Path) -> None:
    good = "".join(json.dumps({"text": f"row {i * i}"}) + "\n" for i in range(4000)).encode()
    packed = {"gz": gzip.compress, "xz": lzma.compress}.get(kind, bytes)(good if how == "cut" else b"\xff" + good)
    file = tmp_path / f"rows.{kind}"
    file.write_bytes({"cut": packed[: len(packed) // 2], "not it": good}.get(how, packed))
    for read in (lambda f: list(rows(f)), documents):
        with pytest.raises(DataError, match=file.name):
            read(file)


def test_text_learns_all_of_it(tmp_path: Path, tokenizer: Any) -> None:
    example = prepare(write(tmp_path, {"text": "Once upon a time"}), part(), tokenizer, 100).examples[0]
    assert example.labels == example.ids and example.ids[-1] == tokenizer.eos_token_id


def test_what_is_cut_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "a " * 50, "completion": "b"},
        {"prompt": "a", "completion": "b " * 50},
        {"prompt": "a", "completion": "b"},
    ]
    found = prepare(write(tmp_path, *rows), part(), tokenizer, 20)
    assert (found.rows, found.truncated, found.without_target, len(found.examples)) == (3, 2, 1, 2)
    assert len(found.remarks(tokenizer.eos_token_id)) == 2
    assert "will not stop" in found.remarks(-7)[-1]
    said = found.remarks(-7, "evaluation")
    assert "2 of 3 evaluation rows" in said[0] and "misses" in said[1] and len(said) == 2
    assert found.prompts == 3 and found.counts()["without_target"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ([1], "line 2: a list"),
        ({"question": "?"}, r"line 2: the keys \['question'\]"),
        ({"prompt": "a", "completion": 3}, "completion = 3"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "ends with the assistant"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "no message before"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
            "content is a list in the message of 'user'",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
            "content is a NoneType",
        ),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str, tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path, {"prompt": "a", "completion": "b"}, row)
    with pytest.raises(DataError, match=message):
        prepare(file, part(), tokenizer, 100)


def test_documents() -> None:
    found = documents(embedded.path("tinystories"))
    assert len(found) > 100 and all(d and "<|endoftext|>" not in d for d in found)


def test_recipes_round_trip(tmp_path: Path) -> None:
    recipe = parse(
        {
            "model": "a/b",
            "data": {"train": "embedded:banking77/train"},
            "output": "o",
            "method": {"name": "dst", "keep": 1.0, "relative": True},
        }
    )
    file = tmp_path / "r.yaml"
    file.write_text(recipe.to_yaml())
    again = load(file, ["optimizer.lr=2e-4"])
    assert again.method == recipe.method and isinstance(again.method.keep, float) and again.optimizer.lr == 2e-4
    assert Recipe.model_validate(again.model_dump()) == again
    with pytest.raises(RecipeError, match="data: this key is missing"):
        parse({"model": "a/b", "output": "o"})


def test_preview(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: embedded:stories260K\ndata: {train: 'embedded:banking77/train', limit: 5}\noutput: unused\n"
    )
    result = CliRunner().invoke(app, ["data", "preview", str(file), "--json"])
    found = json.loads(result.stdout)
    assert found["rows"][0]["ends_with_eos"] and found["rows"][0]["context"].endswith("\n") and found["of"]["rows"] == 5
    assert "bear loss" in CliRunner().invoke(app, ["data", "preview", str(file)]).stdout
