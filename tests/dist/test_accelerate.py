"""FSDP2 through accelerate, which shards after the optimizer is built: the same masks, bits and delta as one process."""

from pathlib import Path

import pytest
import torch

from finetooth import Delta
from tests.dist.ranks import run
from tests.dist.test_5_sharded import plain
from tests.laws.toy import ROWS, batches, same, snapshot, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accelerate")
    run("tests.dist.accelerate_worker", str(folder))
    return folder


@pytest.mark.parametrize("row", ROWS)
def test_built_before_it_is_sharded(row: str, folder: Path, tmp_path: Path) -> None:
    model, opt = plain(row, "fp32")
    list(train(model, opt, batches(4)))
    other = torch.load(folder / f"{row}.pt", weights_only=True)  # noqa: TID251 - tensors only
    assert other["sharded"] == sorted(n for n, _ in model.named_parameters())
    assert {n: s.index.tolist() for n, s in opt.selections().items()} == {n: i.tolist() for n, i in other["chosen"].items()}
    assert all(same(p, other["model"][n]) for n, p in snapshot(model).items())
    Delta.extract(model, opt).save(tmp_path / "delta.safetensors")
    assert (tmp_path / "delta.safetensors").read_bytes() == (folder / f"{row}.safetensors").read_bytes()
