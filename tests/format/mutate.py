"""Ways to break a delta file: at random bytes, and where its structure is: lengths, JSON, offsets, tensors.

A mutation is a function of a file and a `random.Random`, so that a seed gives the same file again. Most mutated bytes end in a
checksum-like refusal of the header; that is why most of these take the file apart, change one thing, and put it together so
that everything else still holds. Nothing here knows the codings of a tensor: their bytes are changed as bytes and as integers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

WHOLE_NUMBERS = [0, 1, -1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30]  # fmt: skip
TEXTS = ["", "x", "../x", "/x", "\0", "\ud800", "é", "a" * 300, "null", "plain", "gap7", "gap8", "gap16", "bitmap", "base", "element", "row", "column", "block", "matrix", "layer", "F32", "BF16", "BOOL", "F8_E4M3", "I64", "sha256:" + "0" * 64, "1", "2", "99"]  # fmt: skip
RAW = ["1e999", "-1e999", "NaN", "Infinity", "[" * 200, "[" * 100_000, '{"a":' * 500, "1" * 5000, '"\\ud800"', '"\\u0000"', "{}", "[]", "[[]]", "-0", "1E400", '{"a":1,"a":2}', "\ufeff{}", "tru", '"']  # fmt: skip
HEADER_LENGTHS = [0, 1, 2, 7, 8, 2**16, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
PATTERNS = [b"\xff" * 8, b"\0" * 8, struct.pack("<d", float("nan")), struct.pack("<ff", float("inf"), float("nan")), b"\x80\x7f" * 4, b"\x00\x7c" * 4, b"\xff\x7f" * 4, struct.pack("<q", 2**63 - 1), struct.pack("<q", -1), b"\x7f" * 8]  # fmt: skip


@dataclass
class File:
    """A file taken apart: the header's table, the metadata's texts in it, and the bytes of the tensors."""

    header: dict[str, Any]
    data: bytearray

    @staticmethod
    def parse(blob: bytes) -> File | None:
        """None if it is not one any more."""
        try:
            (size,) = struct.unpack("<Q", blob[:8])
            header = json.loads(blob[8 : 8 + size])
        except (struct.error, ValueError, RecursionError):
            return None
        ok = isinstance(header, dict) and isinstance(header.get("__metadata__"), dict)
        return File(header, bytearray(blob[8 + size :])) if ok else None

    def bytes(self) -> bytes:
        return packed(json.dumps(self.header, ensure_ascii=False, separators=(",", ":")), self.data)

    def tensors(self) -> list[str]:
        return [key for key in self.header if key != "__metadata__"]

    def place(self, key: str) -> tuple[int, int]:
        """Where a tensor's bytes are; an empty place if its offsets are no longer any."""
        entry = self.header[key]
        found = entry.get("data_offsets") if isinstance(entry, dict) else None
        good = isinstance(found, list) and len(found) == 2 and all(type(n) is int for n in found)
        return (found[0], found[1]) if good and 0 <= found[0] < found[1] <= len(self.data) else (0, 0)


def packed(text: str, data: bytes) -> bytes:
    """A header as text, in front of the tensors."""
    head = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(head)) + head + data


