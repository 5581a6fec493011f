"""docs/recipes.md names every key of a recipe with its type and its default, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from finetooth import METHODS
from finetooth.assemble import check_options
from finetooth.recipe import Recipe
from finetooth.schema import keys, takes

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")

KEYS = list(keys(Recipe))


def line(key: str, field: FieldInfo) -> str:
    """What the page says of a key, up to its meaning."""
    default = f"`{spelled(field.default)}`" if not field.is_required() else "required"
    return f"| `{key}` | {takes(field, '`')} | {default} |"


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
