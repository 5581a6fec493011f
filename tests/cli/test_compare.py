"""`finetooth compare`: real runs in processes of their own, gone on with after an interruption, and the arithmetic over them."""

from __future__ import annotations

import csv
import io
import json
import math
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from finetooth import compare, outsiders, tally
from finetooth.cli.board import Board
from finetooth.cli.main import app
from finetooth.contest import Entry, contender, contenders
from finetooth.recipe import MethodPart, RecipeError, parse
from tests.cli.test_delta import llama
from tests.cli.test_train import recipe, runner

pytest.importorskip("scipy", reason="intervals: pip install 'finetooth[dev]'")
pytest.importorskip("matplotlib", reason="the plot: pip install 'finetooth[dev]'")


def call(path: Path, *words: str) -> Any:
    return runner.invoke(app, ["compare", str(path), *words])


@pytest.mark.slow
def test_swept_run_and_gone_on_with(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA is PEFT's: pip install 'finetooth[dev]'")
    text = tmp_path / "general.txt"
    text.write_text("Once upon a time there was a cat.\n<|endoftext|>\nThe dog ran home.\n")
    path = recipe(tmp_path, data={"limit": 8, "eval_limit": 4}, evaluate={"task": "loss", "forgetting": str(text)})
    methods = "random:keep=0.1,lora:r=2:embeddings=true"
    words = ["--methods", methods, "--lr", "1e-4,1e-2", "--seeds", "1", "--out", str(tmp_path / "c")]
    first = call(path, *words, "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert [r["error"] for r in found["runs"]] == [""] * 6, first.stderr
    assert len(list((tmp_path / "c" / "base").glob("*.json"))) == 1 and len({r["run"] for r in found["runs"]}) == 4
    for line in found["summary"]:
        swept = {r["lr"]: r["task_loss"] for r in found["runs"] if r["contender"] == line["contender"]}
        assert line["task_loss"] == min(swept.values()) == swept[line["lr"]]
        assert (
            line["delta_bytes"] > 0
            and line["train_peak_bytes"] > 0
            and line["train_seconds"] > 0
            and line["forgetting"] is not None
        )
    with (tmp_path / "c" / "runs.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == [r["run"] for r in found["runs"]]
    assert b"random:keep=0.1" in (tmp_path / "c" / "pareto.svg").read_bytes()
    assert runner.invoke(app, ["report", str(tmp_path / "c")]).exit_code == 0
    assert "random:keep=0.1" in (tmp_path / "c" / "report.html").read_text()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "c" / "runs").rglob("results.json")}
    lost = next(p for p in times if "lora-r-2-embeddings-true-lr-0.01" in str(p))
    lost.unlink()  # as an interruption leaves it
    again = call(path, *words, "--json")
    assert json.loads(again.stdout)["summary"][0] == found["summary"][0]
    assert [p for p in times if p.stat().st_mtime_ns != times[p]] == [lost]
    other = call(path, *words[:6], "--seeds", "1", "--out", str(tmp_path / "c"), "train.max_length=60")
    assert other.exit_code == 2 and "was run with another recipe" in other.stderr
    text.write_text("Once upon a time there was a dog.\n")
    changed = call(path, *words)
    assert changed.exit_code == 2 and "another content of evaluate.forgetting" in changed.stderr


def settled(folder: Path) -> bool:
    """Whether nothing is written there for two seconds, in which such a run makes several checkpoints."""
    seen = {p.name for p in folder.rglob("*")}
    time.sleep(2)
    return seen == {p.name for p in folder.rglob("*")}


@pytest.mark.exhaustive
def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    """`kill -9` of the comparison alone, in its second run: that run ends too, and the same command does it and nothing else."""
    general = tmp_path / "general.txt"
    general.write_text("Once upon a time there was a cat.\n")
    train = {"max_steps": 40, "checkpoint_every": 2, "batch_size": 2, "accumulate": 1, "max_length": 64}
    path = recipe(tmp_path, train=train, evaluate={"task": "loss", "forgetting": str(general)})
    out = tmp_path / "c"
    words = [str(path), "--methods", "random,magnitude", "--seeds", "1", "--threads", "1", "--out", str(out)]
    log, (first, second) = tmp_path / "log", (out / "runs" / f"{n}-lr-0.0001-seed-0" for n in ("random", "magnitude"))
    command = [sys.executable, "-m", "finetooth", "compare", *words]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        while process.poll() is None and not any(second.glob("checkpoints/checkpoint-*/trainer_state.json")):
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL, log.read_text()
    while not settled(second):  # a run that went on without its comparison would write its results
        pass
    assert (first / "results.json").is_file() and not (second / "results.json").exists(), log.read_text()
    ended = (first / "results.json").stat().st_mtime_ns
    again = call(path, *words[1:], "--json")
    assert again.exit_code == 0 and again.stderr.count(": runs") == 1 and "base" not in again.stderr, again.stderr
    assert "going on from checkpoint-" in (out / "logs" / f"{second.name}.txt").read_text()
    found = json.loads(again.stdout)["runs"]
    assert [r["error"] for r in found] == ["", ""] and (first / "results.json").stat().st_mtime_ns == ended
    assert (
        found[0]["train_seconds"] > 0 and found[1]["train_seconds"] is None
    )  # nobody knows how long a resumed run took
    assert not (second / "checkpoints").exists()


RUNNER = """
import json, pathlib
def base(recipe):
    return {"task_loss": 9.0}, []
def train(recipe, before):
    folder = pathlib.Path(recipe.output)
    folder.mkdir(parents=True)
    loss = abs(recipe.optimizer.lr - 0.1) + recipe.train.seed
    results = {"before": before[0], "after": {"task_loss": loss, "left": 1 - loss}, "forgetting": None}
"""
SAVED = """
    (folder / "results.json").write_text(json.dumps(results))
"""


def test_a_protocol_of_its_own_and_rates_followed_outwards(tmp_path: Path) -> None:
    file = tmp_path / "runner.py"
    file.write_text(RUNNER + SAVED)
    words = ["--methods", "full", "--lr", "0.01,0.03", "--seeds", "2", "--jobs", "2"]
    result = call(
        recipe(tmp_path), *words, "--widen", "2", "--runner", str(file), "--out", str(tmp_path / "c"), "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [r["lr"] for r in found["runs"]] == [0.01, 0.03, 0.09, 0.27, 0.09, 0.09]
    assert [r["stage"] for r in found["runs"]] == ["sweep"] * 4 + ["final"] * 2
    (line,) = found["summary"]
    assert (
        line["left"] == pytest.approx(0.49)
        and line["left_sd"] > 0
        and {r["task_loss_before"] for r in found["runs"]} == {9}
    )
    assert not (tmp_path / "c" / "pareto.svg").exists()  # nothing was measured that could be forgotten


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods", "gmt,randon"], "'randon' is unknown: there are full, gmt"),
        (["--methods", "gmt,gmt"], "'gmt' is there twice"),
        (["--methods", "gmt:keep"], "write key=value"),
        (["--methods", "gmt:keep=2.5"], "keep=2.5"),
        (["--methods", "lora:rank=3"], "no option 'rank': there are r, alpha, embeddings"),
        (["--methods", "lora:keep=0.1"], "neither keep nor targets"),
        (["--methods", "lora:embeddings=2"], "lora:embeddings=2: give true or false"),
        (["--methods", "lora:embeddings=true", "merged=true"], "merged: true cannot be had with lora:embeddings"),
        (["--lr", "1e-3,x"], "--lr 1e-3,x: give numbers"),
        (["--lr", "0"], "learning rates are above 0"),
        (["--lr", "1e-3,1e-3"], "a number is there twice"),
        (["--select", "nowhere.jsonl"], "--select: there is no file"),
        (["--runner", "nowhere.py"], "--runner: there is no file"),
        (["--lr", "1e-3", "--widen", "1"], "--widen is about a sweep, and --lr has one"),
        (["--select", __file__], "--select is about a sweep, and --lr has one"),
        (["evaluate.task=none"], "there is nothing to compare by"),
    ],
)
def test_bad_input_runs_nothing(words: list[str], says: str, tmp_path: Path) -> None:
    result = call(recipe(tmp_path), *words, "--out", str(tmp_path / "c"))
    assert result.exit_code == 2 and says in result.stderr and not (tmp_path / "c").exists()


