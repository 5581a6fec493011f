"""Files and targets that must be refused, always as DeltaError, and with nothing changed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from finetooth import delta as delta_module
from finetooth.delta import Delta, DeltaError, WrongBase

from .deltas import Edit, Weights, copy, rewrite, same

Saved = tuple[Path, Weights, Weights]


def meta(key: str, value: Any) -> Edit:
    return lambda header, entries, data: header["__metadata__"].__setitem__(key, value)


def entry(name: str, key: str, value: Any) -> Edit:
    return lambda header, entries, data: entries[name].__setitem__(key, value)


def put(key: str, at: int, value: bytes) -> Edit:
    """Overwrite bytes of a tensor's data, `at` bytes from its start."""

    def edit(header: dict[str, Any], entries: dict[str, Any], data: bytearray) -> None:
        begin = header[key]["data_offsets"][0] + at
        data[begin : begin + len(value)] = value

    return edit


def head(key: str, **fields: Any) -> Edit:
    return lambda header, entries, data: header[key].update(fields)


def rename(old: str, new: str) -> Edit:
    return lambda header, entries, data: header.__setitem__(new, header.pop(old))


def int32(n: int) -> bytes:
    return struct.pack("<i", n)


BIG = "[" * 100_000
BROKEN: dict[str, tuple[Edit, str]] = {
    "another format": (meta("format", "gguf"), "not a Finetooth delta"),
    "no metadata": (lambda h, e, d: h.pop("__metadata__") and h.update(__metadata__={}), "not a Finetooth delta"),
    "newer version": (meta("version", "3"), "newer than this library reads"),
    "no version": (meta("version", "one"), "whole number"),
    "a key is missing": (lambda h, e, d: h["__metadata__"].pop("tied"), "has no tied"),
    "tensors not JSON": (meta("tensors", "nonsense"), "tensors is not JSON"),
    "JSON too deep": (meta("recipe", BIG), "recipe is not JSON"),
    "a key twice": (meta("base", '{"id":null,"id":"x","revision":null,"weights":1,"tuned":false}'), "twice"),
    "NaN in JSON": (meta("recipe", "NaN"), "NaN"),
    "base without fields": (meta("base", "{}"), "base is"),
    "method no name": (meta("method", "[1]"), "method"),
    "tied to nothing": (meta("tied", '{"x": 3}'), "tied says"),
    "tied to itself": (meta("tied", '{"x": "x"}'), "tied says"),
    "an alias has an entry": (meta("tied", '{"n": "e"}'), "tied says"),
    "index coding": (entry("n", "index_coding", "gaps"), "'gaps'"),
    "value coding": (entry("n", "value_coding", "xor"), "'xor'"),
    "no coding": (lambda h, e, d: e["n"].pop("value_coding"), "value_coding None"),
    "entry no table": (lambda h, e, d: e.__setitem__("n", 3), "not a table"),
    "negative shape": (entry("n", "shape", [-5]), "shape"),
    "shape of booleans": (entry("n", "shape", [True]), "shape"),
    "huge shape": (entry("n", "shape", [2**40, 2**40]), "no tensor is that large"),
    "empty shape": (entry("n", "shape", [0]), "count"),
    "unknown dtype": (entry("n", "dtype", "F4"), "'F4'"),
    "another dtype": (entry("n", "dtype", "BF16"), "the values of 'n'"),
    "unknown unit": (entry("n", "unit", {"kind": "diagonal", "size": 1}), "diagonal"),
    "unit no table": (entry("n", "unit", "row"), "expected a kind"),
    "row of a vector": (entry("n", "unit", {"kind": "row", "size": 1}), "needs a matrix"),
    "block does not divide": (entry("n", "unit", {"kind": "block", "size": 2}), "divide"),
    "another unit": (entry("b.weight", "unit", {"kind": "column", "size": 1}), "'b.weight' has changed 8"),
    "count too large": (entry("a.weight", "count", 49), "count 49"),
    "count zero": (entry("a.weight", "count", 0), "count 0"),
    "count lies": (entry("b.weight", "count", 2), "the index of 'b.weight'"),
    "changed zero": (entry("a.weight", "changed", 0), "changed 0"),
    "changed too large": (entry("a.weight", "changed", 3), "changed 3"),
    "fingerprint no hash": (entry("n", "fingerprint", "sha256:xyz"), "fingerprints"),
    "result missing": (lambda h, e, d: e["n"].pop("result"), "fingerprints"),
    "result is the base": (lambda h, e, d: e["n"].update(result=e["n"]["fingerprint"]), "fingerprints"),
    "out of range": (put("index:a.weight", 4, int32(48)), "out of range"),
    "negative": (put("index:a.weight", 0, int32(-1)), "out of range"),
    "duplicate": (put("index:a.weight", 0, int32(47)), "strictly increasing"),
    "unsorted": (put("index:a.weight", 0, int32(47) + int32(10)), "strictly increasing"),
    "index of floats": (head("index:n", dtype="F32"), "the index of 'n'"),
    "index two-dimensional": (head("index:a.weight", shape=[1, 2]), "the index of 'a.weight'"),
    "infinity": (put("values:n", 0, struct.pack("<f", float("inf"))), "not finite"),
    "not a number": (put("values:n", 0, struct.pack("<f", float("nan"))), "not finite"),
    "values flat": (head("values:a.weight", shape=[2]), "the values of 'a.weight'"),
    "a tensor is missing": (lambda h, e, d: e.__setitem__("zz", e["n"]), "lacks 'index:zz'"),
    "a tensor too many": (lambda h, e, d: e.pop("n"), "beyond what its metadata lists"),
    "another name": (rename("values:n", "values:m"), "lacks 'values:n'"),
    "offsets beyond the end": (head("values:n", data_offsets=[0, 10**9]), "not a whole safetensors file"),
}


