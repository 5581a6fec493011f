"""Opening whatever holds weights, and rebuilding the base from what was replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetooth.base import Replaced, open_base
from finetooth.checkpoint import copy_changed
from finetooth.units import Unit

from .deltas import copy, make, same


def test_every_source_gives_the_same_tensors(tmp_path: Path) -> None:
    base, _ = make(torch.bfloat16)
    save_file(base, tmp_path / "model.safetensors")
    for source in (base, tmp_path, str(tmp_path), tmp_path / "model.safetensors", open_base(base)):
        opened = open_base(source)
        assert same({name: opened.tensor(name) for name in opened.names()}, base)
        assert opened.shape_dtype("e") == ((2, 4, 6), torch.bfloat16)
    assert open_base(tmp_path).id == tmp_path.name  # never the whole path


def test_a_folder_of_the_hub_s_cache_knows_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    assert (open_base(folder).id, open_base(folder).revision) == ("org/name", "0123abc")


@pytest.mark.parametrize(
    ("index", "error", "says"),
    [
        ("nonsense", ValueError, "not an index"),
        ({"weight_map": [1]}, ValueError, "not an index"),
        ({"weight_map": {"w": "lost.safetensors"}}, FileNotFoundError, "lost.safetensors is missing"),
        ({"weight_map": {"v": "a.safetensors"}}, ValueError, "'v' is in a.safetensors"),
        ({"weight_map": {"w": "../a.safetensors"}}, ValueError, "same folder"),
        ({"weight_map": {"w": "broken"}}, ValueError, "broken is not a whole safetensors file"),
    ],
)
def test_a_broken_checkpoint_is_refused(tmp_path: Path, index: object, error: type[Exception], says: str) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "broken").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    text = index if isinstance(index, str) else json.dumps(index)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(error, match=says):
        open_base(tmp_path)


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="pickle"):
        open_base(tmp_path)


def test_no_data_is_said() -> None:
    with pytest.raises(ValueError, match="meta device"):
        open_base({"w": torch.zeros(2, device="meta")}).tensor("w")


@pytest.mark.parametrize("unit", [Unit(), Unit("row"), Unit("column"), Unit("block", 4), Unit("matrix")], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)], ids=str)
def test_replaced_knows_the_base_whatever_trains(unit: Unit, shape: tuple[int, ...]) -> None:
    """The dense copy it stands for is kept here only."""
    x = torch.randn(shape).to(torch.bfloat16)
    truth, held, n = x.clone(), Replaced.empty(unit, x), unit.count(shape)
    for _ in range(12):
        chosen = torch.randperm(n)[: max(1, n // 3)].sort().values.to(torch.int32)
        held.remember(chosen, x)
        grid = unit.grid(x)
        flat = grid.reshape(n, -1)
        flat[chosen.long()] += torch.randn(len(chosen), flat.shape[1]).to(x.dtype)
        grid.copy_(flat.reshape(grid.shape))
        assert torch.equal(held.original(x), truth)
        assert bool((held.index[1:] > held.index[:-1]).all())
        back = held.index[torch.rand(len(held.index)) < 0.3]  # these go back to the base, and are forgotten
        restored = held.original(x).clone()
        mask = torch.zeros(n, dtype=torch.bool)
        mask[back.long()] = True
        grid.copy_(
            torch.where(mask[:, None], unit.grid(restored).reshape(n, -1), grid.reshape(n, -1)).reshape(grid.shape)
        )
        held.forget(back)
        assert not set(back.tolist()) & set(held.index.tolist())
        assert torch.equal(held.original(x), truth)


def test_replaced_shares_the_first_index_and_keeps_the_first_values() -> None:
    x = torch.arange(6.0)
    held, index = Replaced.empty(Unit(), x), torch.tensor([1, 4], dtype=torch.int32)
    held.remember(index, x)
    assert held.index is index
    x[1] = 9.0
    held.remember(torch.tensor([0, 1], dtype=torch.int32), x)
    assert held.index.tolist() == [0, 1, 4]
    assert held.values.flatten().tolist() == [0.0, 1.0, 4.0]
    assert copy({"x": held.original(x)})["x"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    src, dst = tmp_path, tmp_path.parent / f"{tmp_path.name}-copy"
    before = sorted(tmp_path.parent.iterdir())

    def bytes_of(name: str) -> memoryview:
        if name == "b":
            raise OSError("no space left")
        return memoryview(bytes(8))

    with pytest.raises(OSError, match="the disk is full"):
        copy_changed(src, dst, ["a", "b"], bytes_of)
    with pytest.raises(ValueError, match="'a' has 8 bytes"):
        copy_changed(src, dst, ["a"], lambda name: memoryview(bytes(4)))
    assert sorted(tmp_path.parent.iterdir()) == before
    copy_changed(src, dst, ["a"], bytes_of)
    assert dst.is_dir()
