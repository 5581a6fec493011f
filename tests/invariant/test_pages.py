"""The pages: their Python runs, their links lead somewhere, and every method has one.

Blocks of Python on a page run one after another in one namespace, which has what a reader would have: a model,
batches, a second copy of the base model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import finetooth

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(1)
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **size))


@pytest.mark.parametrize("page", ["README.md", "docs/own-rules.md", "docs/guarantees.md", "docs/sharing.md"])
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(24).reshape(2, 12)
    space: dict[str, Any] = {"model": tiny(), "base_model": tiny(), "batches": [{"input_ids": ids, "labels": ids}]}
    if page == "docs/guarantees.md":
        space["opt"] = finetooth.build("magnitude", space["model"])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec", dont_inherit=True), space)
    if page == "README.md":
        pairs = zip(tiny().parameters(), space["base_model"].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    if page == "docs/sharing.md":  # to rounding: float32 differences of float32 weights
        said = [m(ids).logits for m in (space["adapted"], space["model"])]
        torch.testing.assert_close(*said, rtol=0, atol=1e-4)


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
