"""The fuzzer's short form; docs/guarantees.md has the command for a million files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetooth import archive
from tests.format.fuzz import Seed, Trial, plain, seeds
from tests.format.mutate import WAYS, mutate

FILES = 3000


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Seed]:
    return seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def trial(found: list[Seed], tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(found, tmp_path_factory.mktemp("trial"))


def test_every_seed_is_a_good_file(found: list[Seed], trial: Trial) -> None:
    assert {trial.run(s.blob) for s in found} == {"applied"}
    assert len(found) > 90 and len({s.blob for s in found}) == len(found)


def test_a_few_thousand_files(found: list[Seed], tmp_path: Path) -> None:
    trial = Trial(found, tmp_path)
    plain(FILES, 0, trial, found, found[0])
    assert not trial.log.faults, trial.log.line()
    n = trial.log.outcomes
    assert min(n["refused"], n["loaded"], n["applied"]) > FILES // 50, n  # it gets past the header, and to the model


@settings(max_examples=300, deadline=None)
@given(draw=st.randoms(use_true_random=False), which=st.integers(0, 10**6))
def test_any_mutation(draw: random.Random, which: int, found: list[Seed], trial: Trial) -> None:
    blobs = [s.blob for s in found]
    assert trial.run(mutate(blobs[which % len(blobs)], draw, blobs)) != "fault", trial.log.faults


@settings(max_examples=200, deadline=None)
@given(blob=st.binary(max_size=300))
def test_any_bytes(blob: bytes, trial: Trial) -> None:
    assert trial.run(blob) == "refused"


@pytest.mark.parametrize("check", ["_check_index", "_check_values"])
def test_it_finds_a_check_that_is_missing(
    check: str, found: list[Seed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a check of the loader there are faults, and the files that did it are kept: the fuzzer can fail."""
    monkeypatch.setattr(archive.Archive, check, lambda *_: None)
    trial = Trial(found, tmp_path, tmp_path / "keep")
    plain(FILES // 3, 0, trial, found, found[0])
    assert trial.log.faults and list((tmp_path / "keep").iterdir())


def test_the_same_seed_gives_the_same_files(found: list[Seed]) -> None:
    blobs = [s.blob for s in found[:5]]
    one, two = ([mutate(blobs[0], draw, blobs) for _ in range(200)] for draw in (random.Random(7), random.Random(7)))
    assert one == two and len(set(one)) > 150 and len(WAYS) > 10
