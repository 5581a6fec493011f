"""Bytes of tensors that are alive, counted while code runs on tensors without values.

A `Meter` sees every operation below autograd. It counts each new storage when an operation returns it and takes it off when
the last tensor that looks at it is gone. Run under torch's fake tensors (shapes and dtypes, no memory), the code that
trains a model tells how its memory rises and falls: what autograd saves and frees, what checkpointing makes again, what
hooks gather and drop. The alternative, a formula for each architecture, is wrong for the next one.

Storage made by `torch.empty` counts as far as views of it reach, because a system gives out pages when they are written;
an allocator of a GPU takes all of it (`whole=True`). What an operation uses inside itself is not seen, but for the
operations of this package (`INSIDE`).

Not covered: the workspaces of matrix libraries, and what allocators lose between blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetooth.linear import STRIPE, sampled

_EMPTY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")
PAGE = 4096
TOKENS = 512  # that the CPU's sampled product transposes at a time


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live bytes (`now`) and the most there were since `mark` (`peak`)."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._whole = whole
        self._held: dict[int, int] = {}  # bytes counted, by storage
        self._written: set[int] = set()  # storages that count as far as views reach

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were there before; how many bytes they add."""
        before = self.now
        for t in tensors:
            self._count(t, False)
        return self.now - before

    def mark(self) -> int:
        """Start a new peak from here; the bytes alive now."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operation and count what it returns."""
        name = func._schema.name
        out = SHAPES.get(name, func)(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._count(t, name in _EMPTY and not self._whole)
        if (inside := INSIDE.get(name)) is not None:
            self.peak = max(self.peak, self.now + inside(*args))
        return out

    def _count(self, t: Tensor, empty: bool) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, 0 if empty else storage.nbytes()
        if key not in self._held:
            self._held[key] = 0
            weakref.finalize(storage, self._drop, key)
            if empty:
                self._written.add(key)
        elif key in self._written:
            size = min(_touched(t), size)
        if size > self._held[key]:
            self.now += size - self._held[key]
            self._held[key] = size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self._written.discard(key)
        self.now -= self._held.pop(key)


def _touched(t: Tensor) -> int:
    """Bytes of the pages that writing a tensor gives out; a row that does not begin with a page reaches into one more."""
    rows = 0 if t.is_contiguous() or not t.numel() else t.numel() // t.shape[-1]
    return t.numel() * t.element_size() + rows * PAGE


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each counted once.

    >>> import torch
    >>> x = torch.zeros(4)
    >>> unique_bytes([x, x[:2]])
    16
    """
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def _chosen_gradient(dy: Tensor, x: Tensor, index: Tensor, unit: str, width: int, backend: str) -> int:
    """Beside its result: a product before it is float32, chosen outputs, a stripe, or two operands transposed."""
    size, k = dy.element_size(), index.numel()
    if unit in ("column", "row"):
        other = dy.shape[1] if unit == "column" else width
        return (k * other * size if size < 4 else 0) + (k * dy.shape[0] * size if unit == "row" else 0)
    if sampled(unit, k, dy.shape[1] * width, dy.dtype, dy.device, backend):
        return 4 * min(TOKENS, dy.shape[0]) * (dy.shape[1] + width) + 2 * k * index.element_size()
    return min(STRIPE, dy.shape[1] * width) * size


def _noisy(x: Tensor, w: Tensor, *_: Any) -> int:
    """A stripe of the weight with its noise."""
    return min(STRIPE, w.numel()) * w.element_size()


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The result's shape: torch's own says so for bfloat16 only. Without offsets, a batched product."""
    both = a.ndim == b.ndim == 2  # groups of the dimension that is summed over: one matrix for each
    groups = () if offs is None or not both else (offs.numel(),)
    return a.new_zeros((*groups, *a.shape[:-1], b.shape[-1]))


SHAPES: dict[str, Callable[..., Any]] = {"aten::_grouped_mm": _grouped_mm}
INSIDE: dict[str, Callable[..., int]] = {
    "finetooth::chosen_gradient": _chosen_gradient,
    "finetooth::noisy_linear": _noisy,
    "finetooth::noisy_input_grad": _noisy,
}
