"""The bytes of the format do not move: a committed file is read, written again, and taken apart by hand."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import torch

from finetooth.base import fingerprint
from finetooth.delta import Delta

from .deltas import same
from .golden.make import base, delta, tuned

GOLDEN = Path(__file__).parent / "golden" / "golden.safetensors"
SHA256 = "aff42d841239e016d8e02c102637141c98cba5220fcffae172a3610562d3601e"


def test_the_file_is_the_one_that_was_committed() -> None:
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == SHA256


def test_today_s_writer_gives_the_same_bytes(tmp_path: Path) -> None:
    for i, d in enumerate([delta(), Delta.load(GOLDEN)]):
        d.save(tmp_path / str(i))
        assert (tmp_path / str(i)).read_bytes() == GOLDEN.read_bytes()


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