def test_a_run_that_fails_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    file = tmp_path / "runner.py"
    file.write_text(
        RUNNER + "\n    if recipe.method.name == 'full':\n        raise ValueError('empty.jsonl is empty')\n" + SAVED
    )
    words = ["--methods", "full,random", "--seeds", "1", "--runner", str(file), "--out", str(tmp_path / "c"), "--json"]
    result = call(recipe(tmp_path), *words)
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and [bool(r["error"]) for r in found["runs"]] == [True, False]
    assert "1 of 2 runs failed" in found["remarks"][0] and "empty.jsonl" in found["remarks"][0]


def test_a_sweep_of_which_nothing_is_left(tmp_path: Path) -> None:
    file, words = tmp_path / "runner.py", ["--methods", "full", "--lr", "0.01,0.1", "--out", str(tmp_path / "c")]
    file.write_text(RUNNER + "\n    raise ValueError('empty.jsonl is empty')\n")
    result = call(recipe(tmp_path), *words, "--runner", str(file))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    said = result.stderr
    assert "2 of 2 runs failed" in said and "empty.jsonl is empty" in said and "seeds" not in said
    report = runner.invoke(app, ["report", str(tmp_path / "c")])
    assert report.exit_code == 0 and "empty.jsonl is empty" in (tmp_path / "c" / "report.html").read_text()


