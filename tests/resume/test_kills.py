"""Law 6 through every entry point: killed in a step and in a checkpoint, and the end is the same, bit for bit.

`tests/resume/kills.py` does the killing, and does it for every row when it is run by itself (docs/resume.md has its log). Here
one row that has random noise of its own is killed in the command (which is TRL's SFTTrainer) and every other loop; with
`-m exhaustive` in TRL's other trainers too, and the command with two more rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOOPS = "finetooth train,transformers.Trainer,trl.GRPOTrainer,bare PyTorch,accelerate"
OTHERS = "trl.SFTTrainer,trl.DPOTrainer,trl.KTOTrainer,ORPOTrainer"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "fork"), reason="a process that has imported everything is forked for every attempt"
    ),
]


def test_every_entry_point_is_named() -> None:
    from tests.resume.entries import ENTRIES

    assert sorted([*LOOPS.split(","), *OTHERS.split(",")]) == sorted(ENTRIES)


def killed(*words: str) -> list[dict[str, Any]]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.resume.kills", "--kills", "2", "--json", *words]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--rows", "gift-sw", "--entries", LOOPS), id="loops"),
        pytest.param(("--rows", "gift-sw", "--entries", OTHERS), id="trainers", marks=pytest.mark.exhaustive),
        pytest.param(
            ("--rows", "gmt-strict,dst", "--entries", "finetooth train"), id="rows", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_killed_and_resumed_it_ends_the_same(words: tuple[str, ...]) -> None:
    found = killed(*words)
    certain = [(f["landed"]["step"], f["landed"]["checkpoint"]) for f in found]
    assert certain == [(1, 1)] * len(found), found
    assert sum(sum(f["different"].values()) for f in found) == 0, found
