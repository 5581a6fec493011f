"""The numeric kernels, one module for each backend with the same names, signatures and in-place contract.

Today there is one backend, `reference`, which runs wherever torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetooth.kernels import reference

BACKENDS = {"reference": reference}


def pick(op: str, backend: str = "reference") -> Callable[..., Any]:
    """The kernel `op` of a backend; raises ValueError, never another one, if it is not there."""
    if backend not in BACKENDS:
        raise ValueError(f"kernel backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}.")
    kernel = getattr(BACKENDS[backend], op, None)
    if kernel is None:
        raise ValueError(f"kernel backend {backend!r} has no {op!r}.")
    return kernel  # type: ignore[no-any-return]
