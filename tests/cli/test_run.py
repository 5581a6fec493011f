"""What a run writes, for those who read it: JSON, a model card, a metrics file that a kill cannot spoil."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from finetooth import run
from finetooth.card import card as make_card
from finetooth.cli.main import app
from finetooth.delta import Delta
from finetooth.hf import SelectiveCallback
from finetooth.lines import Lines
from finetooth.recipe import Recipe, parse
from tests.cli.test_train import call, recipe, runner

MINE: dict[str, Any] = {"model": "m", "data": {"train": "t"}, "output": "o"}
RESULTS: dict[str, Any] = {
    "base": "base",
    "before": {"task_loss": 2.0},
    "after": {"task_loss": 1.0},
    "changed": 1,
    "weights": 10,
    "share": 0.1,
    "delta_bytes": 100,
    "reverted": True,
}


def carded(model: str, base: str) -> str:
    made: Recipe = parse({"model": model, "data": {"train": "/home/somebody/rows.jsonl"}, "output": "/home/somebody/o"})
    return make_card(made, {**RESULTS, "base": base, "revision": "abc"}, "a paper", run.environment())


def python(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def test_a_card_says_where_the_base_is(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for model, base, wanted in (
        ("org/name", "org/name", "base = 'org/name'"),
        (str(folder), "base", "base = 'path/to/base'  # the base was a local folder"),
    ):
        card = carded(model, base)
        assert wanted in python(card) and "/home/" not in card and str(tmp_path) not in card
        front = yaml.safe_load(card.split("---")[1])
        assert front.get("base_model") == ("org/name" if model == "org/name" else None)
        assert front.get("base_model_relation") == ("adapter" if model == "org/name" else None)
        assert front["library_name"] == "finetooth" and front["tags"] == ["finetooth", "gmt"]
        assert "at revision `abc`" in card and f"| torch | {run.environment()['torch']} |" in card


def test_a_card_repeats_the_recipe_and_the_results() -> None:
    card = carded("org/name", "org/name")
    told = parse(yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]))
    assert told.data.train == "rows.jsonl" and told.model_dump()["optimizer"] == parse(MINE).model_dump()["optimizer"]
    assert "| task loss | 2.0000 | 1.0000 |" in card and "bit for bit: yes" in card and "a paper" in card


def test_the_card_of_an_embedded_base_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("train", recipe(tmp_path, evaluate={"task": "none"}), "--json")
    monkeypatch.chdir(tmp_path / "run")
    card = Path("README.md").read_text()
    space: dict[str, Any] = {}
    exec(python(card), space)
    assert space["inverse"].base.tuned is True and not [*Path("checkpoints").rglob("README.md")]
    assert str(tmp_path) not in card + Path("results.json").read_text()
    assert str(tmp_path) not in json.dumps(call("delta", "info", "delta.safetensors", "--json"))


def test_no_json_has_nan(tmp_path: Path) -> None:
    run.write_json(tmp_path / "r.json", {"a": [math.nan, 1.5], "b": {"c": -math.inf}})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}
    opt, state = (
        SimpleNamespace(grad_norm=math.inf, skipped=0, clipped=0, max_grad_norm=0.0),
        SimpleNamespace(global_step=1, is_world_process_zero=True, log_history=[]),
    )
    SelectiveCallback(opt, tmp_path / "m.jsonl").on_log(  # type: ignore[arg-type]
        None, state, None, {"loss": math.nan, "learning_rate": 0.5}
    )
    line = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": None, "learning_rate": 0.5, "grad_norm": None, "skipped_steps": 0}


def test_json_on_stdout_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    from finetooth.cli import show

    show.results({"before": {"task_loss": math.nan}}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"before": {"task_loss": None}}


def test_nothing_measured_is_no_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    from finetooth.cli import show

    told = {
        **RESULTS,
        "method": "gmt",
        "seconds": 1,
        "run": "run",
        "sample": None,
        "skipped_steps": 0,
        "forgetting": None,
    }
    for found in (told, {**told, "before": {}, "after": {}}):
        show.results(found, as_json=False)
        out = capsys.readouterr().out
        assert "base fine-tuned with gmt, 1 s" in out
        assert ("after" in out) == ("task loss" in out) == bool(found["after"])


def test_a_recipe_is_told_section_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    from finetooth.cli import show

    show.facts({"recipe": {"model": "m", "data": {"separator": "\n", "eval": None}}}, False, "a delta")
    lines = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert lines == ["model: m", r'data: {"separator": "\n"}']


def test_the_last_step_is_logged_and_reported(tmp_path: Path) -> None:
    """Also where its number is no multiple of the interval: else the bar ends with the loss of long ago."""
    from finetooth import train
    from finetooth.recipe import load

    seen: list[tuple[int, int, float | None]] = []
    train.train(load(recipe(tmp_path, evaluate={"task": "none"})), progress=lambda *facts: seen.append(facts))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3]
    assert seen[-1] == (3, 3, lines[1]["loss"]) and lines[1]["loss"] != lines[0]["loss"]


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "train_runtime": 9}\n{"step": 3}\n{"step": 2, "lo')
    assert Lines(file).cut(2) == Lines(file).read() == [{"step": 1}, {"step": 2}]
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n', "nor the summary, which the resumed run writes again"


def test_evaluation_rows_that_are_lost_are_misses(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a " * 60, "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = recipe(tmp_path, data={"eval": "rows.jsonl"}, train={"max_length": 48})
    result = runner.invoke(app, ["train", str(file), "--json"])
    assert "cut to train.max_length: 1 of 2 evaluation rows" in result.stderr and "as misses" in result.stderr
    found = json.loads(result.stdout)
    assert found["data"]["eval"] == {"rows": 2, "truncated": 1, "without_target": 1, "tokens_learnt": 2}
    assert found["data"]["train"]["rows"] == 24 and found["run"] == str(tmp_path / "run")


def test_exact_match_counts_all_that_were_to_be_asked() -> None:
    from finetooth.data import Tokens
    from finetooth.evaluate import exact_match

    assert exact_match(["b"], [Tokens([1], [1], 0, "b")], None, rows=4) == 0.25


def test_exact_match_on_texts_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetooth import pretrained, train
    from finetooth.recipe import load

    (tmp_path / "rows.jsonl").write_text('{"text": "Once upon a time"}\n')
    monkeypatch.setattr(pretrained, "AutoModelForCausalLM", None)
    with pytest.raises(ValueError, match="texts only"):
        train.train(load(recipe(tmp_path, data={"eval": "rows.jsonl"})))


def test_the_bits_are_measured_in_the_recipes_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetooth import evaluate, train
    from finetooth.recipe import load

    sizes = []
    real = evaluate.task_loss
    monkeypatch.setattr(
        evaluate,
        "task_loss",
        lambda m, e, pad, batch_size=64: (sizes.append(batch_size), real(m, e, pad, batch_size))[1],
    )
    how = {"task": "loss", "max_new_tokens": 1, "quantized_bits": 4, "batch_size": 3}
    train.train(load(recipe(tmp_path, method={"name": "gift-sw", "keep": 8}, evaluate=how)))
    assert sizes == [3, 3, 3]


def test_targets_rounding_and_decay_reach_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetooth import jobs

    given, real = {}, jobs.build
    monkeypatch.setattr(jobs, "build", lambda *a, **k: (given.update(k), real(*a, **k))[1])
    file = recipe(tmp_path, method={"name": "dst", "keep": 0.1}, train={"precision": "bf16"}, evaluate={"task": "none"})
    changes = ["method.targets=all", "optimizer.rounding=nearest", "optimizer.decay_to=base"]
    found = call("train", file, *changes, "--json")
    assert (given["targets"], given["rounding"], given["decay_to"]) == ("all", "nearest", "base")
    assert found["reverted"] is True
    assert "model.embed_tokens.weight" in Delta.load(tmp_path / "run" / "delta.safetensors").changes


def test_a_run_resumes_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, output="run", evaluate={"task": "none"}, train={"checkpoint_every": 2})
    call("train", "recipe.yaml", "--json")
    monkeypatch.chdir(tmp_path / "deep")
    found = call("train", "../recipe.yaml", "output=../run", "--resume", "--json")
    assert found["run"] == str(tmp_path / "run") and found["reverted"] is True
