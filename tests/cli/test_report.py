"""`finetooth report` on real runs: what the page shows, what it says is missing, and that nothing of the data gets out of its text."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetooth import comparison, figures, record, tally
from finetooth.cli.main import app
from tests.cli.test_train import recipe, runner

pytest.importorskip("matplotlib", reason="draws the plots: pip install 'finetooth[report]'")

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</dd>{{ 7*7 }}$\\alpha$"
VOID = {"meta", "link", "br", "img", "path", "use", "input"}


class Reader(HTMLParser):
    """Reads a page as a browser would, and keeps its text; an element that is not closed, or loads something, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.words, self.ids = list[str](), list[str](), list[str](), list[str]()
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "srcset", "action"), (tag, name)
            assert name not in ("href", "xlink:href") or (value or "").startswith("#"), (tag, value)
            assert "url(" not in (value or "") or re.search(r"url\(#\w+\)", value or ""), (tag, value)
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """What a person reads."""
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(path: Path) -> Reader:
    """A page that is what every report must be."""
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000 and "http:" not in text and "https:" not in text and "@import" not in text
    reader = Reader(text)
    assert not set(reader.tags) & {"script", "iframe", "object", "embed", "img", "link", "base", "form"}
    assert len(reader.ids) == len(set(reader.ids)), "an id stands twice"
    return reader


def report(*words: object) -> Any:
    return runner.invoke(app, ["report", *map(str, words)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on rows that would like to be markup."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"prompt": f"{EVIL} {i}", "completion": f"{EVIL} {i}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "general.txt").write_text("Once upon a time there was a cat.\n")
    file = recipe(
        folder,
        data={"train": str(folder / "rows.jsonl"), "eval": str(folder / "rows.jsonl")},
        train={"max_steps": 4, "batch_size": 2, "accumulate": 1, "max_length": 128, "checkpoint_every": 2},
        evaluate={"forgetting": str(folder / "general.txt")},
    )
    result = runner.invoke(app, ["train", str(file)])
    assert result.exit_code == 0, result.output
    return folder / "run"


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "run", ignore=shutil.ignore_patterns("checkpoints", "report.html")))


