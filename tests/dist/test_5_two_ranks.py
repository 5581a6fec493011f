"""Law 5: two ranks = one process, under torch's DistributedDataParallel with two gloo processes on a CPU.

On the toy, whose gradients are exact in any order, the same masks and the same bits. What no engine of torch shards is refused by name.
"""

from pathlib import Path

import pytest
import torch

from tests.dist.ranks import PATIENCE, asked, in_turn, run
from tests.dist.worker import COMPACT, TIED, tied_toy
from tests.laws.toy import DTYPES, Toy, batches, build, same, snapshot, train

pytestmark = pytest.mark.timeout(PATIENCE + 100)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run("tests.dist.worker", str(folder), *asked(request, "row", "dtype"))
    return folder


@pytest.mark.parametrize(("row", "dtype"), in_turn(0))
def test_two_ranks(row: str, dtype: str, folder: Path) -> None:
    model = Toy(DTYPES[dtype])
    opt = build(row, model, weight_decay=0.1)
    list(train(model, opt, batches(4)))
    for rank in range(2):
        other = torch.load(folder / f"{row}.{dtype}.{rank}.pt", weights_only=True)  # noqa: TID251 - tensors only
        assert {n: s.index.tolist() for n, s in opt.selections().items()} == {n: i.tolist() for n, i in other["chosen"].items()}
        assert all(same(p, other["model"][n]) for n, p in snapshot(model).items())


@pytest.mark.parametrize("row", TIED)
def test_tied_weights_of_an_optimizer_that_was_there_first(row: str, folder: Path) -> None:
    """As accelerate's users have it: the process group comes after the optimizer."""
    model = tied_toy()
    list(train(model, build(row, model, seed=1), batches(6)))
    for rank in range(2):
        other = torch.load(folder / f"{row}.tied.{rank}.pt", weights_only=True)  # noqa: TID251 - tensors only
        assert all(same(p, other[n]) for n, p in snapshot(model).items())


@pytest.mark.parametrize("row", COMPACT)
def test_what_crosses_the_network(row: str, folder: Path) -> None:
    """The gathered gradients in float32, and no more; DDP is left with the smallest tensor, as it refuses to have none."""
    sent = torch.load(folder / "traffic.0.pt", weights_only=True)[row]  # noqa: TID251 - numbers only
    assert (sent["ours"], sent["ddp"]) == (sent["chosen"], sent["smallest"])
    assert sent["ours"] + sent["ddp"] < sent["dense"]


def test_fsdp1_is_refused() -> None:
    model = Toy()
    model.lm_head.weight._flat_param = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"lm_head.weight.*DDP"):
        build("full", model)


def test_flattened_parameters_are_refused() -> None:
    """What DeepSpeed's ZeRO does to an optimizer's groups."""
    model = Toy()
    opt = build("full", model)
    model(batches(1)[0]).loss.backward()
    opt.param_groups[0]["params"] = [torch.cat([p.detach().flatten() for p in model.parameters()])]
    with pytest.raises(RuntimeError, match=r"DeepSpeed.*Use DDP or FSDP2"):
        opt.step()
