"""Half Fine-Tuning's budget: half of every category in every layer (arXiv 2404.18466).

Pools are "model.layers.3/attention", ".../ffn", ".../norm", and "/" for what lies outside the blocks, which
always trains. Of n modules n/2 train; where n is odd, (n+1)/2 in a random half of the layers and (n-1)/2 in
the others, so that the whole comes to half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from finetooth.anatomy import Part
from finetooth.kernels import reference

OUTSIDE = "/"


def sub_blocks(parts: Mapping[str, Part]) -> Callable[[str], str]:
    """The pool of a parameter: its layer and its place in it."""
    return lambda name: f"{parts[name].layer}/{parts[name].place}"


def halves(units: Mapping[str, int], seed: int) -> dict[str, int]:
    """How many modules of every pool train.

    >>> halves({"l.0/ffn": 3, "l.1/ffn": 3, "l.0/attention": 4, "/": 2}, seed=0)
    {'l.0/ffn': 2, 'l.1/ffn': 1, 'l.0/attention': 2, '/': 2}
    """
    odd: dict[tuple[str, int], list[str]] = {}
    for pool, n in units.items():
        if n % 2:
            odd.setdefault((pool.rpartition("/")[2], n), []).append(pool)
    more = set()
    for pools in odd.values():
        drawn = sorted(pools, key=lambda pool: reference.key(seed, "halves", pool))
        more.update(drawn[: (len(drawn) + 1) // 2])
    return {pool: n if pool == OUTSIDE else (n + (pool in more)) // 2 for pool, n in units.items()}
