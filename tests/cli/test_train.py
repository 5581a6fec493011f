"""The main job through the real command line, on the embedded model; and what bad input gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from trl import SFTTrainer
from typer.testing import CliRunner

import finetooth.train
import finetooth.trainer
from finetooth.cli.main import app

runner = CliRunner()


def recipe(folder: Path, **sections: Any) -> Path:
    raw: dict[str, Any] = {
        "model": "embedded:stories260K",
        "method": {"name": "gmt", "keep": 0.2},
        "data": {"train": "embedded:banking77/train", "eval": "embedded:banking77/test", "limit": 24, "eval_limit": 8},
        "train": {"max_steps": 3, "batch_size": 4, "accumulate": 2, "max_length": 96},
        "evaluate": {"task": "exact_match", "max_new_tokens": 4},
        "output": str(folder / "run"),
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def call(*words: object) -> Any:
    result = runner.invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_checkpoints_are_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only saving moves: LoRA, which saves no checkpoint, is compared by the same seconds."""
    now, save = [0.0], SFTTrainer._save_checkpoint

    def slow(*given: Any) -> None:
        save(*given)
        now[0] += 100.0

    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", slow)
    for module in (finetooth.train, finetooth.trainer):
        monkeypatch.setattr(module, "time", clock)
    found = call("train", recipe(tmp_path), "--json")
    assert now[0] >= 100.0 and found["train_seconds"] == 0.0


