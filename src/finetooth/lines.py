"""A file of JSON lines, one for a step, that a resumed run continues without doubles.

Lines are appended, so a run that is killed leaves at most one that is not whole. A resumed run cuts the file behind its checkpoint:
later lines belong to what was lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetooth.files import room, whole
from finetooth.run import to_json


class Lines:
    """The lines of one file; each has a `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one; NotWritten if the disk is full."""
        with room(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Leave the lines up to a step, and return them."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _step(line) <= step]
        with whole(self.path) as temp:
            temp.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return [json.loads(line) for line in kept]

    def read(self) -> list[dict[str, Any]]:
        """The lines that are whole, the trainer's summary left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [json.loads(line) for line in lines if math.isfinite(_step(line))]


def _step(line: str) -> float:
    """The step of a line; infinity for one that is not whole, and for the trainer's summary, which is written again."""
    try:
        found = json.loads(line)
        return math.inf if "train_runtime" in found else float(found["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
