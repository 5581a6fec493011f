"""The pretrained weights in their place for the length of a block: what a reference model is.

    p[chosen] <-> base values;  the block;  p[chosen] <-> what they were, bit for bit

What an optimizer has replaced it holds, so that k values change places, and k are set aside. A tensor whose base has to be
read (`full`, `gmt` and `gmt-strict`, from their folder) is set aside whole, in the host's memory.

The writes go through `p.data`. In DPO the reference runs between the policy's forward and its backward, which must find the
versions that autograd noted; it finds the same bits too, because all of them are back by then. Autocast keeps casts of
weights for the length of its context: they are forgotten on the way in and on the way out.

The alternatives: a second model takes its memory for the whole of training; a hook at every layer, which would hold one
layer's base at a time, misses weights that are used outside their module (tied heads, fused losses).

Not covered: an optimizer step, a backward or a checkpoint inside the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from finetooth.selection import Selection

Part = tuple[Tensor, Selection | None, Tensor]  # a parameter, where in it (None: everywhere), and the values there


@contextmanager
def exchanged(parts: Iterable[Part]) -> Iterator[None]:
    """Write the values of all parts for the length of a block; what was there comes back, also after an exception."""
    aside: list[Part] = []
    try:
        for p, where, values in parts:
            aside.append((p, where, _copy(p, where)))
            _write(p, where, values)
        torch.clear_autocast_cache()
        yield
    finally:
        for p, where, values in reversed(aside):
            _write(p, where, values)
        torch.clear_autocast_cache()


def _copy(p: Tensor, where: Selection | None) -> Tensor:
    return p.data.to("cpu", copy=True) if where is None else where.gather(p.data)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled, it would be a write that autograd counts
def _write(p: Tensor, where: Selection | None, values: Tensor) -> None:
    if where is None:
        p.data.copy_(values)
    else:
        where.scatter_(p.data, values)
