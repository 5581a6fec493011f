"""What is chosen together: one entry, a row, a column, a run of entries, a matrix or a layer.

A `Unit` turns a tensor into a table `[n_units, unit_numel]` without copying it, so that one top-k, one
gather and one scatter serve every granularity. Units speak about *storage*: for a weight stored as
`[out, in]` (`nn.Linear`) a column is an input feature; for GPT-2's `Conv1D`, stored as `[in, out]`, an
input feature is a stored row. `Unit.transposed` does that swap once, when a run is built, so that neither
a selection nor a delta file ever needs to know how a layer multiplies.

The alternative, a mask per tensor, costs a byte per weight and has to be searched before it can be used.

`matrix` and `layer` name the same table (one unit, the whole tensor); they differ in which tensors are
chosen together: a matrix takes its bias along, a layer everything in it (see `selection.select`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("element", "row", "column", "block", "matrix", "layer")
WHOLE = ("matrix", "layer")


@dataclass(frozen=True)
class Unit:
    """A granularity: `kind` is one of `KINDS`; `size` is the run length of a `block` and 1 otherwise.

    >>> import torch
    >>> Unit("column").view(torch.arange(6).reshape(2, 3))
    tensor([[0, 3],
            [1, 4],
            [2, 5]])
    >>> Unit("block", 2).count((2, 3))
    3
    """

    kind: str = "element"
    size: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unit={self.kind!r} is unknown: choose one of {', '.join(KINDS)}.")
        if self.size < 1 or (self.size != 1 and self.kind != "block"):
            raise ValueError(f"unit {self.kind!r} has size={self.size}: only a block has a size, and it is at least 1.")

    def __str__(self) -> str:
        return f"block({self.size})" if self.kind == "block" else self.kind

    def transposed(self) -> Unit:
        """The unit of the same meaning in the transposed storage: rows and columns change places."""
        return Unit({"row": "column", "column": "row"}.get(self.kind, self.kind), self.size)

    def grid(self, x: Tensor) -> Tensor:
        """View `x` as `[*units, unit_numel]`, where the units may span several dimensions.

        A column of a stack of matrices `[experts, out, in]` is a column of one matrix: the units are
        `[experts, in]`, which no single stride can walk. Hence `grid` for gather and scatter, and `view`
        where one dimension of units is needed.
        """
        if not x.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(x.shape)} is not contiguous: units are read from its storage.")
        if self.kind in WHOLE:
            return x.view(1, -1)
        if self.kind == "element":
            return x.view(-1, 1)
        if self.kind == "block":
            return x.view(-1, self._block(tuple(x.shape)))
        if x.ndim < 2:
            raise ValueError(f"a {self.kind} needs a matrix: the tensor has shape {tuple(x.shape)}.")
        return x.view(-1, x.shape[-1]) if self.kind == "row" else x.transpose(-1, -2)

    def view(self, x: Tensor) -> Tensor:
        """View `x` as `[n_units, unit_numel]`; raises ValueError where that cannot be a view."""
        grid = self.grid(x)
        if grid.ndim > 2:
            raise ValueError(f"the columns of a stack of shape {tuple(x.shape)} have no common stride: use gather.")
        return grid

    def count(self, shape: tuple[int, ...]) -> int:
        """How many units a tensor of this shape has."""
        numel = math.prod(shape)
        if self.kind in WHOLE:
            return 1
        return numel // self.numel(shape) if numel else 0

    def numel(self, shape: tuple[int, ...]) -> int:
        """How many entries one unit of a tensor of this shape has."""
        if self.kind in WHOLE:
            return math.prod(shape)
        if self.kind == "element":
            return 1
        if self.kind == "block":
            return self._block(shape)
        if len(shape) < 2:
            raise ValueError(f"a {self.kind} needs a matrix: the tensor has shape {shape}.")
        return shape[-1] if self.kind == "row" else shape[-2]

    def of(self, entries: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The sorted ids of the units that hold these entries (int64, row-major) of a tensor of this shape.

        >>> Unit("column").of(torch.tensor([1, 4, 5]), (2, 3))
        tensor([1, 2])
        """
        size = self.numel(shape)
        if self.kind == "column":
            columns = shape[-1]
            entries, size = entries // (size * columns) * columns + entries % columns, 1
        found: Tensor = torch.unique(entries // max(size, 1))
        return found

    def _block(self, shape: tuple[int, ...]) -> int:
        """The run length in this shape: a tensor smaller than a block is one block."""
        size = min(self.size, math.prod(shape)) or self.size  # of a shard without rows
        if math.prod(shape) % size:
            raise ValueError(f"block size {self.size} does not divide a tensor of shape {shape}: choose a divisor.")
        return size
