"""Typos of every key, choice and argument: an error that names the wrong one, its place, and the nearest right one.

And values of a wrong type or out of range for every key, made from the schema: key, value and what was expected.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn
from typer.testing import CliRunner

import finetooth
from finetooth import METHODS
from finetooth.assemble import check_options
from finetooth.cli.main import app
from finetooth.jobs import check, check_method
from finetooth.nearest import distance
from finetooth.recipe import MethodPart, Recipe, load
from finetooth.schema import keys, section, takes, words
from tests.faults.typed import typos

RAW: dict[str, Any] = {
    "model": "embedded:stories260K",
    "data": {"train": "embedded:banking77/train", "eval": "embedded:banking77/test"},
    "output": "run",
}
SECTIONS = {name: inner for name, field in Recipe.model_fields.items() if (inner := section(field)) is not None}
LEVELS: list[tuple[str, list[str]]] = [("", list(Recipe.model_fields))]
LEVELS += [(f"{name}.", list(inner.model_fields)) for name, inner in SECTIONS.items() if name != "method"]
Call = Callable[[], Any]


def said(call: Call) -> str:
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    return str(raised.value)


def suggested(message: str) -> str:
    found = re.search(r"Did you mean '([^']+)'\?", message)
    return found[1] if found else ""


def right(message: str, place: str, typo: str, word: str) -> bool:
    """Whether it names the typo in its place, and a word that is at least as near as the right one."""
    near = suggested(message)
    return f"{place}{typo}" in message and bool(near) and distance(typo, near) <= distance(typo, word)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Recipe]:
    """Reads a raw recipe as the command line does, with overrides."""

    def read(raw: dict[str, Any], *overrides: str) -> Recipe:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(raw), encoding="utf-8")
        recipe = load(file, overrides)
        check_method(recipe.method)
        return recipe

    return read


def with_key(place: str, typo: str) -> dict[str, Any]:
    raw = copy.deepcopy(RAW)
    at = raw if not place else raw.setdefault(place[:-1], {})
    at[typo] = 1
    return raw


@pytest.mark.parametrize(("place", "known"), LEVELS, ids=[place or "top" for place, _ in LEVELS])
def test_keys(place: str, known: list[str], read: Callable[..., Recipe]) -> None:
    """In YAML and as an override."""
    wrong, done = [], 0
    for word in known:
        for typo in typos(word, known):
            for call in (lambda t=typo: read(with_key(place, t)), lambda t=typo: read(RAW, f"{place}{t}=1")):
                message, done = said(call), done + 1
                if not right(message, place, typo, word):
                    wrong.append((typo, message))
    assert not wrong and done > 60 * len(known), (done, wrong[:3])


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_in_overrides(name: str, read: Callable[..., Recipe]) -> None:
    for typo in typos(name, Recipe.model_fields):
        assert right(said(lambda t=typo: read(RAW, f"{t}.lr=1")), "", typo, name), typo


@pytest.mark.parametrize("row", METHODS)
def test_keys_of_a_method(row: str, read: Callable[..., Recipe]) -> None:
    options = said(lambda: check_options(row, {"?": 0})).rpartition("There are: ")[2].rstrip(".").split(", ")
    known = [*MethodPart.model_fields, *options]
    for word in known:
        for typo in typos(word, known, letters="e"):
            message = said(lambda t=typo: read({**RAW, "method": {"name": row, t: 1}}))
            assert right(message, "method.", typo, word), message


CHOICES = [(key, words(field.annotation)) for key, field in keys(Recipe) if words(field.annotation)]
CHOICES += [
    ("method.name", list(METHODS)),
    ("method.unit", ["element", "row", "column", "block", "matrix", "layer"]),
    ("method.pool", ["tensor", "silo", "layer", "model"]),
    ("method.score", ["gradient", "snip", "magnitude", "random"]),
    ("method.when", ["once", "every", "at", "warmup"]),
    ("method.rest", ["frozen", "reset", "noise", "quantized"]),
    ("method.state", ["compact", "dense"]),
    ("method.mask", ["gradient", "update"]),
    ("method.targets", ["all", "blocks", "linear", "dense-linear"]),
]


@pytest.mark.parametrize(("key", "known"), CHOICES, ids=[key for key, _ in CHOICES])
def test_choices(key: str, known: list[str], read: Callable[..., Recipe]) -> None:
    for word in known:
        for typo in typos(word, known):
            message = said(lambda t=typo: read(RAW, f"{key}='{t}'"))
            assert right(message, "", typo, word) and key.rpartition(".")[2] in message + "method name", message


def test_reporters_and_embedded_names(tmp_path: Path, read: Callable[..., Recipe]) -> None:
    output = f"output={tmp_path / 'run'}"
    for typo in typos("tensorboard") + typos("wandb"):
        message = said(lambda t=typo: check(read(RAW, output, f"train.report_to=['{t}']"), resume=False))
        assert right(message, "", typo, "tensorboard"), message
    for typo in typos("stories260K"):
        message = said(lambda t=typo: read(RAW, f"model='embedded:{t}'"))
        assert right(message, "embedded:", typo, "stories260K"), message


def test_arguments_of_build_and_of_a_rule() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    options = said(lambda: check_options("dst", {"?": 0})).rpartition("There are: ")[2].rstrip(".").split(", ")
    known = [
        name for name in inspect.signature(finetooth.build).parameters if name not in ("method", "model", "overrides")
    ]
    legal = [*known, *options, "method", "model", "betas", "eps", "decay_to", "stop_after", "kernels", "moments"]
    for word in [*known, *options, "betas", "eps", "decay_to", "stop_after", "kernels", "moments"]:
        for typo in typos(word, legal):
            message = said(lambda t=typo: finetooth.build("dst", model, **{t: 1}))
            assert right(message, "", typo, word), message
    fields = [field.name for field in dataclasses.fields(finetooth.Rule)]
    for word in fields:
        for typo in typos(word, fields):
            message = said(lambda t=typo: finetooth.Rule(score=abs, **{t: 1}))
            assert right(message, "", typo, word), message


def test_commands_and_flags() -> None:
    """typer's own suggestions."""
    for word, near in (("trian", "train"), ("paln", "plan"), ("dleta", "delta")):
        found = CliRunner().invoke(app, [word])
        assert found.exit_code == 2 and word in found.stderr and near in found.stderr
    for flag, near in (("--jsn", "--json"), ("--resum", "--resume")):
        found = CliRunner().invoke(app, ["train", "recipe.yaml", flag])
        assert found.exit_code == 2 and flag in found.stderr and near in found.stderr


