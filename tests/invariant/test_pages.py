"""The pages: their links lead somewhere, every method has one, and the site shows them all.

Their blocks of code: `tests/docs`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import finetooth

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")]
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name(page)} links to {target}, which does not exist"


def test_every_method_has_a_page() -> None:
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == set(finetooth.METHODS)


@pytest.mark.parametrize("row", list(finetooth.METHODS))
def test_a_page_names_the_papers_of_its_row(row: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{row}.md").read_text(encoding="utf-8")
    missing = [number for number in re.findall(r"\d{4}\.\d{5}", finetooth.METHODS[row].paper) if number not in text]
    assert not missing, f"docs/methods/{row}.md does not name {missing}"


def test_the_site_has_every_page() -> None:
    """A strict build says so too; this does without its libraries."""
    shown = set(re.findall(r"[\w./-]+\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE))
    missing = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} - shown
    assert not missing, f"mkdocs.yml does not name {sorted(missing)} under nav"
