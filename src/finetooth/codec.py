"""The delta's file format: between changes in memory and one safetensors file. `docs/format.md` is the contract.

Encoding is deterministic: the same delta gives the same bytes, so a file can be compared, hashed and pinned.
That is why the file is laid out here (the header's order included) and not by safetensors' writer, which
orders metadata by a hash that changes from call to call. Reading goes through safetensors, whose checks of
the header we want.

`decode` believes nothing: everything that the metadata says is checked against the tensors before a `Change`
is built, and whatever is wrong is a `DeltaError`. What a file alone cannot prove (that the base is the right
one, that the result is the promised one) is checked when the delta is applied.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from finetooth.base import DTYPES, dtype_name, raw
from finetooth.selection import Selection
from finetooth.units import Unit

FORMAT = "finetooth-delta"
VERSION = 1
_KEYS = ("format", "version", "library", "base", "method", "recipe", "tensors", "tied")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_WHOLE_NUMBERS = {torch.int32: "I32", torch.int64: "I64"}
_LONGEST_NAME, _LONGEST_MESSAGE, _AT_ONCE = 1024, 1000, 1 << 16  # entries a check looks at together, to need no memory


class DeltaError(ValueError):
    """A delta that cannot be read, or that does not fit what it is applied to. Nothing has been changed."""


@dataclass(frozen=True, eq=False)
class Change:
    """What happened to one tensor: the chosen units and their new values."""

    selection: Selection
    values: Tensor = field(repr=False)  # [k, unit_numel] in the weight's dtype
    changed: int  # entries under the units whose bits differ from the base's
    fingerprint: str  # of the tensor before
    result: str  # of the tensor after

    def new(self, old: Tensor) -> Tensor:  # what the base has under the units, [k, unit_numel]: a coding may need it
        return self.values


@dataclass(frozen=True)
class Origin:
    """What a delta belongs to. `weights` is how many the whole base has; `tuned` marks an inverse, whose base
    is the tuned model."""

    id: str | None = None
    revision: str | None = None
    weights: int | None = None
    tuned: bool = False

    def __str__(self) -> str:
        name = self.id or "a base without a name"
        return ("the tuned form of " if self.tuned else "") + name + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, eq=False)
class Parts:
    """What a file holds, before it is a `Delta`."""

    changes: Mapping[str, Change]
    tied: Mapping[str, str]
    base: Origin
    method: str | None
    recipe: Any
    library: str


def encode(parts: Parts) -> tuple[bytes, list[Tensor]]:
    """The head of the file (its length, then the header) and the tensors that follow, in order."""
    tensors: dict[str, Tensor] = {}
    for name in (*parts.changes, *parts.tied):
        require_name(name)
    for name, change in parts.changes.items():
        require_finite(name, change.values)
        tensors[f"index:{name}"] = change.selection.index
        tensors[f"values:{name}"] = change.values
    # Widest entries first, as safetensors itself does, so that every tensor is aligned to its entries.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": _metadata(parts)}
    at = 0
    for key in order:
        t = tensors[key]
        size = t.numel() * t.element_size()
        header[key] = {"dtype": dtype_name(t.dtype), "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = _dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, [tensors[key] for key in order]


def write(parts: Parts, path: Path) -> None:
    head, tensors = encode(parts)
    with path.open("xb") as f:
        f.write(head)
        for t in tensors:
            f.write(raw(t))


def _metadata(parts: Parts) -> dict[str, str]:
    tensors = {name: _entry(change) for name, change in parts.changes.items()}
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "library": parts.library,
        "base": _dumps(asdict(parts.base)),
        "method": _dumps(parts.method),
        "recipe": _dumps(parts.recipe),
        "tensors": _dumps(tensors),
        "tied": _dumps(dict(parts.tied)),
    }


def _entry(change: Change) -> dict[str, Any]:
    selection = change.selection
    return {
        "shape": list(selection.shape),
        "dtype": dtype_name(change.values.dtype),
        "unit": {"kind": selection.unit.kind, "size": selection.unit.size},
        "count": len(selection),
        "changed": change.changed,
        "fingerprint": change.fingerprint,
        "result": change.result,
        "index_coding": "plain",
        "value_coding": "plain",
    }


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise DeltaError(f"the recipe of a delta is JSON, and this one is not: {e}.") from e


def read(path: Path) -> Parts:
    """Read and check a file; anything wrong with it is a DeltaError that names the file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no delta file at {path}.")
    try:
        with safe_open(str(path), framework="pt") as f:
            metadata = f.metadata() or {}
            _json({"header": _header(path)}, "header")  # safetensors takes a key twice, and other readers the other one
            check_format(metadata)
            # A copy: the file may be replaced or cut short while the delta is in use.
            return decode(metadata, {key: f.get_tensor(key).clone() for key in list(f.keys())})
    except DeltaError as e:
        raise DeltaError(f"{path.name}: {_cut(str(e))}") from e
    except (SafetensorError, OSError, KeyError, AttributeError, RuntimeError, TypeError) as e:
        raise DeltaError(f"{path.name} is not a whole safetensors file: {_cut(str(e))}") from e


