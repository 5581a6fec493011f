"""One of two ranks: build first, then let accelerate shard model and optimizer, and save what rank 0 gets."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from finetooth import Delta
from tests.dist.sharded_worker import EXACT, gathered
from tests.laws.toy import DTYPES, ROWS, Toy, batches, build


def fsdp2() -> Accelerator:
    """accelerate takes FSDP on a CPU for DDP, in silence: what it would have set up on a GPU, of what its launcher was told."""
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin()
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = fsdp2()
    rank = dist.get_rank()

    def mine(ids: list[torch.Tensor]) -> list[torch.Tensor]:
        return [b.chunk(2)[rank] for b in ids]

    calibration = [{"input_ids": b} for b in mine(batches(2, seed=9))]
    for row in ROWS:
        model = Toy(DTYPES["fp32"])
        opt = build(row, model, weight_decay=0.1, calibration=calibration, base=dict(Toy().named_parameters()), **EXACT)
        wrapped, prepared = accelerator.prepare(model, opt)
        wrapped.train()
        for ids in mine(batches(4)):
            accelerator.backward(wrapped(ids).loss)
            prepared.step()
            prepared.zero_grad()
        opt.verify_frozen()
        chosen = {n: s.index for n, s in opt.selections().items()}
        delta = Delta.extract(wrapped, prepared)
        found = {"model": gathered(wrapped), "chosen": chosen, "sharded": sorted(opt._cuts)}
        if rank == 0:
            delta.save(folder / f"{row}.safetensors")
            torch.save(found, folder / f"{row}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
