"""Which weights train, as data, and the only place in this package where a top-k exists.

A `Rule` says how to choose; `select` applies it to the weights of a model and returns one `Selection` for
each. Choosing is: score every entry, add the scores of the entries of a unit, and in every *pool* (a
tensor, a module, the model) keep the k units that score highest. The budget of a pool is met exactly:
ties fall to the larger secondary key (a score with a `tie` attribute names it), then to the smaller index.
The exception is a rule with `threshold=True`, where everything that reaches the k-th score is kept, as GMT
defines it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetooth import shards
from finetooth.kernels import pick
from finetooth.ranked import kth_over_ranks, top_over_ranks
from finetooth.rule import Rule, layer, stem
from finetooth.units import WHOLE, Unit
from finetooth.weight import Score, Weight


@dataclass(frozen=True)
class Selection:
    """The chosen units of one tensor: sorted unit ids, the unit they count, the tensor's shape.

    >>> s = Selection(torch.tensor([0, 2], dtype=torch.int32), Unit("column"), (2, 3))
    >>> x = torch.arange(6.0).reshape(2, 3)
    >>> s.gather(x)
    tensor([[0., 3.],
            [2., 5.]])
    >>> s.scatter_(x, torch.zeros(2, 2)); x
    tensor([[0., 1., 0.],
            [0., 4., 0.]])
    """

    index: Tensor
    unit: Unit
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.index.numel()

    @property
    def numel(self) -> int:
        """How many entries are chosen."""
        return len(self) * self.unit.numel(self.shape)

    def gather(self, x: Tensor) -> Tensor:
        """The chosen units of `x` as a new tensor `[k, unit_numel]`."""
        grid = self._grid(x)
        if grid.ndim > 2:
            return grid[torch.unravel_index(self.index.long(), grid.shape[:-1])]
        rows = grid if grid.shape[1] > 1 else grid[:, 0]  # torch takes entries in a third of the time of rows of one
        return rows.index_select(0, self.index).view(-1, grid.shape[1])

    def scatter_(self, x: Tensor, values: Tensor) -> None:
        """Write `values` `[k, unit_numel]` into the chosen units of `x`; nothing else is touched."""
        grid, index = self._grid(x), self.index.long()
        if grid.ndim > 2:
            grid[torch.unravel_index(index, grid.shape[:-1])] = values
        elif grid.shape[1] > 1:
            grid.index_copy_(0, index, values)
        else:
            grid[:, 0].scatter_(0, index, values.reshape(index.shape))

    def entries(self) -> Tensor:
        """Where the chosen entries lie, row-major: int64 `[k, unit_numel]`, in the order of `gather`."""
        size, start = self.unit.numel(self.shape), self.index.long()[:, None]
        inner = torch.arange(size, device=start.device)[None]
        if self.unit.kind == "column":
            columns = self.shape[-1]
            return start // columns * (size * columns) + start % columns + inner * columns
        return start * size + inner

    def mask(self) -> Tensor:
        """A boolean tensor of the weight's shape, true where chosen."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.index.device)
        self.scatter_(mask, mask.new_ones(()).expand(len(self), self.unit.numel(self.shape)))
        return mask

    def _grid(self, x: Tensor) -> Tensor:
        if tuple(x.shape) != self.shape:
            raise ValueError(
                f"a selection of a tensor of shape {self.shape} was used on one of shape {tuple(x.shape)}."
            )
        return self.unit.grid(x)

    @staticmethod
    def whole(shape: tuple[int, ...], device: torch.device | str = "cpu", unit: Unit = Unit("matrix")) -> Selection:
        """Everything: every unit of the tensor."""
        n = unit.count(shape)
        index = torch.arange(n, dtype=torch.int32 if n < 2**31 else torch.int64, device=device)
        return Selection(index, unit, shape)


def _ids(index: Tensor) -> Tensor:
    return index.to(torch.int32 if index.numel() == 0 or int(index[-1]) < 2**31 - 1 else torch.int64)


def select(rule: Rule, weights: Iterable[Weight]) -> dict[str, Selection]:
    """Apply a rule: one `Selection` of the storage of every weight.

    Raises ValueError for a score of the wrong shape, or one that is negative or not finite.
    """
    return {name: selection for found in select_pools(rule, weights) for name, selection in found.items()}


def select_pools(rule: Rule, weights: Iterable[Weight]) -> Iterator[dict[str, Selection]]:
    """The same one pool at a time, letting go of what a pool's scores read before the next is scored."""
    pools: dict[str, list[Weight]] = {}
    for weight in weights:
        pools.setdefault(rule.pool(weight.name), []).append(weight)
    if not pools:
        return
    if rule.exclude and any(w.cut is not None for members in pools.values() for w in members):
        raise ValueError(
            "exclude= with sharded parameters is not supported: train without it, and merge what conflicts."
        )
    seed = next(iter(pools.values()))[0].seed
    units = {pool: _units(rule, members) for pool, members in pools.items()}
    budgets = rule.budgets(units, seed)
    choose = _choose_groups if rule.unit.kind in WHOLE else _choose_units
    for pool in list(pools):
        yield choose(rule, pools.pop(pool), budgets[pool])


