"""What crosses ranks: the only file that imports torch.distributed.

Under data parallelism every rank holds the whole model and, after the gradients' all-reduce, the same
gradients: selections made from them agree by themselves. What must be shared is what was measured on a rank's
own batches before training. Sharded parameters (FSDP2's DTensor) are refused by name until they are supported.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """How many ranks take part; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which rank this is; 0 without torch.distributed."""
    return dist.get_rank() if world() > 1 else 0


def wait() -> None:
    """Go on when every rank is here."""
    if world() > 1:
        dist.barrier()


def reduce_(tensors: Iterable[Tensor], how: str) -> None:
    """All-reduce tensors in place, how = 'mean', 'sum' or 'max'; does nothing on a single rank."""
    ranks = world()
    if ranks == 1:
        return
    op = dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM
    for tensor in tensors:
        dist.all_reduce(tensor, op=op)
        if how == "mean":
            tensor.div_(ranks)


def refuse_sharded(name: str, p: Tensor) -> None:
    """Raise ValueError for a sharded parameter."""
    if type(p).__name__ == "DTensor" or hasattr(p, "_flat_param"):
        raise ValueError(
            f"{name!r} is sharded (FSDP or tensor parallel), which is not supported yet: use DDP, or train on one device."
        )
