"""Reads a delta file, of any version, with nothing but numpy and safetensors. docs/format.md is what it follows.

    python examples/read_delta.py delta.safetensors [base.safetensors]

For your own programs: copy it. `read` gives, for every changed tensor, its entry in the metadata, the ids of the units that
changed, and their new values [count, unit_numel] as bit patterns (unsigned integers: numpy has no bfloat16; `.view` makes
floats of what it has). Values that are coded against the base need the base's tensor: `new_values`. `apply` gives
the whole new tensor. It does not check fingerprints; a program that applies deltas has to."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import safetensors

BITS = {"base4": 4, "base8": 8, "base16": 16, "base24": 24}


def read(path):
    """{name: (entry, ids, stream of values)}, and the metadata."""
    blob = Path(path).read_bytes()
    tensors = dict(safetensors.deserialize(blob))  # checks the container
    (size,) = struct.unpack("<Q", blob[:8])
    metadata = json.loads(blob[8 : 8 + size])["__metadata__"]
    if metadata["format"] != "finetooth-delta" or int(metadata["version"]) > 2:
        raise ValueError(f"{path} is no delta of version 1 or 2")
    out = {}
    for name, entry in json.loads(metadata["tensors"]).items():
        index = tensors[f"index:{name}"]
        out[name] = entry, ids(entry, index["data"], index["dtype"]), bytes(tensors[f"values:{name}"]["data"])
    return out, metadata


def ids(entry, data, dtype):
    """The changed units, sorted."""
    kinds = {"U8": "u1", "U16": "<u2", "I32": "<i4", "I64": "<i8"}
    stream, coding = np.frombuffer(data, kinds[dtype]), entry["index_coding"]
    if coding == "bitmap":
        stream = np.flatnonzero(np.unpackbits(stream, bitorder="little"))
    elif coding in ("gap8", "gap16"):
        ends = stream != np.iinfo(stream.dtype).max
        stream = np.cumsum(stream, dtype=np.int64)[ends] + np.arange(entry["count"])
    elif coding == "gap7":
        ends, place = stream < 128, np.arange(stream.size)
        place -= np.maximum.accumulate(np.where(np.append(True, ends[:-1]), place, 0))  # of each byte in its number
        stream = np.cumsum((stream & 127).astype(np.int64) << 7 * place)[ends] + np.arange(entry["count"])
    elif coding != "plain":
        raise ValueError(f"{coding} is newer than this reader")
    return stream


def new_values(entry, stream, old=None):
    """[count, unit_numel] bit patterns; `old` are those that the base has there."""
    digits = "".join(c for c in entry["dtype"].partition("_")[0] if c.isdigit()) or "8"
    word, coding = np.dtype(f"<u{int(digits) // 8}"), entry["value_coding"]
    if coding == "plain":
        return np.frombuffer(stream, word).reshape(entry["count"], -1)
    stream, bits, n = np.frombuffer(stream, "u1"), BITS[coding], old.size
    if bits == 4:
        z = np.stack([stream[: -(-n // 2)] & 15, stream[: -(-n // 2)] >> 4], 1).reshape(-1)[:n].astype(word)
    else:
        planes = stream[: n * bits // 8].reshape(bits // 8, n)
        z = sum(plane.astype(word) << (8 * i) for i, plane in enumerate(planes))
    long = z == (1 << bits) - 1
    z[long] = np.frombuffer(stream[-(-n * bits // 8) :].tobytes(), word)
    step = (z >> 1) ^ np.negative(z & 1)
    floating = entry["dtype"][0] in "FB" and entry["dtype"] != "BOOL"
    return ordered(ordered(old.reshape(-1), floating) + step, floating).reshape(old.shape)


def ordered(x, floating):
    """Floats' bit patterns as integers in the order of the floats; the other way round as well."""
    return x ^ (np.negative(x >> (8 * x.itemsize - 1)) >> 1) if floating else x


def grid(entry, x):
    """A view of the tensor [units..., unit_numel]."""
    kind, size, shape = entry["unit"]["kind"], entry["unit"]["size"], entry["shape"]
    if kind == "column":
        return x.reshape(shape).swapaxes(-1, -2)
    width = {"element": 1, "row": shape[-1] if shape else 1, "block": min(size, x.size)}.get(kind, x.size)
    return x.reshape(-1, width)


def apply(entry, where, stream, base):
    """The new tensor, of the base's: bit patterns (base.view of unsigned integers) in, bit patterns out."""
    out = base.copy()
    cells = grid(entry, out)
    at = np.unravel_index(where, cells.shape[:-1])
    cells[at] = new_values(entry, stream, cells[at])
    return out


if __name__ == "__main__":
    changes, metadata = read(sys.argv[1])
    for name, (entry, where, _) in changes.items():
        sys.stdout.write(f"{name} {entry['dtype']} {entry['shape']}: {len(where)} {entry['unit']['kind']}s\n")