def mutate(blob: bytes, draw: Random, others: list[bytes]) -> bytes:
    """One to three changes; `others` are files to take parts from."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        way = draw.choice(WAYS)
        if way in BYTEWISE:
            blob = way(blob, draw)
        elif (file := File.parse(blob)) is not None:
            try:
                blob = way(file, draw) if way is not _foreign else _foreign(file, draw, others)
            except RecursionError:  # of what an earlier change nested
                return blob
    return blob


# -- bytes --------------------------------------------------------------------------------------------------


def _flip(blob: bytes, draw: Random) -> bytes:
    out = bytearray(blob)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if out:
            out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _splice(blob: bytes, draw: Random) -> bytes:
    """Cut out, double or overwrite a stretch."""
    at, size = draw.randrange(len(blob) + 1), draw.choice((1, 2, 4, 8, 64, 1000))
    stretch = blob[at : at + size]
    new = draw.choice((b"", stretch * 2, bytes(size), draw.choice(PATTERNS), draw.randbytes(len(stretch))))
    return blob[:at] + new + blob[at + size :]


def _cut(blob: bytes, draw: Random) -> bytes:
    return blob[: draw.randrange(len(blob) + 1)] if draw.random() < 0.7 else blob + draw.randbytes(draw.choice((1, 8)))


def _length(blob: bytes, draw: Random) -> bytes:
    """Lie about how long the header is."""
    (size,) = struct.unpack("<Q", blob[:8].ljust(8, b"\0"))
    new = draw.choice((*HEADER_LENGTHS, size - 1, size + 1, len(blob) - 8, len(blob) - 7))
    return struct.pack("<Q", new % 2**64) + blob[8:]


# -- structure ----------------------------------------------------------------------------------------------


def _any(draw: Random) -> Any:
    """Some JSON value that is as a rule the wrong one."""
    return draw.choice(
        (None, True, False, draw.choice(WHOLE_NUMBERS), draw.choice(TEXTS), 0.5, -1.5, [], {}, [draw.choice(WHOLE_NUMBERS)] * draw.randrange(4), [0] * 17, {"kind": "block", "size": draw.choice(WHOLE_NUMBERS)})
    )  # fmt: skip


def _inside(value: Any, draw: Random) -> None:
    """Change one thing somewhere in a JSON table or list."""
    while True:
        if not isinstance(value, dict | list) or not value:
            return
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        if not isinstance(value[key], dict | list) or not value[key] or draw.random() < 0.15:
            break
        value = value[key]
    kind = draw.randrange(5)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value[key], int) and not isinstance(value[key], bool):
        value[key] += draw.choice((-1, 1, 2, -8, 8))
    elif kind == 2 and isinstance(value, dict):
        value[draw.choice((*TEXTS, key + "x", key[:-1]))] = value.pop(key) if draw.random() < 0.5 else value[key]
    else:
        value[key] = _any(draw)


def _header(file: File, draw: Random) -> bytes:
    """Names, dtypes, shapes and offsets of the container."""
    table = {k: v for k, v in file.header.items() if k != "__metadata__"}
    _inside(table, draw)
    file.header = {"__metadata__": file.header["__metadata__"], **table}
    return file.bytes()


def _metadata(file: File, draw: Random) -> bytes:
    """One thing in the JSON of one of the metadata's texts."""
    texts = file.header["__metadata__"]
    key = draw.choice(["tensors", "tensors", "tensors", *texts])
    try:
        value = {"": json.loads(texts[key])}
    except (ValueError, KeyError, TypeError, RecursionError):
        return file.bytes()
    _inside(value, draw)
    texts[key] = json.dumps(value.get(""), ensure_ascii=draw.random() < 0.9)
    return file.bytes()


def _text(file: File, draw: Random) -> bytes:
    """One of the metadata's texts as a text: replaced, without an end, or with something put into it."""
    texts = file.header["__metadata__"]
    key = draw.choice(list(texts) or ["tensors"])
    old, at = str(texts.get(key, "")), draw.randrange(len(str(texts.get(key, ""))) + 1)
    new = (
        draw.choice(RAW),
        draw.choice(TEXTS),
        old[:at],
        old[:at] + draw.choice(RAW) + old[at:],
        draw.choice(RAW) + old,
    )
    texts[key] = draw.choice(new)
    if draw.random() < 0.1:
        del texts[key]
    return file.bytes()


def _doubled(file: File, draw: Random) -> bytes:
    """A key twice, in the header or in the metadata, where a table can no longer say it."""
    text = json.dumps(file.header, ensure_ascii=False, separators=(",", ":"))
    texts = file.header["__metadata__"]
    if draw.random() < 0.5 and file.tensors():
        key = draw.choice(file.tensors())
        again = json.dumps({key: file.header[draw.choice(file.tensors())]}, separators=(",", ":"))
        return packed(again[:-1] + "," + text[1:], file.data)
    key = draw.choice(list(texts) or [""])
    old = str(texts.get(key, ""))
    if old.startswith("{") and len(old) > 2:
        texts[key] = old[:-1] + "," + old[1:]
    return file.bytes()


