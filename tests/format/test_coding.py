"""Codings of ids and values: back comes what went in, the sizes are those of the page, and a stream that is none is refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetooth import coding
from finetooth.base import DTYPES, bits
from finetooth.codec import patterns

UNITS = 300_000
Ids = Any


def every_coding(index: Ids, units: int) -> dict[str, Ids]:
    """The stream of each coding, not of the smallest only."""
    out: dict[str, Ids] = {"plain": index}
    for name, dtype in coding.GAPS.items():
        out[name] = np.concatenate([coding._escaped(gaps, dtype) for gaps in coding._gaps(index)])
    marks = np.zeros(units, bool)
    marks[index] = True
    return {**out, "bitmap": np.packbits(marks, bitorder="little")}


@settings(max_examples=60, deadline=None)
@given(ids=st.sets(st.integers(0, UNITS - 1), min_size=1, max_size=40), units=st.just(UNITS))
def test_ids_come_back(ids: set[int], units: int) -> None:
    index = np.array(sorted(ids), np.int32)
    streams = every_coding(index, units)
    sizes = coding.index_sizes(index, units)
    for name, stream in streams.items():
        assert np.array_equal(coding.decode_index(name, stream, index.size, units), index), name
        assert sizes[name] == stream.nbytes, name
    best, stream = coding.encode_index(index, units)
    assert stream.nbytes == min(sizes.values()) and np.array_equal(stream, streams[best])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_pieces_meet(dtype: Any) -> None:
    """More ids than are worked on at once, with gaps of every length on both sides of the seams."""
    gaps = np.resize(np.array([1, 2, 254, 255, 256, 257, 510, 511, 70000, 1]), 3 * coding._PIECE + 7)
    index = (np.cumsum(gaps) - 1).astype(np.int64)
    units = int(index[-1]) + 1
    if dtype is np.int32:
        index, units = index[index < 2**31].astype(np.int32), 2**31 - 1
    for name in coding.GAPS:
        stream = np.concatenate([coding._escaped(g, coding.GAPS[name]) for g in coding._gaps(index)])
        found = coding.decode_index(name, stream, index.size, units)
        assert np.array_equal(found, index) and found.dtype == (np.int32 if units <= 2**31 else np.int64)
    dense = np.flatnonzero(np.arange(40 * coding._PIECE) % 3 == 0).astype(np.int32)
    marks = every_coding(dense, 40 * coding._PIECE)["bitmap"]
    assert np.array_equal(coding.decode_index("bitmap", marks, dense.size, 40 * coding._PIECE), dense)


def test_one_percent_costs_what_the_page_says() -> None:
    """1 / (1 - 0.99^255) bytes an id: 1.083. The sample's spread is far below the tolerance."""
    index = np.flatnonzero(np.random.default_rng(0).random(10_000_000) < 0.01).astype(np.int32)
    name, stream = coding.encode_index(index, 10_000_000)
    assert name == "gap8" and stream.nbytes / index.size == pytest.approx(1.083, abs=0.005)


