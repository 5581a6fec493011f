"""`finetooth plan` through the real command line: what it says, that it reads no weights, what bad input gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import finetooth
from finetooth import embedded
from finetooth.cli.main import app
from finetooth.data import Tokens
from finetooth.longest import longest_rows
from tests.laws.toy import NEEDED

runner = CliRunner()


def recipe(folder: Path, **sections: Any) -> Path:
    raw: dict[str, Any] = {
        "model": "embedded:stories260K",
        "method": {"name": "gmt"},
        "data": {"train": "embedded:banking77/train", "eval": "embedded:banking77/test", "limit": 24},
        "train": {"batch_size": 4, "max_length": 96},
        "output": str(folder / "run"),
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def call(*words: object) -> Any:
    result = runner.invoke(app, ["plan", *map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_without_weights(tmp_path: Path) -> None:
    """A folder with config and tokenizer is enough for a method that needs no base on disk; nothing is written."""
    source = embedded.path("embedded:stories260K")
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    found = call(recipe(tmp_path, model=str(bare), method={"name": "magnitude"}))
    assert found == call(recipe(tmp_path, method={"name": "magnitude"}))
    assert not (tmp_path / "run").exists()


def test_what_it_says(tmp_path: Path) -> None:
    found = call(recipe(tmp_path), "method.keep=0.5")
    kinds, weights = found["kinds"], 260_032
    assert sum(k["weights"] for k in kinds.values()) == weights
    assert set(kinds) == {"embedding", "linear, attention", "linear, ffn", "norm"}
    assert sum(k["chosen"] for k in kinds.values()) == weights // 2
    assert found["state"] == sum(k["state"] for k in kinds.values()) == weights * 8 + weights // 8
    assert (
        found["gradients"] == weights * 4 and found["weights"] == weights * 4 + 16 * 2
    )  # and two buffers of rotary phases
    assert found["peak"] == max(found["phases"].values()) >= found["training_peak"]
    assert list(found["phases"]) == ["calibrate and choose", "forward and backward", "step", "evaluate", "delta"]
    assert found["cards"]["8 GB"] is True and found["method"] == "gmt"
    assert found["batch"]["rows"] == 4 and found["batch"]["ragged"] and "24 rows" in found["batch"]["source"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return call(recipe(tmp_path_factory.mktemp("full"), method={"name": "full"}))


@pytest.mark.parametrize("row", list(finetooth.METHODS))
def test_every_row(row: str, full: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = dict(NEEDED.get(row, {}))
    if finetooth.METHODS[row].source:
        given["calibration"] = "embedded:banking77/test"
    found = call(recipe(tmp_path, method={"name": row, **given}))
    if row in ("full", "gmt", "gmt-strict"):
        assert found["gradients"] == full["gradients"]
    else:
        assert found["gradients"] < full["gradients"] and found["kinds"]["embedding"]["chosen"] in (0, 4 * 64, 32768)
    assert found["delta"] <= full["delta"]


def test_what_makes_it_less(tmp_path: Path) -> None:
    plain = call(recipe(tmp_path))
    half = call(recipe(tmp_path), "train.precision=bf16")
    again = call(recipe(tmp_path), "train.gradient_checkpointing=true")
    more = call(recipe(tmp_path), "train.accumulate=4")
    assert half["weights"] < plain["weights"] and half["state"] == plain["state"]
    assert again["activations"] < plain["activations"] / 2 and again["training_peak"] < plain["training_peak"]
    assert more["training_peak"] > plain["training_peak"]  # gradients of earlier micro-batches stay


def test_a_delta_of_turns_may_hold_every_layer(tmp_path: Path) -> None:
    """Not only those that a plan sees chosen first."""
    full, lisa, badam = (call(recipe(tmp_path, method={"name": row})) for row in ("full", "lisa", "badam"))
    blocks = sum(n["weights"] for kind, n in badam["kinds"].items() if "," in kind)
    assert lisa["delta"] == full["delta"] > badam["delta"] > 4 * blocks


def test_packing_and_text(tmp_path: Path) -> None:
    found = call(recipe(tmp_path, data={"packing": True}, evaluate={"task": "none"}))
    assert found["batch"]["packed"] and "evaluate" not in found["phases"]
    result = runner.invoke(app, ["plan", str(recipe(tmp_path)), "train.batch_size=2"])
    assert result.exit_code == 0, result.output
    for word in ("embedding", "20.00%", "delta file", "2 rows of", "fits on a card of"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("method.name=gmtt", "Did you mean 'gmt'"),
        ("method.keep=1.5", "out of range"),
        ("train.max_length=4096", "context of 512"),
        ("method.targets=nothing*", "no parameter matches"),
        ("trian.epochs=2", "unknown"),
        ("evaluate.quantized_bits=4", "gift-sw"),
        ("method.name=ssu", "method.calibration"),
        ("method.calibration=embedded:banking77/test", "is not read"),
        ("method.name=rows", "needs rows="),
        ("method={name: rows, rows: [512]}", "has 512 rows"),
        ("method={name: rows, rows: ['no such token']}", "has no token 'no such token'"),
        ("method={name: badam, order: upwards}", "ascending"),
    ],
)
def test_bad_input(change: str, said: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["plan", str(recipe(tmp_path)), change])
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


def test_the_output_folder_may_be_in_use(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "left.txt").touch()
    call(recipe(tmp_path))


def test_longest_rows() -> None:
    rows = [Tokens(list(range(n)), [], 0) for n in (3, 9, 5, 7)]
    assert [len(r.ids) for r in longest_rows(rows, 3)] == [9, 7, 3]
    assert [len(r.ids) for r in longest_rows(rows, 1)] == [9]
    assert [len(r.ids) for r in longest_rows(rows, 8)] == [9, 7, 5, 3]


def test_probe(tmp_path: Path) -> None:
    """That it runs and says both numbers; what they are is for benchmarks, not for a test on a shared machine."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell the peak of a process")
    found = call(recipe(tmp_path, evaluate={"task": "none"}), "--probe")
    assert found["measured_peak"] == max(found["measured"].values()) > 0
    assert set(found["measured"]) == {"calibrate and choose", "training"}
