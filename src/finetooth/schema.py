"""What every key of a recipe takes, in words, from the schema itself: for errors, and for the tables of the page on recipes."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetooth.nearest import hint, nearest

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def keys(part: type[BaseModel], before: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a schema, dotted."""
    for name, field in part.model_fields.items():
        if (inner := section(field)) is not None:
            yield from keys(inner, f"{before}{name}.")
        else:
            yield before + name, field


def section(field: FieldInfo) -> type[BaseModel] | None:
    """The schema of a key that is a section."""
    inner = field.annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def takes(field: FieldInfo, quote: str = "'") -> str:
    """What a key takes: its type, or its words, and its limits."""
    limits = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    return " ".join([_kind(field.annotation, quote), " and ".join(limits)]).strip()


def _kind(annotation: Any, quote: str) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"{quote}{word}{quote}" for word in args)
    if origin in (Union, types.UnionType, tuple) and args[1:] != (...,):
        return ", ".join(_kind(arg, quote) for arg in args if arg is not type(None))
    if origin is list or args[1:] == (...,):
        return f"list of {_kind(args[0], quote)}s"
    return WORDS[origin or annotation]


def words(annotation: Any) -> list[str]:
    """The words that a key may be, if it is one of some words."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for arg in get_args(annotation) for word in words(arg)]


def sentences(schema: type[BaseModel], raw: Mapping[str, Any], errors: list[Any]) -> list[str]:
    """pydantic's errors in words of the house, one for every key that is wrong."""
    found: dict[str, str] = {}
    for error in errors:
        path, field = _at(schema, error["loc"])
        key = ".".join(map(str, path))
        if error["type"] in ("extra_forbidden", "invalid_key"):
            found.setdefault(key, _unknown(schema, path))
        elif error["type"] == "missing":
            found.setdefault(key, f"{key}: this key is missing.")
        elif error["type"] == "value_error":
            found.setdefault(key, f"{key}={_given(raw, path)!r}: {error['msg'].removeprefix('Value error, ')}.")
        elif field is not None:
            found.setdefault(key, _wrong(key, field, _given(raw, path)))
        else:
            found.setdefault(key, f"{key}={error['input']!r}: {error['msg']}.")
    return list(found.values())


def _at(schema: type[BaseModel], loc: tuple[Any, ...]) -> tuple[tuple[Any, ...], FieldInfo | None]:
    """How far a place goes in the schema: what follows is inside a value, or a branch of a union."""
    part: type[BaseModel] | None = schema
    field: FieldInfo | None = None
    for n, name in enumerate(loc):
        if part is None:
            return loc[:n], field
        field = part.model_fields.get(str(name))
        if field is None:
            return loc[: n + 1], None
        part = section(field)
    return loc, field


def _given(raw: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        raw = raw[name]
    return raw


def _wrong(key: str, field: FieldInfo, value: Any) -> str:
    inner = section(field)
    if inner is not None:
        return f"{key}={value!r}: expected a section with {', '.join(inner.model_fields)}."
    known = words(field.annotation)
    near = hint(value, known) if isinstance(value, str) else ""
    return f"{key}={value!r}: expected {'one of ' if known else ''}{takes(field)}.{near}"


def _unknown(schema: type[BaseModel], path: tuple[Any, ...]) -> str:
    """A key that is not there: the nearest that is, here or under its own name in another section."""
    part = schema
    for name in path[:-1]:
        part = section(part.model_fields[name]) or part
    key, last, known = ".".join(map(str, path)), str(path[-1]), list(part.model_fields)
    elsewhere = [dotted for dotted, _ in keys(schema) if dotted.rpartition(".")[2] == last]
    near = nearest(last, known) or next(iter(elsewhere), None)
    return f"{key}: this key is unknown.{f' Did you mean {near!r}?' if near else ''} There are: {', '.join(known)}."
