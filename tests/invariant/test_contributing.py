"""CONTRIBUTING.md's recipe for a new method, carried out: two edits to a copy, and the row obeys the laws.

The two code blocks are read from the page itself, so that the page cannot go stale. The copy has the package and
the tests; its `src` comes first on PYTHONPATH of a new process, so that it stands in for the installed package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
END_OF_ROWS = "\n)\n\nMETHODS:"
CHECK = """
import torch, finetooth
assert "COPY" in finetooth.__file__, finetooth.__file__
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
opt = finetooth.build("tiniest", model, lr=0.1, keep=0.25, targets=["*.weight"])
before = {name: p.detach().clone() for name, p in model.named_parameters()}
model(torch.ones(2, 8)).square().sum().backward()
opt.step()
opt.verify_frozen()
for name, s in opt.selections().items():
    moved = (dict(model.named_parameters())[name] != before[name])
    smallest = before[name].abs().flatten().argsort()[:16].sort().values
    assert s.index.tolist() == smallest.tolist() == moved.flatten().nonzero().flatten().tolist()
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's code, edited as the page says."""
    folder = tmp_path_factory.mktemp("COPY")
    for part in ("src/finetooth", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    recipe = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## A new method: two edits")[1]
    score, row = re.findall(r"```python\n(.*?)```", recipe, flags=re.DOTALL)
    scores, methods = folder / "src/finetooth/scores.py", folder / "src/finetooth/methods.py"
    scores.write_text(scores.read_text(encoding="utf-8") + "\n\n" + score, encoding="utf-8")
    text = methods.read_text(encoding="utf-8")
    assert text.count(END_OF_ROWS) == 1, "methods.py does not end its rows as this test expects: mend END_OF_ROWS"
    methods.write_text(text.replace(END_OF_ROWS, "\n" + row.rstrip("\n") + END_OF_ROWS), encoding="utf-8")
    return folder


def run(copy: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    env |= {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_two_edits_make_a_row(copy: Path) -> None:
    done = run(copy, "-c", CHECK)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_new_row_is_under_every_law(copy: Path) -> None:
    done = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/laws", "-k", "tiniest")
    assert done.returncode == 0, done.stdout[-4000:]  # 5 would mean that no law knows the row