def test_a_share_below_rank_1_is_refused() -> None:
    """It would be rounded up, to several times the weights that were asked for."""
    pytest.importorskip("peft", reason="SHiRA is PEFT's: pip install 'finetooth[dev]'")
    with pytest.raises(RecipeError, match=r"share=0.01 is less than PEFT trains: rank 1 is 0.11 of the matrices"):
        outsiders.wrapped(llama(False), MethodPart(name="shira", share=0.01), 0)


def test_lora_of_embeddings() -> None:
    """It is drawn from the seed alone, the model begins as the base, and a head that is the same weight has none."""
    pytest.importorskip("peft", reason="LoRA is PEFT's: pip install 'finetooth[dev]'")
    part = MethodPart.model_validate({"name": "lora", "r": 2, "embeddings": True})
    model, tokens, drawn = llama(tied=True), torch.arange(8)[None], []
    plain = model(tokens).logits
    for state in (0, 1):
        torch.manual_seed(state)
        tuned = outsiders.wrapped(deepcopy(model), part, 5)
        assert torch.equal(tuned(tokens).logits, plain)
        drawn.append({name: p for name, p in tuned.named_parameters() if p.requires_grad})
    assert sum("embed_tokens" in name for name in drawn[0]) == 2 and not any("lm_head" in name for name in drawn[0])
    assert all(torch.equal(p, drawn[1][name]) for name, p in drawn[0].items())


def test_nothing_is_generated_where_the_loss_decides(tmp_path: Path) -> None:
    rows = tmp_path / "dev.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    common = parse({"model": "m", "output": "o", "data": {"train": "t", "eval": "e"}, "evaluate": {"task": "bleu"}})
    plan = compare.planned(common, {"methods": "full", "lr": "1e-3,1e-2", "keep": ""}, select=rows, out=tmp_path / "c")
    swept, final = (compare._recipe(plan, Entry(plan.contenders[0], 1e-3, 0), stage) for stage in ("sweep", "final"))
    assert (swept.evaluate.task, swept.data.eval) == ("loss", str(rows))
    assert (final.evaluate.task, final.data.eval) == ("bleu", "e")


