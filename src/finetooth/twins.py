"""Whether the loops of a delta's codings are numpy's, or their compiled twins (`kernels/numba_coding.py`).

The twins have about half the speed of a copy where numpy's loops have a tenth (docs/benchmarks.md), but are compiled in every process
anew, which takes seconds. So a process takes numpy's loops until these have taken seconds too, and from then on the twins, where numba is
installed: whatever it has yet to code, that costs about twice at most what the better of the two would have.

Both give the same bits. Not covered by the twins: bitmaps, whose loops numpy vectorizes, ids of 64 bits, machines that are big-endian.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

PAYS = 500_000_000  # entries through numpy's loops before compiling; writing an id takes two loops, reading it one to check and two to decode
_coded = [0]  # entries so far


def twin(name: str, entries: int) -> Callable[..., Any] | None:
    """The compiled loop of that name for a piece of so many entries; None where numpy's is to be taken."""
    if _coded[0] < PAYS:
        _coded[0] += entries
        return None
    module = _module()
    return None if module is None else getattr(module, name)


@cache
def _module() -> ModuleType | None:
    if sys.byteorder != "little":
        return None
    try:
        return importlib.import_module("finetooth.kernels.numba_coding")
    except ImportError:
        return None
