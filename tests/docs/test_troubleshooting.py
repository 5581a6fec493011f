"""docs/troubleshooting.md is keyed by messages that the package really has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### `(.+)`$", PAGE, flags=re.MULTILINE)


@cache
def messages() -> tuple[str, ...]:
    """Every text in the package that is no docstring, `…` where a value is put in."""
    found = []
    for file in sorted((ROOT / "src" / "finetooth").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts | alone:
                found.append(node.value)
    return tuple(found)


def test_there_are_some() -> None:
    assert len(HEADINGS) >= 25 and len(set(HEADINGS)) == len(HEADINGS)
    assert len(HEADINGS) == PAGE.count("\n### "), "a heading of this level is a message, in backticks"


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_message_is_in_the_source(heading: str) -> None:
    fixed = [part for part in heading.split("…") if part.strip()]
    pattern = re.compile(".*?".join(re.escape(part) for part in fixed), flags=re.DOTALL)
    assert any(pattern.search(message) for message in messages()), f"no text in src/finetooth has {heading!r}"
