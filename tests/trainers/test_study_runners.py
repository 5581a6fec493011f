"""The study's runners of `finetooth compare --runner`, on the embedded model: DPO, and three tasks in a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetooth.entrant import runner
from finetooth.recipe import Recipe, load
from tests.cli.test_train import recipe

STUDIES = Path(__file__).resolve().parents[2] / "studies"
ROWS = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}.", "rejected": f"{n}"} for n in range(8)]
METHODS: list[dict[str, Any]] = [
    {"name": "gmt", "keep": 0.5},
    {"name": "random", "keep": 0.02},
    {"name": "lora", "keep": None, "r": 2},
]


def written(folder: Path, method: dict[str, Any], *tasks: str) -> Recipe:
    """A recipe on rows that were written, in the folder of a task as the study's are."""
    for task in tasks:
        (folder / task).mkdir()
        for part in ("train", "test"):
            lines = "".join(f"{json.dumps(row)}\n" for row in ROWS)
            (folder / task / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "general.txt").write_text("Once upon a time there was a cat.\n", encoding="utf-8")
    data = {"train": str(folder / tasks[0] / "train.jsonl"), "eval": str(folder / tasks[0] / "test.jsonl")}
    evaluate = {"task": "loss", "forgetting": str(folder / "general.txt")}
    short = {"max_steps": 2, "accumulate": 1}
    return load(recipe(folder, method=method, data=data, train=short, evaluate=evaluate, optimizer={"lr": 1e-3}))


def results(wanted: Recipe, file: str) -> dict[str, Any]:
    how = runner(STUDIES / file)
    numbers, said = json.loads(json.dumps(how.base(wanted)))  # as the comparison hands it on
    how.train(wanted, (numbers, said))
    found: dict[str, Any] = json.loads((Path(wanted.output) / "results.json").read_text(encoding="utf-8"))
    assert found["before"] == numbers and found["train_seconds"] > 0 and found["delta_bytes"] > 0
    assert found["forgetting"] == pytest.approx(found["after"]["general_loss"] - numbers["general_loss"], abs=1e-9)
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method["name"]))
def test_dpo(method: dict[str, Any], tmp_path: Path) -> None:
    if method["name"] == "lora":
        pytest.importorskip("peft", reason="LoRA is PEFT's: pip install 'finetooth[dev]'")
    after = results(written(tmp_path, method, "preferences"), "preferences.py")["after"]
    assert after["task_loss"] < 0.69  # trained on the rows it is measured on; ln 2 without training
    assert 0 <= after["preference_accuracy"] <= 1 and after["margin"] > 0


def test_three_tasks_in_a_row(tmp_path: Path) -> None:
    wanted = written(tmp_path, METHODS[1], "banking77", "e2e", "tatoeba")
    found = results(wanted, "sequence.py")["after"]
    assert found["first_lost"] == pytest.approx(found["first_left"] - found["first_learnt"], abs=1e-9)
    assert not list(Path(wanted.output).glob("*/merged"))