def _units(rule: Rule, members: list[Weight]) -> int:
    if rule.unit.kind in WHOLE:
        return len({group_of(rule.unit, w.name) for w in members})
    return sum(w.stored[1].count(w.cut.shape if w.cut is not None else w.stored[0]) for w in members)


def group_of(unit: Unit, name: str) -> str:
    """Which whole tensors are chosen together: those of a module, or those of a block."""
    return layer(name) if unit.kind == "layer" else stem(name)


def _choose_units(rule: Rule, members: list[Weight], k: int) -> dict[str, Selection]:
    if rule.exchange is not None and members[0].turn:
        free = (
            _units(rule, members)
            - k
            - sum(int((~a).count_nonzero()) for a in _allowed(rule, members, members[0].value.device) or ())
        )
        dropped = max(0, min(round(rule.exchange.turnover(members[0].step) * k), free))
        stay = _top_of(rule, members, among(rule.exchange.stay, True), k - dropped)
        grown = _top_of(rule, members, among(rule.score, False), dropped)
        found = [torch.cat(pair).sort().values for pair in zip(stay, grown, strict=True)]
    else:
        found = _top_of(rule, members, rule.score, k)
    return {w.name: Selection(_ids(i), w.stored[1], w.stored[0]) for w, i in zip(members, found, strict=True)}


def among(score: Score, chosen: bool) -> Score:
    """The same of what is chosen now, or of what is not: 0 elsewhere, and there the next larger float32, which is never 0."""

    def part(w: Weight) -> Tensor:
        s = score(w).float().contiguous()
        return torch.where(w.chosen == chosen, (s.view(torch.int32) + 1).view(torch.float32), 0.0)

    part.by_entry = getattr(score, "by_entry", False)  # type: ignore[attr-defined]
    return part


def _top_of(rule: Rule, members: list[Weight], score: Score, k: int) -> list[Tensor]:
    """For every member the sorted ids of its units among the k best of all."""
    scores = [unit_scores(score, w) for w in members]
    tie = getattr(score, "tie", None)
    if members[0].cut is not None and not members[0].whole:
        seconds = (lambda: [unit_scores(tie, w) for w in members]) if tie else None
        return top_over_ranks(scores, k, seconds, rule.threshold)
    second = (lambda: torch.cat([unit_scores(tie, w) for w in members])) if tie else None
    flat = scores[0] if len(scores) == 1 else torch.cat(scores)
    index, out, start = _top_allowed(rule, members, flat, k, second), [], 0
    for s in scores:
        low, high = torch.searchsorted(index, torch.tensor([start, start + s.numel()], device=index.device)).tolist()
        out.append(index[low:high] - start)
        start += s.numel()
    return out


def _top_allowed(rule: Rule, members: list[Weight], flat: Tensor, k: int, tie: Callable[[], Tensor] | None) -> Tensor:
    """`top` of the units that hold no excluded entry."""
    masks = _allowed(rule, members, flat.device)
    if masks is None:
        return top(flat, k, tie, rule.threshold)
    allowed = torch.cat(masks).nonzero().squeeze(1)
    return allowed[top(flat[allowed], k, None if tie is None else lambda: tie()[allowed], rule.threshold)]


def _allowed(rule: Rule, members: list[Weight], device: torch.device) -> list[Tensor] | None:
    """For every member which units hold no excluded entry; None where all are free of them."""
    if not any(w.name in rule.exclude for w in members):
        return None
    masks = []
    for w in members:
        shape, unit = w.stored
        masks.append(torch.ones(unit.count(shape), dtype=torch.bool, device=device))
        if w.name in rule.exclude:
            masks[-1][unit.of(rule.exclude[w.name].to(device, torch.int64), shape)] = False
    return masks


def _choose_groups(rule: Rule, members: list[Weight], k: int) -> dict[str, Selection]:
    """The score of a group is the mean over its tensors, so that a bias does not count as a second vote."""
    names = {w.name: group_of(rule.unit, w.name) for w in members}
    barred = {names[w.name] for w in members if w.name in rule.exclude}
    groups: dict[str, list[Tensor]] = {name: [] for name in names.values() if name not in barred}
    kept, peers, device = set(groups), tuple(groups), members[0].value.device
    members[0].forget()
    if 0 < k < len(groups):  # else there is nothing to ask
        for w in members:
            w.peers = peers
            if names[w.name] in groups:
                groups[names[w.name]].append(unit_scores(rule.score, w))
        flat = torch.cat([torch.stack(s).mean(0) for s in groups.values()])
        kept = {peers[i] for i in top(flat, k).tolist()}
    out = {}
    for w in members:
        whole = Selection.whole(w.stored[0], device, rule.unit)
        out[w.name] = whole if k and names[w.name] in kept else replace(whole, index=whole.index[:0])
    return out


