"""The study: recipes that are valid, methods and options that exist, and tables and figures of what comparisons write."""

from __future__ import annotations

import csv
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from safetensors import safe_open
from transformers import AutoConfig

from finetooth import recipe as recipes
from finetooth.contest import contenders
from finetooth.methods import METHODS
from finetooth.recipe import MethodPart, parse

STUDIES = Path(__file__).resolve().parents[2] / "studies"
POOL, QUESTIONS, ACROSS, SIZES = (
    yaml.safe_load((STUDIES / f"{name}.yaml").read_text(encoding="utf-8"))
    for name in ("pool", "questions", "across", "sizes")
)

pytest.importorskip("scipy", reason="intervals: pip install 'finetooth[dev]'")
pytest.importorskip("matplotlib", reason="the figures: pip install 'finetooth[dev]'")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    return lambda name: runpy.run_path(str(STUDIES / name))


@pytest.mark.parametrize("size", SIZES)
def test_the_pool_is_comparisons_that_could_run(size: str, script: Any, tmp_path: Path) -> None:
    for part in POOL.values():
        assert set(part) <= {"recipes", "methods", "set", "rates", "runner", "alone"}
        assert "runner" not in part or (STUDIES / part["runner"]).is_file()
    found = list(script("run.py")["comparisons"](POOL, SIZES[size], tmp_path, set()))
    assert len(found) == sum(len(part["recipes"]) for part in POOL.values())
    for one in found:
        _, file, *changes = one.command[: one.command.index("--methods")]
        raw = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        recipes.override(raw, changes)
        assert parse(raw).train.max_steps == SIZES[size]["steps"]
        words = dict(zip(one.command[len(changes) + 2 :: 2], one.command[len(changes) + 3 :: 2], strict=True))
        assert len(contenders(words["--methods"].split(","), [], MethodPart())) == one.contenders


def test_questions_read_what_the_pool_has(script: Any) -> None:
    assert [name[0] for name in QUESTIONS] == list("123456")
    parts = script("readings.py")["parts"]
    known = {"kind", "contenders", "methods", "parts", "more", "recipes", "number", "over", "edges"}
    for question in QUESTIONS.values():
        for name, table in question.items():
            if name == "question":
                continue
            trained = [m for part in parts(POOL, table) for m in POOL[part]["methods"]]
            assert set(table.get("contenders", [])) <= set(trained), name
            assert set(table.get("methods", [])) <= {m.split(":")[0] for m in trained}, name
            assert set(table) <= known, name
    trained = [m for part in parts(POOL, ACROSS) for m in POOL[part]["methods"]]
    assert {name for pairs in ACROSS["pairs"].values() for pair in pairs for name in pair} <= set(trained)


