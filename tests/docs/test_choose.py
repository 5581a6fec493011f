"""docs/choose.md has no number of its own: what it says was measured, or planned, stands on the page that it comes from."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("docs/benchmarks.md", "docs/plan.md", "examples/README.md")
NUMBER = re.compile(r"(?<![\w.,])(\d{1,3}(?:,\d{3})+|\d+\.\d{2,}|\d{3,})(?!\w)")


def test_numbers_stand_where_they_were_measured() -> None:
    evidence = "\n".join((ROOT / source).read_text(encoding="utf-8") for source in SOURCES)
    text = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    lost = sorted({number for number in NUMBER.findall(text) if number not in evidence})
    assert not lost, f"docs/choose.md says {lost}: neither of {', '.join(SOURCES)} does"
