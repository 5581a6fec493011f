"""`finetooth eval` through the real command line: a base, a run before and after, local tasks and the harness's."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetooth import embedded
from finetooth.cli.main import app
from finetooth.data import rows
from tests.cli.test_train import call, recipe, runner

FORGETTING = "Once upon a time there was a little girl.\n<|endoftext|>\nTom had a red ball. He ran and ran.\n"


def refused(*words: object) -> str:
    result = runner.invoke(app, [str(w) for w in words])
    assert result.exit_code == 2 and "Traceback" not in result.stderr, result.output
    return result.stderr


def banking(folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows with four intents to choose from, the right one at every place in turn."""
    given = [row for row, _ in itertools.islice(rows(embedded.path("banking77/test")), count)]
    intents = sorted({row["completion"] for row in given})
    out = []
    for i, row in enumerate(given):
        others = [text for text in intents if text != row["completion"]]
        choices = [others[(7 * i + 3 * k) % len(others)] for k in range(4)]
        choices[i % 4] = row["completion"]
        out.append({"prompt": row["prompt"], "completion": row["completion"], "choices": choices, "label": i % 4})
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in out))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that has learnt something, and what `finetooth train` said of it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "general.txt").write_text(FORGETTING)
    data = {"eval_limit": 16, "limit": None, "separator": ""}
    how = {"task": "exact_match", "max_new_tokens": 8, "forgetting": "general.txt"}
    train = {"max_steps": 40, "batch_size": 16, "accumulate": 1}
    file = recipe(folder, data=data, evaluate=how, train=train, optimizer={"lr": 2e-3})
    return folder / "run", call("train", file, "--json")


def test_a_run_gives_the_numbers_of_its_training_again(run: tuple[Path, Any]) -> None:
    """To the last bit: the same code on the same weights, which base plus delta are."""
    folder, trained = run
    found = call("eval", folder, "--json")
    assert found["before"] == trained["before"] and found["after"] == trained["after"]
    assert (
        found["forgetting"] == trained["forgetting"] == found["after"]["general_loss"] - found["before"]["general_loss"]
    )
    assert found["forgetting"] != 0 and found["after"]["task_loss"] < found["before"]["task_loss"]
    written = json.loads((folder / "eval.json").read_text())
    assert written == {**found, "run": "run"} and str(folder.parent) not in json.dumps(written)
    assert written["environment"]["torch"] == torch.__version__ and not (folder / "merged").exists()


def test_changes_to_the_recipe_and_a_limit(run: tuple[Path, Any]) -> None:
    folder, trained = run
    found = call("eval", folder, "evaluate.task=loss", "evaluate.forgetting=null", "--limit", 4, "--json")
    assert set(found["after"]) == {"task_loss"} and found["forgetting"] is None and found["data"]["rows"] == 4
    assert found["limit"] == 4 and found["after"] != trained["after"]


def test_a_recipe_is_its_base_and_nothing_is_written(run: tuple[Path, Any], tmp_path: Path) -> None:
    folder, trained = run
    found = call("eval", folder.parent / "recipe.yaml", f"output={tmp_path / 'other'}", "--json")
    assert found["before"] == trained["before"] and found["after"] is found["forgetting"] is found["run"] is None
    assert not (tmp_path / "other").exists()


def test_as_a_table(run: tuple[Path, Any]) -> None:
    folder, trained = run
    told = runner.invoke(app, ["eval", str(folder)])
    assert told.exit_code == 0, told.output
    for words in ("before", "after", "task loss", "exact match", "loss on the general text", "eval.json"):
        assert words in told.stdout
    assert f"{trained['forgetting']:+.3f}" in told.stdout and "forgetting (after − before)" in told.stdout
    base = runner.invoke(app, ["eval", str(folder.parent / "recipe.yaml")])
    assert "base" in base.stdout and "after" not in base.stdout and "eval.json" not in base.stdout