def _header(path: Path) -> str:
    with path.open("rb") as f:
        return f.read(struct.unpack("<Q", f.read(8))[0]).decode("utf-8")


def _cut(message: str) -> str:  # what a file says of itself may be as long as the file
    return message.partition("\n")[0][:_LONGEST_MESSAGE]


def check_format(metadata: Mapping[str, str]) -> None:
    """Raise unless the metadata is that of a delta that this library reads."""
    if metadata.get("format") != FORMAT:
        raise DeltaError(f"not a Finetooth delta: format is {metadata.get('format')!r}, expected {FORMAT!r}.")
    version = metadata.get("version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", version):
        raise DeltaError(f"version is {version!r}: expected a whole number.")
    if int(version) > VERSION:
        raise DeltaError(f"format version {version} is newer than this library reads ({VERSION}): upgrade finetooth.")
    missing = [key for key in _KEYS if key not in metadata]
    if missing:
        raise DeltaError(f"the metadata has no {', '.join(missing)}.")


def decode(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Parts:
    """Check metadata (after `check_format`) and tensors against each other and build what they say."""
    entries = _table(metadata, "tensors")
    expected = {f"{kind}:{name}" for name in entries for kind in ("index", "values")}
    for what, keys in (
        ("lacks", expected - set(tensors)),
        ("has, beyond what its metadata lists,", set(tensors) - expected),
    ):
        if keys:
            raise DeltaError(
                f"the file {what} {min(keys)!r}" + (f" and {len(keys) - 1} more." if len(keys) > 1 else ".")
            )
    changes = {n: _change(n, e, tensors[f"index:{n}"], tensors[f"values:{n}"]) for n, e in entries.items()}
    method = _json(metadata, "method")
    if method is not None and not isinstance(method, str):
        raise DeltaError(f"method is {method!r}: expected a name or null.")
    recipe = _json(metadata, "recipe")
    return Parts(changes, _tied(metadata, changes), _origin(metadata), method, recipe, metadata["library"])


def _change(name: str, entry: Any, index: Tensor, values: Tensor) -> Change:
    require_name(name)
    if not isinstance(entry, dict):
        raise DeltaError(f"the entry of '{name}' is not a table.")
    for kind in ("index_coding", "value_coding"):
        if entry.get(kind) != "plain":
            raise DeltaError(f"'{name}' has {kind} {entry.get(kind)!r}: this library reads 'plain'. Upgrade finetooth?")
    shape, dtype, unit = _shape(name, entry), _dtype(name, entry), _unit(name, entry)
    try:
        units, width = unit.count(shape), unit.numel(shape)
    except ValueError as e:
        raise DeltaError(f"'{name}': {e}") from e
    count = _number(name, entry, "count", 1, units)
    _check_index(name, index, count, units)
    if values.dtype != dtype or tuple(values.shape) != (count, width):
        found = f"{values.dtype} {tuple(values.shape)}"
        raise DeltaError(f"the values of '{name}' are {found}: expected {dtype} {(count, width)}.")
    require_finite(name, values)
    changed = _number(name, entry, "changed", 1, count * width)
    prints = [entry.get(key) for key in ("fingerprint", "result")]
    if not all(isinstance(p, str) and _FINGERPRINT.fullmatch(p) for p in prints) or prints[0] == prints[1]:
        raise DeltaError(
            f"'{name}' has the fingerprints {prints}: expected two different ones, sha256:<64 hex digits>."
        )
    return Change(Selection(index, unit, shape), values, changed, str(prints[0]), str(prints[1]))


def _check_index(name: str, index: Tensor, count: int, units: int) -> None:
    if index.dtype not in _WHOLE_NUMBERS or index.ndim != 1 or index.numel() != count:
        found = f"{index.dtype} {tuple(index.shape)}"
        raise DeltaError(f"the index of '{name}' is {found}: expected {count} ids, int32 or int64.")
    if not all(bool((piece[1:] > piece[:-1]).all()) for piece in _pieces(index, 1)):
        raise DeltaError(f"the index of '{name}' is not strictly increasing (unsorted, or a unit twice).")
    if int(index[0]) < 0 or int(index[-1]) >= units:
        found = f"[{int(index[0])}, {int(index[-1])}]"
        raise DeltaError(f"the index of '{name}' is out of range: {found}, the tensor has {units} units.")


def require_name(name: str) -> None:
    """Raise unless a name can be shown as it is: what a terminal obeys or hides is no part of a parameter's name."""
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise DeltaError(f"a tensor is called {ascii(name)[:99]}: expected 1 to {_LONGEST_NAME} printable characters.")


def require_finite(name: str, values: Tensor) -> None:
    """Raise if a new value is an infinity or not a number."""
    small = values.element_size() == 1  # torch has no isfinite for 8-bit floats
    finite = (bool(torch.isfinite(p.float() if small else p).all()) for p in _pieces(values.reshape(-1)))
    if values.dtype.is_floating_point and not all(finite):
        raise DeltaError(f"'{name}' has new values that are not finite: such a model is broken, a delta refuses it.")


def _pieces(flat: Tensor, more: int = 0) -> Iterator[Tensor]:  # views of _AT_ONCE entries, and `more` of the next
    return (flat[at : at + _AT_ONCE + more] for at in range(0, flat.numel(), _AT_ONCE))


def _shape(name: str, entry: dict[str, Any]) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape) or len(shape) > 16:
        raise DeltaError(f"'{name}' has shape {shape!r}: expected a list of whole numbers.")
    if math.prod(shape) >= 2**63:
        raise DeltaError(f"'{name}' has shape {shape}: no tensor is that large.")
    return tuple(shape)