def test_the_report_of_a_run(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    result = report(folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["report"] == str(folder / "report.html") and found["missing"] == []
    page, results = read(folder / "report.html"), json.loads((folder / "results.json").read_text())
    for title in ("Training loss", "Learning rate", "Gradient norm", "Clip rate", "How the selection moved", "Samples"):
        assert title in page.text, title
    assert f"{results['changed']:,} of {results['weights']:,}" in page.text and "float32" in page.text
    assert "the tolerance is none" in page.text and "the base, bit for bit" in page.text
    assert record.sha256(folder / "delta.safetensors") in page.text and "4 optimizer steps" in page.text
    assert f"{results['forgetting']:+.3f}".replace("-", "−") in page.text
    assert page.tags.count("svg") == 8 and {"q_proj", "down_proj"} <= set(page.words)
    assert str(tmp_path) not in (folder / "report.html").read_text()


def test_data_stays_text(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    assert report(folder).exit_code == 0
    text = (folder / "report.html").read_text()
    assert "<script" not in text and "<img" not in text and "alert(1)&lt;/script&gt;" in text
    assert "{{ 7*7 }}" in read(folder / "report.html").text and "default-src 'none'" in text


def test_the_same_folder_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    folder, first, second = copied(run, tmp_path), tmp_path / "a.html", tmp_path / "b.html"
    assert report(folder, "-o", first).exit_code == report(folder, "-o", second).exit_code == 0
    assert first.read_bytes() == second.read_bytes() and not (folder / "report.html").exists()


def test_what_was_counted_is_what_was_chosen(run: Path) -> None:
    """gmt keeps 0.2 of every tensor; all four steps had a norm above 1 or none, as the norms say."""
    found = record.read(run)
    chosen, changed = found.chosen(), found.changed()
    assert chosen is not None and changed is not None
    assert all(abs(n - 0.2 * chosen.of[name]) <= 1 for name, n in chosen.meant.items())
    assert sum(changed.meant.values()) == json.loads((run / "results.json").read_text())["changed"]
    assert [line["step"] for line in found.selection] == [line["step"] for line in found.resources] == [1, 2, 4]
    assert found.steps[0]["clipped_steps"] == int(found.steps[0]["grad_norm"] > 1.0)
    assert found.resources[0]["host_bytes"] > 50e6 and found.resources[-1]["seconds"] > found.resources[0]["seconds"]


def test_a_run_without_an_end(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    for name in ("results.json", "delta.safetensors", "samples.json", "README.md"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:-2]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    result = report(folder, "--json")
    assert result.exit_code == 0, result.output
    page = read(folder / "report.html")
    assert "This run has no end: what is here is what it left at step 2." in page.text
    assert "Training loss" in page.text and "How the selection moved" in page.text
    assert sum("has not come to its end" in text for text in json.loads(result.stdout)["missing"]) == 3


def test_nothing_but_a_recipe(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(run / "recipe.yaml", tmp_path / "run")
    assert report(tmp_path / "run").exit_code == 0
    assert "no step was logged" in read(tmp_path / "run" / "report.html").text


def test_a_run_of_an_earlier_finetooth(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    for name in ("selection.jsonl", "resources.jsonl", "samples.json"):
        (folder / name).unlink()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "clipped_steps"} for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)))
    result = report(folder)
    assert result.exit_code == 0 and result.stderr.count("not recorded: the run was made by an earlier Finetooth") == 3
    assert "One row; this run noted no more." in read(folder / "report.html").text


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("recipe.yaml", "a: [", "is not the recipe of a run"),
        ("recipe.yaml", "model: 3", "is not the recipe of a run"),
        ("results.json", "{", "results.json cannot be read"),
        ("results.json", "[]", "holds list, and dict was expected"),
        ("results.json", "{}", "has another form than Finetooth writes"),
        ("samples.json", '[{"prompt": 1}]', "has another form than Finetooth writes"),
        ("selection.jsonl", '{"step": 1, "of": [], "chosen": 3}', "has another form than Finetooth writes"),
        ("metrics.jsonl", '{"step": 1, "loss": "a"}', "has another form than Finetooth writes"),
        ("delta.safetensors", "nothing", "delta.safetensors"),
        ("compare.json", '{"runs": 3}', "has another form than Finetooth writes"),
    ],
)
def test_a_file_that_is_none_of_ours(name: str, text: str, says: str, run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    (folder / name).write_text(text)
    result = report(folder)
    assert result.exit_code == 2 and says in result.stderr, result.output
    assert not (folder / "report.html").exists()


def test_what_is_no_run(run: Path, tmp_path: Path) -> None:
    for words, says in (
        ((tmp_path / "nowhere",), "there is no folder"),
        ((tmp_path,), "is neither a run nor a comparison"),
        ((run, "-o", tmp_path), "give a file in a folder that exists"),
        ((run, "-o", tmp_path / "no" / "a.html"), "give a file in a folder that exists"),
    ):
        result = report(*words)
        assert result.exit_code == 2 and says in result.stderr, result.output


@pytest.mark.parametrize("row", ["full", "random"])
def test_a_selection_that_is_made_once(row: str, tmp_path: Path) -> None:
    file = recipe(
        tmp_path, method={"name": row, "keep": None}, evaluate={"task": "none"}, optimizer={"max_grad_norm": 0}
    )
    assert runner.invoke(app, ["train", str(file)]).exit_code == 0
    assert report(tmp_path / "run").exit_code == 0
    page = read(tmp_path / "run" / "report.html")
    assert "It was made once, and did not move." in page.text and "nothing was clipped" in page.text
    found = record.read(tmp_path / "run")
    assert len(found.selection) == 1 and found.chosen() is not None
    assert "How the selection moved" not in page.text and "forgetting was not measured" in page.text


@pytest.mark.parametrize(("chosen", "expected"), [({"a": 10, "b": 30}, 0.25), ({"a": 40, "b": 0}, None)])
def test_what_chance_would_keep(chosen: dict[str, int], expected: float | None) -> None:
    """Of whole tensors it is not known: all of one that is chosen is not chance."""
    line = {"step": 1, "chosen": chosen, "of": {"a": 40, "b": 120}, "first": {}}
    found: Any = record.Record(Path(), None, {}, [], [line], [])  # type: ignore[arg-type]
    assert found.chance() == expected


def compared(folder: Path, labels: tuple[str, ...], **more: Any) -> Path:
    """A comparison's folder, its rows made up, its summary by the arithmetic that `compare` uses."""
    rows = []
    for i, label in enumerate(labels):
        for stage, lrs, seeds in (("sweep", (1e-3, 1e-2), (0,)), ("final", (1e-2,), (0, 1))):
            for lr in lrs:
                for seed in seeds:
                    numbers = {
                        "task_loss": 2 - 0.3 * i + 0.1 * seed + 0.001 / lr,
                        "forgetting": 1.0 + 0.2 * i,
                        "seconds": 9,
                    }
                    costs = {"share": 0.1, "delta_bytes": 1000, "state_bytes": 9000, "peak_bytes": 1e9}
                    same = {"contender": label, "lr": lr, "seed": seed, "stage": stage, "run": f"{i}-{lr}-{seed}"}
                    rows.append({**same, **numbers, **costs, "error": "", **more})
    summary = tally.summary([row for row in rows if row["stage"] == "final"])
    known = {"model": "m", "data": {"train": EVIL}}
    folder.mkdir()
    found = {"recipe": known, "runs": rows, "summary": summary, "remarks": [EVIL]}
    (folder / comparison.COMPARED).write_text(json.dumps(found))
    return folder


def test_the_report_of_a_comparison(tmp_path: Path) -> None:
    folder = compared(tmp_path / "c", ("full", EVIL, *(f"method {i}" for i in range(12))))
    assert report(folder).exit_code == 0
    page = read(folder / "report.html")
    assert page.tags.count("svg") == 1 + 14 and "14 methods on m" in page.text
    for title in ("Table", "Learning against forgetting", "Sweep", "All 42 runs", "★"):
        assert title in page.text, title
    assert "2.000" not in page.text.split("Sweep")[0] or "± " in page.text
    assert EVIL.split("$")[0].split("{{")[0] in "".join(page.words), "the name, whole, as text"


def test_a_comparison_that_measured_less(tmp_path: Path) -> None:
    folder = compared(tmp_path / "c", ("full", "gmt"), forgetting=None)
    found = json.loads((folder / comparison.COMPARED).read_text())
    found["runs"] = [row for row in found["runs"] if row["stage"] == "final"]
    found["runs"][0]["error"] = "it broke"
    (folder / comparison.COMPARED).write_text(json.dumps(found))
    result = report(folder)
    assert result.exit_code == 0 and "not measured: give the recipe a general text" in result.stderr
    page = read(folder / "report.html")
    assert "1 of 4 runs failed" in page.text and "it broke" in page.text and "there was one learning rate" in page.text


@pytest.mark.parametrize("more", [True, False])
def test_names_stand_at_their_points(more: bool) -> None:
    """Also where more of the task's measure is better, as of exact match: names once stood far above the figure, over the page's title."""
    drawn = figures.pareto(
        {"low": (0.2, 3.0, 0.02, 0.1), "high": (0.3, 3.5, 0.0, 0.0)}, ["low"], "exact match", "forgetting", more
    )
    heights = {name: float(y) for y, name in re.findall(r'y="([-\d.]+)"[^>]*>(low|high)<', drawn)}
    bottom = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', drawn)[1])  # type: ignore[index]
    assert 0 < heights["high"] < bottom / 2 < heights["low"] < bottom, heights