@pytest.mark.parametrize("path", sorted((STUDIES / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    assert parse(yaml.safe_load(path.read_text(encoding="utf-8"))).evaluate.forgetting


def test_counts_on_the_page(script: Any, tmp_path: Path) -> None:
    page = (STUDIES / "README.md").read_text(encoding="utf-8")
    comparisons = script("run.py")["comparisons"]
    for part in POOL:
        cells = []
        for size in ("small", "full"):
            counts = [c.runs(SIZES[size]) for c in comparisons(POOL, SIZES[size], tmp_path, {part})]
            least, most = (sum(n) for n in zip(*counts, strict=True))
            cells.append(f"{least:,}" if least == most else f"{least:,} – {most:,}")
        assert f"| {' | '.join(cells)} |" in next(line for line in page.splitlines() if line.startswith(f"| `{part}`"))


def test_differences_on_the_page() -> None:
    """Those of `tables.md`, as they stand there."""
    tables = (STUDIES / "results" / "tables.md").read_text(encoding="utf-8")
    across = tables[tables.index("## Across tasks\n") + len("## Across tasks\n") : tables.index("## 1.")]
    assert across in (STUDIES / "README.md").read_text(encoding="utf-8")


def test_rates_of_the_rows() -> None:
    """Those that `finetooth methods` tells: the best ones of all budgets, in those of full fine-tuning on the same task."""
    with (STUDIES / "results" / "runs.csv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["stage"] == "final" and r["recipe"] in POOL["core"]["recipes"]]
    rows = [r for r in rows if r["part"] in ("core", "sparse", "middle", "relative") or r["part"].startswith("budgets")]
    full = {r["recipe"]: float(r["lr"]) for r in rows if r["method"] == "full"}
    found: dict[str, dict[float, list[float]]] = {}
    for row in (r for r in rows if r["method"] in METHODS and r["method"] != "full"):
        best = round(float(row["lr"]) / full[row["recipe"]], 2)
        keep = 0.5 if row["method"] == "hft" else float(row["keep"])
        found.setdefault(row["method"], {}).setdefault(keep, []).append(best)
    spans = {name: {keep: (min(all_), max(all_)) for keep, all_ in own.items()} for name, own in found.items()}
    assert spans == {name: row.rates for name, row in METHODS.items() if row.rates}


def test_the_card_of_the_base_says_what_was_measured(script: Any, tmp_path: Path) -> None:
    base = STUDIES / "base" / "model"
    if not base.is_dir():
        pytest.skip("the weights are in the repository alone")
    config, told = AutoConfig.from_pretrained(base), json.loads((base / "training.json").read_text(encoding="utf-8"))
    with safe_open(base / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"BF16"}
    assert (base / "model.safetensors").stat().st_size < 40e6
    script("base/card.py")["write"](tmp_path, config, sum(math.prod(s) for s in shapes.values()), told)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (base / "README.md").read_text(encoding="utf-8")


def test_figures_of_what_is_no_size_are_refused(script: Any, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="one of try, small, full, not in 'other'"):
        script("figures.py")["main"](tmp_path / "other")
    assert not list(tmp_path.iterdir())


def final(contender: str, seed: int, loss: float, size: float, lr: float = 1e-3) -> dict[str, Any]:
    method, _, keep = contender.partition(":keep=")
    return {
        **{
            "contender": contender,
            "method": method,
            "keep": float(keep.partition(":")[0]) if keep else None,
            "lr": lr,
            "seed": seed,
        },
        **{
            "stage": "final",
            "error": "",
            "task_loss": loss,
            "forgetting": 0.1 * seed,
            "delta_bytes": size,
            "share": 1.0,
        },
    }


def written(folder: Path, part: str, rows: list[dict[str, Any]]) -> None:
    (folder / part / "banking77").mkdir(parents=True)
    (folder / part / "banking77" / "compare.json").write_text(json.dumps({"runs": rows}))


def test_tables_and_figures(script: Any, tmp_path: Path) -> None:
    """Differences are from the first that is named, or from `random` of the same bin of bytes; there is none where that was not run."""
    out = tmp_path / "small"
    core, budgets = [], []
    for seed in range(3):
        core += [final("full", seed, 0.5 + 0.1 * seed, 2e7), final("gmt:keep=0.5", seed, 0.4 + 0.1 * seed, 2e7)]
        core += [
            final("random:keep=0.02", seed, 1.0 + seed, 4e5),
            final("dst:keep=0.02:relative=true", seed, 0.7 + seed, 5e5),
        ]
        budgets += [final("dst:keep=0.005:relative=true", seed, 0.9 + seed, 1e5)]
    core += [{**final("full", 0, 9.0, 2e7), "stage": "sweep"}, {**final("full", 3, 9.0, 2e7), "error": "it diverged"}]
    written(out, "core", core)
    written(out, "budgets", budgets)
    names = [Path(file).name for file in script("figures.py")["draw"](out)]
    assert names[:3] == ["runs.csv", "tables.csv", "tables.md"]
    assert {"1-gmt-rows.svg", "1-gmt-keep.svg", "2-dst-bytes.svg", "5-front-front.svg"} <= set(names)
    with (out / "tables.csv").open() as file:
        table = list(csv.DictReader(file))

    def cell(name: str, contender: str, key: str) -> str:
        return next(row[key] for row in table if (row["table"], row["contender"]) == (name, contender))

    assert float(cell("rows", "gmt:keep=0.5", "task_loss_difference")) == pytest.approx(-0.1)
    assert cell("rows", "gmt:keep=0.5", "runs") == "3" == cell("rows", "full", "runs")
    assert float(cell("front", "dst:keep=0.02:relative=true", "task_loss_difference")) == pytest.approx(-0.3)
    assert (
        cell("front", "dst:keep=0.005:relative=true", "task_loss_difference") == ""
        and cell("front", "dst:keep=0.005:relative=true", "bin") == "1"
    )
    assert not [
        row for row in table if row["table"] in ("steps", "equal-bytes", "time")
    ]  # without what they compare with
    assert b"gmt:keep=0.5" in (out / "1-gmt-rows.svg").read_bytes()
    assert "| 1 | `gmt:keep=0.5` − `full` | **−0.100 ± 0.000** |" in (out / "tables.md").read_text(encoding="utf-8")
    with (out / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(core) + len(budgets)


def test_runs_that_are_kept_are_read_again(script: Any, tmp_path: Path) -> None:
    """A part that is not in `--out` is taken from runs.csv of `--to`; tables from it alone are the same."""
    out, to, draw = tmp_path / "small", tmp_path / "results", script("figures.py")["draw"]
    written(out, "core", [final(c, seed, 1 / 3 + seed, 2e7) for c in ("full", "gmt:keep=0.5") for seed in range(3)])
    draw(out, to)
    made = {file.name: file.read_bytes() for file in to.iterdir()}
    draw(tmp_path / "none" / "small", to)
    assert {file.name: file.read_bytes() for file in to.iterdir()} == made
    other = tmp_path / "later" / "small"
    written(other, "budgets", [final("dst:keep=0.005:relative=true", seed, 0.9, 1e5) for seed in range(3)])
    draw(other, to)
    with (to / "runs.csv").open() as file:
        assert [row["part"] for row in csv.DictReader(file)] == ["core"] * 6 + ["budgets"] * 3
