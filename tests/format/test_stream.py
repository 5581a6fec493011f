"""A loaded delta reads its file when it is asked; folders are written a tensor at a time; --quick, and what it does not see."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetooth import base as base_module
from finetooth.base import bits
from finetooth.codec import Change
from finetooth.delta import Delta, DeltaError, WrongBase, apply_folder

from .deltas import Weights, copy, make, rewrite, same
from .test_attacks import entry, meta, put

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def folder(path: Path, weights: Weights) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    return path


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Weights, Weights]:
    base, tuned = make(torch.bfloat16)
    tuned["a.weight"].copy_(base["a.weight"])
    tuned["a.weight"][0::3] *= 1.5  # rows that moved by few steps
    Delta.extract(tuned, base).save(tmp_path / "portable")
    Delta.extract(tuned, base).save(tmp_path / "against", against=base)
    return tmp_path, base, tuned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_against_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = make(dtype)
    bits(tuned["d.weight"]).copy_(bits(base["d.weight"]) + 3)  # three steps each
    delta = Delta.extract(tuned, base)
    delta.save(tmp_path / "p")
    Delta.load(tmp_path / "p").save(tmp_path / "a", against=base)
    assert (tmp_path / "a").stat().st_size < (tmp_path / "p").stat().st_size
    loaded, x = Delta.load(tmp_path / "a"), copy(base)
    inverse = loaded.apply(x)
    assert same(x, tuned)
    with loaded.reverted(x):
        assert same(x, base)
    assert same(x, tuned)
    again = inverse.apply(x)
    assert same(x, base)
    again.apply(x)
    assert same(x, tuned)
    assert inverse.inverse().verify(x) == "applied"


def test_a_file_against_the_base_says_that_it_needs_it(both: tuple[Path, Weights, Weights]) -> None:
    path, base, tuned = both
    delta = Delta.load(path / "against")
    with pytest.raises(DeltaError, match=r"'a.weight' are coded against the base .*give the base"):
        _ = delta.changes["a.weight"].values
    c = delta.changes["a.weight"]
    old = c.selection.gather(base["a.weight"])
    assert torch.equal(c.new(old), c.selection.gather(tuned["a.weight"]))
    with pytest.raises(DeltaError, match="coded against the base"):
        delta.save(path / "x", plain=True)
    with pytest.raises(WrongBase):
        delta.save(path / "x", against=tuned, plain=True)
    assert not (path / "x").exists()
    delta.portable(base).save(path / "again")
    assert (path / "again").read_bytes() == (path / "portable").read_bytes()
    delta.save(path / "plain", against=base, plain=True)
    assert Delta.load(path / "plain").info()["codings"] == {"plain + plain": len(delta.changes)}


@pytest.mark.parametrize("file", ["portable", "against"])
def test_a_file_that_is_written_over_is_noticed(both: tuple[Path, Weights, Weights], file: str) -> None:
    path, base, _ = both
    delta, x = Delta.load(path / file), copy(base)
    blob = bytearray((path / file).read_bytes())
    blob[-1] ^= 1
    with (path / file).open("r+b") as f:  # in place; a new file in its place leaves the open one as it is
        f.write(blob)
    with pytest.raises(DeltaError, match="written over after it was loaded"):
        delta.apply(x)
    assert same(x, base)
    os.truncate(path / file, len(blob) - 3)
    with pytest.raises(DeltaError, match="written over after it was loaded"):
        delta.apply(x)
    assert same(x, base)


def test_a_file_that_is_replaced_or_deleted_stays_readable(both: tuple[Path, Weights, Weights]) -> None:
    path, base, tuned = both
    delta = Delta.load(path / "portable")
    delta.save(path / "portable", against=base)  # itself
    (path / "portable").unlink()
    delta.apply(base)
    assert same(base, tuned)


def test_a_look_up_lets_go(both: tuple[Path, Weights, Weights]) -> None:
    """Every change is a new object, and the file is closed with the delta."""
    delta = Delta.load(both[0] / "portable")
    assert delta.changes["n"] is not delta.changes["n"]
    file = delta.changes._file  # type: ignore[attr-defined]
    del delta
    gc.collect()
    assert file.closed


def test_every_touched_tensor_is_read_once(both: tuple[Path, Weights, Weights], monkeypatch: Any) -> None:
    path, base, tuned = both
    delta, src = Delta.load(path / "portable"), folder(path / "base", base)
    reads: list[str] = []
    real = base_module.Files.tensor
    monkeypatch.setattr(base_module.Files, "tensor", lambda self, name: reads.append(name) or real(self, name))
    apply_folder(src, path / "out", delta, inverse=path / "inverse")
    assert sorted(reads) == sorted(delta.changes)
    reads.clear()
    delta.verify(path / "out")
    assert sorted(reads) == sorted(delta.changes)
    monkeypatch.undo()
    reads.clear()
    inverse = Delta.load(path / "inverse")
    inverse.apply(tuned)
    assert same(tuned, base)
    assert inverse.base.tuned


@pytest.mark.parametrize("file", ["portable", "against"])
def test_the_inverse_on_disk_is_the_one_in_memory(both: tuple[Path, Weights, Weights], file: str) -> None:
    path, base, _ = both
    delta, src = Delta.load(path / file), folder(path / "base", base)
    lazily = apply_folder(src, path / "out", delta, inverse=path / "streamed")
    delta.apply(copy(base)).save(path / "held")
    lazily.save(path / "lazily")
    assert (path / "streamed").read_bytes() == (path / "held").read_bytes() == (path / "lazily").read_bytes()
    assert delta.verify(path / "out") == "applied"


def test_a_wrong_base_leaves_neither_folder_nor_inverse(both: tuple[Path, Weights, Weights]) -> None:
    path, base, _ = both
    base["scalar"] += 1
    src, delta = folder(path / "base", base), Delta.load(path / "portable")
    before = sorted(path.rglob("*"))
    with pytest.raises(WrongBase, match="'scalar' is not that"):
        apply_folder(src, path / "out", delta, inverse=path / "inverse")
    assert sorted(path.rglob("*")) == before


def test_extract_to_a_file_is_extract_and_save(both: tuple[Path, Weights, Weights]) -> None:
    path, base, tuned = both
    old, new = folder(path / "base", base), folder(path / "tuned", tuned)
    for steps in (False, True):
        Delta.extract(new, old).save(path / "x", against=base if steps else None)
        delta = Delta.extract_to(path / "y", new, old, steps=steps)
        assert (path / "x").read_bytes() == (path / "y").read_bytes()
        assert delta.verify(tuned) == "applied"
    assert not Delta.extract_to(path / "z", old, old).changes
    assert not (path / "z").exists()


@pytest.mark.parametrize("file", ["portable", "against"])
def test_quick_sees_what_is_replaced_and_nothing_else(both: tuple[Path, Weights, Weights], file: str) -> None:
    path, base, tuned = both
    delta = Delta.load(path / file)
    other = copy(base)
    other["n"][3] = 5.0  # not replaced
    assert delta.verify(other, quick=True) == "base"
    with pytest.raises(WrongBase):
        delta.verify(other)
    delta.apply(other, quick=True)
    assert same(other, tuned | {"n": other["n"]}) and other["n"][0] == tuned["n"][0]
    with pytest.raises(WrongBase, match="already applied"):
        delta.apply(other, quick=True)
    base["n"][0] = 7.0  # replaced
    held = copy(base)
    with pytest.raises(WrongBase, match="replaced values of 'n' are not those"):
        delta.apply(base, quick=True)
    assert same(base, held)


def test_quick_needs_the_fingerprints(both: tuple[Path, Weights, Weights]) -> None:
    path, base, tuned = both
    delta = Delta.load(path / "portable")
    fields = ("selection", "values", "changed", "fingerprint", "result")
    old = {name: Change(*(getattr(c, f) for f in fields)) for name, c in delta.changes.items()}
    for call in (lambda d: d.apply(base, quick=True), lambda d: d.verify(base, quick=True)):
        with pytest.raises(DeltaError, match=r"no fingerprint .* leave quick out"):
            call(Delta(old))
    Delta(old).save(path / "packed", against=base)
    assert Delta.load(path / "packed").verify(tuned, quick=True) == "applied"


def coded(name: str, **said: Any) -> Any:
    return lambda header, entries, data: entries[name].update(said)


ATTACKS = {
    "a coding of the future": (coded("n", index_coding="gap32"), "'gap32'"),
    "version 1 with codings": (meta("version", "1"), "version 1 has plain|version 1 has"),
    "ids in the wrong type": (coded("b.weight", index_coding="gap16"), "the index of 'b.weight' is U8"),
    "a bitmap of another length": (coded("a.weight", index_coding="bitmap", unit={"kind": "element", "size": 1},
                                         count=2, changed=2), "the index of 'a.weight' is U8|the values of"),
    "gaps that never end": (put("index:n", 0, b"\xff"), "in the middle of a gap"),
    "gaps out of range": (put("index:n", 0, b"\x09"), "out of range"),
    "a count of more than there is": (entry("a.weight", "count", 3), "the index of 'a.weight'|the values of"),
    "a huge tensor and count": (lambda h, e, d: e["n"].update(shape=[2**40], count=2**39), "the index of 'n' is U8"),
    "steps that are cut": (coded("n", value_coding="base8"), "the values of 'n' are BF16"),
    "steps in a wrong width": (coded("d.weight", value_coding="base16"), "the values of 'd.weight'"),
    "a fingerprint of something else": (coded("n", replaced="sha256:0"), "fingerprints"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTACKS)
def test_coded_files_that_are_refused(both: tuple[Path, Weights, Weights], case: str) -> None:
    path = both[0] / "against"
    edit, says = ATTACKS[case]
    rewrite(path, lambda header, entries, data: None)
    Delta.load(path)
    rewrite(path, edit)
    with pytest.raises(DeltaError, match=says):
        Delta.load(path)


def test_a_lying_count_allocates_nothing(tmp_path: Path) -> None:
    """Two small files: 2^44 units in a bitmap that is not there, and steps of 2^44 entries. In a process of its own, for the peak."""
    base = {"w": torch.zeros(4096, dtype=torch.bfloat16)}
    tuned = {"w": torch.ones(4096, dtype=torch.bfloat16)}
    Delta.extract(tuned, base).save(tmp_path / "a", against=base)
    many = {"shape": [2**44], "count": 2**44, "changed": 1, "unit": {"kind": "element", "size": 1}}
    rewrite(tmp_path / "a", coded("w", **many, index_coding="bitmap"))
    code = (
        "import resource, sys; from finetooth.delta import Delta, DeltaError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "try: Delta.load(sys.argv[1])\n"
        "except DeltaError as e: assert 'the index of' in str(e), e\n"
        "else: sys.exit('loaded')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_steps_that_lead_to_no_number_are_refused() -> None:
    """From the largest bf16 one step up is an infinity; a file cannot know that before it meets its base."""
    base = {"w": torch.full((64,), 1.0, dtype=torch.bfloat16)}
    tuned = {"w": base["w"].clone()}
    bits(tuned["w"])[:40] += 1
    with tempfile.TemporaryDirectory() as folder:
        Delta.extract(tuned, base).save(Path(folder) / "a", against=base)
        change = Delta.load(Path(folder) / "a").changes["w"]
        assert change.coded is not None
        with pytest.raises(DeltaError, match="not finite"):
            change.new(torch.full((1, 64), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16))
        with pytest.raises(DeltaError, match=r"coded against .* was given"):
            change.new(torch.ones(40, 1, dtype=torch.bfloat16))
