"""What a user may hand in by mistake, through the real command line: one line that says what, where and what to do; 2 for bad input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from finetooth import embedded
from finetooth.cli.main import app

ROW = {"prompt": "Where is my card?", "completion": "card arrival"}
ROWS = [ROW, {"prompt": "How do I top up?", "completion": "top up"}] * 4
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 512}
runner = CliRunner()


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass
class Place:
    """A folder with a recipe, a model and rows, of which a case spoils one thing."""

    folder: Path

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def model(self) -> Path:
        """A copy of the embedded model, to be spoilt."""
        target = self.folder / "model"
        if not target.exists():
            shutil.copytree(embedded.path("stories260K"), target)
        return target

    def recipe(self, **sections: Any) -> Path:
        raw: dict[str, Any] = {
            "model": "model" if (self.folder / "model").exists() else "embedded:stories260K",
            "method": {"name": "magnitude"},
            "data": {"train": "rows.jsonl"},
            "train": {"max_steps": 2, "batch_size": 2, "max_length": 64},
            "evaluate": {"task": "none"},
            "output": str(self.folder / "run"),
        }
        for name, section in sections.items():
            raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        return self.folder / "recipe.yaml"

    def config(self, change: Callable[[dict[str, Any]], Any], name: str = "config.json") -> None:
        file = self.model / name
        held = json.loads(file.read_text())
        change(held)
        file.write_text(json.dumps(held))

    def tokenizer(self, **tokens: Any) -> None:
        """Special tokens of the model's tokenizer, None to take one away."""
        self.config(
            lambda held: [held.pop(k, None) if v is None else held.update({k: v}) for k, v in tokens.items()],
            "tokenizer_config.json",
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(tmp_path)
    found.rows.write_text(lines(ROWS), encoding="utf-8")
    return found


def train(*words: object) -> Result:
    return runner.invoke(app, ["train", *map(str, words)])


def other_model(place: Place, kind: str) -> None:
    """A tiny model of another kind in the place of the Llama, with its tokenizer."""
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    if kind == "bert":
        made: Any = BertForMaskedLM(BertConfig(**SMALL, intermediate_size=8, max_position_embeddings=128))
    else:
        made = T5ForConditionalGeneration(
            T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4, vocab_size=512)
        )
    (place.model / "config.json").unlink()
    made.save_pretrained(place.model)


def one_less(place: Place) -> None:
    file = place.model / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})


def more_tokens(place: Place) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.model)
    tokenizer.add_tokens(["<card>"])
    tokenizer.save_pretrained(place.model)
    place.rows.write_text(lines([{**ROW, "prompt": "Where is my <card>?"}]))


def refuse(place: Place, spoil: Callable[[Place], Any]) -> Result:
    words = spoil(place)
    words = words if isinstance(words, list) else [place.recipe() if not isinstance(words, Path) else words]
    return train(*words)


