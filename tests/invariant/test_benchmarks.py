"""docs/benchmarks.md is what its rows say, and the making of it says what the rows mean."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

ROOT = Path(__file__).resolve().parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
AGAIN = "run python benchmarks/tables.py"


def test_the_page_is_what_the_rows_say() -> None:
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert text == tables.page(text, RESULTS), AGAIN


def test_the_plots_are_what_the_rows_say() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install -e '.[bench]'")
    from benchmarks import plots

    for name, svg in plots.draw(tables.groups(tables.read(RESULTS, "steps"))).items():
        committed = (DOCS / name).read_text(encoding="utf-8")
        version = re.search(r"Matplotlib v([\w.+]+)", committed)
        if version is None or version[1] != matplotlib.__version__:
            pytest.skip(f"{name} was drawn by matplotlib {version and version[1]}: another version draws other bytes")
        assert committed == svg.decode(), AGAIN


def rows(steps: dict[str, list[float]], **more: Any) -> list[dict[str, Any]]:
    """Made-up rows, a round for every number of seconds; they are never written into benchmarks/results."""
    same = {
        "run": "2000-01-01T00:00:00",
        "hardware": "Abacus, 2 cores",
        "threads": 1,
        **dict.fromkeys(("torch", "transformers", "peft", "commit"), "0"),
        "command": "python benchmarks/steps.py",
        "measure": "time",
        "size": "1M",
        "weights": 1_000_000,
        "dtype": "fp32",
        "tokens": "4x512",
        "checkpointing": False,
        **dict.fromkeys(("library_mb", "build_mb", "peak_mb", "state_mb"), 1.0),
        **more,
    }
    parts = {"forward_s": 0.3, "backward_s": 0.6, "optimizer_s": 0.1, "outside_share": 0.1}
    return [
        {**same, **parts, "contender": name, "round": i, "step_s": s}
        for name, seconds in steps.items()
        for i, s in enumerate(seconds)
    ]


def made(tmp_path: Path, lines: list[dict[str, Any]]) -> Path:
    with (tmp_path / "steps.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return tmp_path


def test_a_ratio_is_taken_within_a_round(tmp_path: Path) -> None:
    """The machine was twice as slow in the second round; gmt took 1.04 of full's time in all three."""
    seconds = {"AdamW(fused)": [1.0, 2.0, 1.0], "gmt": [1.04, 2.08, 1.04]}
    found = tables.tables(made(tmp_path, rows(seconds)))
    line = "| gmt | 1.04 (1.04–2.08) | 0.300 | 0.600 | 0.100 | 10.0 % | 1.04 |"
    assert line in found["time"]
    target = next(line for line in found["targets"].splitlines() if "whole step" in line)
    assert "1M fp32 4x512: 1.04 | yes |" in target and "≤ 1.05 × AdamW(fused)" in target
    assert "| not measured | – |" in found["targets"]


def test_no_ratio_is_taken_across_runs(tmp_path: Path) -> None:
    """A later run of fewer contenders does not replace the run that can be compared."""
    lines = rows({"AdamW(fused)": [1.0], "gmt": [1.5]}) + rows({"gmt": [0.1]}, run="2000-01-02T00:00:00")
    found = tables.tables(made(tmp_path, lines))
    assert "| gmt | 1.50 |" in found["time"] and "0.1 |" not in found["time"]
    target = next(line for line in found["targets"].splitlines() if "whole step" in line)
    assert "1.50 | no |" in target


def test_marks_are_needed_once() -> None:
    assert tables.filled("<!-- a -->\nold\n<!-- /a -->", {"a": "new"}) == "<!-- a -->\nnew\n<!-- /a -->"
    with pytest.raises(ValueError, match="one pair of marks <!-- a -->"):
        tables.filled("nothing", {"a": "new"})


def test_plots_are_the_same_bytes_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install -e '.[bench]'")
    from benchmarks import plots

    lines = [row for size in (1_000_000, 2_000_000) for row in rows({"LoRA r16": [1.0], "gmt": [2.0]}, weights=size)]
    lines = [{**row, "size": str(row["weights"]), "measure": m} for row in lines for m in ("time", "memory")]
    shown = tables.groups(tables.read(made(tmp_path, lines), "steps"))
    drawn = plots.draw(shown)
    assert list(drawn) == list(plots.PLOTS) and plots.draw(shown) == drawn
    assert all(b"<dc:date>" not in svg for svg in drawn.values())
