"""Every block of code on every page: it runs, or it says why not and is checked. How: `blocks.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.docs import blocks
from tests.docs.blocks import ROOT

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")]
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.timeout(900)  # the front page trains and measures: 25 s of a core, and much more where cores are shared
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    if name(page) == "docs/trainers.md":
        pytest.skip("tests/trainers/test_page.py runs it, each section with the arguments and rows of its trainer")
    document = blocks.document(page)
    document.namespace.update(blocks.reader())
    for example in document.examples():
        example.evaluate()
    if name(page) == "README.md":  # it says that its last delta takes the base back
        pairs = zip(blocks.reader()["model"].parameters(), document.namespace["base_model"].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_has_a_language_that_is_checked(page: Path) -> None:
    assert blocks.languages(page) <= set(blocks.CHECKS), "an untold language is not checked: `text` is for output"


WRONG = [
    ("```sh\nfinetooth trian first.yaml\n```", "there is no such command"),
    ("```sh\nfinetooth methods gmt --jsn\n```", "there is no option --jsn"),
    ("```sh\nfinetooth plan nowhere.yaml\n```", "there is no nowhere.yaml"),
    ("```sh\nfinetooth methods gtm\n```", "exit code 2"),
    ("```sh\npip install -e '.[nothing]' && finetooth demo\n```", "there is no extra"),
    ("```sh\npython benchmarks/steps.py --nothing\n```", "does not name --nothing"),
    ("```sh\nrm -r everything\n```", "does not know how to check"),
    ("```python\nassert 1 == 2, 'no'\n```", "no"),
    ("```yaml\nmethod: {name: gmtt}\n```", "is unknown"),
    ('```json\n{"text": "a"}\n{"txt": "b"}\n```', "expected"),
    ("<!-- runs: no, why -->\n```python\n1 +\n```", "invalid syntax"),
    ("<!-- runs: no, why -->\n```sh\nfinetooth plan RECIPE.yaml --probes\n```", "there is no option --probes"),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[text.splitlines()[-2] for text, _ in WRONG])
def test_what_is_wrong_is_found(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}\n", encoding="utf-8")
    (example,) = blocks.document(page).examples()
    with pytest.raises((AssertionError, ValueError, SyntaxError), match=said):
        example.evaluate()


def test_a_marked_block_does_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- runs: no, it would fail -->\n```python\nassert False\n```\n\n```python\nx = 1\n```\n", encoding="utf-8"
    )
    document = blocks.document(page)
    for example in document.examples():
        example.evaluate()
    assert document.namespace["x"] == 1