def test_a_run_folder(tmp_path: Path) -> None:
    found = call("train", recipe(tmp_path), "--json")
    run = tmp_path / "run"
    names = {"recipe.yaml", "environment.json", "metrics.jsonl", "delta.safetensors", "results.json", "README.md"}
    assert names <= {p.name for p in run.iterdir()}
    assert found["reverted"] is True and found["changed"] > 0 and found["run"] == str(run)
    assert {"task_loss", "exact_match"} == set(found["after"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1 and lines[0]["grad_norm"] > 0 and lines[-1]["step"] == 3
    card = (run / "README.md").read_text()
    assert "Gradient-Mask Tuning" in card and "stories260K" in card and str(tmp_path) not in card.split("## Recipe")[0]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["accumulate"] == 2
    # the delta on the untouched base is what was trained: the command line agrees with itself
    info = call("delta", "info", run / "delta.safetensors", "--json")
    assert info["changed"] == found["changed"] and info["method"] == "gmt"


@pytest.mark.parametrize("row", ["full", "gmt-strict", "dst", "gift-sw", "hft", "random", "grad", "snip", "magnitude"])
def test_every_row_runs(row: str, tmp_path: Path) -> None:
    keep = {"gift-sw": 8}.get(row)
    file = recipe(tmp_path, method={"name": row, "keep": keep}, evaluate={"task": "loss", "max_new_tokens": 1})
    found = call("train", file, "--json")
    assert found["reverted"] is True and found["changed"] > 0
    assert found["changed"] == found["weights"] or row in ("full", "gmt-strict") or found["changed"] < found["weights"]


def test_bf16_and_quantized_columns(tmp_path: Path) -> None:
    file = recipe(
        tmp_path,
        method={"name": "gift-sw", "keep": 8},
        train={"precision": "bf16"},
        evaluate={"task": "loss", "max_new_tokens": 1, "quantized_bits": 4},
    )
    found = call("train", file, "merged=true", "--json")
    assert found["reverted"] is True
    assert found["after"]["task_loss_at_4_bits"] != found["after"]["task_loss"]
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").dtype == torch.bfloat16


def test_the_command_line_is_the_python_interface(tmp_path: Path) -> None:
    """Law 10 in part: the same recipe through `finetooth.train` gives the same file, bit for bit."""
    from finetooth.recipe import load
    from finetooth.train import train

    call("train", recipe(tmp_path), "--json")
    train(load(tmp_path / "recipe.yaml", [f"output={tmp_path / 'other'}"]))
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "delta.safetensors") for name in ("run", "other"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("row", ["gmt", "gift-sw"])
def test_a_killed_run_resumes_to_the_same_bits(row: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    keep = {"gift-sw": 8}.get(row)
    shared = {"method": {"name": row, "keep": keep}, "evaluate": {"task": "none"}}
    train = {"max_steps": 60, "checkpoint_every": 5, "batch_size": 2, "accumulate": 1, "max_length": 64}
    file = recipe(tmp_path, **shared, train=train)
    command = [sys.executable, "-m", "finetooth", "train", str(file)]
    run, straight = tmp_path / "run", tmp_path / "straight"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and not (run / "checkpoints" / "checkpoint-5" / "trainer_state.json").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (run / "delta.safetensors").exists(), "the run ended before it could be killed"
    call("train", file, "--resume", "--json")
    call("train", file, f"output={straight}", "--json")
    one, two = load_file(run / "delta.safetensors"), load_file(straight / "delta.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and len(steps) == len(set(steps)) + 1  # the last step also has the summary


BAD = [
    (["method.name=gmtt"], "Did you mean 'gmt'"),
    (["method.name=dst", "method.relativ=true"], "Did you mean 'relative'"),
    (["optimiser.lr=1.0e-3"], "Did you mean 'optimizer'"),
    (["train.batchsize=3"], "Did you mean 'batch_size'"),
    (["data.train=nowhere.jsonl"], "there is no file"),
    (["data.train=${NOT_SET_ANYWHERE}/x"], "NOT_SET_ANYWHERE is not set"),
    (["model=embedded:llama"], "the package has"),
    (["model=./nowhere/at/all"], "neither a folder"),
    (["train.precision=int4"], "'fp32', 'bf16'"),
    (["train.max_length=100000"], "more than the model's context"),
    (["train.max_length=4"], "none of the 24 rows has a token left to learn"),
    (["method.keep=1.5"], "out of range"),
    (["nonsense"], "is not an override"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[c[-1] for c, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(changes: list[str], message: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["train", str(recipe(tmp_path)), *changes])
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists(), "a run that cannot start leaves nothing in the way"


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    result = runner.invoke(app, ["train", str(recipe(tmp_path))])
    assert result.exit_code == 2 and "not empty" in result.stderr
    result = runner.invoke(app, ["train", str(recipe(tmp_path)), "--resume"])
    assert result.exit_code == 2 and "no run to resume" in result.stderr
    assert (tmp_path / "run" / "precious").read_text() == "mine"


def test_help_does_not_load_torch() -> None:
    code = "import sys; from typer.testing import CliRunner; from finetooth.cli.main import app; r = CliRunner().invoke(app, ['--help']); sys.exit(10 * r.exit_code + ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_methods() -> None:
    rows = call("methods", "--json")
    assert [r["name"] for r in rows] == [
        "full",
        "gmt",
        "gmt-strict",
        "dst",
        "gift-sw",
        "hft",
        "nano",
        "fish",
        "lift",
        "ssu",
        "spectrum",
        "rows",
        "spiel",
        "lisa",
        "badam",
        "random",
        "grad",
        "snip",
        "magnitude",
    ]
    assert all(r["deviations"] and r["paper"] for r in rows)
    page = runner.invoke(app, ["methods", "dst"])
    assert "2411.08610" in page.stdout and "silo" in page.stdout and "27 with keep=0.02" in page.stdout
    assert runner.invoke(app, ["methods", "dts"]).exit_code == 2


@pytest.mark.parametrize(("given", "said"), [({}, True), ({"lr": 1e-4}, False)])
def test_a_rate_that_nobody_chose(given: dict[str, float], said: bool, tmp_path: Path) -> None:
    """Said once, for a row that wants a larger one; not of the same number where it was written down."""
    method = {"name": "random", "keep": 0.01}
    found = runner.invoke(app, ["train", str(recipe(tmp_path, method=method, optimizer=given)), "--json"])
    assert found.exit_code == 0 and ("optimizer.lr is left at 0.0001" in found.stderr) is said


def test_square_brackets_are_shown(tmp_path: Path) -> None:
    rows = [{"prompt": "name[The Punter], eatType[pub]", "completion": "The Punter is a [cosy] pub."}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")}
    result = runner.invoke(app, ["train", str(recipe(tmp_path, data=data)), "train.max_steps=1"])
    assert result.exit_code == 0, result.output
    assert "eatType[pub]" in result.stdout and "[cosy]" in result.stdout


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_chat_and_text_rows(kind: str, tmp_path: Path) -> None:
    """A local model folder with a chat template; the loss is on the last answer, or on all of a text."""
    import shutil

    from transformers import AutoTokenizer

    from finetooth import embedded

    shutil.copytree(embedded.path("stories260K"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "Where is my card?"}, {"role": "assistant", "content": "On its way."}]
    row = {"messages": turns} if kind == "messages" else {"text": "The card is on its way."}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    data = {"train": "rows.jsonl", "eval": "rows.jsonl"}
    file = recipe(tmp_path, model="model", data=data, evaluate={"task": "loss", "max_new_tokens": 4})
    found = call("train", file, "optimizer.lr=1.0e-2", "--json")
    assert found["reverted"] is True and found["after"]["task_loss"] < found["before"]["task_loss"]
    assert (found["sample"].get("expected") == "On its way.") is (kind == "messages")
