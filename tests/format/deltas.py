"""Small models and deltas for the tests of the file format."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Edit = Callable[[dict[str, Any], dict[str, Any], bytearray], None]


def make(dtype: torch.dtype = torch.float32) -> tuple[Weights, Weights]:
    """A base and a tuned one in which every unit is the cheapest somewhere."""
    g = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (6, 8), "b.weight": (6, 8), "c.weight": (6, 8), "d.weight": (6, 8), "e": (2, 4, 6), "n": (5,)}
    base = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    base["scalar"] = torch.tensor(0.5, dtype=dtype)
    base["same"] = torch.ones(3, dtype=dtype)
    tuned = {name: t.clone() for name, t in base.items()}
    tuned["a.weight"][1, 2], tuned["a.weight"][5, 7] = 3.0, -4.0
    tuned["b.weight"][4] += 1
    tuned["c.weight"][:, 3] += 1
    tuned["d.weight"] += 1
    tuned["e"][1, :, 2] += 1
    tuned["n"][0] = 9.0
    tuned["scalar"] += 1
    return base, tuned


def copy(weights: Weights) -> Weights:
    return {name: t.clone() for name, t in weights.items()}


def same(a: Weights, b: Weights) -> bool:
    """Equal bit for bit: -0.0 is not 0.0."""
    return a.keys() == b.keys() and all(
        torch.equal(t.reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)) for name, t in a.items()
    )


def rewrite(path: Path, edit: Edit) -> None:
    """Change a delta file from the outside: `edit(header, entries, data)` works in place."""
    blob = path.read_bytes()
    (size,) = struct.unpack("<Q", blob[:8])
    header, data = json.loads(blob[8 : 8 + size]), bytearray(blob[8 + size :])
    entries = json.loads(header["__metadata__"]["tensors"])
    edit(header, entries, data)
    if "tensors" in header["__metadata__"] and header["__metadata__"]["tensors"][:1] == "{":
        header["__metadata__"]["tensors"] = json.dumps(entries)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