def _dtype(name: str, entry: dict[str, Any]) -> torch.dtype:
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DeltaError(f"'{name}' has dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _unit(name: str, entry: dict[str, Any]) -> Unit:
    unit = entry.get("unit")
    if not isinstance(unit, dict) or not isinstance(unit.get("kind"), str) or type(unit.get("size")) is not int:
        raise DeltaError(f"'{name}' has unit {unit!r}: expected a kind and a size.")
    try:
        return Unit(unit["kind"], unit["size"])
    except ValueError as e:
        raise DeltaError(f"'{name}': {e}") from e


def _number(name: str, entry: dict[str, Any], key: str, low: int, high: int) -> int:
    n = entry.get(key)
    if type(n) is not int or not low <= n <= high:
        raise DeltaError(f"'{name}' has {key} {n!r}: expected a whole number from {low} to {high}.")
    return n


def _origin(metadata: Mapping[str, str]) -> Origin:
    base = _table(metadata, "base")
    id, revision, weights, tuned = (base.get(key) for key in ("id", "revision", "weights", "tuned"))
    texts = all(text is None or isinstance(text, str) for text in (id, revision))
    if not texts or not (weights is None or (type(weights) is int and weights >= 0)) or type(tuned) is not bool:
        raise DeltaError(f"base is {base}: expected id, revision, weights and tuned.")
    return Origin(id, revision, weights, tuned)


def _tied(metadata: Mapping[str, str], changes: Mapping[str, Change]) -> dict[str, str]:
    tied = _table(metadata, "tied")
    for alias, name in tied.items():
        require_name(alias)
        if not isinstance(name, str) or alias in changes or name in tied:
            raise DeltaError(f"tied says that '{alias}' is {name!r}: an alias names a tensor, and has no entry itself.")
    return tied


def _table(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    value = _json(metadata, key)
    if not isinstance(value, dict):
        raise DeltaError(f"the metadata's {key} is not a JSON object.")
    return value


def _json(metadata: Mapping[str, str], key: str) -> Any:
    try:
        text = metadata[key]
        value = json.loads(text, object_pairs_hook=_no_doubles, parse_constant=_no_constants, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:  # half of a pair is no character, and cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as e:
        raise DeltaError(f"the metadata's {key} is not JSON: {e}") from e


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_constants(text)


def _no_constants(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