def test_budgets_are_for_methods_that_have_one() -> None:
    found = contenders(["full", "hft", "gmt", "random:keep=0.3", "lora"], [0.1, 5], MethodPart())
    assert [c.label for c in found] == ["full", "hft", "gmt:keep=0.1", "gmt:keep=5", "random:keep=0.3", "lora"]
    assert [c.method.keep for c in found] == [None, None, 0.1, 5, 0.3, None]


def test_options_of_the_recipe_stand_for_its_own_method() -> None:
    common = MethodPart(name="gift-sw", keep=0.03, **{"bits": 3})
    assert contender("gift-sw", common).method == common
    assert contender("random", common).method.keep is None
    with pytest.raises(ValueError, match=r"keep=1\.5"):
        contender("random:keep=1.5", common)


def row(label: str, seed: int, loss: float, forgetting: float) -> dict[str, Any]:
    return {
        "contender": label,
        "lr": 1e-3,
        "seed": seed,
        "stage": "final",
        "error": "",
        "task_loss": loss,
        "forgetting": forgetting,
    }


def test_the_board_says_what_has_become_of_every_run() -> None:
    board, one, two = Board(), contender("gmt"), contender("random:keep=0.1")
    for entry in (Entry(one, 1e-3, 0), Entry(one, 3e-3, 0), Entry(two, 1e-3, 0)):
        board.note(entry, "sweep", "waits", None)
    assert board.note(None, "base", "runs", None) == "the base is measured: runs"
    assert board.note(Entry(one, 1e-3, 0), "sweep", "ended", 1.2345) == "1 of 3  sweep gmt lr 0.001 seed 0: 1.234"
    board.note(Entry(one, 3e-3, 0), "sweep", "failed", None)
    board.note(Entry(two, 1e-3, 0), "sweep", "runs", None)
    board.note(Entry(one, 1e-3, 1), "final", "ended", 2.0)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(board)
    lines = [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]
    assert "gmt 1.234 failed 0.001 2.000" in lines and "random:keep=0.1 runs" in lines
    assert lines[0].startswith("3 of 4 runs")


def test_differences_are_within_a_seed() -> None:
    """Seeds differ far more than methods: only the paired difference sees it."""
    rows = [row("a", s, 1.0 + s, 0.5) for s in range(3)] + [
        row("b", s, 1.1 + s + e, 0.4) for s, e in enumerate((0.0, 0.01, -0.01))
    ]
    a, b = tally.summary(rows)
    assert (
        a["task_loss"] == 2.0
        and a["task_loss_sd"] == 1.0
        and "task_loss_difference" not in {k for k, v in a.items() if v is not None}
    )
    assert b["task_loss_difference"] == pytest.approx(0.1)
    assert b["task_loss_interval"] == pytest.approx(
        4.302653 * 0.01 / math.sqrt(3), rel=1e-5
    )  # t(0.975, 2 degrees) from a table


def test_a_diverged_rate_is_not_the_best() -> None:
    rows = [
        {**row("a", 0, math.nan, 1.0), "lr": 1.0},
        {**row("a", 0, 2.0, 1.0), "lr": 0.1},
        {**row("a", 0, 3.0, 0.0), "lr": 0.01},
    ]
    assert tally.best(rows) == {"a": 0.1}


def test_differences_are_from_a_contender_that_failed_too() -> None:
    """Then there are none: the next one does not take its place."""
    rows = [{**row("a", 0, 1.0, 1.0), "error": "out of memory"}, row("b", 0, 2.0, 1.0), row("c", 0, 3.0, 1.0)]
    for found in (tally.summary(rows, "a"), tally.summary(rows[1:], "a")):
        assert [line.get("task_loss_difference") for line in found] == [None] * len(found)


def test_what_a_reader_must_know() -> None:
    rows = [
        {**row("a", 0, loss, 1.0), "lr": lr, "stage": "sweep", "run": f"a-{lr}"}
        for lr, loss in ((0.1, 1.0), (0.01, 2.0))
    ]
    said = tally.remarks([*rows, {**rows[0], "stage": "final"}])
    assert "at an end of the sweep" in said[0] and "a (0.1)" in said[0] and "fewer than three seeds" in said[1]