# -- values --------------------------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {"text": "many", "list": [[]], "mapping": {"a": {}}, "yes": True, "nan": float("nan")}


def wrong_values(key: str, taken: str) -> list[Any]:
    """Values that a key does not take, by what the schema says of it."""
    found: list[Any] = [WRONG["list"]]
    if "mapping" not in taken:
        found.append(WRONG["mapping"])
    if "true or false" not in taken:
        found.append(True)
    if "text" not in taken or "list" in taken:
        found.append("many") if taken != "text, list of texts" else None
        found += [WRONG["nan"], float("inf")] if key != "optimizer.max_grad_norm" else [WRONG["nan"]]
    for limit, outside in (("≥ 0", -1), ("> 0", 0), ("≥ 1", 0), ("≥ 2", 1), ("≤ 8", 9)):
        found += [outside] if limit in taken else []
    return found + ([2.5] if taken.startswith("whole number") else [])


@pytest.mark.parametrize(("key", "field"), list(keys(Recipe)), ids=[key for key, _ in keys(Recipe)])
def test_values(key: str, field: Any, read: Callable[..., Recipe]) -> None:
    for value in wrong_values(key, takes(field)):
        raw = copy.deepcopy(RAW)
        *path, last = key.split(".")
        (raw.setdefault(path[0], {}) if path else raw)[last] = value
        message = said(lambda r=raw: read(r))
        assert f"{key}={value!r}: expected" in message and len(message.splitlines()) == 1, message
        assert takes(field) in message, message


@pytest.mark.parametrize("name", SECTIONS)
def test_a_value_for_a_section(name: str, read: Callable[..., Recipe]) -> None:
    message = said(lambda: read({**RAW, name: 3}))
    assert f"{name}=3: expected a section with {next(iter(SECTIONS[name].model_fields))}" in message


OPTIONS = ["unit", "pool", "score", "threshold", "when", "rest", "state", "mask", "bits", "gamma", "tau", "rho"]


@pytest.mark.parametrize("name", [*OPTIONS, "relative", "zero_moments"])
def test_values_of_a_method(name: str, read: Callable[..., Recipe]) -> None:
    row = "dst" if name in ("relative", "zero_moments") else "gift-sw"
    for value in (["a"], {"a": 1}, -3, "many"):
        message = said(lambda v=value: read({**RAW, "method": {"name": row, name: v}}))
        assert name in message and repr(value) in message, message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", "model: this key stands twice, again in line 2"),
        ("model: [\n", "is not YAML"),
        ("- model\n", "holds list"),
        ("", "holds NoneType"),
        ("1: 2\nmodel: m\noutput: o\ndata: {train: t}\n", "1: this key is unknown"),
        ("lr: 1\nmodel: m\noutput: o\ndata: {train: t}\n", "lr: this key is unknown. Did you mean 'optimizer.lr'?"),
    ],
)
def test_the_file_itself(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert message in said(lambda: load(tmp_path / "recipe.yaml"))


def test_an_override_that_is_not_yaml(read: Callable[..., Recipe]) -> None:
    assert "the value is not YAML" in said(lambda: read(RAW, "data.template={x"))