def _offsets(file: File, draw: Random) -> bytes:
    """Tensors over each other, of no bytes, past the end."""
    keys = [k for k in file.tensors() if isinstance(file.header[k], dict)]
    if not keys:
        return file.bytes()
    one, two = file.header[draw.choice(keys)], file.header[draw.choice(keys)]
    begin, end = (
        draw.choice((0, 1, 4, 8, len(file.data))),
        draw.choice((0, 1, 8, len(file.data), len(file.data) + 1, 2**63)),
    )
    kind = draw.randrange(4)
    if kind == 0:
        one["data_offsets"], two["data_offsets"] = two.get("data_offsets"), one.get("data_offsets")
    elif kind == 1:
        one["data_offsets"] = two.get("data_offsets")
    elif kind == 2:
        one["data_offsets"] = [begin, end]
    else:
        one.update(shape=[0], data_offsets=[begin, begin])
    return file.bytes()


def _tensor(file: File, draw: Random) -> bytes:
    """The bytes of one tensor: single ones, whole numbers, or two stretches exchanged."""
    keys = file.tensors()
    begin, end = file.place(draw.choice(keys)) if keys else (0, 0)
    if begin == end:
        return file.bytes()
    width = draw.choice([n for n in (1, 2, 4, 8) if n <= end - begin])
    slots = (end - begin) // width
    one, two = (begin + width * draw.randrange(slots) for _ in range(2))
    a, b = file.data[one : one + width], file.data[two : two + width]
    kind = draw.randrange(4)
    if kind == 0:
        file.data[one : one + width], file.data[two : two + width] = b, a
    elif kind == 1:
        file.data[one : one + width] = b
    elif kind == 2:
        file.data[one : one + width] = draw.choice(PATTERNS)[:width]
    else:
        near = (int.from_bytes(a, "little") + draw.choice((-1, 1, 2, 256, -256))) % 256**width
        file.data[one : one + width] = near.to_bytes(width, "little")
    return file.bytes()


def _resized(file: File, draw: Random) -> bytes:
    """A tensor longer or shorter, with the container's offsets made to fit: only the metadata now disagrees."""
    keys = [k for k in file.tensors() if file.place(k) != (0, 0)]
    if not keys:
        return file.bytes()
    key = draw.choice(keys)
    begin, end = file.place(key)
    entry = file.header[key]
    shape = entry.get("shape")
    if (
        not isinstance(shape, list)
        or not shape
        or type(shape[0]) is not int
        or shape[0] < 1
        or (end - begin) % shape[0]
    ):
        return file.bytes()
    step, places = (end - begin) // shape[0], {k: file.place(k) for k in file.tensors()}
    more = draw.choice((-shape[0], -1, -1, 1, 1, 8))
    shape[0] = max(0, shape[0] + more)
    size = step * shape[0]
    file.data[begin:end] = (bytes(file.data[begin:end]) + draw.randbytes(max(0, size - (end - begin))))[:size]
    entry["data_offsets"] = [begin, begin + size]
    for other in file.tensors():
        low, high = places[other]
        if low != high and low >= end:
            file.header[other]["data_offsets"] = [low + begin + size - end, high + begin + size - end]
    return file.bytes()


def _foreign(file: File, draw: Random, others: list[bytes]) -> bytes:
    """Metadata, or tensors, of another file."""
    other = File.parse(draw.choice(others))
    assert other is not None
    kind = draw.randrange(3)
    if kind == 0:
        file.header["__metadata__"] = other.header["__metadata__"]
    elif kind == 1:
        key = draw.choice(list(other.header["__metadata__"]))
        file.header["__metadata__"][key] = other.header["__metadata__"][key]
    else:
        file.header, file.data = {**other.header, "__metadata__": file.header["__metadata__"]}, other.data
    return file.bytes()


Bytewise = Callable[[bytes, Random], bytes]
BYTEWISE: tuple[Bytewise, ...] = (_flip, _splice, _cut, _length)
WAYS: tuple[Any, ...] = (
    *BYTEWISE, _header, _header, _metadata, _metadata, _metadata, _text, _text, _doubled, _offsets, _tensor, _tensor, _tensor,
    _resized, _foreign,
)  # fmt: skip
