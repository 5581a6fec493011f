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
from finetooth.preflight import about, in_both, remarks, stops
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
        assert (
            sum("generation prompt" in remark for remark in remarks(found, None, {tokenizer.eos_token_id})) == differs
        )


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
    assert found.longest > 50 and len(remarks(found, None, {tokenizer.eos_token_id})) == 2
    assert "will not stop" in remarks(found, None, {-7})[-1] and "will not stop" in remarks(found, None, set())[-1]
    said = about(found, "evaluation")
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


TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
SYSTEM = {"role": "system", "content": "be kind"}
ASK, FULL = (
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}",
)
USERS = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [
        (FULL + ASK, {"messages": [SYSTEM, *TURNS]}, None),
        (FULL, {"messages": TURNS}, "no generation prompt"),
        (USERS + ASK, {"messages": [SYSTEM, *TURNS]}, "leaves out or rewrites what a message says: 2 of 2"),
        (FULL + ASK, {"messages": [*TURNS[:1], {**TURNS[1], "thinking": "hm"}]}, "leaves out or rewrites"),
        (FULL + ASK, {"messages": TURNS, "tools": [{"name": "search"}]}, "tools are not read"),
        (FULL + ASK, {"messages": [TURNS[0], {**TURNS[1], "content": " "}]}, "the answer is empty"),
    ],
)
def test_what_a_chat_template_does_with_a_row(
    template: str, row: Any, said: str | None, tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = template
    try:
        found = prepare(write(tmp_path, row, row), part(), tokenizer, 200)
    finally:
        tokenizer.chat_template = None
    told = about(found, "training")
    assert (said is None and not told) or (said is not None and len(told) == 1 and said in told[0]), told


def test_what_a_template_does_with_a_prompt(tmp_path: Path, tokenizer: Any) -> None:
    file = write(
        tmp_path,
        {"prompt": "Hello", "tone": "kind", "completion": "there"},
        {"prompt": "Hello", "completion": "", "tone": "a"},
    )
    assert about(prepare(file, part(template="({tone})"), tokenizer, 100), "training") == [
        "data.template leaves out the prompt: 2 of 2 training rows.",
        "the answer is empty, so that only its end is learnt: 1 of 2 training rows.",
    ]
    assert len(about(prepare(file, part(template="{prompt} ({tone})"), tokenizer, 100), "training")) == 1


def test_rows_in_both_files_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    learn = prepare(write(tmp_path, {"prompt": "a", "completion": "b"}, {"text": "same"}), part(), tokenizer, 100)
    rows = [{"prompt": "a", "completion": "other"}, {"prompt": "c", "completion": "b"}, {"text": "same"}]
    test = prepare(write(tmp_path, *rows, name="eval.jsonl"), part(), tokenizer, 100)
    assert in_both(learn, test) == 2 and in_both(learn, learn) == 2
    assert remarks(learn, test, {tokenizer.eos_token_id}) == [
        "asked in the training rows as well, word for word: 2 of 3 evaluation rows."
    ]


def test_where_generation_stops(tmp_path: Path, tokenizer: Any) -> None:
    """The model's generation config decides, then its config, then the tokenizer."""
    import shutil

    folder = shutil.copytree(embedded.path("stories260K"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert stops(str(folder), tokenizer) == {5, 6}
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    assert stops(str(folder), tokenizer) == {7}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert stops(str(folder), tokenizer) == {tokenizer.eos_token_id}


def test_preview_says_what_training_says(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a " * 60, "completion": "b"}]
    write(tmp_path, *rows)
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: embedded:stories260K\ndata: {train: rows.jsonl, eval: rows.jsonl}\noutput: unused\ntrain: {max_length: 48}\n"
    )
    found = json.loads(CliRunner().invoke(app, ["data", "preview", str(file), "--json"]).stdout)
    assert found["eval"] == {"rows": 2, "truncated": 1, "without_target": 1, "tokens_learnt": 2, "in_training": 2}
    assert len(found["remarks"]) == 5 and found["longest"] > 48
    shown = CliRunner().invoke(app, ["data", "preview", str(file)]).stdout.replace("\n", " ")
    assert "2 evaluation rows; 1 cut" in shown and shown.count("note: ") == 5
    told = CliRunner().invoke(app, ["train", str(file), f"output={tmp_path / 'run'}", "train.max_steps=1"]).stderr
    assert all(f"note: {remark}" in told for remark in found["remarks"])


def test_preview_refuses_what_training_refuses(tmp_path: Path) -> None:
    write(tmp_path, {"prompt": "a", "completion": "b"})
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: embedded:stories260K\ndata: {train: rows.jsonl, eval: rows.jsonl}\noutput: unused\nevaluate: {task: choice}\n"
    )
    result = CliRunner().invoke(app, ["data", "preview", str(file)])
    assert result.exit_code == 2 and "rows.jsonl, line 1: no choices" in result.stderr
