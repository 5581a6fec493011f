"""The pieces of one array, worked on by several threads: numpy's loops let go of the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_LEAST = 8  # pieces that are worth a thread

T = TypeVar("T")
R = TypeVar("R")


def spread(work: Callable[[T], R], pieces: Sequence[T]) -> list[R]:
    """`[work(x) for x in pieces]`, by at most as many threads as torch takes. The first error, in order, is raised.

    >>> spread(abs, [1, -2])
    [1, 2]
    """
    threads = min(torch.get_num_threads(), len(pieces) // _LEAST)
    if threads < 2:
        return [work(x) for x in pieces]
    cuts = [len(pieces) * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(lambda i: [work(x) for x in pieces[cuts[i] : cuts[i + 1]]], range(threads))
        return [result for part in parts for result in part]