def test_another_base_is_refused(run: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(embedded.path("stories260K"), tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    before = (run[0] / "eval.json").read_bytes() if (run[0] / "eval.json").exists() else b""
    assert "'model.norm.weight' is not that of" in refused("eval", run[0], f"model={tmp_path / 'other'}")
    assert ((run[0] / "eval.json").read_bytes() if (run[0] / "eval.json").exists() else b"") == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["evaluate.task=bleus"], "'exact_match', 'choice', 'bleu', 'rouge'"),
        (["evaluate.task=choice", "data.eval=null"], "needs data.eval"),
        (["evaluate.task=choice"], "line 1: no choices"),
        (["evaluate.choices=[a, b]"], "read by task: choice"),
        (["evaluate.task=none"], "there is nothing to measure"),
        (["--include", "tasks"], "name the tasks"),
        (["--limit", "0"], "greater than or equal to 1"),
    ],
)
def test_bad_input_before_a_weight_is_read(
    changes: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetooth import pretrained

    monkeypatch.setattr(pretrained, "AutoModelForCausalLM", None)
    assert said in refused("eval", recipe(tmp_path), *changes)


def test_a_run_that_has_not_ended(tmp_path: Path) -> None:
    assert "it has no recipe.yaml" in refused("eval", tmp_path)
    recipe(tmp_path)
    assert "it has no delta.safetensors" in refused("eval", tmp_path)
    assert "there is no recipe" in refused("eval", tmp_path / "nowhere")


@pytest.mark.parametrize("task", ["choice", "bleu", "rouge"])
def test_local_tasks(task: str, tmp_path: Path) -> None:
    """Before and after, in training too; a row that the cut leaves nothing of counts against the model."""
    if task != "choice":
        pytest.importorskip({"bleu": "sacrebleu", "rouge": "rouge_score"}[task], reason="needs the extra eval")
    given = banking(tmp_path, 12)
    long = {**given[0], "prompt": "a " * 200}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*given, long]))
    file = recipe(tmp_path, data={"eval": "rows.jsonl", "eval_limit": None}, evaluate={"task": task, "batch_size": 5})
    trained = call("train", file, "optimizer.lr=5.0e-3", "--json")
    found = call("eval", tmp_path / "run", "--json")
    names = {
        "choice": {"choice_accuracy", "choice_accuracy_per_character"},
        "bleu": {"bleu"},
        "rouge": {"rouge1", "rouge2", "rougeL"},
    }[task]
    assert set(found["after"]) == {"task_loss", *names}
    assert found["after"] == trained["after"] and found["before"] == trained["before"]
    if task == "choice":
        assert found["after"]["choice_accuracy"] * 13 == pytest.approx(round(found["after"]["choice_accuracy"] * 13))
        assert found["after"]["choice_accuracy"] <= 12 / 13


TASK: dict[str, Any] = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def harness_task(folder: Path, name: str, file: Path) -> Path:
    (folder / "tasks").mkdir(exist_ok=True)
    kwargs = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
    (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **TASK, "dataset_kwargs": kwargs}))
    return folder / "tasks"


@pytest.mark.slow  # the harness reads 14,000 task files
def test_the_harness_and_our_own_choice_agree(run: tuple[Path, Any], tmp_path: Path) -> None:
    """A multiple-choice task of lm-evaluation-harness on the same rows: the same accuracies, before and after.

    The harness parts prompt and choice by a space, which this tokenizer makes of an empty separator.
    """
    pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'finetooth[eval]'")
    given = banking(tmp_path, 60)
    tasks = harness_task(tmp_path, "banking_choice", tmp_path / "choice.jsonl")
    change = [f"data.eval={tmp_path / 'choice.jsonl'}", "data.eval_limit=null", "evaluate.task=choice"]
    found = call("eval", run[0], *change, "--tasks", "banking_choice", "--include", tasks, "--json")
    for when in ("before", "after"):
        assert found[when]["banking_choice/acc"] == pytest.approx(found[when]["choice_accuracy"], abs=1e-12)
        normalized = found[when]["choice_accuracy_per_character"]
        assert found[when]["banking_choice/acc_norm"] == pytest.approx(normalized, abs=1e-12)
    assert found["after"]["choice_accuracy"] > max(0.3, found["before"]["choice_accuracy"]) and len(given) == 60
    assert found["tasks"] == ["banking_choice"]


@pytest.mark.slow  # the harness reads 14,000 task files
def test_the_harness_alone_and_limited(run: tuple[Path, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'finetooth[eval]'")
    banking(tmp_path, 20)
    tasks = harness_task(tmp_path, "banking_choice", tmp_path / "choice.jsonl")
    generator = torch.get_rng_state()
    file = run[0].parent / "recipe.yaml"
    change = ["data.eval=null", "evaluate.task=none", "evaluate.forgetting=null"]
    found = call("eval", file, *change, "--tasks", "banking_*", "--include", tasks, "--limit", 3, "--json")
    assert found["before"]["banking_choice/acc"] * 3 == pytest.approx(round(found["before"]["banking_choice/acc"] * 3))
    assert set(found["before"]) >= {"banking_choice/acc", "banking_choice/acc_norm"} and found["after"] is None
    assert torch.equal(generator, torch.get_rng_state()), "the harness has seeded torch's generator"


@pytest.mark.slow  # the harness reads 14,000 task files
def test_an_unknown_task_is_named_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'finetooth[eval]'")
    from finetooth import pretrained

    monkeypatch.setattr(pretrained, "AutoModelForCausalLM", None)
    said = refused("eval", recipe(tmp_path), "--tasks", "arc_esay")
    assert "'arc_esay'" in said and "Did you mean 'arc_easy'" in said
    assert "is no folder" in refused("eval", recipe(tmp_path), "--tasks", "arc_easy", "--include", tmp_path / "nowhere")


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'finetooth[eval]'" in refused("eval", recipe(tmp_path), "--tasks", "arc_easy")
