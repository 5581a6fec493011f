"""A fault on one rank of two, under DDP and FSDP2: both skip the same step, both stop at the same one, nobody waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dist.ranks import PATIENCE, asked, in_turn, run
from tests.laws.toy import ROWS, same

pytestmark = pytest.mark.timeout(PATIENCE + 100)


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("faults")
    run("tests.faults.ranks_worker", str(folder), *asked(request, "row", "dtype", "engine"))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]  # noqa: TID251 - tensors only


@pytest.mark.parametrize(
    ("engine", "row", "dtype"),
    [pytest.param(e, *case.values, marks=case.marks) for i, e in enumerate(("ddp", "fsdp2")) for case in in_turn(i)],
)
def test_both_ranks_skip_and_stop(row: str, dtype: str, engine: str, ranks: list[Any]) -> None:
    one, two = (rank["found"][f"{row}.{dtype}.{engine}"] for rank in ranks)
    for found in (one, two):
        assert found["skipped"] and found["moved"] and found["counts"] == [3, 3]
        assert "2 gradients in a row" in found["said"] and "first bad tensor is 'model." in found["said"]
    assert one["said"] == two["said"]
    assert all(same(p, two["weights"][n]) for n, p in one["weights"].items())


@pytest.mark.parametrize("row", ROWS)
def test_a_shard_that_one_rank_holds(row: str, ranks: list[Any]) -> None:
    """The rank without a bad entry names the tensor too."""
    said = [rank["shards"][row] for rank in ranks]
    assert said[0] == said[1] and "first bad tensor is 'model." in said[0] and "2 gradients in a row" in said[0]
