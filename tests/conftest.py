"""What every test shares: one thread, no network, and where the real data lies.

The data is found through the environment variable FINETOOTH_DATA, else as `../shared/data` beside the
repository. Tests that need it ask for the fixture `shared_data` and are skipped, with the reason, without it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in what tests start, too
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products need on CUDA

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("FINETOOTH_DATA", ROOT.parent / "shared" / "data"))
LONGEST = ("tests/resume/test_kills.py", "tests/dist/", "tests/cli/test_compare.py")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A test module that cannot be imported is an error. `--doctest-ignore-import-errors`, which is meant for the package's
    optional kernels, skips it and leaves half a module behind, in which pytest then finds no tests."""
    report = yield
    if report.skipped and "unable to import module" in str(report.longrepr):
        report.outcome = "failed"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end, one process would do them while the other has nothing left."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """A sum over threads depends on their number; and xdist's workers would fight for the cores."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Fresh models are equal from test to test, and no test sees the generator another one left."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real tasks, texts and models."""
    if not (DATA / "MANIFEST.json").is_file():
        pytest.skip(f"there is no data at {DATA}: set FINETOOTH_DATA to the folder that holds MANIFEST.json")
    return DATA
