"""Codings of ids and values: back comes what went in, the sizes are those of the page, and a stream that is none is refused."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetooth import coding, varint, zigzag
from finetooth.base import DTYPES, bits
from finetooth.codec import patterns

pytestmark = pytest.mark.usefixtures("loops")

UNITS = 300_000
Ids = Any


def every_coding(index: Ids, units: int) -> dict[str, Ids]:
    """The stream of each coding, not of the smallest only."""
    out: dict[str, Ids] = {"plain": index}
    out |= {name: coding.encoded(index, name) for name in (*coding.GAPS, "gap7")}
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
        if name in sizes:
            assert sizes[name] == stream.nbytes, name
        else:
            assert name == "gap7" and stream.nbytes > 1.5 * index.size
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
    for name in (*coding.GAPS, "gap7"):
        stream = coding.encoded(index, name)
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
    "a number without an end": ("gap7", [3, 128], 1, "in the middle"),
    "a number of seven bytes": ("gap7", [129, 128, 128, 128, 128, 128, 1], 1, "more than 6 bytes"),
    "a number that goes on for nothing": ("gap7", [129, 0], 1, "longer than it needs"),
    "a number beyond the tensor": ("gap7", [5, 232, 7], 2, "out of range"),
    "too many numbers": ("gap7", [1, 1, 1], 2, "more than its 2"),
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
    z = zigzag.steps(old, new, dtype.is_floating_point)
    assert np.array_equal(zigzag.moved(old, z.copy(), dtype.is_floating_point), new)
    for name, width in zigzag.STEPS.items():
        if width <= 8 * z.itemsize:
            assert np.array_equal(zigzag.decode(name, zigzag.packed(z, name), n, z.dtype), z), name
    best = zigzag.encode(z)
    assert best is None or best[1].nbytes < z.nbytes
    assert best is None or np.array_equal(zigzag.decode(*best, n, z.dtype), z)


def test_one_step_is_the_next_number() -> None:
    """The integers are in the order of the floats, across zero: -tiny, -0.0, 0.0, tiny."""
    tiny = torch.tensor([-1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0])
    order = zigzag._ordered(patterns(tiny), True, np.empty(6, np.uint32)).view(np.int32)
    assert bool((np.diff(order) > 0).all())
    assert order[1:5].tolist() == [-2, -1, 0, 1]
    up = torch.nextafter(torch.tensor([1.5]), torch.tensor([2.0]))
    assert zigzag.steps(patterns(torch.tensor([1.5])), patterns(up), True).tolist() == [2]


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
    for look in (zigzag.check, zigzag.decode):
        with pytest.raises(ValueError, match=says):
            look(name, np.array(stream, np.uint8), n, np.uint16)


def test_checking_makes_nothing_of_the_stream_s_size() -> None:
    """A bitmap of ones says 32 times its size in ids: looking through it holds a piece of it."""
    full, none = np.full(1 << 22, 255, np.uint8), np.zeros(1 << 22, np.uint8)
    tracemalloc.start()
    coding.check_index("bitmap", full, 8 << 22, 8 << 22)
    coding.check_index("gap8", none, 1 << 22, 1 << 22)
    zigzag.check("base4", none, 2 << 22, np.uint64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * coding._PIECE < full.nbytes


# -- beside decoders that go one number at a time ---------------------------------------------------


def ids_one_by_one(name: str, stream: list[int], count: int, units: int) -> list[int] | None:
    """None: refused."""
    ids: list[int] = []
    gap, place, open_ended = 0, 0, False
    for at, x in enumerate(stream):
        if name == "plain":
            ids.append(x)
        elif name == "bitmap":
            ids += [8 * at + bit for bit in range(8) if x >> bit & 1]
        elif name == "gap7":
            gap, place, open_ended = gap + ((x & 127) << 7 * place), place + 1, x > 127
            if place > 6 or (place > 1 and not x):
                return None
            if not open_ended:
                ids.append((ids[-1] if ids else -1) + gap + 1)
                gap = place = 0
        else:
            gap, open_ended = gap + x, x == np.iinfo(coding.GAPS[name]).max
            if not open_ended:
                ids.append((ids[-1] if ids else -1) + gap + 1)
                gap = 0
    rising = all(a < b for a, b in pairwise([-1, *ids, units]))
    return ids if rising and len(ids) == count and not open_ended else None


def seven(stream: list[int]) -> list[int]:
    """The ids of gap7, whether they are well written or not."""
    ids, gap, place = [-1], 0, 0
    for x in stream:
        gap, place = gap + ((x & 127) << 7 * place), place + 1
        if x < 128:
            ids.append(ids[-1] + gap + 1)
            gap = place = 0
    return ids[1:]


def steps_one_by_one(name: str, stream: bytes, n: int, itemsize: int) -> list[int] | None:
    bits = zigzag.STEPS[name]
    size, top = -(-n * bits // 8), (1 << bits) - 1
    planes, tail = stream[:size], stream[size:]
    if bits > 8 * itemsize or len(planes) < size or len(tail) % itemsize:
        return None
    if bits == 4:
        short = [x for byte in planes for x in (byte & 15, byte >> 4)]
        if any(short[n:]):
            return None
    else:
        short = [sum(planes[plane * n + i] << 8 * plane for plane in range(bits // 8)) for i in range(n)]
    long = [int.from_bytes(tail[i : i + itemsize], "little") for i in range(0, len(tail), itemsize)]
    if short[:n].count(top) != len(long) or any(x < top for x in long):
        return None
    return [long.pop(0) if x == top else x for x in short[:n]]


STREAMS = {
    "plain": (np.int32, st.integers(-1, 40)),
    "wide": (np.int64, st.integers(-1, 40) | st.integers(2**31 - 2, 2**31 + 2)),
    "gap8": (np.uint8, st.sampled_from([0, 1, 2, 254, 255])),
    "gap16": (np.uint16, st.sampled_from([0, 1, 255, 65534, 65535])),
    "gap7": (np.uint8, st.sampled_from([0, 1, 127, 128, 129, 255])),
    "bitmap": (np.uint8, st.sampled_from([0, 0, 1, 6, 128, 255])),
}
PIECES = st.sampled_from([2, 4, 16, 1 << 16])  # escapes and ends fall on every side of a seam


def cut(patch: pytest.MonkeyPatch, piece: int) -> None:
    """Pieces of that size."""
    for module, name in ((coding, "_PIECE"), (coding, "_BYTES"), (varint, "PIECE"), (zigzag, "_PIECE")):
        patch.setattr(module, name, piece)


@settings(max_examples=500, deadline=None)
@given(
    data=st.data(), kind=st.sampled_from(list(STREAMS)), piece=PIECES, off=st.integers(-1, 1), room=st.integers(-1, 9)
)
def test_ids_are_those_read_one_by_one(data: Any, kind: str, piece: int, off: int, room: int) -> None:
    """Of streams that are right and that are not, with a count and a number of units that are right or nearly so."""
    dtype, numbers = STREAMS[kind]
    stream, name = data.draw(st.lists(numbers, max_size=40)), "plain" if kind == "wide" else kind
    stream = sorted(set(stream)) if name == "plain" and data.draw(st.booleans()) else stream
    top = 127 if name == "gap7" else np.iinfo(dtype).max - 1
    close = [*stream[:-1], *[min(x, top) for x in stream[-1:]]]  # as an encoder would end it
    stream = close if data.draw(st.booleans()) else stream
    bits = [8 * i + b for i, x in enumerate(stream) for b in range(8) if x >> b & 1]
    found = {"plain": stream, "bitmap": bits, "gap7": seven(stream)}.get(
        name, np.cumsum([x + (x != np.iinfo(dtype).max) for x in stream]) - 1
    )
    ends = name == "plain" or name == "bitmap" or np.array(stream) != np.iinfo(dtype).max
    count = max(0, int(np.sum(ends) if name in coding.GAPS else len(found)) + off)
    units = max(1, (int(max(found)) if len(found) else 0) + 1 + room)
    expected, array = ids_one_by_one(name, stream, count, units), np.array(stream, dtype)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, piece)
        if expected is None:
            for look in (coding.check_index, coding.decode_index):
                with pytest.raises(ValueError, match=r"increasing|range|holds|middle|gap of more|longer than"):
                    look(name, array, count, units)
        else:
            coding.check_index(name, array, count, units)
            assert coding.decode_index(name, array, count, units).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(
        st.sampled_from([0, 1, 127, 128, 253, 254, 255, 256, 509, 510, 511, 16383, 16384, 65534, 65535, 65536]),
        min_size=1,
        max_size=30,
    ),
    dtype=st.sampled_from([np.int32, np.int64]),
    first=st.sampled_from([0, 254, 255, 2**31 - 1 - 3_000_000]),
    piece=PIECES,
)
def test_what_is_coded_is_read_one_by_one(gaps: list[int], dtype: Any, first: int, piece: int) -> None:
    index = (np.cumsum([first, *(g + 1 for g in gaps)])).astype(dtype)
    units = int(index[-1]) + 1
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, piece)
        name, stream = coding.encode_index(index, units)
        sizes = coding.index_sizes(index, units)
        assert sizes[name] == stream.nbytes == min(sizes.values())
        if first < 1000:  # else the slow one takes its time
            assert ids_one_by_one(name, stream.tolist(), index.size, units) == index.tolist()
        assert np.array_equal(coding.decode_index(name, stream, index.size, units), index)


def test_the_last_id_that_fits() -> None:
    """No sum on the way is larger than the id."""
    index, units = np.array([2**31 - 1], np.int32), 2**31
    for name in coding.GAPS:
        stream = coding.encoded(index, name)
        assert coding.decode_index(name, stream, 1, units).tolist() == [2**31 - 1]
        with pytest.raises(ValueError, match="out of range"):
            coding.decode_index(name, stream, 1, units - 1)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(zigzag.STEPS)), itemsize=st.sampled_from([1, 2, 4, 8]), piece=PIECES)
def test_steps_are_those_read_one_by_one(data: Any, name: str, itemsize: int, piece: int) -> None:
    """Of streams as they are written, and with a byte more, less or different."""
    top = (1 << min(zigzag.STEPS[name], 8 * itemsize)) - 1
    near = st.sampled_from([0, 1, top - 1, top, 1 << 8 * itemsize - 1, (1 << 8 * itemsize) - 1])
    z = np.array(data.draw(st.lists(near, min_size=1, max_size=40)), f"u{itemsize}")
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, piece)
        stream = zigzag.packed(z, name) if zigzag.STEPS[name] <= 8 * itemsize else z.view(np.uint8)
        raw = bytearray(stream.tobytes())
        for _ in range(data.draw(st.integers(0, 2))):
            at = data.draw(st.integers(0, len(raw)))
            raw[at : at + data.draw(st.integers(0, 1))] = data.draw(st.sampled_from([b"", b"\x00", b"\x0f", b"\xff"]))
        n, changed = max(1, z.size + data.draw(st.sampled_from([0, 0, -1, 1]))), np.frombuffer(bytes(raw), np.uint8)
        expected = steps_one_by_one(name, bytes(raw), n, itemsize)
        if expected is None:
            for look in (zigzag.check, zigzag.decode):
                with pytest.raises(ValueError, match=r"cannot be|half a byte|long"):
                    look(name, changed, n, z.dtype)
        else:
            zigzag.check(name, changed, n, z.dtype)
            assert zigzag.decode(name, changed, n, z.dtype).tolist() == expected


def test_bits_are_the_patterns() -> None:
    x = torch.tensor([-0.0, 1.0], dtype=torch.bfloat16)
    assert patterns(x).tolist() == [0x8000, 0x3F80] and bits(x).numel() == 2
