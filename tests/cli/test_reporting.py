"""Reporters: they write what metrics.jsonl says, and what cannot work is said before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import finetooth
from finetooth.cli.main import app
from finetooth.hf import SelectiveCallback
from tests.cli.test_train import call, recipe, runner


def test_tensorboard_shows_what_the_metrics_say(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="reads the event file back: pip install 'finetooth[dev]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    call("train", recipe(tmp_path, train={"report_to": ["tensorboard"]}, evaluate={"task": "none"}), "--json")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/loss", "train/grad_norm", "train/learning_rate"} <= set(events.Tags()["scalars"])
    for key in ("loss", "grad_norm", "learning_rate", "clipped_steps"):  # it prints ten
        written = {line["step"]: line[key] for line in lines if key in line}
        shown = {event.step: event.value for event in events.Scalars(f"train/{key}")}
        assert shown == pytest.approx(written, rel=1e-6), key  # event files hold float32
    assert len({line["grad_norm"] for line in lines if "loss" in line}) == 2


def test_wandb_shows_the_same_and_leaves_stdout_alone(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="runs W&B offline: pip install 'finetooth[dev]'")
    wanted = recipe(tmp_path, train={"report_to": ["wandb"]}, evaluate={"task": "none"})
    command = [sys.executable, "-m", "finetooth", "train", str(wanted), "--json"]
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["method"] == "gmt"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    for key in ("loss", "grad_norm", "learning_rate", "clipped_steps"):  # it prints ten
        shown = re.search(rf"train/{key} +([-\d.e]+)$", done.stderr, re.MULTILINE)  # of the summary that W&B prints
        assert shown and float(shown[1]) == pytest.approx(last[key], rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["tensorbord"], "'tensorbord' is unknown. Did you mean 'tensorboard'?"),
        (["comet_ml"], "'comet_ml' is not installed: install its package"),
    ],
)
def test_a_reporter_that_cannot_work_is_refused(
    names: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetooth import pretrained

    monkeypatch.setattr(pretrained, "AutoTokenizer", None)
    result = runner.invoke(app, ["train", str(recipe(tmp_path, train={"report_to": names}))])
    assert result.exit_code == 2 and says in result.stderr and not (tmp_path / "run").exists()


class Reporter(TrainerCallback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])


def test_a_trainer_of_your_own(tmp_path: Path) -> None:
    """A reporter that was given before our callback sees the optimizer's norm all the same."""
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **size))
    opt, reporter = finetooth.build("gmt", model, lr=1e-3, max_grad_norm=None), Reporter()
    ids = torch.arange(8)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, max_grad_norm=0.0,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids}] * 4
    callbacks = [reporter, SelectiveCallback(opt, tmp_path / "metrics.jsonl")]
    trainer = Trainer(model, args, train_dataset=rows, optimizers=(opt, None), callbacks=callbacks)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    true = [line["grad_norm"] for line in lines if "loss" in line]
    assert reporter.norms[: len(true)] == true and len(true) == 2
