"""Writes the golden files: run it only when the format gets a new version, which means new files beside these.

PYTHONPATH=src python tests/format/golden/make.py
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from finetooth.base import DTYPES, bits, fingerprint
from finetooth.codec import Change, Origin
from finetooth.delta import Delta
from finetooth.diff import gather, scatter_
from finetooth.selection import Selection
from finetooth.units import Unit

HERE = Path(__file__).parent
CHOSEN = {
    "layers.0.weight": (Unit("element"), [1, 10]),
    "layers.1.weight": (Unit("column"), [0, 5]),
    "experts.weight": (Unit("column"), [4]),
    "block.weight": (Unit("block", 4), [2]),
    "norm.weight": (Unit("matrix"), [0]),
}


def base() -> dict[str, torch.Tensor]:
    """Small whole numbers, so that nothing depends on a generator; one tensor per dtype that matters."""
    return {
        "layers.0.weight": torch.arange(12.0).reshape(3, 4),
        "layers.1.weight": torch.arange(12.0).reshape(2, 6).to(torch.bfloat16),
        "experts.weight": torch.arange(12.0).reshape(2, 2, 3).half(),
        "block.weight": torch.arange(12.0).reshape(3, 4),
        "norm.weight": torch.ones(3),
    }


def tuned() -> dict[str, torch.Tensor]:
    out = {name: t.clone() for name, t in base().items()}
    for name, (unit, index) in CHOSEN.items():
        chosen = Selection(torch.tensor(index, dtype=torch.int32), unit, tuple(out[name].shape))
        chosen.scatter_(out[name], -2 - chosen.gather(out[name]))
    return out


def delta() -> Delta:
    changes = {}
    for name, (unit, index) in CHOSEN.items():
        old, new = base()[name], tuned()[name]
        chosen = Selection(torch.tensor(index, dtype=torch.int32), unit, tuple(old.shape))
        changed = int((old != new).sum())
        changes[name] = Change(chosen, gather(chosen, new), changed, fingerprint(old), fingerprint(new))
    origin = Origin("org/name", "0123abc", 51)
    return Delta(changes, {"head.weight": "layers.0.weight"}, origin, "gmt", {"lr": 0.1, "note": "é"}, "finetooth 0")


# -- version 2: every coding of ids and of values, in every dtype that it is meant for -------------------------

SECOND = {
    "gap8": (
        "F32",
        Unit(),
        [0, 1, 255, 256, 511, 767, 1000, 1511, 1712, 1913],
    ),  # gaps of 0, 253, 254, 255, 510 and more
    "gap7": (
        "F64",
        Unit(),
        [3, 131, 260, 16644, 33029, *range(100_000, 100_010)],
    ),  # of 127, 128, 16,383, 16,384 and more
    "gap16": ("I16", Unit(), [20000, 90001, 120010, 149000]),
    "bitmap": ("F16", Unit("row"), [0, 2, 3, 5, 7, 8, 10, 13]),
    "plain": ("I8", Unit(), [2_199_999]),
    "base4": ("F8_E4M3", Unit(), list(range(0, 400, 40))),
    "base8": ("BF16", Unit(), list(range(0, 4000, 200))),
    "base16": ("F32", Unit("column"), [1, 7]),
    "base24": ("I64", Unit("block", 4), [2, 4, 6]),
}
STEP = {"base4": 3, "base8": 60, "base16": 9000, "base24": 3_000_000}  # the sign alternates; every seventh is long


def second_base() -> dict[str, torch.Tensor]:
    """Whole numbers again; the large ones are there for the gaps."""
    shapes = {
        "gap16": (3, 50000),
        "gap7": (3, 50000),
        "bitmap": (14, 3),
        "plain": (1100, 2000),
        "base4": (20, 20),
        "base16": (12, 8),
        "base24": (7, 4),
    }
    out = {}
    for name, (dtype, _, _) in SECOND.items():
        shape = shapes.get(name, (50, 80))
        out[name] = (torch.arange(math.prod(shape)) % 61 - 30).reshape(shape).to(DTYPES[dtype])
    return out


def second_tuned() -> dict[str, torch.Tensor]:
    out = {name: t.clone() for name, t in second_base().items()}
    for name, (_, unit, index) in SECOND.items():
        chosen = Selection(torch.tensor(index, dtype=torch.int32), unit, tuple(out[name].shape))
        old = gather(chosen, out[name])
        moved = -2 - old if name not in STEP else stepped(old, STEP[name])
        scatter_(chosen, out[name], moved)
    return out


def stepped(old: torch.Tensor, step: int) -> torch.Tensor:
    """`old` with its bit patterns moved; the mantissas of these numbers have the room."""
    flat, n = bits(old.reshape(-1)).clone(), torch.arange(old.numel())
    by = torch.where(n % 2 == 0, step, -step) * torch.where(n % 7 == 6, 1 if step < 60 else 5, 1)
    whole = flat.long()
    whole[bits(old.reshape(-1)) == 0] = 0x28 if old.element_size() == 1 else 0x4000  # not below zero
    return (whole + by).to(flat.dtype).view(old.dtype).reshape(old.shape)


def second() -> Delta:
    changes = {}
    for name, (_, unit, index) in SECOND.items():
        old, new = second_base()[name], second_tuned()[name]
        chosen = Selection(torch.tensor(index, dtype=torch.int32), unit, tuple(old.shape))
        before, values = gather(chosen, old), gather(chosen, new)
        prints = (fingerprint(old), fingerprint(new), fingerprint(before), fingerprint(values))
        changes[name] = Change(chosen, values, int((bits(before) != bits(values)).sum()), *prints)
    return Delta(changes, {}, Origin("org/name", None, 430_000), "grad", {"note": "version 2"}, "finetooth 0")


if __name__ == "__main__":
    delta().save(HERE / "golden.safetensors", plain=True)
    second().save(HERE / "portable-2.safetensors")
    second().save(HERE / "against-2.safetensors", against=second_base())
