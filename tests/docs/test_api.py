"""docs/api.md documents every public name."""

from __future__ import annotations

import re
from pathlib import Path

import finetooth

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_public_name_is_on_the_page() -> None:
    named = re.findall(r"^::: finetooth\.(\w+)$", PAGE, flags=re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(finetooth.__all__) - {"__version__"} <= set(named)
