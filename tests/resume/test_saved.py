"""Checkpoints are complete or absent: every kind of damage is found, the one before is taken, and it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import finetooth
from finetooth import saved
from finetooth.saved import MANIFEST, UNFINISHED, fault, last_good, saving, seal


def write(out: Path, *steps: int, keep: int | None = None) -> None:
    for step in steps:
        with saving(out / f"step-{step}", keep=keep) as folder:
            (folder / "model.safetensors").write_bytes(bytes(range(200)) + str(step).encode())
            (folder / "shards").mkdir()
            (folder / "shards" / "optimizer.pt").write_bytes(b"o" * 1000)


def names(out: Path) -> set[str]:
    return {p.name for p in out.iterdir()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit of the weights": lambda p: flip(p / "model.safetensors"),
    "one bit in a folder below": lambda p: flip(p / "shards" / "optimizer.pt"),
    "half a file": lambda p: (p / "model.safetensors").write_bytes(b"half"),
    "an empty file": lambda p: (p / "model.safetensors").write_bytes(b""),
    "a file less": lambda p: (p / "shards" / "optimizer.pt").unlink(),
    "one bit of a digest": lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace("a", "b", 1)),
    "half a list": lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text()[:60]),
    "another list": lambda p: (p / MANIFEST).write_text('{"files": []}'),
    "a list of another kind": lambda p: (p / MANIFEST).write_text(json.dumps([1])),
    "no list": lambda p: (p / MANIFEST).unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_one_before_is_taken(kind: str, tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    assert last_good(tmp_path) == tmp_path / "step-20" and fault(tmp_path / "step-20") is None
    DAMAGE[kind](tmp_path / "step-20")
    said: list[str] = []
    assert last_good(tmp_path, said.append) == tmp_path / "step-10"
    assert len(said) == 1 and "step-20 is not used" in said[0]


def test_without_anybody_to_tell_it_warns(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    flip(tmp_path / "step-2" / "model.safetensors")
    with pytest.warns(UserWarning, match=r"step-2 is not used: model\.safetensors has another sha256"):
        assert finetooth.last_good(tmp_path) == tmp_path / "step-1"


def test_none_good_is_an_error_that_lists_them_all(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    flip(tmp_path / "step-2" / "model.safetensors")
    (tmp_path / "step-1" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step-2: model.* sha256.*; step-1: model.safetensors is missing"):
        last_good(tmp_path, lambda _: None)


def test_nothing_yet_is_none(tmp_path: Path) -> None:
    assert last_good(tmp_path / "not there") is None and last_good(tmp_path) is None
    (tmp_path / "logs").mkdir()
    (tmp_path / "checkpoint-5").mkdir()  # the very first, killed while it was written
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match="no finetooth.json"):
        assert last_good(tmp_path) is None


def test_a_finished_checkpoint_that_nobody_sealed_is_not_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (tmp_path / "checkpoint-5" / name).write_text(name)
    with pytest.raises(ValueError, match=r"finetooth\.seal"):
        last_good(tmp_path, lambda _: None)
    saved.promise(tmp_path)
    assert not (tmp_path / MANIFEST).exists(), "that all are sealed is not so"
    seal(tmp_path / "checkpoint-5")
    assert last_good(tmp_path) == tmp_path / "checkpoint-5"


def test_a_checkpoint_of_the_model_only_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    for name in ("model.safetensors", "trainer_state.json"):
        (tmp_path / "checkpoint-5" / name).write_text(name)
    seal(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="save_only_model"):
        last_good(tmp_path, lambda _: None)


def test_steps_are_numbers(tmp_path: Path) -> None:
    write(tmp_path, 9, 10, 100)
    assert last_good(tmp_path) == tmp_path / "step-100"


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def half() -> None:
        with saving(tmp_path / "step-2") as folder:
            (folder / "model.safetensors").write_text("half")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        half()
    assert names(tmp_path) == {"step-1"} and last_good(tmp_path) == tmp_path / "step-1"


def test_a_library_that_cannot_write_is_named_with_the_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(
            finetooth.NotWritten, match=r"step-2 could not be written: the writer gave up \([\d,]+ bytes free"
        ),
        saving(tmp_path / "step-2"),
    ):
        raise RuntimeError("the writer gave up\nand a stack of C++")
    assert names(tmp_path) == set()


def test_old_ones_go_when_the_new_one_is_complete(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, keep=2)
    (tmp_path / "other-1").mkdir()
    with pytest.raises(KeyError), saving(tmp_path / "step-3", keep=1):
        raise KeyError
    assert names(tmp_path) == {"step-1", "step-2", "other-1"}
    write(tmp_path, 3, keep=1)
    assert names(tmp_path) == {"step-3", "other-1"}


def test_a_run_that_fell_back_writes_the_damaged_step_again(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    flip(tmp_path / "step-2" / "model.safetensors")
    flip(tmp_path / "step-3" / "model.safetensors")
    write(tmp_path, 2, keep=2)
    assert names(tmp_path) == {"step-1", "step-2", "step-3"} and fault(tmp_path / "step-2") is None


def test_what_a_kill_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / UNFINISHED / "step-1").mkdir(parents=True)
    (tmp_path / UNFINISHED / "step-1" / "half").write_text("half")
    assert last_good(tmp_path) is None
    write(tmp_path, 1)
    assert names(tmp_path) == {"step-1"} and not (tmp_path / "step-1" / "half").exists()


def test_a_name_without_a_step_and_a_keep_of_nothing_are_refused(tmp_path: Path) -> None:
    for name, keep, message in (("last", None, "does not end in a step"), ("step-1", 0, "keep=0")):
        with pytest.raises(ValueError, match=message), saving(tmp_path / name, keep=keep):
            pass
    assert names(tmp_path) == set()


def test_sealing_again_after_a_change(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-1" / "model.safetensors").write_text("other")
    assert fault(tmp_path / "step-1") is not None
    finetooth.seal(tmp_path / "step-1")
    assert fault(tmp_path / "step-1") is None


def test_newest_reads_no_file(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "step-3").mkdir()
    assert saved.newest(tmp_path) == tmp_path / "step-2"
