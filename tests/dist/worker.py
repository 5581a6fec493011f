"""One of two ranks: train rows under DDP on half of every batch, and save what rank 0 holds."""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import finetooth
from tests.laws.toy import DTYPES, Toy, batches, build, snapshot, train

TIED = ("lisa", "badam", "random", "rows")
COMPACT = ("random", "grad", "gift-sw", "rows", "fish")  # that choose once and gather gradients


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    early = {c: built(*c.split("."), torch.arange(2)) for c in cases if c.startswith(("lisa", "badam"))}  # before there are ranks
    tied = {row: (model := tied_toy(), build(row, model, seed=1)) for row in TIED}
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    every_row(folder, cases, rank, early)
    for row, (model, opt) in tied.items():
        ddp = DistributedDataParallel(model)
        list(train(ddp, opt, [b.chunk(2)[rank] for b in batches(6)]))
        torch.save(snapshot(model), folder / f"{row}.tied.{rank}.pt")
    torch.save({row: traffic(row) for row in COMPACT}, folder / f"traffic.{rank}.pt")
    tied.clear()  # DDP's reducers go with the models, and must before their process group does
    del ddp, model, opt
    gc.collect()
    dist.destroy_process_group()


def every_row(folder: Path, cases: list[str], rank: int, early: dict[str, tuple[Toy, finetooth.SelectiveAdamW]]) -> None:
    for case in cases:
        model, opt = early.pop(case, None) or built(*case.split("."), torch.tensor([rank]))
        ddp = DistributedDataParallel(model)
        list(train(ddp, opt, [b.chunk(2)[rank] for b in batches(4)]))
        chosen = {n: s.index for n, s in opt.selections().items()}
        torch.save({"model": snapshot(model), "chosen": chosen}, folder / f"{case}.{rank}.pt")


def traffic(row: str) -> dict[str, int]:
    """Bytes that a step after the first gives to all-reduces of ours and of DDP's, and what they are measured by."""
    rank, sent = dist.get_rank(), {"ours": 0, "ddp": 0}
    model, opt = built(row, "fp32", torch.tensor([rank]))
    ddp = DistributedDataParallel(model)

    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent["ddp"] += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    def all_reduce(tensor: torch.Tensor, *given: object, **named: object) -> object:
        sent["ours"] += 0 if named.get("async_op") else tensor.nbytes  # the hook's are
        return whole(tensor, *given, **named)

    ddp.register_comm_hook(None, hook)
    whole, dist.all_reduce = dist.all_reduce, all_reduce
    try:
        for _ in train(ddp, opt, [b.chunk(2)[rank] for b in batches(2)]):
            found = dict(sent)
            sent.update(ours=0, ddp=0)
    finally:
        dist.all_reduce = whole
    sizes = [model.get_parameter(name).nbytes for name in opt.selections()]
    chosen = sum(s.numel for s in opt.selections().values())
    return {**found, "chosen": 4 * chosen, "dense": sum(sizes), "smallest": min(sizes)}


def tied_toy() -> Toy:
    model = Toy()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def built(row: str, dtype: str, parts: torch.Tensor) -> tuple[Toy, finetooth.SelectiveAdamW]:
    """A model, and an optimizer with those halves of the calibration batches."""
    model = Toy(DTYPES[dtype])
    calibration = [{"input_ids": torch.cat([b.chunk(2)[i] for i in parts])} for b in batches(2, seed=9)]
    return model, build(row, model, weight_decay=0.1, calibration=calibration)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
