"""What a step asks of its gradients before it writes: that there are any, that they can be used, how large they are.

A gradient can be used if every entry is finite, and so is its square after clipping: Adam's second moment would be infinite from
then on, and the weight would never move again, without a word. Only what is used is asked: the chosen entries, or all of them
where a selection is made of them or moments see them. One that cannot be used changes nothing but a count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from finetooth import shards

LARGEST = 2.0**63  # its square, 2^126, is below the largest float32, 2^128


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that cannot be used: NaN, infinite, or too large to be squared."""


class Guard:
    """Counts bad steps in a row, and clips to a norm; `norm` is that of the last gradients that were used."""

    def __init__(self, max_norm: float, stop_after: int) -> None:
        self.max_norm, self.stop_after, self.norm = max_norm, stop_after, 0.0
        self.total = 0.0  # the norm of all gradients of the present step
        self.names = list[str]()  # of all that may have a gradient, in one order on all ranks
        self._bad, self._idle = 0, 0

    @property
    def bad(self) -> int:
        """How many steps in a row, up to the last, had a gradient that cannot be used."""
        return self._bad

    def state(self) -> dict[str, float]:
        """How many steps in a row were bad, or without gradients, and the last norm: a resumed run goes on from there."""
        return {"bad": self._bad, "idle": self._idle, "norm": self.norm}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take over what `state` gave."""
        self._bad, self._idle, self.norm = int(state["bad"]), int(state["idle"]), state["norm"]

    def passes(self, grads: Mapping[str, Tensor], total: float, loss: float = 0.0) -> bool:
        """Whether all of them can be used; NonFiniteError, naming the first bad tensor, after `stop_after` times in a row.

        total: their norm, on all ranks together; loss: what they are gradients of, where that is known.
        """
        self.total = total
        if math.isfinite(loss) and min(total, self.max_norm or total) < LARGEST and math.isfinite(total):
            self._bad = 0
            return True
        self._bad += 1
        if self._bad >= self.stop_after:
            first = "the loss itself is not" if not math.isfinite(loss) else self._first(grads)
            raise NonFiniteError(
                f"{self._bad} gradients in a row were not finite; {first}. No weight was written in these steps. Lower the "
                "learning rate, or look at the data of these steps."
            )
        return False

    def _first(self, grads: Mapping[str, Tensor]) -> str:
        """The first tensor, on any rank, that is not finite, or the one with the largest entry."""
        mine = [name in grads and not bool(torch.isfinite(grads[name]).all()) for name in self.names]
        device = next((g.device for g in grads.values()), torch.device("cpu"))
        found = shards.counts([int(bad) for bad in mine], device).any(0).nonzero()
        if len(found):
            return f"the first bad tensor is {self.names[int(found[0])]!r}"
        largest = max(
            grads, key=lambda name: float(grads[name].abs().max()) if grads[name].numel() else 0.0, default=None
        )
        return (
            f"their norm of {self.total:.1e} is too large to be squared, and max_grad_norm does not clip it; the largest "
            f"entry is in {largest!r}"
        )

    def some(self, grads: Mapping[str, Tensor], example: str) -> bool:
        """Whether there are any; a loss that does not reach what trains is a RuntimeError after a few steps."""
        self._idle = 0 if grads else self._idle + 1
        if self._idle >= self.stop_after:
            raise RuntimeError(
                f"no weight that trains had a gradient in {self._idle} steps in a row: was backward called, and does "
                f"the loss depend on {example!r}?"
            )
        return bool(grads)

    def factor(self, total: float) -> float:
        """What the gradients in use, of norm `total`, are to be multiplied by: 1 where clipping changes nothing."""
        self.norm = total
        if not self.max_norm:
            return 1.0
        if total > torch.finfo(torch.float32).max:
            return self.max_norm / total
        coefficient = self.max_norm / (torch.tensor(total) + 1e-6)  # float32 and the 1e-6: torch's clip_grad_norm_
        return min(1.0, float(coefficient))


def norm(grads: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, in float32: float16's own would overflow at 65504.

    Where the squares overflow although every entry is finite, it is taken of the gradients over their largest entry.

    >>> norm([torch.tensor([3.0]), torch.tensor([4.0])]).item(), norm([torch.tensor([1e30])]).isfinite().item()
    (5.0, True)
    """
    held = [g for g in grads if g.numel()]
    if not held:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in held])
    )
    if torch.isfinite(total):
        return total
    largest: Tensor = torch.stack([g.abs().amax().float() for g in held]).amax()
    if not torch.isfinite(largest):
        return total
    parts = torch.stack([torch.linalg.vector_norm(g.float() / largest) for g in held])
    whole: Tensor = torch.linalg.vector_norm(parts.double())
    return largest.double() * whole
