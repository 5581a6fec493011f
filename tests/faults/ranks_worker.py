"""One of two ranks: rows under DDP or FSDP2, with a fault on rank 1 only; both must skip the same step and stop at the same one.

    one step whose loss is NaN on rank 1 -> a good step -> a gradient shard that is infinite on rank 1 -> two more: NonFiniteError

After a skip every rank compares its weights with those before, and at the end with the other rank.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from finetooth import NonFiniteError
from tests.laws.toy import DTYPES, ROWS, Toy, batches, build, same


def held(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds."""
    return {n: local(p).detach().clone() for n, p in model.named_parameters()}


def local(p: Any) -> Any:
    return p.to_local() if hasattr(p, "to_local") else p


class Pair:
    """A row on two ranks."""

    def __init__(self, row: str, dtype: str, engine: str) -> None:
        self.rank, model = dist.get_rank(), Toy(DTYPES[dtype])
        base = {n: p.detach().clone() for n, p in model.named_parameters()}
        if engine == "fsdp2":
            fully_shard(model)
        calibration = [{"input_ids": b.chunk(2)[self.rank]} for b in batches(2, seed=9)]
        self.opt = build(row, model, weight_decay=0.1, calibration=calibration, base=base, stop_after=2)
        self.model, self.run = model, model if engine == "fsdp2" else DistributedDataParallel(model)
        self.ids = iter(batches(9))

    def step(self, spoil: float = 1.0) -> None:
        """One batch; the loss of rank 1 is multiplied by `spoil`."""
        self.run.train()
        loss = self.run(next(self.ids).chunk(2)[self.rank]).loss
        (loss * (spoil if self.rank else 1.0)).backward()
        try:
            self.opt.step()
        finally:
            self.opt.zero_grad()

    def skips(self, spoil: float) -> bool:
        """Whether a step with a fault on rank 1 is skipped here too."""
        before, counted = held(self.model), (self.opt.steps, self.opt.skipped + 1)
        self.step(spoil)
        return counted == (self.opt.steps, self.opt.skipped) and unmoved(before, self.model)


def unmoved(before: dict[str, Tensor], model: nn.Module) -> bool:
    return all(same(p, before[n]) for n, p in held(model).items())


def outcome(row: str, dtype: str, engine: str) -> dict[str, Any]:
    pair = Pair(row, dtype, engine)
    for _ in range(2):
        pair.step()
    first = pair.skips(math.nan)
    before = held(pair.model)
    pair.step()
    moved = not unmoved(before, pair.model)
    second, said, before = pair.skips(math.inf), "", held(pair.model)
    try:
        pair.step(-math.inf)
    except NonFiniteError as error:
        said = str(error)
    pair.opt.verify_frozen()
    return {
        "skipped": first and second and unmoved(before, pair.model),
        "moved": moved,
        "said": said,
        "counts": [pair.opt.steps, pair.opt.skipped],
        "weights": {} if engine == "fsdp2" else held(pair.model),
    }


def shard(row: str) -> str:
    """A NaN in what rank 1 alone holds of a gradient: what both ranks say."""
    pair = Pair(row, "fp32", "fsdp2")
    pair.step()
    said = ""
    for _ in range(2):
        pair.run.train()
        pair.run(next(pair.ids).chunk(2)[pair.rank]).loss.backward()
        name = next(n for n, s in pair.opt.selections().items() if s.mask().any())
        p = pair.model.get_parameter(name)
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if pair.rank:
            p.grad.to_local().fill_(math.nan)  # type: ignore[attr-defined]
        try:
            pair.opt.step()
        except NonFiniteError as error:
            said = str(error) if repr(name) in str(error) else f"not {name}: {error}"
        pair.opt.zero_grad()
    return said


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {case: outcome(*case.split(".")) for case in cases}
    shards = {row: shard(row) for row in ROWS}
    torch.save({"found": found, "shards": shards}, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
