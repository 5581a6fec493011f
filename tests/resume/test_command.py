"""`finetooth train --resume` after damage, before the first checkpoint, and after the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetooth.cli.main import app
from tests.cli.test_train import recipe, runner
from tests.resume.test_saved import flip

TIMING = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def started(folder: Path) -> tuple[list[str], Path, bytes, list[dict[str, Any]]]:
    """A run that came to its end: the command, its folder, its delta, its metrics."""
    train = {"max_steps": 4, "batch_size": 2, "accumulate": 1, "max_length": 32, "checkpoint_every": 2}
    command = ["train", str(recipe(folder, evaluate={"task": "none"}, train=train))]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    run = folder / "run"
    return command, run, (run / "delta.safetensors").read_bytes(), metrics(run)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "resources.jsonl").read_text().splitlines()]


def test_a_damaged_newest_checkpoint_gives_way_and_it_is_said(tmp_path: Path) -> None:
    command, run, delta, logged = started(tmp_path)
    weights = run / "checkpoints" / "checkpoint-4" / "model.safetensors"
    flip(weights)
    noted, took = ((run / name).read_text() for name in ("selection.jsonl", "resources.jsonl"))
    result = runner.invoke(app, [*command, "--resume"])
    assert result.exit_code == 0, result.output
    assert "checkpoint-4 is not used: model.safetensors has another sha256" in result.stderr
    assert "going on from checkpoint-2" in result.stderr
    assert (run / "delta.safetensors").read_bytes() == delta and metrics(run) == logged
    assert (run / "selection.jsonl").read_text() == noted and noted.count("kept") == 2
    assert [line["step"] for line in lines(run)] == [1, 2, 4] and (run / "resources.jsonl").read_text()[:40] == took[
        :40
    ]
    again = runner.invoke(app, [*command, "--resume"])
    assert again.exit_code == 0 and "going on from checkpoint-4" in again.stderr, "written again, and whole"
    assert (run / "delta.safetensors").read_bytes() == delta and metrics(run) == logged


def test_nothing_good_starts_nothing(tmp_path: Path) -> None:
    command, run, _, _ = started(tmp_path)
    for step in (2, 4):
        (run / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    result = runner.invoke(app, [*command, "--resume"])
    assert (
        result.exit_code == 2 and "checkpoint-4: optimizer.pt is missing; checkpoint-2: optimizer.pt" in result.stderr
    )
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("left", ["a checkpoint half written", "nothing but the recipe"])
def test_killed_before_the_first_checkpoint(left: str, tmp_path: Path) -> None:
    command, run, delta, logged = started(tmp_path)
    (run / "delta.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")
    if left == "a checkpoint half written":
        (run / "checkpoints" / ".unfinished" / "checkpoint-2").mkdir(parents=True)
    result = runner.invoke(app, [*command, "--resume"])
    assert result.exit_code == 0 and "there is no checkpoint yet: starting at the beginning" in result.stderr
    assert (run / "delta.safetensors").read_bytes() == delta and metrics(run) == logged


def test_another_environment_is_said(tmp_path: Path) -> None:
    command, run, _, _ = started(tmp_path)
    facts = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**facts, "torch": "1.0"}))
    result = runner.invoke(app, [*command, "--resume"])
    assert (
        result.exit_code == 0 and "equal bits are not promised" in result.stderr and "torch 1.0 (now" in result.stderr
    )
