"""Through `accelerate launch`: FSDP2, sharded after the optimizer is built, is one process to the bit; DDP is the example."""

from pathlib import Path

import pytest
import torch

from finetooth import Delta
from tests.dist.ranks import PATIENCE, launch
from tests.dist.test_5_sharded import plain
from tests.laws.toy import ROWS, batches, same, snapshot, train

pytestmark = pytest.mark.timeout(PATIENCE + 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accelerate")
    fsdp2 = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "false")
    launch(*fsdp2, "-m", "tests.dist.accelerate_worker", str(folder))
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


def test_the_example_under_ddp(capfd: pytest.CaptureFixture[str]) -> None:
    launch("--multi_gpu", "examples/accelerate_loop.py", "--steps", "4")
    said = capfd.readouterr().out
    assert said.count("->") == 1, "of two ranks, one speaks"
    assert "47 tensors checked: nothing moved" in said
