"""What the metadata of a delta file says, checked: the format, the base, ties, and one entry for every tensor.

Whatever is not as `docs/format.md` has it is a DeltaError that names the field, what was found and what was expected. Only
the metadata is looked at here; whether the streams are what it says is `archive.py`'s.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from finetooth import coding, zigzag
from finetooth.base import DTYPES
from finetooth.checkpoint import no_doubles
from finetooth.codec import FORMAT, VERSION, DeltaError, Origin, require_name
from finetooth.units import Unit

_KEYS = ("format", "version", "library", "base", "method", "recipe", "tensors", "tied")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What the metadata says of one tensor, checked."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: Unit
    units: int  # in the whole tensor
    width: int  # entries of a unit
    count: int
    changed: int
    fingerprint: str
    result: str
    replaced: str | None
    written: str | None
    index_coding: str
    value_coding: str


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


def entry(name: str, said: Any, version: int) -> Entry:
    """What the table `tensors` says of one tensor."""
    require_name(name)
    if not isinstance(said, dict):
        raise DeltaError(f"the entry of '{name}' is not a table.")
    codings = [_coding(name, said, key, version) for key in ("index_coding", "value_coding")]
    shape, dtype, unit = _shape(name, said), _dtype(name, said), _unit(name, said)
    try:
        units, width = unit.count(shape), unit.numel(shape)
    except ValueError as e:
        raise DeltaError(f"'{name}': {e}") from e
    count = _number(name, said, "count", 1, units)
    changed = _number(name, said, "changed", 1, count * width)
    prints: list[Any] = [said.get(key) for key in ("fingerprint", "result")]
    extra: list[Any] = [said.get(key) for key in ("replaced", "written")]
    for text in (*prints, *(text for text in extra if text is not None)):
        if not isinstance(text, str) or not _FINGERPRINT.fullmatch(text) or prints[0] == prints[1]:
            raise DeltaError(
                f"'{name}' has the fingerprints {prints + extra}: expected two different ones, sha256:<64 hex digits>."
            )
    return Entry(shape, dtype, unit, units, width, count, changed, *prints, *extra, *codings)


def _coding(name: str, said: dict[str, Any], key: str, version: int) -> str:
    found, known = said.get(key), coding.INDEX if key == "index_coding" else zigzag.VALUES
    if found not in (known if version > 1 else known[:1]):
        raise DeltaError(f"'{name}' has {key} {found!r}: version {version} has {', '.join(known)}. Upgrade finetooth?")
    return str(found)


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


def origin(metadata: Mapping[str, str]) -> Origin:
    """What the delta belongs to."""
    base = table(metadata, "base")
    id, revision, weights, tuned = (base.get(key) for key in ("id", "revision", "weights", "tuned"))
    texts = all(text is None or isinstance(text, str) for text in (id, revision))
    if not texts or not (weights is None or (type(weights) is int and weights >= 0)) or type(tuned) is not bool:
        raise DeltaError(f"base is {base}: expected id, revision, weights and tuned.")
    after = base.get("after", {})
    if not isinstance(after, dict) or not all(isinstance(p, str) and _FINGERPRINT.fullmatch(p) for p in after.values()):
        raise DeltaError(f"base has after={after!r}: expected names and fingerprints, sha256:<64 hex digits>.")
    return Origin(id, revision, weights, tuned, after)


def tied(metadata: Mapping[str, str], changes: Mapping[str, Any]) -> dict[str, str]:
    """Aliases, by the name that has the entry."""
    aliases = table(metadata, "tied")
    for alias, name in aliases.items():
        require_name(alias)
        if not isinstance(name, str) or alias in changes or name in aliases:
            raise DeltaError(f"tied says that '{alias}' is {name!r}: an alias names a tensor, and has no entry itself.")
    return aliases


def table(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """A JSON object out of the metadata."""
    value = parsed(metadata, key)
    if not isinstance(value, dict):
        raise DeltaError(f"the metadata's {key} is not a JSON object.")
    return value


def parsed(metadata: Mapping[str, str], key: str) -> Any:
    """JSON out of the metadata, without doubles, NaN, infinities and text that cannot be written again."""
    text = metadata[key]
    try:
        value = json.loads(text, object_pairs_hook=no_doubles, parse_constant=_no_constants, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:  # half of a pair is no character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as e:
        raise DeltaError(f"the metadata's {key} is not JSON: {e}") from e


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_constants(text)


def _no_constants(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
