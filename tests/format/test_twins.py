"""When the codings' loops are compiled. That both kinds give the same is in `test_coding.py`, whose tests all run with each."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from finetooth import coding, twins, zigzag

IDS = np.flatnonzero(np.random.default_rng(0).random(30_000_000) < 0.01).astype(np.int32)
UNITS = 30_000_000


@pytest.fixture
def paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has coded nothing, and that compiles in the middle of the ids."""
    pytest.importorskip("numba", reason="compiled loops: pip install 'finetooth[cpu]'")
    monkeypatch.setattr(twins, "_coded", [0])
    monkeypatch.setattr(twins, "PAYS", IDS.size // 2)


def test_a_process_goes_over_in_the_middle_of_a_tensor(paying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert twins.twin("gap_sizes", 1) is None
    made = coding.encode_index(IDS, UNITS)
    assert twins.twin("gap_sizes", 1) is not None
    assert IDS.size // 2 < twins._coded[0] < IDS.size
    monkeypatch.setattr(twins, "PAYS", sys.maxsize)
    name, stream = coding.encode_index(IDS, UNITS)
    assert made[0] == name and np.array_equal(made[1], stream)


def test_without_numba_it_stays_numpy_s(paying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "finetooth.kernels.numba_coding", None)  # importing it is an ImportError
    twins._module.cache_clear()
    try:
        monkeypatch.setattr(twins, "PAYS", 0)
        assert twins.twin("gap_sizes", 1) is None
        name, stream = coding.encode_index(IDS, UNITS)
        assert np.array_equal(coding.decode_index(name, stream, IDS.size, UNITS), IDS)
    finally:
        twins._module.cache_clear()


def test_ids_of_64_bits_are_numpy_s(paying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "PAYS", 0)
    far = IDS.astype(np.int64) + 2**33
    name, stream = coding.encode_index(far, UNITS + 2**33)
    assert np.array_equal(coding.decode_index(name, stream, far.size, UNITS + 2**33), far)


def test_moved_writes_over_the_steps(paying: None) -> None:
    old, new = (np.array(x, np.uint16) for x in ([1, 2, 40000], [3, 1, 40001]))
    z = zigzag.steps(old, new, True)
    assert zigzag.moved(old, z, True) is z and z.tolist() == new.tolist()
