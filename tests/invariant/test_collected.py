"""Every test there is, is one that `pytest` runs."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """pytest leaves out folders by name; "dist" is on its own list, and tests/dist was left out for as long as it was on ours."""
    left_out = pytestconfig.getini("norecursedirs")
    folders = {part for file in TESTS.rglob("test_*.py") for part in file.relative_to(TESTS.parent).parent.parts}
    assert "dist" in folders
    assert not [(folder, name) for folder in folders for name in left_out if fnmatch(folder, name)]
