"""Finetooth: fine-tune a language model by training only the weights that matter.

    opt = finetooth.build("gmt", model, lr=1e-4, keep=0.2)
    delta = finetooth.Delta.extract(model, base)

Names are imported when they are first used, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetooth.assemble import build
    from finetooth.chain import compose, link
    from finetooth.conflicting import conflicts
    from finetooth.contrast import trim
    from finetooth.delta import Delta, DeltaError, WrongBase
    from finetooth.files import NotWritten
    from finetooth.guard import NonFiniteError
    from finetooth.hf import SelectiveCallback
    from finetooth.merging import merge
    from finetooth.method import Method
    from finetooth.methods import METHODS
    from finetooth.named import FrozenMoved
    from finetooth.optim import SelectiveAdamW
    from finetooth.reference import Reference
    from finetooth.rule import Rule
    from finetooth.saved import last_good, saving, seal
    from finetooth.selection import Selection, select
    from finetooth.switch import DeltaSwitch
    from finetooth.units import Unit
    from finetooth.weight import Weight

__version__ = "0.1.0"

_HOMES = {
    "METHODS": "methods",
    "Delta": "delta",
    "DeltaError": "delta",
    "DeltaSwitch": "switch",
    "FrozenMoved": "named",
    "Method": "method",
    "NonFiniteError": "guard",
    "NotWritten": "files",
    "Reference": "reference",
    "Rule": "rule",
    "Selection": "selection",
    "SelectiveAdamW": "optim",
    "SelectiveCallback": "hf",
    "Unit": "units",
    "Weight": "weight",
    "WrongBase": "delta",
    "build": "assemble",
    "compose": "chain",
    "conflicts": "conflicting",
    "last_good": "saved",
    "link": "chain",
    "merge": "merging",
    "saving": "saved",
    "seal": "saved",
    "select": "selection",
    "trim": "contrast",
}

__all__ = [
    "METHODS",
    "Delta",
    "DeltaError",
    "DeltaSwitch",
    "FrozenMoved",
    "Method",
    "NonFiniteError",
    "NotWritten",
    "Reference",
    "Rule",
    "Selection",
    "SelectiveAdamW",
    "SelectiveCallback",
    "Unit",
    "Weight",
    "WrongBase",
    "__version__",
    "build",
    "compose",
    "conflicts",
    "last_good",
    "link",
    "merge",
    "saving",
    "seal",
    "select",
    "trim",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finetooth' has no attribute {name!r}")
    return getattr(importlib.import_module(f"finetooth.{_HOMES[name]}"), name)
