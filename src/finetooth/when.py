"""At which optimizer steps the selection is made again: a `When` is a function step -> bool.

Steps count from 0 and never count micro-batches. `once` also tells the optimizer that a selection is final:
it may then freeze what was not chosen, so that those weights compute no gradient at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

When = Callable[[int], bool]


def once(step: int) -> bool:
    """Select a single time, at the start."""
    return step == 0


def every(n: int) -> When:
    """Select at steps 0, n, 2n, …

    >>> [step for step in range(6) if every(2)(step)]
    [0, 2, 4]
    """
    if n < 1:
        raise ValueError(f"every({n}): give the number of optimizer steps between two selections, at least 1.")

    def when(step: int) -> bool:
        return step % n == 0

    when.__name__ = "every step" if n == 1 else f"every({n})"
    return when


def at(steps: Iterable[int]) -> When:
    """Select at exactly these steps."""
    wanted = frozenset(steps)
    return lambda step: step in wanted


def warmup(n: int) -> When:
    """Train densely for n steps, then select at every step."""
    return lambda step: step >= n
