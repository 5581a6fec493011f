"""The numeric kernels, one module for each backend with the same names, signatures and in-place contract.

`reference` is plain torch, runs everywhere and documents the arithmetic. `numba` (CPU) and `triton` (CUDA) are fast twins of
some of its functions. What a twin does not have is the reference's, and so is everything where no twin is installed; but a
backend that was asked for by name is never replaced by another.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from finetooth.nearest import hint

BACKENDS = {"reference": "any device", "numba": "CPU, extra 'cpu'", "triton": "CUDA"}
OPS = (
    "adamw_at_",
    "masked_adamw_",
    "magnitude_cut",
    "reaching",
    "flagged",
    "positions",
    "sampled_product_",
    "best_steps",
    "noisy",
    "round_stochastic",
    "uniform",
)


class NoKernel(ValueError):
    """A backend that was asked for is not there, or has no such kernel, or not for this device."""


def pick(op: str, device: torch.device | str = "cpu", backend: str = "auto") -> Callable[..., Any]:
    """The kernel `op` for tensors on a device. "auto" takes the fastest that is installed, else the reference.

    Raises NoKernel, and never takes another one, if a backend given by name is missing or cannot do it.
    """
    kind = torch.device(device).type
    if backend == "auto":
        module = _module({"cpu": "numba", "cuda": "triton"}.get(kind, "reference"))
        found = getattr(module, op, None) or getattr(_module("reference"), op, None)
        if found is None:
            raise NoKernel(f"there is no kernel {op!r}.")
        return found  # type: ignore[no-any-return]
    check(backend, kind)
    found = getattr(_module(backend), op, None)
    if found is None:
        raise NoKernel(f"kernel backend {backend!r} has no {op!r}.")
    return found  # type: ignore[no-any-return]


def check(backend: str, device: str = "cpu") -> None:
    """Raise NoKernel unless a backend is "auto", or is installed and works on this kind of device."""
    if backend == "auto":
        return
    if backend not in BACKENDS:
        raise NoKernel(
            f"kernel backend {backend!r} is unknown: choose one of auto, {', '.join(BACKENDS)}.{hint(backend, ['auto', *BACKENDS])}"
        )
    if _module(backend) is None:
        raise NoKernel(f"kernel backend {backend!r} is not installed ({BACKENDS[backend]}).")
    if {"numba": "cpu", "triton": "cuda"}.get(backend, device) != device and not _interpreted(backend):
        raise NoKernel(f"kernel backend {backend!r} does not work on {device} tensors ({BACKENDS[backend]}).")


@cache
def _module(backend: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"finetooth.kernels.{backend}")
    except ImportError:
        return None


def _interpreted(backend: str) -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on CPU tensors."""
    return backend == "triton" and bool(getattr(_module("triton"), "INTERPRETED", False))
