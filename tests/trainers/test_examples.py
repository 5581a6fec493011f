"""Every script under examples/, a few steps long, on rows of the shape that it asks for."""

from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path

import pytest

from .cases import TEXTS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PREFERENCES = ("dpo", "kto", "orpo")
LAUNCHED = "sharded"  # by torchrun, on two ranks
READER = "read_delta"  # no training: tests/format/test_golden.py reads every golden file with it


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    rows = [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in TEXTS] * 250
    for part in ("train", "test"):
        with gzip.open(tmp_path / f"{part}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(json.dumps(row) for row in rows))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted({path.stem for path in EXAMPLES.glob("*.py")} - {LAUNCHED, READER}))
def test_it_runs(
    script: str, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(EXAMPLES / f"{script}.py"))["main"]
    if script in PREFERENCES:
        main(preferences, steps=2)
    else:
        main(steps=2)
    assert "->" in capsys.readouterr().out


def test_there_is_one_for_every_trainer() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"trainer", "sft", "dpo", "kto", "orpo", "grpo", "accelerate_loop", "torch_loop", LAUNCHED, READER}


def test_they_are_short() -> None:
    lengths = {p.stem: len(p.read_text(encoding="utf-8").splitlines()) for p in EXAMPLES.glob("*.py")}
    long = {name: n for name, n in lengths.items() if n > (100 if name == READER else 65)}
    assert not long, f"an example fits a screen: {long}"