BROKEN: dict[str, tuple[str, list[int], int, str]] = {
    "a gap without an end": ("gap8", [3, 255], 1, "in the middle"),
    "gaps beyond the tensor": ("gap8", [255, 255, 255, 255, 0], 1, "out of range"),
    "too many gaps": ("gap8", [1, 1, 1], 2, "more than its 2"),
    "too few gaps": ("gap16", [1, 65535, 65535, 0], 3, "out of range|expected 3"),
    "too few ids": ("gap8", [1, 255, 1], 3, "holds 2 ids"),
    "no gaps": ("gap8", [], 1, "holds 0 ids"),
    "bits beyond the tensor": ("bitmap", [0] * 125 + [1], 1, "out of range"),
    "too many bits": ("bitmap", [3], 1, "more than its 1"),
    "a negative id": ("plain", [-1, 5], 2, "out of range"),
    "a double": ("plain", [5, 5], 2, "increasing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_streams_that_are_none(case: str) -> None:
    name, numbers, count, says = BROKEN[case]
    stream = np.array(numbers, {"plain": np.int32, "gap16": np.uint16}.get(name, np.uint8))
    for look in (coding.check_index, coding.decode_index):
        with pytest.raises(ValueError, match=says):
            look(name, stream, count, 1000)


def values(dtype: torch.dtype, n: int, seed: int) -> torch.Tensor:
    """Every bit pattern may come, NaN with a payload and -0.0 too; of booleans, the two that there are."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (n * size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return (raw % 2).view(dtype) if dtype == torch.bool else raw.view(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 70_001])
def test_values_come_back(dtype: torch.dtype, n: int) -> None:
    """Steps of any length, in every coding that the dtype has room for."""
    old, new = patterns(values(dtype, n, 0)), patterns(values(dtype, n, 1))
    new[: n // 2] = old[: n // 2] + np.arange(n // 2).astype(old.dtype)  # short ones as well
    z = coding.steps(old, new, dtype.is_floating_point)
    assert np.array_equal(coding.moved(old, z, dtype.is_floating_point), new)
    for name, width in coding.STEPS.items():
        if width <= 8 * z.itemsize:
            top = (1 << width) - 1
            stream = np.concatenate([coding._packed(np.minimum(z, top), width), z[z >= top].view(np.uint8)])
            assert np.array_equal(coding.decode_steps(name, stream, n, z.dtype), z), name
    best = coding.encode_steps(z)
    assert best is None or best[1].nbytes < z.nbytes
    assert best is None or np.array_equal(coding.decode_steps(*best, n, z.dtype), z)


def test_one_step_is_the_next_number() -> None:
    """The integers are in the order of the floats, across zero: -tiny, -0.0, 0.0, tiny."""
    tiny = torch.tensor([-1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0])
    order = coding._ordered(patterns(tiny), True).view(np.int32)
    assert bool((np.diff(order) > 0).all())
    assert order[1:5].tolist() == [-2, -1, 0, 1]
    up = torch.nextafter(torch.tensor([1.5]), torch.tensor([2.0]))
    assert coding.steps(patterns(torch.tensor([1.5])), patterns(up), True).tolist() == [2]


@pytest.mark.parametrize(
    ("name", "stream", "n", "says"),
    [
        ("base8", [1], 2, "cannot be"),
        ("base8", [1, 2, 3], 2, "cannot be"),
        ("base8", [255, 1], 2, "more than the 0 long"),
        ("base8", [1, 2, 0, 1], 2, "0 long steps: 1 are"),
        ("base8", [255, 2, 3, 0], 2, "short step among"),
        ("base4", [0x10], 1, "half a byte"),
        ("base24", [1, 2, 3], 1, "cannot be"),
    ],
)
def test_steps_that_are_none(name: str, stream: list[int], n: int, says: str) -> None:
    """In 16 bits."""
    for look in (coding.check_steps, coding.decode_steps):
        with pytest.raises(ValueError, match=says):
            look(name, np.array(stream, np.uint8), n, np.uint16)


def test_checking_makes_nothing_of_the_stream_s_size() -> None:
    """A bitmap of ones says 32 times its size in ids: looking through it holds a piece of it."""
    full = np.full(1 << 22, 255, np.uint8)
    tracemalloc.start()
    coding.check_index("bitmap", full, 8 << 22, 8 << 22)
    coding.check_index("gap8", np.zeros(1 << 22, np.uint8), 1 << 22, 1 << 22)
    coding.check_steps("base4", np.zeros(1 << 22, np.uint8), 2 << 22, np.uint64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 8 * coding._PIECE < full.nbytes * 8


def test_bits_are_the_patterns() -> None:
    x = torch.tensor([-0.0, 1.0], dtype=torch.bfloat16)
    assert patterns(x).tolist() == [0x8000, 0x3F80] and bits(x).numel() == 2