@pytest.mark.parametrize("attack", BROKEN)
def test_a_broken_file_is_refused(saved: Saved, attack: str) -> None:
    path = saved[0]
    edit, says = BROKEN[attack]
    rewrite(path, lambda header, entries, data: None)
    Delta.load(path)  # what rewrite writes is read: the refusal is due to the edit
    rewrite(path, edit)
    with pytest.raises(DeltaError, match=says):
        Delta.load(path)


def test_unknown_keys_are_ignored(saved: Saved) -> None:
    rewrite(saved[0], meta("note", "hello"))
    rewrite(saved[0], entry("n", "note", "hello"))
    assert Delta.load(saved[0]).method == "gmt"


def test_every_truncation_is_refused(saved: Saved) -> None:
    path = saved[0]
    blob = path.read_bytes()
    for size in [*range(0, 40), *range(40, len(blob), 37), len(blob) - 1]:
        path.write_bytes(blob[:size])
        with pytest.raises(DeltaError):
            Delta.load(path)
    path.write_bytes(blob + b"\0")
    with pytest.raises(DeltaError):
        Delta.load(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_changed_byte_is_refused_or_harmless(saved: Saved, at: int, value: int) -> None:
    """Loading raises DeltaError or nothing; applying raises DeltaError or gives exactly the tuned model."""
    path, base, tuned = saved
    good = path.with_suffix(".good")
    if not good.exists():
        good.write_bytes(path.read_bytes())
    blob = bytearray(good.read_bytes())
    blob[at % len(blob)] = value
    path.write_bytes(blob)
    x = copy(base)
    try:
        Delta.load(path).apply(x)
    except DeltaError:
        assert same(x, base)
    else:
        assert same(x, tuned)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model")
    (tmp_path / "pickle").write_bytes(b"\x80\x04\x95")
    (tmp_path / "empty").touch()
    for name in ("model", "pickle", "empty"):
        with pytest.raises(DeltaError, match=name):
            Delta.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Delta.load(tmp_path / "none")


TARGETS: dict[str, tuple[Any, str]] = {
    "another base": (lambda x: x["e"].add_(1), r"'e' is not that of .*: expected sha256:\w+, found sha256:\w+"),
    "one bit": (lambda x: x["scalar"].neg_(), "'scalar' is not"),
    "an untouched entry of a touched tensor": (lambda x: x["a.weight"][0, 0].neg_(), "'a.weight' is not"),
    "shape": (lambda x: x.update(e=torch.zeros(2, 4, 5)), r"'e' is F32 \[2, 4, 5\]"),
    "dtype": (lambda x: x.update(scalar=x["scalar"].double()), "'scalar' is F64"),
    "missing": (lambda x: x.pop("scalar"), "no 'scalar'"),
    "half applied": (lambda x: x["a.weight"][1, 2].fill_(3.0), "'a.weight' is not"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_a_wrong_target_is_refused_untouched(saved: Saved, case: str) -> None:
    path, x, _ = saved
    edit, says = TARGETS[case]
    edit(x)
    before = copy(x)
    with pytest.raises(DeltaError, match=says):
        Delta.load(path).apply(x)
    assert same(x, before)


def test_the_error_of_a_wrong_base_names_the_base(saved: Saved) -> None:
    path, base, _ = saved
    rewrite(path, meta("base", json.dumps({"id": "org/name", "revision": "abc", "weights": 9, "tuned": False})))
    base["n"] += 1
    with pytest.raises(WrongBase, match="'n' is not that of org/name@abc"):
        Delta.load(path).apply(base)


@pytest.mark.parametrize(
    "lie",
    [
        put("values:n", 0, struct.pack("<f", 8.0)),
        put("index:n", 0, int32(1)),
        entry("n", "result", "sha256:" + "0" * 64),
        entry("b.weight", "changed", 1),
    ],
)
def test_a_file_that_lies_about_its_result_is_refused(saved: Saved, lie: Edit) -> None:
    """Well formed, for the right base, and not what it promises."""
    path, base, _ = saved
    rewrite(path, lie)
    delta, before = Delta.load(path), copy(base)
    with pytest.raises(DeltaError, match=r"promises|it changes"):
        delta.apply(base)
    assert same(base, before)


def test_a_write_that_fails_is_rolled_back(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    path, base, _ = saved
    delta, before, real, calls = Delta.load(path), copy(base), delta_module.scatter_, []

    def failing(selection: Any, x: Any, values: Any) -> None:
        real(selection, x, values)
        calls.append(not same(base, before))
        if sum(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(delta_module, "scatter_", failing)
    with pytest.raises(KeyboardInterrupt):
        delta.apply(base)
    assert any(calls)  # something had been written
    assert same(base, before)


def test_a_save_that_fails_leaves_the_old_file(saved: Saved) -> None:
    path, base, _ = saved
    blob = path.read_bytes()
    tuned = copy(base)
    tuned["n"][0] += 1
    with pytest.raises(DeltaError, match="JSON"):
        Delta.extract(tuned, base, recipe={"x": object()}).save(path)
    assert path.read_bytes() == blob
    assert [p.name for p in path.parent.iterdir()] == [path.name]
