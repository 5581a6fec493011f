"""One of two ranks: train every row under DDP on half of every batch, and save what rank 0 holds."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.laws.toy import DTYPES, ROWS, Toy, batches, build, snapshot, train


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for row in ROWS:
        for dtype in DTYPES:
            model = Toy(DTYPES[dtype])
            calibration = [{"input_ids": b.chunk(2)[rank]} for b in batches(2, seed=9)]
            opt = build(row, model, weight_decay=0.1, calibration=calibration)
            ddp = DistributedDataParallel(model)
            list(train(ddp, opt, [b.chunk(2)[rank] for b in batches(4)]))
            chosen = {n: s.index for n, s in opt.selections().items()}
            torch.save({"model": snapshot(model), "chosen": chosen}, folder / f"{row}.{dtype}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
