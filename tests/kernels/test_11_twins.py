"""Law 11: a fast kernel equals its reference."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from finetooth.kernels import OPS, NoKernel, check, pick, reference

from .cases import CASES


def available(backend: str, device: str) -> str:
    """Why a backend cannot be tested here, or nothing."""
    try:
        check(backend, device)
    except NoKernel as error:
        return str(error)
    return "" if device == "cpu" or torch.cuda.is_available() else "no CUDA device"


@pytest.mark.parametrize(
    ("backend", "device"), [("numba", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_equal(case: Callable[[str, str], None], backend: str, device: str) -> None:
    if why := available(backend, device):
        pytest.skip(why)
    op = next(op for op in OPS if op.startswith(case.__name__))
    if not hasattr(importlib.import_module(f"finetooth.kernels.{backend}"), op):
        pytest.skip(f"{backend} has no {op}: the reference does it")
    case(backend, device)


def test_a_tensor_without_values_is_not_read() -> None:
    """What a plan has in place of weights: their memory would be somebody else's, and so would what is read from it."""
    pytest.importorskip("numba", reason="compiled loops: pip install 'finetooth[cpu]'")
    numba = importlib.import_module("finetooth.kernels.numba")
    with FakeTensorMode():
        w = torch.empty(4, 64)
        with pytest.raises(RuntimeError, match="without values"):
            numba.best_steps(w, w.amax(1, keepdim=True), [1.0, 0.9], 7)


def test_triton_through_its_interpreter() -> None:
    """The interpreter has to be on before triton is imported: a process of its own."""
    pytest.importorskip("triton", reason="kernels for CUDA: pip install 'finetooth[dev]', on Linux")
    code = (
        "from tests.kernels.cases import CASES; from finetooth.kernels import OPS, triton as t\n"
        "for case in CASES:\n"
        "    if any(hasattr(t, op) for op in OPS if op.startswith(case.__name__)): case('triton', 'cpu'); print(case.__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "magnitude_cut" in done.stdout and "masked_adamw" in done.stdout


def test_a_backend_by_name_is_never_replaced() -> None:
    assert pick("adamw_", backend="reference") is reference.adamw_
    for op, device, backend, message in (
        ("adamw_at_", "cpu", "cuda", "choose one of auto, reference"),
        ("conv", "cpu", "reference", "has no 'conv'"),
        ("conv", "cpu", "auto", "no kernel 'conv'"),
        ("adamw_at_", "cuda", "numba", "does not work on cuda|not installed"),
        ("adamw_at_", "cpu", "triton", "does not work on cpu|not installed"),
    ):
        with pytest.raises(NoKernel, match=message):
            pick(op, device, backend)
