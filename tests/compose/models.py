"""Bases and deltas of them in chosen units, for the tests of merging."""

from __future__ import annotations

import torch
from torch import Tensor

from finetooth.base import bits, fingerprint
from finetooth.codec import Change
from finetooth.delta import Delta, Origin
from finetooth.selection import Selection
from finetooth.units import Unit

Weights = dict[str, Tensor]
SHAPES = {"model.layers.0.a.weight": (4, 6), "model.layers.1.b.weight": (2, 3, 4), "norm.weight": (5,)}
UNITS = (Unit("element"), Unit("row"), Unit("column"), Unit("block", 2), Unit("matrix"))


def base(dtype: torch.dtype, seed: int = 0) -> Weights:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in SHAPES.items()}


def delta(weights: Weights, units: dict[str, tuple[Unit, list[int]]], seed: int) -> Delta:
    """A delta that lists these units of these tensors; about a third of the listed entries do not change."""
    g, changes = torch.Generator().manual_seed(seed), {}
    for name, (unit, index) in units.items():
        old, shape = weights[name], tuple(weights[name].shape)
        ids = sorted({i % unit.count(shape) for i in index})
        s = Selection(torch.tensor(ids, dtype=torch.int32), unit, shape)
        noise = torch.randn(len(s), unit.numel(shape), generator=g)
        values = s.gather(old) + (noise * (torch.rand(noise.shape, generator=g) < 0.7)).to(old.dtype)
        values.view(-1)[0] = s.gather(old).view(-1)[0] + 1  # something changes
        new = old.clone()
        s.scatter_(new, values)
        changed = int((bits(new) != bits(old)).sum())
        changes[name] = Change(s, values, changed, fingerprint(old), fingerprint(new))
    return Delta(changes, base=Origin("org/base", weights=sum(t.numel() for t in weights.values())), method="grad")


def applied(weights: Weights, d: Delta) -> Weights:
    out = {name: t.clone() for name, t in weights.items()}
    d.apply(out)
    return out
