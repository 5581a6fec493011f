"""A delta file to look at and to attack."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetooth.delta import Delta

from .deltas import Weights, make


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Weights, Weights]:
    base, tuned = make()
    path = tmp_path / "delta.safetensors"
    Delta.extract(tuned, base, recipe={"lr": 0.1}, method="gmt").save(path, plain=True)
    return path, base, tuned
