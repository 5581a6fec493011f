"""What crosses ranks: the only file that imports torch.distributed.

Under data parallelism every rank holds the whole model and, after the gradients' all-reduce, the same gradients:
selections made from them agree by themselves. What must be shared is what was measured on a rank's own batches.

Under FSDP2 (`fully_shard`) every parameter is a DTensor, and a rank holds some of its rows. `local` is what a rank holds, and
everything that is done entry by entry is done to that. Three things cross ranks: sums (norms, counts of scores), pieces that are put together
to a whole tensor (`whole`, `joined`), and how many of equal scores the ranks before this one take (`counts`). All of it is collective:
every rank must call the same functions in the same order.

Not covered: meshes of more than one dimension (HSDP, tensor parallelism) and shards of another dimension than the first, refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_REMEDY = "use DDP or FSDP2 (torch.distributed.fsdp.fully_shard on a mesh of one dimension), or train on one device"


def world() -> int:
    """How many ranks take part; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one."""
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


@dataclass(frozen=True)
class Cut:
    """Which rows `[start, start + rows)` of the first dimension of a tensor of this shape a rank holds."""

    shape: tuple[int, ...]
    start: int
    rows: int

    @property
    def local(self) -> tuple[int, ...]:
        """The shape of what is held."""
        return (self.rows, *self.shape[1:])

    @property
    def row(self) -> int:
        """Entries in a row."""
        return math.prod(self.shape[1:])


def sharded(t: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(t, "full_tensor")


def cut(name: str, p: Tensor) -> Cut | None:
    """How a parameter is cut, None for one that every rank holds whole; ValueError for a way that is not supported."""
    if hasattr(p, "_flat_param") or type(p).__name__ == "FlatParameter":
        raise ValueError(f"{name!r} is sharded by FSDP1 (FlatParameter), which is not supported: {_REMEDY}.")
    if hasattr(p, "ds_id"):
        raise ValueError(f"{name!r} is partitioned by DeepSpeed ZeRO-3, which is not supported: {_REMEDY}.")
    if not sharded(p):
        return None
    from torch.distributed.tensor import Shard

    placements, mesh = tuple(p.placements), p.device_mesh  # type: ignore[attr-defined]
    if placements != (Shard(0),) or mesh.ndim != 1 or mesh.size() != world():
        raise ValueError(f"{name!r} is placed as {placements} on a mesh of {mesh.size()} ranks: {_REMEDY}.")
    return like(tuple(p.shape), p)


def reshard(model: Any) -> None:
    """Let FSDP2 put its shards back in the place of the whole parameters that a forward without a backward leaves there."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()


def like(shape: tuple[int, ...], p: Any) -> Cut:
    """How a tensor of this shape is cut on the mesh of a sharded parameter."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    held, offset = compute_local_shape_and_global_offset(shape, p.device_mesh, p.placements)
    return Cut(shape, min(offset[0], shape[0]), held[0])


def local(t: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; the tensor itself where it is not sharded."""
    found: Tensor = t._local_tensor if sharded(t) else t  # type: ignore[attr-defined]
    return found


@torch.no_grad()
def whole(t: Tensor) -> Tensor:
    """All of a tensor: of a sharded one a copy, which every rank gets."""
    found: Tensor = t.full_tensor() if sharded(t) else t  # type: ignore[attr-defined]
    return found


def joined(piece: Tensor, dim: int = 0) -> Tensor:
    """The pieces of all ranks, of different sizes in one dimension, one after the other."""
    ranks = world()
    flat = piece.detach().movedim(dim, 0).contiguous()
    sizes = [int(n) for n in counts([len(flat)], piece.device)[:, 0]]
    padded = flat.new_zeros((max(sizes), *flat.shape[1:]))
    padded[: len(flat)] = flat
    # Bytes: gloo does not know every dtype that a state has.
    seen = padded.view(torch.uint8) if padded.numel() and padded.ndim else padded
    found = [torch.empty_like(seen) for _ in range(ranks)]
    if seen.numel():
        dist.all_gather(found, seen)
    out = torch.cat([f.view(padded.dtype)[:n] if f.numel() else f[:n] for f, n in zip(found, sizes, strict=True)])
    return out.movedim(0, dim).contiguous()


def counts(mine: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of every rank, `[ranks, n]` int64 on the CPU."""
    here = torch.tensor(list(mine), dtype=torch.int64, device=device)
    if world() == 1:
        return here[None].cpu()
    found = [torch.empty_like(here) for _ in range(world())]
    dist.all_gather(found, here)
    return torch.stack(found).cpu()


def total(value: float, device: torch.device) -> float:
    """The sum of a number over ranks, in float64 where the device has it."""
    held = torch.tensor([value], dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    reduce_([held], "sum")
    return float(held)
