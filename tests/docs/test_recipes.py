"""docs/recipes.md names every key of a recipe with its type and its default, and no others."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetooth import METHODS
from finetooth.assemble import check_options
from finetooth.recipe import Recipe

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def keys(part: type[BaseModel], before: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that a recipe may have, dotted."""
    for name, field in part.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{before}{name}.")
        else:
            yield before + name, field


KEYS = list(keys(Recipe))


def kind(annotation: Any) -> str:
    """A type in the words of the page."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in args)
    if origin in (Union, types.UnionType, tuple) and args[1:] != (...,):
        return ", ".join(kind(arg) for arg in args if arg is not type(None))
    if origin is list or args[1:] == (...,):
        return f"list of {kind(args[0])}s"
    return WORDS[origin or annotation]


def line(key: str, field: FieldInfo) -> str:
    """What the page says of a key, up to its meaning."""
    limits = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    default = f"`{spelled(field.default)}`" if not field.is_required() else "required"
    return f"| `{key}` | {' '.join([kind(field.annotation), ' and '.join(limits)]).strip()} | {default} |"


def spelled(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)
    return yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True).splitlines()[0]


@pytest.mark.parametrize(("key", "field"), KEYS, ids=[key for key, _ in KEYS])
def test_a_key_with_its_type_and_default(key: str, field: FieldInfo) -> None:
    said = [found for found in PAGE.splitlines() if found.startswith(f"| `{key}` |")]
    assert len(said) == 1, f"docs/recipes.md needs one line {line(key, field)} MEANING |"
    assert said[0].startswith(line(key, field)), f"docs/recipes.md says {said[0]!r}: expected {line(key, field)}"


def test_no_other_keys() -> None:
    parts = [*Recipe.model_fields, "method"]
    tabled = re.findall(r"^\| `([\w.]+)` \| .* \| .* \| .* \|$", PAGE, flags=re.MULTILINE)
    dotted = {key for key in tabled if "." in key or key in parts}
    assert dotted == {key for key, _ in KEYS}


def test_every_field_of_a_row() -> None:
    fields = PAGE.split("Any other key under `method`")[1].split("```")[0]
    for row in METHODS:
        with pytest.raises(ValueError, match="There are: ") as raised:
            check_options(row, {"?": 0})
        known = str(raised.value).rpartition("There are: ")[2].rstrip(".").split(", ")
        missing = [name for name in known if f"`{name}`" not in fields]
        assert not missing, f"docs/recipes.md does not name {missing}, which {row} takes"
