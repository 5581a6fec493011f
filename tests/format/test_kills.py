"""SIGKILL at every moment at which something is half written: the target is not there, or complete; the next call gets there.

A process that has imported everything forks a child for every attempt. The child kills itself, with the signal that cannot be
caught, at its n-th moment: when half of a file is copied or written, before an fsync, before a rename. n goes up until a child
gets to its end, so that no moment is left out.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from finetooth import checkpoint, codec, files
from finetooth.cli.delta import app
from finetooth.delta import Delta
from tests.cli.test_delta import llama, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="every attempt is a fork"),
]
Shape = dict[str, bytes]


class Moments:
    """In a child: counts, and ends the process at one."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def reach(self, half: Callable[[], None] = lambda: None) -> None:
        self.seen += 1
        if self.seen == self.at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.reach()
            return real(*args, **kwargs)

        setattr(owner, name, counted)

    def half(self, owner: Any, name: str, written: Callable[..., Path]) -> None:
        """After a file is written, with half of it left; and before."""
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.reach()
            out = real(*args, **kwargs)
            path = written(*args)
            self.reach(lambda: os.truncate(path, path.stat().st_size // 2))
            return out

        setattr(owner, name, counted)

    def install(self) -> None:
        self.before(files, "sync")
        for name in ("rename", "replace", "mkdir"):
            self.before(Path, name)
        self.half(checkpoint.shutil, "copyfile", lambda src, dst, **_: Path(dst))
        self.half(checkpoint, "_overwrite", lambda file, *_: Path(file))
        self.half(codec.Writer, "finish", lambda _, parts, path: Path(path))


def attempt(words: list[str], at: int = 0) -> bool:
    """Run a command in a child that is killed at a moment, or not at all; whether it was."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            torch.set_num_threads(1)
            Moments(at).install()
            app(words, standalone_mode=False)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def shape(folder: Path) -> Shape:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded base, what training made of it, the delta between them, and what each command makes when left alone."""
    out = tmp_path_factory.mktemp("given")
    model = llama(tied=False)
    for name in ("base", "tuned"):
        model.save_pretrained(out / name, max_shard_size="16KB")
        (out / name / "tokenizer.json").write_text("{}")
        (out / name / "additional_chat_templates").mkdir()
        (out / name / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
        train(model)
    Delta.extract(out / "tuned", out / "base").save(out / "delta")
    return out


COMMANDS = {
    "apply": "apply {given}/base {given}/delta --out {out} --inverse {out}.inverse",
    "revert": "revert {given}/tuned {given}/delta --base {given}/base --out {out}",
    "export": "export {given}/delta --base {given}/base --to {out}",
    "extract": "extract {given}/base {given}/tuned --out {out}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_moment(name: str, given: Path, tmp_path: Path) -> None:
    def words(out: Path) -> list[str]:
        return [w.format(given=given, out=out) for w in COMMANDS[name].split()]

    alone = tmp_path / "alone"
    alone.mkdir()
    assert not attempt(words(alone / "out"))
    expected, kills, after = shape(alone), 0, False
    for at in range(1, 1000):
        place = tmp_path / f"killed-{at}"
        place.mkdir()
        if not attempt(words(place / "out"), at):
            break
        kills += 1
        target = place / "out"
        complete = target.exists()
        after = after or complete
        seen = {p: b for p, b in shape(place).items() if not p.startswith(".")}
        assert all(expected[p] == b for p, b in seen.items()), f"moment {at}: something is half there"
        if complete:
            assert {p for p in expected if p.split("/")[0] == "out"} <= set(seen), f"moment {at}: something is missing"
        elif kills % 3 == 1:
            assert not attempt(words(target))  # what was left does not stop the next
            assert shape(place) == expected
            assert not list(place.glob(".*")), "what was left is still there"
    assert kills > 5 and after, kills  # and the last ones came after the rename
    assert kills < 999


def test_a_model_comes_out(given: Path, tmp_path: Path) -> None:
    """What the kill test takes for complete is a checkpoint that verifies."""
    assert not attempt(["export", str(given / "delta"), "--base", str(given / "base"), "--to", str(tmp_path / "out")])
    assert Delta.load(given / "delta").verify(tmp_path / "out") == "applied"
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    """Two processes write the same folder: neither removes the other's half, and the second one to end is told."""
    first = checkpoint.new_folder(tmp_path / "out")
    one = first.__enter__()
    (one / "a").write_text("1")
    with checkpoint.new_folder(tmp_path / "out") as two:
        (two / "a").write_text("2")
    assert (one / "a").read_text() == "1"
    with pytest.raises(FileExistsError, match="out exists"):
        first.__exit__(None, None, None)
    assert shape(tmp_path) == {"out/a": b"2"}
