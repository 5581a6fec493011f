"""A full disk stops a run with a clear message, and the last complete checkpoint is intact; no folder is half there.

The disk is a real one: a small tmpfs, where mounting is allowed. Elsewhere a limit on the size of files has to do, which is not
the same error ("File too large") but comes at the same places.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import Result

import finetooth
from finetooth.cli.main import app
from finetooth.run import write_json
from finetooth.saved import fault
from tests.cli.test_train import recipe, runner

TINY = {"max_steps": 4, "batch_size": 2, "accumulate": 1, "max_length": 32, "checkpoint_every": 1}


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes, mounted until the block ends."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or os.geteuid()
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # weights that were read may be mapped still


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes; Python ignores the signal, so that writing fails with EFBIG."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    _, hard = old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def fill(folder: Path, leave: int) -> None:
    """Use the disk up but for about `leave` bytes."""
    with (folder / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - leave))


WRITERS = {
    "torch": lambda path: torch.save({"state": torch.zeros(1 << 20)}, path),
    "safetensors": lambda path: save_file({"state": torch.zeros(1 << 20)}, path),
    "python": lambda path: path.write_bytes(bytes(4 << 20)),
}


def save(path: Path, writer: str) -> None:
    with finetooth.saving(path) as folder:
        WRITERS[writer](folder / "state")


@pytest.mark.parametrize("writer", WRITERS)
def test_every_library_that_writes(writer: str, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 12 << 20) as out:
        save(out / "step-1", writer)
        fill(out, 3 << 20)
        with pytest.raises(
            finetooth.NotWritten, match=r"step-2 could not be written: the disk is full \([\d,]+ bytes free"
        ):
            save(out / "step-2", writer)
        assert {p.name for p in out.iterdir()} == {"step-1", "filler"}
        assert finetooth.last_good(out) == out / "step-1"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_limit_on_files_is_no_other_error(writer: str, tmp_path: Path) -> None:
    with small_files(1 << 20), pytest.raises(finetooth.NotWritten, match="step-2 could not be written"):
        save(tmp_path / "step-2", writer)
    assert not list(tmp_path.iterdir())


def test_the_list_of_files_too_can_find_no_room(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 1 << 20) as out:
        block = finetooth.saving(out / "step-1")
        fill(block.__enter__(), 0)
        with pytest.raises(finetooth.NotWritten, match="step-1 could not be written: the disk is full"):
            block.__exit__(None, None, None)
        assert not list(out.iterdir())


@pytest.mark.parametrize("leave", [0, 1, 2, 3, 4, 5])
def test_a_run_stops_and_can_be_resumed(leave: int, tmp_path: Path) -> None:
    """`leave`: how many times the size of a checkpoint there is; the disk is full in the first, in a later one, or after them."""
    alone = recipe(tmp_path, evaluate={"task": "none"}, train=TINY)
    assert runner.invoke(app, ["train", str(alone), "--json"]).exit_code == 0
    size = sum(p.stat().st_size for p in (tmp_path / "run" / "checkpoints" / "checkpoint-4").rglob("*"))
    with disk(tmp_path / "disk", 40 << 20) as out:
        fill(out, leave * size // 2 + size // 4)
        command = ["train", str(alone), f"output={out / 'run'}", "--json"]
        result = runner.invoke(app, command)
        if result.exit_code:
            assert result.exit_code == 1 and "could not be written: the disk is full" in result.stderr, result.output
            assert "Traceback" not in result.stderr and "--resume" in result.stderr
            left = sorted((out / "run" / "checkpoints").glob("*"))
            assert all(fault(p) is None for p in left) and not (out / "run" / "checkpoints" / ".unfinished").exists()
            assert (
                f"The last complete checkpoint is {left[-1]}" in result.stderr
                if left
                else "no checkpoint yet" in result.stderr
            )
            (out / "filler").unlink()
            result = runner.invoke(app, [*command, "--resume"])
        else:
            assert leave >= 4, "the disk was too large to be full"
        assert result.exit_code == 0, result.output
        one, two = (finetooth.Delta.load(p / "delta.safetensors") for p in (out / "run", tmp_path / "run"))
        assert all(torch.equal(one.changes[n].values, c.values) for n, c in two.changes.items())


def test_deltas_and_results_name_the_file(tmp_path: Path) -> None:
    delta = finetooth.Delta.extract({"w": torch.ones(1 << 20)}, {"w": torch.zeros(1 << 20)})
    with disk(tmp_path / "disk", 1 << 20) as out:
        with pytest.raises(finetooth.NotWritten, match=r"d\.safetensors could not be written: the disk is full"):
            delta.save(out / "d.safetensors")
        fill(out, 0)
        with pytest.raises(finetooth.NotWritten, match=r"results\.json could not be written: the disk is full"):
            write_json(out / "results.json", {"sample": "?" * 10_000})
        (out / "filler").unlink()
        assert not list(out.iterdir())


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A base in four shards of a megabyte, and a delta of it."""
    base = {f"w{i}": torch.zeros(1 << 18) for i in range(4)}
    (tmp_path / "base").mkdir()
    for name, t in base.items():
        save_file({name: t}, tmp_path / "base" / f"{name}.safetensors")
    where = {name: f"{name}.safetensors" for name in base}
    write_json(tmp_path / "base" / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    finetooth.Delta.extract({n: t + 1 for n, t in base.items()}, base).save(tmp_path / "delta")
    return tmp_path / "base", tmp_path / "delta"


COMMANDS = {
    "apply": "apply {base} {delta} --out {out}/new --inverse {out}/inverse",
    "export": "export {delta} --base {base} --to {out}/new",
    "patches": "export {delta} --as patches --to {out}/new",
    "extract": "extract {base} {tuned} --out {out}/new",
}


def command(name: str, made: tuple[Path, Path], out: Path) -> Result:
    tuned = made[0].with_name("tuned")
    if name == "extract" and not tuned.exists():
        assert runner.invoke(app, ["delta", "apply", *map(str, made), "--out", str(tuned)]).exit_code == 0
    words = COMMANDS[name].format(base=made[0], delta=made[1], tuned=tuned, out=out).split()
    return runner.invoke(app, ["delta", *words])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("leave", [0, 1 << 20, 3 << 20])
def test_a_folder_is_whole_or_not_there(name: str, leave: int, made: tuple[Path, Path], tmp_path: Path) -> None:
    """`leave`: bytes that are free; every command needs four megabytes or more."""
    with disk(tmp_path / "disk", 40 << 20) as out:
        fill(out, leave)
        result = command(name, made, out)
        assert result.exit_code == 1 and "could not be written" in result.stderr, result.output
        assert "free in" in result.stderr and result.stderr.count("\n") == 1
        if name == "export":
            assert "it takes 4,1" in result.stderr  # four shards and their headers
        assert [p.name for p in out.iterdir()] == ["filler"]
        (out / "filler").unlink()
        result = command(name, made, out)
        assert result.exit_code == 0, result.output


def test_a_disk_that_fills_up_meanwhile(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was room when it was asked for; somebody else takes it after the second shard."""
    real, copied = shutil.copyfile, []

    def copy(src: str, dst: str, **how: Any) -> Any:
        copied.append(src)
        if len(copied) == 3:
            fill(tmp_path / "disk", 100_000)
        return real(src, dst, **how)

    with disk(tmp_path / "disk", 40 << 20) as out:
        monkeypatch.setattr(shutil, "copyfile", copy)
        result = command("export", made, out)
        assert result.exit_code == 1 and "new could not be written: the disk is full (" in result.stderr, result.output
        assert "needed in all)" in result.stderr
        assert [p.name for p in out.iterdir()] == ["filler"]
