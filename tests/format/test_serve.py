"""Patches do in a server what the delta does here: both of vLLM's contracts, kept with plain torch.

The two receivers below are written after what vLLM's do (the places are named in `serve.py`): what they demand is asserted, and what
they write is compared bit for bit with the tuned model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from finetooth.base import open_base
from finetooth.cli.delta import app
from finetooth.codec import Change, DeltaError
from finetooth.delta import Delta, WrongBase
from finetooth.selection import Selection
from finetooth.serve import LIST, Patch, entries, patches, read, write
from finetooth.units import KINDS, Unit
from tests.format.deltas import Weights, copy, make, same

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def flat(held: Weights, patch: Patch) -> None:
    """As sparse_nccl_engine applies one: to a contiguous parameter, by flat int32 indices."""
    param = held[patch.name]
    assert param.is_contiguous() and patch.indices.dtype == torch.int32
    assert patch.indices.ndim == patch.values.ndim == 1 and len(patch.indices) == len(patch.values)
    assert patch.values.dtype == param.dtype
    param.view(-1).index_copy_(0, patch.indices.long(), patch.values)


def masked(patch: Patch) -> torch.Tensor:
    """As checkpoint_weight_patch makes a checkpoint tensor of one: NaN where nothing changes."""
    n = torch.Size(patch.shape).numel()
    assert patch.dtype.is_floating_point and not patch.values.isnan().any()
    assert (
        int(patch.indices.min()) >= 0
        and int(patch.indices.max()) < n
        and len(patch.indices.unique()) == len(patch.indices)
    )
    out = torch.full((n,), float("nan"), dtype=patch.dtype)
    out.index_copy_(0, patch.indices.long(), patch.values)
    return out.view(patch.shape)


class Joined(nn.Module):
    """A server's attention: q, k and v are one parameter, whose loader knows where a checkpoint's tensor goes."""

    PARTS = ("q_proj", "k_proj", "v_proj")

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.qkv_proj = nn.Parameter(torch.cat([weights[f"{part}.weight"] for part in self.PARTS]))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, new in weights:
            at = self.PARTS.index(name.removesuffix(".weight")) * len(new)
            place = self.qkv_proj.data[at : at + len(new)]
            torch.where(new.isnan(), place, new, out=place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tuned_model_bit_for_bit(dtype: torch.dtype) -> None:
    base, tuned = make(dtype)
    delta = Delta.extract(tuned, base)
    assert {str(c.selection.unit) for c in delta.changes.values()} > {"element", "row", "column", "matrix"} - {
        "element"
    }
    one, two = copy(base), copy(base)
    for patch in patches(delta):
        assert patch.indices.is_contiguous() and patch.values.is_contiguous()
        assert bool((patch.indices[1:] > patch.indices[:-1]).all())
        flat(one, patch)
        flat(one, patch)  # values replace: twice is once
        new = masked(patch)
        two[patch.name] = torch.where(new.isnan(), two[patch.name], new)
    assert same(one, tuned) and same(two, tuned)


def test_joined_weights_are_left_to_the_server() -> None:
    g = torch.Generator().manual_seed(0)
    base = {f"{part}.weight": torch.randn(4, 6, generator=g) for part in Joined.PARTS}
    tuned = copy(base)
    tuned["k_proj.weight"][1, 2] += 1
    tuned["v_proj.weight"][:, 3] -= 1
    server = Joined(base)
    server.load_weights((p.name, masked(p)) for p in patches(Delta.extract(tuned, base)))
    assert torch.equal(server.qkv_proj, Joined(tuned).qkv_proj)


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_every_unit(kind: str, shape: tuple[int, ...]) -> None:
    unit = Unit(kind, 4 if kind == "block" else 1)
    n = unit.count(shape)
    chosen = Selection(torch.arange(0, n, 2, dtype=torch.int32), unit, shape)
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)  # an entry's value is its place
    assert torch.equal(entries(chosen), chosen.gather(x))


def test_what_a_patch_cannot_say_is_refused(tmp_path: Path) -> None:
    huge = Selection(torch.tensor([5]), Unit(), (2**16, 2**15 + 1))
    change = Change(huge, torch.zeros(1, 1), 1, "sha256:" + "0" * 64, "sha256:" + "1" * 64)
    with pytest.raises(DeltaError, match=r"'w' \[65536, 32769\] has more than 2\^31 entries.*--as checkpoint"):
        write(Delta({"w": change}), tmp_path / "out")
    largest = replace(change, selection=Selection(torch.tensor([2**31 - 1]), Unit(), (2**16, 2**15)))
    assert next(patches(Delta({"w": largest}))).indices.tolist() == [2**31 - 1]
    whole = Delta.extract({"n": torch.tensor([1])}, {"n": torch.tensor([2])})
    with pytest.raises(DeltaError, match=r"'n' is torch\.int64: .*floating-point"):
        list(patches(whole))
    assert not list(tmp_path.iterdir())


def test_a_folder_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = make(torch.bfloat16)
    monkeypatch.setattr("finetooth.serve._FILE_BYTES", 200)  # so that there is more than one file
    delta = Delta.extract(tuned, base)
    found = write(delta, tmp_path / "out", base)
    assert found["patches"] == len(delta.changes) and found["files"] > 1
    back = copy(base)
    for patch, made in zip(read(tmp_path / "out"), patches(delta), strict=True):
        assert patch[:3] == made[:3] and torch.equal(patch.indices, made.indices)
        flat(back, patch)
    assert same(back, tuned)
    listed = json.loads((tmp_path / "out" / LIST).read_text())["patches"]
    assert all(getattr(torch, p["dtype"]) == torch.bfloat16 for p in listed)  # as vLLM looks a dtype up
    with pytest.raises(FileExistsError):
        write(delta, tmp_path / "out")


def test_names_are_no_paths(tmp_path: Path) -> None:
    """A tensor may be called anything that is printable: it is a key in a file."""
    name = "../../etc/x"
    delta = Delta.extract({name: torch.ones(2)}, {name: torch.zeros(2)})
    write(delta, tmp_path / "a" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert sorted(p.name for p in (tmp_path / "a" / "out").iterdir()) == ["patches-00001.safetensors", LIST]
    text = (tmp_path / "a" / "out" / LIST).read_text()
    (tmp_path / "a" / "out" / LIST).write_text(text.replace("patches-00001", "../patches-00001"))
    with pytest.raises(ValueError, match="in the same folder"):
        list(read(tmp_path / "a" / "out"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "finetooth-patches", "version": 2}'])
def test_another_list_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / LIST).write_text(text)
    with pytest.raises(ValueError, match=LIST):
        list(read(tmp_path))


def test_a_base_that_knows_an_alias_only(tmp_path: Path) -> None:
    w = torch.zeros(3, 2)
    delta = replace(Delta.extract({"embed": w + 1}, {"embed": w}), tied={"head": "embed"})
    assert write(delta, tmp_path / "out", {"head": w})["entries"] == 6
    assert next(patches(delta, open_base({"head": w}))).name == "embed"


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(w) for w in words])


def test_the_command(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, tuned = make()
    save_file(base, tmp_path / "base.safetensors")
    Delta.extract(tuned, base).save(tmp_path / "d")
    done = run("export", tmp_path / "d", "--as", "patches", "--to", tmp_path / "out", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["patches"] == 7, done.output
    checked = ("export", tmp_path / "d", "--as", "patches", "--base", tmp_path / "base.safetensors", "--to")
    assert run(*checked, tmp_path / "checked").exit_code == 0
    save_file(tuned, tmp_path / "base.safetensors")
    refused = run(*checked, tmp_path / "no")
    assert refused.exit_code == 2 and "already applied" in refused.stderr and not (tmp_path / "no").exists()
    with pytest.raises(WrongBase):
        write(Delta.load(tmp_path / "d"), tmp_path / "no", tuned)
    without = run("export", tmp_path / "d", "--to", tmp_path / "no")
    assert without.exit_code == 2 and "give --base" in without.stderr
