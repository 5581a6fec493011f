"""The bytes of the format do not move: a committed file is read, written again, and taken apart by hand."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from finetooth.base import bits, fingerprint
from finetooth.coding import INDEX
from finetooth.delta import Delta
from finetooth.zigzag import VALUES

from .deltas import same
from .golden.make import base, delta, second, second_base, second_tuned, tuned

pytestmark = pytest.mark.usefixtures("loops")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

FOLDER = Path(__file__).parent / "golden"
GOLDEN = FOLDER / "golden.safetensors"  # version 1
SHA256 = {
    "golden": "aff42d841239e016d8e02c102637141c98cba5220fcffae172a3610562d3601e",
    "portable-2": "df62da9949c4bee02da82c00b219ca6e8f7fa0f53039f7953b939461f3b4395e",
    "against-2": "f92352a7e118cbc1854c0c42e7e5001fd848c8b2a6b1fdc0f7eb227a321984fa",
}


@pytest.mark.parametrize("name", SHA256)
def test_the_file_is_the_one_that_was_committed(name: str) -> None:
    assert hashlib.sha256((FOLDER / f"{name}.safetensors").read_bytes()).hexdigest() == SHA256[name]


def test_today_s_writer_gives_the_same_bytes(tmp_path: Path) -> None:
    for i, d in enumerate([delta(), Delta.load(GOLDEN)]):
        d.save(tmp_path / str(i), plain=True)
        assert (tmp_path / str(i)).read_bytes() == GOLDEN.read_bytes()
    portable, against = (FOLDER / f"{name}-2.safetensors" for name in ("portable", "against"))
    for i, d in enumerate([second(), Delta.load(portable), Delta.load(against).portable(second_base())]):
        d.save(tmp_path / f"p{i}")
        assert (tmp_path / f"p{i}").read_bytes() == portable.read_bytes()
        d.save(tmp_path / f"a{i}", against=second_base())
        assert (tmp_path / f"a{i}").read_bytes() == against.read_bytes()
    Delta.load(against).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == against.read_bytes()


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["portable-2", "against-2"])
def test_today_s_reader_reads_version_2(name: str, quick: bool) -> None:
    x, golden = second_base(), Delta.load(FOLDER / f"{name}.safetensors")
    assert golden.verify(x, quick=quick) == "base"
    inverse = golden.apply(x, quick=quick)
    assert same(x, second_tuned())
    assert golden.verify(x, quick=quick) == "applied"
    inverse.apply(x, quick=quick)
    assert same(x, second_base())


def test_the_golden_files_hold_every_coding() -> None:
    found = {name: Delta.load(FOLDER / f"{name}-2.safetensors").info()["codings"] for name in ("portable", "against")}
    parts = [part for codings in found.values() for coding in codings for part in enumerate(coding.split(" + "))]
    assert {coding for at, coding in parts if at == 0} == set(INDEX)
    assert {coding for at, coding in parts if at == 1} == set(VALUES)


def test_the_reader_for_others_reads_all_of_them() -> None:
    """examples/read_delta.py, which needs numpy and safetensors only, and is short."""
    source = (EXAMPLES / "read_delta.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 100
    assert set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) == {
        "json", "struct", "sys", "pathlib", "numpy", "safetensors"
    }  # fmt: skip
    reader = runpy.run_path(str(EXAMPLES / "read_delta.py"))
    for file, old, new in (
        ("golden", base(), tuned()), ("portable-2", second_base(), second_tuned()),
        ("against-2", second_base(), second_tuned()),
    ):  # fmt: skip
        changes, _ = reader["read"](FOLDER / f"{file}.safetensors")
        assert changes.keys() == old.keys()
        for name, (entry, where, stream) in changes.items():
            got = reader["apply"](entry, where, stream, words(old[name]))
            assert np.array_equal(got, words(new[name])), (file, name)


def words(t: torch.Tensor) -> np.ndarray:
    """Bit patterns, as the example wants them."""
    return bits(t).numpy().view(f"u{t.element_size()}")


def test_today_s_reader_reads_it() -> None:
    x, golden = base(), Delta.load(GOLDEN)
    inverse = golden.apply(x)
    assert same(x, tuned())
    inverse.apply(x)
    assert same(x, base())
    assert (golden.base.id, golden.base.revision, golden.base.weights) == ("org/name", "0123abc", 51)
    assert (golden.method, golden.recipe) == ("gmt", {"lr": 0.1, "note": "é"})
    assert dict(golden.tied) == {"head.weight": "layers.0.weight"}


def test_the_page_is_enough_to_read_it() -> None:
    """docs/format.md followed to the letter, without the library's reader."""
    blob = GOLDEN.read_bytes()
    (size,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + size])
    meta = header["__metadata__"]
    assert (meta["format"], meta["version"]) == ("finetooth-delta", "1")
    entry = json.loads(meta["tensors"])["layers.0.weight"]
    assert entry["unit"] == {"kind": "element", "size": 1}
    assert (entry["shape"], entry["dtype"], entry["count"], entry["changed"]) == ([3, 4], "F32", 2, 2)

    def data(key: str) -> bytes:
        begin, end = header[key]["data_offsets"]
        return blob[8 + size + begin : 8 + size + end]

    assert struct.unpack("<2i", data("index:layers.0.weight")) == (1, 10)
    assert struct.unpack("<2f", data("values:layers.0.weight")) == (-3.0, -12.0)
    old = [float(i) for i in range(12)]
    new = [-3.0 if i == 1 else -12.0 if i == 10 else float(i) for i in range(12)]
    for key, values in (("fingerprint", old), ("result", new)):
        digest = hashlib.sha256(b"F32 [3, 4]\n" + struct.pack("<12f", *values)).hexdigest()
        assert entry[key] == f"sha256:{digest}"
    column = struct.unpack("<4e", data("values:experts.weight").ljust(8, b"\0"))
    assert column[:2] == (-9.0, -12.0)  # id 4 = column 1 of matrix 1, top to bottom: entries 7 and 10


def test_fingerprints_of_odd_tensors() -> None:
    sha = hashlib.sha256
    assert fingerprint(torch.tensor(1.0)) == "sha256:" + sha(b"F32 []\n" + struct.pack("<f", 1.0)).hexdigest()
    assert fingerprint(torch.zeros(0, 3)) == "sha256:" + sha(b"F32 [0, 3]\n").hexdigest()
    assert fingerprint(torch.tensor([True])) == "sha256:" + sha(b"BOOL [1]\n\x01").hexdigest()
    brain = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert fingerprint(brain) == "sha256:" + sha(b"BF16 [1, 2]\n\x80\x3f\x00\x40").hexdigest()
    assert fingerprint(brain.T.contiguous().T) == fingerprint(brain)
    assert len({fingerprint(t) for t in (brain, brain.T, brain.half(), brain.view(torch.int16), -brain)}) == 5
