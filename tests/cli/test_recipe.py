"""Recipes: what is refused before anything is loaded, what reads back equal, and what others get to see."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetooth.delta import Delta
from finetooth.jobs import check
from finetooth.recipe import Recipe, RecipeError, load, parse

RAW: dict[str, Any] = {
    "model": "embedded:stories260K",
    "data": {"train": "embedded:banking77/train", "eval": "embedded:banking77/test"},
    "output": "run",
    "train": {"max_length": 96},
}


def made(folder: Path, *overrides: str, **sections: Any) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**RAW, **sections}))
    return load(file, overrides)


REFUSED = [
    (["method.betas=[0.9, 0.99]"], "write optimizer.betas"),
    (["method.eps=1e-6"], "write optimizer.eps"),
    (["method.stop_after=3"], "write train.stop_after_nonfinite"),
    (["method.decay_to=base"], "write optimizer.decay_to"),
    (["optimizer.decay_to=start"], "'zero', 'base'"),
    (["optimizer.rounding=up"], "'auto', 'stochastic', 'nearest'"),
    (["method.targets=3"], "method.targets"),
    (["evaluate.task=exact_match", "data.eval=null"], "needs data.eval"),
    (["method.name=gift-sw", "evaluate.quantized_bits=4", "data.eval=null"], "needs data.eval"),
    (["method.name=dst", "evaluate.quantized_bits=4"], "'dst' trains by element"),
    (["method.name=full", "evaluate.quantized_bits=4"], "choose gift-sw"),
    (["method.name=gift-sw", "method.unit=row", "method.rest=frozen", "evaluate.quantized_bits=4"], "trains by row"),
    (["evaluate.extract=("], "not a regular expression"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_refused_before_anything_is_loaded(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check(made(tmp_path, f"output={tmp_path / 'run'}", *overrides), resume=False)


def test_accepted(tmp_path: Path) -> None:
    columns = ["method.name=magnitude", "method.unit=column", "evaluate.quantized_bits=4"]
    for overrides in (columns, ["method.name=dst", "method.targets=all"], ["method.targets=['*.mlp.*']"]):
        check(made(tmp_path, f"output={tmp_path / 'run'}", *overrides), resume=False)


def test_infinities_read_back(tmp_path: Path) -> None:
    recipe = made(tmp_path, "method.name=gift-sw", "method.tau=.inf", "method.rho=inf", "optimizer.max_grad_norm=.inf")
    again = parse(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe and (again.method.model_extra or {})["tau"] == math.inf == recipe.optimizer.max_grad_norm
    text = json.dumps(recipe.to_json(), allow_nan=False)
    assert parse(json.loads(text)) == recipe
    delta = Delta.extract({"w": torch.ones(2)}, {"w": torch.zeros(2)}, recipe=recipe.to_json())
    delta.save(tmp_path / "d.safetensors")
    assert parse(Delta.load(tmp_path / "d.safetensors").recipe) == recipe


def test_paths_are_whole_and_those_shown_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "deep").mkdir()
    texts = []
    for here, file in (("deep", "../recipe.yaml"), ("", "recipe.yaml")):
        made(tmp_path, model="model", data={"train": "deep/../rows.jsonl"}, output=str(tmp_path / "run"))
        monkeypatch.chdir(tmp_path / here)
        texts.append(load(file).to_yaml())
    assert texts[0] == texts[1] and str(tmp_path / "rows.jsonl") in texts[0]
    assert load("recipe.yaml", ["output=o"]).output == str(tmp_path / "o")
    shown = load("recipe.yaml").public()
    assert (shown.model, shown.data.train, shown.output) == ("model", "rows.jsonl", "run")
    shown = made(tmp_path).public()
    assert (shown.model, shown.data.train) == ("embedded:stories260K", "embedded:banking77/train")


def test_a_link_keeps_its_ending(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("")
    (tmp_path / "rows.jsonl.gz").symlink_to(tmp_path / "blob")
    assert made(tmp_path, data={"train": "rows.jsonl.gz"}).data.train.endswith("rows.jsonl.gz")
    with pytest.raises(RecipeError, match="there is no file"):
        made(tmp_path, data={"train": "rows.gz"})