Spoil = Callable[[Place], Any]
BAD: dict[str, tuple[Spoil, str, int]] = {
    "an empty file": (lambda p: p.rows.write_text(""), "rows.jsonl has no rows: expected JSON lines", 2),
    "a file of blank lines": (lambda p: p.rows.write_text("\n \n\n"), "rows.jsonl has no rows: expected JSON lines", 2),
    "a broken line": (
        lambda p: p.rows.write_text(lines(ROWS[:3]) + '{"prompt": "a", "completion\n' + lines(ROWS[3:])),
        "rows.jsonl, line 4: not JSON",
        2,
    ),
    "a list instead of lines": (
        lambda p: p.rows.write_text(json.dumps(ROWS, indent=1)),
        "rows.jsonl, line 1: not JSON",
        2,
    ),
    "a list in one line": (
        lambda p: p.rows.write_text(json.dumps(ROWS)),
        "rows.jsonl, line 1: a list, expected an object",
        2,
    ),
    "a line with NUL": (lambda p: p.rows.write_text(lines(ROWS) + "\0\0\0\n"), "rows.jsonl, line 9: not JSON", 2),
    "another encoding": (
        lambda p: p.rows.write_bytes(lines(ROWS).encode("utf-16")),
        "rows.jsonl cannot be read as UTF-8",
        2,
    ),
    "a folder as data": (lambda p: p.recipe(data={"train": "."}), "there is no file", 2),
    "a folder as recipe": (lambda p: [p.folder], "which is a folder: give the YAML file in it", 2),
    "no recipe": (lambda p: [p.folder / "none.yaml"], "there is no recipe", 2),
    "a binary as recipe": (lambda p: [embedded.path("banking77/train")], "is not YAML", 2),
    "prompts longer than max_length": (
        lambda p: p.recipe(train={"max_length": 4}),
        "none of the 8 rows has a token left to learn. Raise train.max_length",
        2,
    ),
    "empty completions": (
        lambda p: p.rows.write_text(lines([{"prompt": "a", "completion": ""}] * 4)),
        "the answer of every row is empty",
        2,
    ),
    "a tokenizer without EOS and pad": (
        lambda p: p.tokenizer(eos_token=None, pad_token=None),
        "has neither a pad nor an end-of-sequence token",
        2,
    ),
    "a model in float16": (
        lambda p: p.recipe(train={"precision": "fp16"}),
        "train.precision='fp16': expected one of 'fp32', 'bf16'",
        2,
    ),
    "an output that is a file": (lambda p: [p.recipe(output=str(p.rows))], "rows.jsonl is a file: give a folder", 2),
    "an output below a file": (lambda p: [p.recipe(output=str(p.rows / "run"))], "rows.jsonl is a file", 2),
    "an output that is in use": (
        lambda p: [(p.folder / "run").mkdir(), (p.folder / "run/x").write_text(""), p.recipe()][2:],
        "is not empty: give another folder, or --resume",
        2,
    ),
    "a model folder without weights": (
        lambda p: (p.model / "model.safetensors").unlink(),
        "model holds no model.safetensors",
        2,
    ),
    "a download that was interrupted": (
        lambda p: (p.model / "model.safetensors").write_bytes((p.model / "model.safetensors").read_bytes()[:100000]),
        "model.safetensors is not a whole safetensors file",
        2,
    ),
    "a shard that is missing": (
        lambda p: [
            (p.model / "model.safetensors").unlink(),
            (p.model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}'),
            p.recipe(),
        ][2:],
        "model-1-of-2.safetensors is missing",
        2,
    ),
    "a model folder without config": (lambda p: (p.model / "config.json").unlink(), "model holds no config.json", 2),
    "a config that is no JSON": (lambda p: (p.model / "config.json").write_text("{"), "config.json of", 2),
    "a model folder without tokenizer": (
        lambda p: [[f.unlink() for f in p.model.glob("tokenizer*")], p.recipe()][1:],
        "the tokenizer of",
        2,
    ),
    "an empty model folder": (
        lambda p: [(p.folder / "model").mkdir(), p.recipe()][1:],
        "model holds no config.json",
        2,
    ),
    "a masked language model": (lambda p: other_model(p, "bert"), "BertForMaskedLM", 2),
    "an encoder-decoder": (lambda p: other_model(p, "t5"), "T5ForConditionalGeneration", 2),
    "a config of another model": (
        lambda p: p.config(lambda c: c.update(hidden_size=32)),
        "have other shapes than its config.json says",
        2,
    ),
    "a checkpoint without some weights": (
        one_less,
        "has no weights for 1 tensors of the model, such as 'model.layers.0.mlp.up_proj.weight'",
        2,
    ),
    "a tokenizer with more tokens than the model": (
        more_tokens,
        "makes the token 512, and the model has embeddings for 512",
        2,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str, place: Place) -> None:
    spoil, message, code = BAD[case]
    found = refuse(place, spoil)
    said = found.stderr.rpartition("error: ")[2]
    assert found.exit_code == code, found.output
    assert message in said and "Traceback" not in found.output, said
    assert not (place.folder / "run" / "recipe.yaml").exists(), "a run that cannot start leaves nothing in the way"


GOOD: dict[str, tuple[Spoil, str]] = {
    "one row": (lambda p: p.rows.write_text(lines([ROW])), ""),
    "a batch larger than the data": (
        lambda p: p.recipe(train={"batch_size": 64}),
        "a step takes 64 rows and there are 8: every epoch is one step",
    ),
    "a byte order mark": (lambda p: p.rows.write_bytes(b"\xef\xbb\xbf" + lines(ROWS).encode()), ""),
    "ends of lines from Windows": (lambda p: p.rows.write_bytes(lines(ROWS).replace("\n", "\r\n").encode()), ""),
    "no end of line at the end": (lambda p: p.rows.write_text(lines(ROWS).rstrip("\n")), ""),
    "other scripts, and line separators in a text": (
        lambda p: p.rows.write_text(
            lines([{"prompt": "Wo ist die Käßtüte\u2028? 你好 🦷", "completion": "da\u2029"}] * 4), encoding="utf-8"
        ),
        "",
    ),
    "an empty output folder": (lambda p: [(p.folder / "run").mkdir(), p.recipe()][1:], ""),
    "a tokenizer without pad": (lambda p: p.tokenizer(pad_token=None), ""),
    "a tokenizer without EOS": (
        lambda p: p.tokenizer(eos_token=None, pad_token="<unk>"),
        "no row teaches the end-of-sequence token",
    ),
    "some empty completions": (
        lambda p: p.rows.write_text(lines([*ROWS, {**ROW, "completion": ""}])),
        "the answer is empty",
    ),
    "weights of float16": (lambda p: p.config(lambda c: c.update(dtype="float16")), ""),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_not(case: str, place: Place) -> None:
    spoil, message = GOOD[case]
    found = refuse(place, spoil)
    assert found.exit_code == 0, found.output
    assert message in found.stderr and (place.folder / "run" / "delta.safetensors").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(place: Place) -> None:
    (place.folder / "closed").mkdir(mode=0o500)
    found = train(place.recipe(output=str(place.folder / "closed" / "run")))
    assert found.exit_code == 2 and "closed" in found.stderr and "Traceback" not in found.output
