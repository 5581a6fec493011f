"""A delta file to look at and to attack."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetooth import twins
from finetooth.delta import Delta

from .deltas import Weights, make


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Weights, Weights]:
    base, tuned = make()
    path = tmp_path / "delta.safetensors"
    Delta.extract(tuned, base, recipe={"lr": 0.1}, method="gmt").save(path, plain=True)
    return path, base, tuned


@pytest.fixture(scope="module", params=["numpy", "compiled"])
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """The codings' loops of a new process, and those of one that has coded much."""
    if request.param == "compiled":
        pytest.importorskip("numba", reason="compiled loops: pip install 'finetooth[cpu]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twins, "PAYS", sys.maxsize if request.param == "numpy" else 0)
        yield
