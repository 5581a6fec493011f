"""Writes golden.safetensors: run it only when the format gets a new version, which is a new file beside this one.

PYTHONPATH=src python tests/format/golden/make.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from finetooth.base import fingerprint
from finetooth.codec import Change, Origin
from finetooth.delta import Delta
from finetooth.diff import gather
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


if __name__ == "__main__":
    delta().save(HERE / "golden.safetensors")
