"""The questions of the study: recipes that are valid, methods and options that exist, and tables and figures of what comparisons write."""

from __future__ import annotations

import csv
import json
import runpy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetooth import recipe as recipes
from finetooth.contest import contenders
from finetooth.recipe import MethodPart, parse

STUDIES = Path(__file__).resolve().parents[2] / "studies"
QUESTIONS = sorted(STUDIES.glob("?-*.yaml"))
SIZES = yaml.safe_load((STUDIES / "sizes.yaml").read_text(encoding="utf-8"))
KEYS = {"recipes", "methods", "keep", "set", "rates", "runner", "alone", "number", "curve", "equal"}

pytest.importorskip("scipy", reason="intervals: pip install 'finetooth[dev]'")
pytest.importorskip("matplotlib", reason="the figures: pip install 'finetooth[dev]'")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    return lambda name: runpy.run_path(str(STUDIES / name))


def test_there_are_six_questions() -> None:
    assert [path.name[0] for path in QUESTIONS] == list("123456")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_a_question_is_comparisons_that_could_run(path: Path, size: str, script: Any, tmp_path: Path) -> None:
    asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(asked) == {"question", "parts"}
    for part in asked["parts"].values():
        assert set(part) <= KEYS and {"recipes", "methods"} <= set(part)
        assert "runner" not in part or (STUDIES / part["runner"]).is_file()
    for found in script("run.py")["comparisons"](path, SIZES[size], tmp_path, set(), set()):
        _, file, *changes = found.command[: found.command.index("--methods")]
        raw = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        recipes.override(raw, changes)
        assert parse(raw).train.max_steps == SIZES[size]["steps"]
        words = dict(zip(found.command[len(changes) + 2 :: 2], found.command[len(changes) + 3 :: 2], strict=True))
        keeps = [float(share) for share in words.get("--keep", "").split(",") if share]
        assert len(contenders(words["--methods"].split(","), keeps, MethodPart())) == found.contenders


@pytest.mark.parametrize("path", sorted((STUDIES / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    assert parse(yaml.safe_load(path.read_text(encoding="utf-8"))).evaluate.forgetting


def test_counts_on_the_page(script: Any, tmp_path: Path) -> None:
    page = (STUDIES / "README.md").read_text(encoding="utf-8")
    comparisons = script("run.py")["comparisons"]
    for size in ("small", "full"):
        counts = [[c.runs(SIZES[size]) for c in comparisons(q, SIZES[size], tmp_path, set(), set())] for q in QUESTIONS]
        cells = [f"{sum(a for a, _ in own):,} – {sum(b for _, b in own):,}" for own in [*counts, list(chain(*counts))]]
        assert f"| `{size}` | {' | '.join(cells)} |" in page


def run(contender: str, method: str, keep: float | None, seed: int, loss: float) -> dict[str, Any]:
    return {
        **{"contender": contender, "method": method, "keep": keep, "lr": 1e-3, "seed": seed, "stage": "final"},
        **{"error": "", "task_loss": loss, "forgetting": 0.1 * seed, "delta_bytes": 100, "share": keep or 1.0},
    }


def test_tables_and_figures(script: Any, tmp_path: Path) -> None:
    """Differences are from `random` with the same budget, and there is none where no budget is the same."""
    rows = []
    for seed in range(3):
        for keep, better in ((0.01, 0.3), (0.1, 0.5)):
            rows.append(run(f"random:keep={keep}", "random", keep, seed, 1.0 + seed))
            rows.append(run(f"gmt:keep={keep}", "gmt", keep, seed, 1.0 + seed - better))
        rows.append(run("full", "full", None, seed, 0.5))
    folder = tmp_path / "tasks" / "banking77"
    folder.mkdir(parents=True)
    (folder / "compare.json").write_text(json.dumps({"runs": rows}))
    written = script("figures.py")["draw"](STUDIES / "5-front.yaml", tmp_path)
    assert [Path(file).name for file in written] == ["tables.csv", "tasks.svg", "tasks-curve.svg"]
    with (tmp_path / "tables.csv").open() as file:
        found = {row["contender"]: row for row in csv.DictReader(file)}
    assert float(found["gmt:keep=0.01"]["task_loss_difference"]) == pytest.approx(-0.3)
    assert float(found["gmt:keep=0.1"]["task_loss_difference"]) == pytest.approx(-0.5)
    assert found["full"]["task_loss_difference"] == "" == found["random:keep=0.01"]["task_loss_difference"]
    assert b"gmt:keep=0.1" in (tmp_path / "tasks.svg").read_bytes()
