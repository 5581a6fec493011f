"""Writes the attack files beside it: `python -m tests.format.attacks.make`. `test_attack_files.py` says what each must be told.

They are files because a file is what an attacker sends: whoever writes another reader can take them. Each is a small good delta
with one thing wrong; the bombs say that they are large and are not. Bytes, not this library's writer: what it writes may change,
and these stay.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPE, INDEX, NEW = [2, 4], [1, 6], [5.0, -6.0]
OLD = [float(i) for i in range(8)]


def fingerprint(values: list[float]) -> str:
    digest = hashlib.sha256(f"F32 {SHAPE}\n".encode())
    digest.update(struct.pack("<8f", *values))
    return f"sha256:{digest.hexdigest()}"


def tuned() -> list[float]:
    return [NEW[INDEX.index(i)] if i in INDEX else x for i, x in enumerate(OLD)]


class Draft:
    """A good file of one tensor, as tables and bytes, to be made a bad one."""

    def __init__(self, name: str = "layers.0.weight") -> None:
        self.name, n = name, len(INDEX)
        self.index, self.values = struct.pack(f"<{n}i", *INDEX), struct.pack(f"<{n}f", *NEW)
        self.entry: dict[str, Any] = {
            "shape": SHAPE, "dtype": "F32", "unit": {"kind": "element", "size": 1}, "count": n, "changed": n,
            "fingerprint": fingerprint(OLD), "result": fingerprint(tuned()), "index_coding": "plain", "value_coding": "plain",
        }  # fmt: skip
        self.entries: Any = {name: self.entry}
        self.metadata: dict[str, Any] = {
            "format": "finetooth-delta", "version": "1", "library": "attack",
            "base": '{"id":"org/name","revision":null,"weights":8,"tuned":false}',
            "method": "null", "recipe": "null", "tied": "{}",
        }  # fmt: skip
        size = 4 * n
        self.header: dict[str, Any] = {
            f"index:{name}": {"dtype": "I32", "shape": [n], "data_offsets": [0, size]},
            f"values:{name}": {"dtype": "F32", "shape": [n, 1], "data_offsets": [size, 2 * size]},
        }
        self.text: Callable[[str], str] = lambda text: text  # of the header, at last
        self.length: int | None = None

    def bytes(self) -> bytes:
        tensors = self.entries if isinstance(self.entries, str) else json.dumps(self.entries)
        header = {"__metadata__": {"tensors": tensors, **self.metadata}, **self.header}
        head = self.text(json.dumps(header)).encode()
        length = len(head) if self.length is None else self.length
        return struct.pack("<Q", length) + head + self.index + self.values


Attack = Callable[[Draft], None]


def set_entry(**fields: Any) -> Attack:
    return lambda d: d.entry.update(fields)


def set_metadata(**texts: str) -> Attack:
    return lambda d: d.metadata.update(texts)


def set_index(*ids: int, code: str = "i") -> Attack:
    return lambda d: setattr(d, "index", struct.pack(f"<{len(ids)}{code}", *ids))


def set_values(*values: float) -> Attack:
    return lambda d: setattr(d, "values", struct.pack(f"<{len(values)}f", *values))


def set_tensor(kind: str, **fields: Any) -> Attack:
    return lambda d: d.header[f"{kind}:{d.name}"].update(fields)


def renamed(name: str) -> Attack:
    return lambda d: d.__init__(name)  # type: ignore[misc]


def in_text(old: str, new: str) -> Attack:
    return lambda d: setattr(d, "text", lambda text: text.replace(old, new, 1))


def many_keys(d: Draft) -> None:
    d.header |= {f"x{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(1000)}


def same_place_twice(d: Draft) -> None:
    d.entries["twin.weight"] = dict(d.entry)
    d.header["index:twin.weight"] = d.header[f"index:{d.name}"]
    d.header["values:twin.weight"] = d.header[f"values:{d.name}"]


def wide_index(d: Draft) -> None:
    """The second id is 2^32 + 6, which is 6 in 32 bits."""
    d.index = struct.pack("<2q", 1, 2**32 + 6)
    d.header[f"index:{d.name}"].update(dtype="I64", data_offsets=[0, 16])
    d.header[f"values:{d.name}"].update(data_offsets=[16, 24])


TWICE = '{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]}'
ATTACKS: dict[str, Attack] = {
    # the container
    "header-longer-than-the-file": lambda d: setattr(d, "length", 10**6),
    "header-of-2-to-the-63": lambda d: setattr(d, "length", 2**63),
    "header-of-2-to-the-64-less-1": lambda d: setattr(d, "length", 2**64 - 1),
    "header-of-no-bytes": lambda d: setattr(d, "length", 0),
    "header-nested-deeply": lambda d: setattr(d, "text", lambda text: '{"x":' * 5000 + "0" + "}" * 5000),
    "header-with-a-thousand-empty-tensors": many_keys,
    "header-with-a-key-twice": in_text('"index:', f'"values:layers.0.weight": {TWICE}, "index:'),
    "offsets-overlap": set_tensor("values", data_offsets=[4, 12]),
    "offsets-the-same": set_tensor("values", data_offsets=[0, 8]),
    "offsets-backwards": set_tensor("values", data_offsets=[16, 8]),
    "offsets-of-no-bytes": set_tensor("index", shape=[0], data_offsets=[0, 0]),
    "offsets-with-a-hole": set_tensor("values", data_offsets=[12, 20]),
    "offsets-past-the-end": set_tensor("values", shape=[2**40, 1], data_offsets=[8, 8 + 2**42]),
    "shape-of-nothing-times-2-to-the-63": lambda d: d.header.update(
        x={"dtype": "U8", "shape": [0, 2**63], "data_offsets": [0, 0]}
    ),
    "shape-that-overflows": set_tensor("values", shape=[2**32, 2**32]),
    # indices
    "index-twice": set_index(6, 6),
    "index-unsorted": set_index(6, 1),
    "index-negative": set_index(-1, 6),
    "index-past-the-end": set_index(1, 8),
    "index-the-largest": set_index(1, 2**31 - 1),
    "index-overflows-32-bits": wide_index,
    # values
    "value-not-a-number": set_values(5.0, float("nan")),
    "value-infinite": set_values(float("-inf"), -6.0),
    # metadata that lies
    "count-too-small": set_entry(count=1),
    "count-huge": set_entry(count=2**62),
    "changed-more-than-there-is": set_entry(changed=3),
    "shape-smaller": set_entry(shape=[2, 3]),
    "shape-huge": set_entry(shape=[2**62, 2**62]),
    "shape-of-hundreds": set_entry(shape=[1] * 400),
    "dtype-another": set_entry(dtype="BF16"),
    "unit-a-row": set_entry(unit={"kind": "row", "size": 1}),
    "unit-a-block-of-billions": set_entry(unit={"kind": "block", "size": 2**62}),
    "fingerprints-the-same": set_entry(result=fingerprint(OLD)),
    "fingerprint-of-another-kind": set_entry(fingerprint="md5:" + "0" * 32),
    "version-newer": set_metadata(version="99"),
    "version-of-other-digits": set_metadata(version="١"),
    "index-coding-unknown": set_entry(index_coding="zip"),
    "value-coding-unknown": set_entry(value_coding="pickle"),
    "recipe-nested-deeply": set_metadata(recipe="[" * 50_000),
    "recipe-a-number-of-5000-digits": set_metadata(recipe="1" * 5000),
    "recipe-an-infinite-number": set_metadata(recipe="[1e999]"),
    "recipe-half-a-character": set_metadata(recipe='"\\ud800"'),
    "base-with-a-key-twice": set_metadata(base='{"id":"a","id":"b","revision":null,"weights":8,"tuned":false}'),
    "tensors-with-a-key-twice": lambda d: setattr(d, "entries", f'{{"{d.name}":1,"{d.name}":{json.dumps(d.entry)}}}'),
    # names
    "name-empty": renamed(""),
    "name-with-nul": renamed("layers.0\0.weight"),
    "name-with-an-escape-sequence": renamed("\x1b[2Jlayers.0.weight"),
    "name-that-turns-writing-around": renamed("layers.0.\u202ethgiew"),
    "name-with-an-invisible-letter": renamed("layers.0.\u200bweight"),
    "name-of-5000-letters": renamed("x" * 5000),
    # one storage, two names
    "tied-and-given-twice": lambda d: d.metadata.update(tied=json.dumps({d.name: "head.weight"})),
    "tied-in-a-chain": set_metadata(tied='{"a":"b","b":"c"}'),
    "tied-to-itself": set_metadata(tied='{"a":"a"}'),
    "two-tensors-in-one-place": same_place_twice,
}
# Well formed: they are refused when they are applied, with the model as it was.
LIARS: dict[str, Attack] = {
    "lie-of-a-value": set_values(5.0, 7.0),
    "lie-of-an-index": set_index(2, 6),
    "lie-of-the-result": set_entry(result="sha256:" + "0" * 64),
    "lie-of-the-base": set_entry(fingerprint="sha256:" + "0" * 64),
    "lie-of-how-many-changed": set_entry(changed=1),
    "lie-of-the-shape": set_entry(shape=[4, 2]),
    "name-a-path-up": renamed("../../layers.0.weight"),
    "name-a-path-from-the-root": renamed("/etc/layers.0.weight"),
    "name-of-a-look-alike": renamed("l\u0430yers.0.weight"),  # a Cyrillic letter
}


def made(name: str) -> bytes:
    draft = Draft()
    ({**ATTACKS, **LIARS})[name](draft)
    return draft.bytes()


if __name__ == "__main__":
    for attack in (*ATTACKS, *LIARS):
        (HERE / f"{attack}.safetensors").write_bytes(made(attack))