def unit_scores(score: Score, w: Weight) -> Tensor:
    """Score a weight and add up the entries of every unit: float32 `[n_units]`, in storage order.

    A score may also return one number per unit, `[n_units]`, where the sum is not what it means.
    """
    s = score(w).float()
    shape, unit = w.stored
    n, name = unit.count(shape), getattr(score, "__name__", type(score).__name__)
    if s.shape == w.value.shape and tuple(s.shape) != (n,):
        s = by_unit(s, w)
    elif tuple(s.shape) != (n,):
        raise ValueError(
            f"score {name!r} returned shape {tuple(s.shape)} for {w.name!r}: expected the weight's "
            f"{tuple(w.value.shape)}, or one value for each of its {n} units ({unit})."
        )
    low, high = s.aminmax() if s.numel() else (s.new_zeros(()), s.new_zeros(()))  # either is NaN if any entry is
    if not (low >= 0 and high < math.inf):
        bad = [key for key in w.stats if not bool(torch.isfinite(w.stats[key]).all())]
        hint = f" What calibration measured there ({', '.join(bad)}) is not finite: look at its batches." if bad else ""
        raise ValueError(
            f"score {name!r} is negative or not finite in {w.name!r}: a score is a non-negative number.{hint}"
        )
    w.forget()
    return s


def by_unit(x: Tensor, w: Weight) -> Tensor:
    """The sums over the entries of every unit `[n_units]`, in storage order, of a tensor of the weight's shape."""
    grid = w.stored[1].grid((x.transpose(-1, -2) if w.transposed else x).contiguous())
    return (grid.sum(-1) if grid.shape[-1] != 1 else grid).flatten()


def kth_largest(scores: Tensor, k: int) -> float:
    """The exact k-th largest of a flat non-negative tensor, 1 <= k <= n."""
    return float(pick("magnitude_cut", scores.device)([scores], k)[0])


def top(scores: Tensor, k: int, tie: Callable[[], Tensor] | None = None, threshold: bool = False) -> Tensor:
    """Ids of the k largest of a flat score, sorted; equal scores: the larger `tie`, then the smaller id.

    >>> top(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1).tolist()
    [1]
    >>> top(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1, threshold=True).tolist()
    [1, 2]
    """
    if k <= 0 or scores.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    if k >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    cut = kth_largest(scores, k)
    above, level = pick("reaching", scores.device)(scores, cut)
    need = k - above.numel()
    if threshold:
        need = level.numel()
    elif tie is not None and level.numel() > need:
        level = level[torch.sort(tie()[level], descending=True, stable=True).indices]
    return _merged(above, level[:need].sort().values)


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """Two sorted lists of different ids as one; b is short, so that nothing of a's length is sorted."""
    if not b.numel():
        return a
    at = torch.searchsorted(a, b) + torch.arange(len(b), device=b.device)
    first = torch.ones(len(a) + len(b), dtype=torch.bool, device=b.device)
    first[at] = False
    out = torch.empty(len(first), dtype=a.dtype, device=a.device)
    out[at], out[first] = b, a
    return out


def magnitude_cuts(
    rule: Rule, grads: Mapping[str, Tensor], seed: int, backend: str = "auto", sizes: Mapping[str, int] | None = None
) -> tuple[dict[str, float], float]:
    """For a threshold on |g|: T by tensor name, and the sum of the squares of all that reaches it.

    The sum is not finite if any gradient is not. A pool that keeps nothing has T = inf. sizes: the entries of the whole
    tensors, where `grads` are what this rank holds of them.
    """
    pools: dict[str, list[str]] = {}
    for name in grads:
        pools.setdefault(rule.pool(name), []).append(name)
    whole = sizes or {name: g.numel() for name, g in grads.items()}
    budgets = rule.budgets({pool: sum(whole[n] for n in names) for pool, names in pools.items()}, seed)
    if sizes is not None:
        return _cuts_of_pieces(grads, pools, budgets)
    cuts, total = dict[str, float](), 0.0
    for pool, names in pools.items():
        held, cut, square = [grads[n] for n in names], math.inf, 0.0
        if any(g.numel() for g in held):
            cut, square = pick("magnitude_cut", held[0].device, backend)(held, max(1, budgets[pool]))
        if not budgets[pool]:
            cut, square = math.inf, 0.0 * square  # not finite if a gradient is not
        total += square
        cuts.update(dict.fromkeys(names, cut))
    return cuts, total


def _cuts_of_pieces(
    grads: Mapping[str, Tensor], pools: Mapping[str, list[str]], budgets: Mapping[str, int]
) -> tuple[dict[str, float], float]:
    held = {pool: [grads[n] for n in names] for pool, names in pools.items() if budgets[pool]}
    levels = dict(zip(held, kth_over_ranks(list(held.values()), [budgets[pool] for pool in held]), strict=True))
    cuts = {name: levels.get(pool, math.inf) for pool, names in pools.items() for name in names}
    mine = 0.0
    for name, g in grads.items():
        reached = torch.where(g.abs().float() >= cuts[name], g.float(), 0.0).square().sum(dtype=torch.float64)
        mine += float(reached) if bool(torch.isfinite(g).all()) else math.nan
    return cuts, shards.total(mine, next(iter(grads.values())).device)
