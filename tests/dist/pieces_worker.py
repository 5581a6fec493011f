"""One of some ranks: what is put together of pieces, even ones, uneven ones and none, is the whole; raises where it is not."""

import itertools

import torch
import torch.distributed as dist

from finetooth import pieces, shards
from finetooth.ranked import kth_over_ranks, top_over_ranks
from finetooth.selection import Selection, kth_largest, top
from finetooth.shards import Cut
from finetooth.units import Unit

SHAPES = [(1, 6), (5, 4), (7, 2), (9,), (2, 3, 4), (1,)]


def cut(shape: tuple[int, ...], rank: int, ranks: int) -> Cut:
    """As torch.chunk cuts: all ranks but the last have equally many rows."""
    size = -(-shape[0] // ranks)
    start = min(rank * size, shape[0])
    return Cut(shape, start, min(size, shape[0] - start))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        wholes = [torch.randint(0, 5, shape, generator=g).float() * 0.3 for shape in SHAPES]  # many are equal
        ties = [torch.randint(0, 3, shape, generator=g).float() for shape in SHAPES]
        cuts = [cut(shape, rank, ranks) for shape in SHAPES]
        choose(wholes, ties, cuts)
    state(rank, ranks)
    dist.destroy_process_group()


def choose(wholes: list[torch.Tensor], ties: list[torch.Tensor], cuts: list[Cut]) -> None:
    held = [pieces.rows(x, c).flatten() for x, c in zip(wholes, cuts, strict=True)]
    second = [pieces.rows(x, c).flatten() for x, c in zip(ties, cuts, strict=True)]
    flat, sizes = torch.cat([x.flatten() for x in wholes]), [x.numel() for x in wholes]
    for k in (1, 2, 17, 40, flat.numel()):
        assert kth_over_ranks([held, held[:1]], [k, 1]) == [kth_largest(flat, k), float(wholes[0].max())]
        for tie, threshold in itertools.product((False, True), (False, True)):
            expected = top(flat, k, (lambda: torch.cat([t.flatten() for t in ties])) if tie else None, threshold)
            found = top_over_ranks(held, k, (lambda: second) if tie else None, threshold)
            found = [shards.joined(i + c.start * c.row) for i, c in zip(found, cuts, strict=True)]
            starts = itertools.accumulate([0, *sizes[:-1]])
            assert torch.cat([i + s for i, s in zip(found, starts, strict=True)]).equal(expected), (k, tie, threshold)


def state(rank: int, ranks: int) -> None:
    g = torch.Generator().manual_seed(0)
    for shape, kind in itertools.product(SHAPES, ("element", "row", "column", "matrix")):
        unit = Unit(kind)
        if kind in ("row", "column") and len(shape) < 2:
            continue
        n, u = unit.count(shape), unit.numel(shape)
        for k in {0, 1, n}:
            index = torch.randperm(n, generator=g)[:k].sort().values.to(torch.int32)
            units = {"index": index, "unit": [kind, 1], "shape": list(shape)}
            ages = torch.randint(1, 4, (k,), generator=g, dtype=torch.int32)
            whole = {"age": ages if len(ages.unique()) > 1 else int(ages[0]) if k else 0, "selection": units}
            whole |= {key: torch.rand((k, u), generator=g) for key in ("exp_avg", "exp_avg_sq")}
            whole |= {"replaced": {**units, "values": torch.rand((k, u), generator=g).bfloat16()}}
            place = cut(shape, rank, ranks)
            again = pieces.join_state(pieces.cut_state(whole, place, compact=True), place, compact=True)
            assert equal(again, whole), (shape, kind, k)
            chosen = Selection(index, unit, shape)
            assert pieces.joined(pieces.mine(chosen, place), place).index.equal(index)


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a.equal(b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


if __name__ == "__main__":
    main()
