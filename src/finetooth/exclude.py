"""Which entries must not train because other deltas change them: so that merging cannot conflict.

What a file lists is excluded: without the base nobody knows which entries of a listed row really changed. Names are those
of the model's parameters, tied ones go by the one name that `named_parameters()` gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from finetooth.anatomy import tied
from finetooth.delta import Delta
from finetooth.moves import Given, opened


def excluded(given: Given | Iterable[Given], model: nn.Module) -> dict[str, Tensor]:
    """The sorted ids of the entries that these deltas list, by parameter name: int32 where they fit, on the host.

    Raises DeltaError or FileNotFoundError as `Delta.load` does, ValueError if a delta is not of this model.
    """
    deltas = opened([given] if isinstance(given, (Delta, str, Path)) else list(given))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    aliases, others = tied(model), {name for name, _ in model.named_buffers()}
    found: dict[str, list[Tensor]] = {}
    for delta in deltas:
        for name, c in delta.changes.items():
            names = (name, *(alias for alias, of in delta.tied.items() if of == name))
            at = next((n for n in (aliases.get(n, n) for n in names) if n in shapes), None)
            if at is None and name in others:
                continue  # a buffer, which does not train
            if at is None or shapes[at] != c.selection.shape:
                is_here = "is not there" if at is None else f"is {list(shapes[at])}"
                raise ValueError(
                    f"exclude: a delta (made for {delta.base}) changes {name!r}, {list(c.selection.shape)}, which {is_here} "
                    "in this model: give deltas of the same base."
                )
            found.setdefault(at, []).append(c.selection.entries().flatten())
    return {name: _ids(torch.unique(torch.cat(parts))) for name, parts in found.items()}


def _ids(entries: Tensor) -> Tensor:
    return entries.int() if not len(entries) or int(entries[-1]) < 2**31 else entries
