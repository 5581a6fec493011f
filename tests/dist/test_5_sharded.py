"""Law 5 under FSDP2: two ranks that each hold half of every tensor = one process, with two gloo processes on a CPU.

On the toy, whose gradients are exact in any order: the same masks, the same bits, the same delta file; and a run goes on from
the other's state, two ranks from one process's and one process from two ranks'.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetooth import Delta
from tests.dist.ranks import PATIENCE, asked, in_turn, run
from tests.dist.sharded_worker import EXACT
from tests.laws.toy import DTYPES, Toy, batches, build, same, snapshot, train

pytestmark = pytest.mark.timeout(PATIENCE + 100)


def plain(row: str, dtype: str) -> tuple[Toy, Any]:
    model = Toy(DTYPES[dtype])
    return model, build(row, model, weight_decay=0.1, base=snapshot(model), **EXACT)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    cases = asked(request, "row", "dtype")
    for case in cases:
        model, opt = plain(*case.split("."))
        list(train(model, opt, batches(4)[:2]))
        torch.save({"model": snapshot(model), "optimizer": opt.state_dict()}, folder / f"{case}.half.pt")
    run("tests.dist.sharded_worker", str(folder), *cases)
    return folder


@pytest.mark.parametrize(("row", "dtype"), in_turn(1))
def test_two_halves(row: str, dtype: str, folder: Path, tmp_path: Path) -> None:
    model, opt = plain(row, dtype)
    list(train(model, opt, batches(4)))
    found = torch.load(folder / f"{row}.{dtype}.sharded.pt", weights_only=True)  # noqa: TID251 - tensors only
    for kind in ("whole", "resumed"):
        other = found[kind]
        chosen = {n: s.index.tolist() for n, s in opt.selections().items()}
        assert chosen == {n: i.tolist() for n, i in other["chosen"].items()}, kind
        assert all(same(p, other["model"][n]) for n, p in snapshot(model).items()), kind
        mine, theirs = opt.state_dict()["selective"], other["state"]
        norms = [state["extra"]["guard"].pop("norm") for state in (mine, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)  # the one sum that is taken in another order
        assert equal(mine, theirs), kind
    Delta.extract(model, opt).save(tmp_path / "delta.safetensors")
    assert (tmp_path / "delta.safetensors").read_bytes() == (folder / f"{row}.{dtype}.delta.safetensors").read_bytes()

    model, opt = plain(row, dtype)  # one process goes on where two ranks were
    model.load_state_dict(found["half"]["model"])
    opt.load_state_dict(found["half"]["optimizer"])
    list(train(model, opt, batches(4)[2:]))
    assert all(same(p, found["whole"]["model"][n]) for n, p in snapshot(model).items())


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("ranks", [2, 3])
def test_pieces(ranks: int) -> None:
    """Even ones, uneven ones and none, with equal scores on both sides of a border; the worker compares."""
    run("tests.dist.pieces_worker", ranks=ranks)


def test_clipping_is_to_the_norm_of_all_ranks(folder: Path) -> None:
    """The norm is summed in another order, so the weights agree to rounding: a few units in the last place of 1."""
    model = Toy()
    opt = build("gmt", model, weight_decay=0.1, base=snapshot(model), max_grad_norm=0.5)
    list(train(model, opt, batches(4)))
    other = torch.load(folder / "clipped.pt", weights_only=True)  # noqa: TID251 - tensors only
    assert opt.grad_norm == pytest.approx(other["norm"], rel=1e-6)
    assert all(torch.allclose(p, other["model"][n], rtol=1e-6, atol=1e-6) for n, p in snapshot(model).items())


def test_what_cannot_work_is_refused_on_every_rank(folder: Path) -> None:
    said = torch.load(folder / "refused.pt", weights_only=True)  # noqa: TID251 - texts only
    for name, part in {
        "eight bits": "moments='8bit' of sharded parameters",
        "some": "is not sharded, and other parameters are",
        "structured": "gradients='structured'",
        "apply": "is sharded over ranks: apply a delta",
        "rank 1": "rank 1 was given has no slots",
        "checkpoint": "torch.distributed.checkpoint",
        "early": "build it when there is a process group",
    }.items():
        assert part in said[name], name
