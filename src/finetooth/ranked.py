"""The k-th largest, and the k best, of tensors of which every rank holds some rows: what `selection.top` finds in the whole.

Nothing is put together: ranks add up counts of bit patterns, and tell each other how many of equal scores they hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finetooth import shards


def kth_over_ranks(pools: list[list[Tensor]], ks: list[int]) -> list[float]:
    """For every pool the exact k-th largest magnitude of its tensors on all ranks together; k is at least 1.

    Counts of bit patterns, eleven bits at a time from the top, are added over ranks: three rounds for all pools together.
    """
    device, left = pools[0][0].device, torch.tensor(ks)
    found = torch.zeros(len(pools), dtype=torch.int64)
    for shift, width in ((20, 11), (10, 10), (0, 10)):  # of 31 bits: the sign is none of a magnitude's
        table = torch.zeros(len(pools), 1 << width, dtype=torch.int64, device=device)
        for i, pool in enumerate(pools):
            for x in pool:
                bits = x.float().contiguous().view(torch.int32).flatten() & 0x7FFFFFFF
                within = bits[(bits >> (shift + width)) == int(found[i])] if shift + width < 31 else bits
                table[i] += torch.bincount((within >> shift) & ((1 << width) - 1), minlength=1 << width)
        shards.reduce_([table], "sum")
        reached = table.cpu().flip(1).cumsum(1)  # how many there are from the largest down
        at = (reached >= left[:, None]).int().argmax(1)
        left -= torch.where(at > 0, reached.gather(1, (at - 1).clamp_min(0)[:, None])[:, 0], 0)
        found = (found << width) | ((1 << width) - 1 - at)
    return found.to(torch.int32).view(torch.float32).tolist()


def top_over_ranks(
    scores: list[Tensor], k: int, tie: Callable[[], list[Tensor]] | None = None, threshold: bool = False
) -> list[Tensor]:
    """`top` of tensors of which every rank holds some rows: for each the sorted ids, here, of what is chosen.

    Equal scores: the larger `tie`, then the earlier tensor, then the lower rank, then the smaller id, as `top` has it of the whole.
    """
    if k <= 0:
        return [torch.empty(0, dtype=torch.int64, device=s.device) for s in scores]
    cut = kth_over_ranks([scores], [k])[0]
    above, level = [(s > cut).nonzero().flatten() for s in scores], [(s == cut).nonzero().flatten() for s in scores]
    device = scores[0].device
    if not threshold:
        need = k - int(shards.counts([sum(len(a) for a in above)], device).sum())
        if tie is not None and need < int(shards.counts([sum(len(x) for x in level)], device).sum()):
            seconds = [t[x] for t, x in zip(tie(), level, strict=True)]
            second = kth_over_ranks([seconds], [need])[0]
            more = [x[s > second] for x, s in zip(level, seconds, strict=True)]
            need -= int(shards.counts([sum(len(m) for m in more)], device).sum())
            above = [torch.cat(pair) for pair in zip(above, more, strict=True)]
            level = [x[s == second] for x, s in zip(level, seconds, strict=True)]
        level = _first(level, need)
    return [torch.cat(pair).sort().values for pair in zip(above, level, strict=True)]


def _first(level: list[Tensor], need: int) -> list[Tensor]:
    """The first of these ids on all ranks together: by tensor, then by rank."""
    counts = shards.counts([len(x) for x in level], level[0].device)  # [ranks, tensors]
    before = counts.t().reshape(-1).cumsum(0).view(counts.t().shape).t() - counts
    left = (need - before[shards.rank()]).clamp_min(0).tolist()
    return [x[:n] for x, n in zip(level, left, strict=True)]
