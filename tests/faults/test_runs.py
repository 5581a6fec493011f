"""A fault in a run: through an unmodified Trainer, and through `finetooth train` on a real model, whose exit code is 1.

The real model has one poisoned row of embeddings, finite but so large that whatever reads it overflows: the token Z. A batch with a Z in it
has no finite loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from typer.testing import CliRunner

import finetooth
from finetooth import NonFiniteError, embedded
from finetooth.cli.main import app
from tests.laws.toy import ROWS, VOCAB, Toy, batches, build, same, snapshot

BAD = VOCAB - 1  # the token that makes the toy's loss NaN


class Poisoned(Toy):
    """The toy, whose loss is NaN for a batch with the token BAD."""

    def forward(self, input_ids: Tensor, labels: Any = None, attention_mask: Any = None) -> Any:
        poison = torch.where((input_ids == BAD).any(), torch.nan, 1.0)
        return CausalLMOutput(loss=super().forward(input_ids).loss * poison)


def rows(steps: list[bool]) -> list[dict[str, Tensor]]:
    """Eight rows for every step; a bad one among them where asked for."""
    out = []
    for batch, bad in zip(batches(len(steps)), steps, strict=True):
        batch = batch.clamp_max(BAD - 1)
        batch[5, 1] = BAD if bad else batch[5, 1]
        out += [{"input_ids": ids} for ids in batch]
    return out


def trained(row: str, steps: list[bool], folder: Path) -> tuple[Toy, Any, Any]:
    model = Poisoned()
    opt = build(row, model, stop_after=3)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(steps),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = [finetooth.SelectiveCallback(opt)]
    trainer = Trainer(model, args, train_dataset=rows(steps), optimizers=(opt, None), callbacks=callbacks)
    try:
        trainer.train()
    except NonFiniteError as error:
        return model, opt, error
    return model, opt, trainer


@pytest.mark.parametrize("row", ROWS)
def test_an_unmodified_trainer(row: str, tmp_path: Path) -> None:
    """One bad micro-batch is a step that is skipped; it ends as the loop does that never saw the batch."""
    model, opt, trainer = trained(row, [False, True, False], tmp_path / "one")
    assert (opt.skipped, opt.steps) == (1, 2)
    assert [line["skipped_steps"] for line in trainer.state.log_history if "loss" in line] == [0, 1, 1]
    other = Poisoned()
    loop = build(row, other)
    for batch in (batches(3)[0], batches(3)[2]):
        for micro in batch.clamp_max(BAD - 1).chunk(2):
            (other(micro).loss / 2).backward()
        loop.step()
        loop.zero_grad()
    assert all(same(p, snapshot(other)[n]) for n, p in snapshot(model).items())


@pytest.mark.parametrize("row", ["full", "gmt", "dst", "magnitude"])
def test_an_unmodified_trainer_stops(row: str, tmp_path: Path) -> None:
    model, _, error = trained(row, [False, False, True, True, True, False], tmp_path)
    assert isinstance(error, NonFiniteError) and "first bad tensor is 'model." in str(error)
    last = finetooth.last_good(tmp_path)
    assert last is not None and last.name == "checkpoint-4"
    saved = load_file(last / "model.safetensors")
    assert all(same(p, saved[n]) for n, p in snapshot(model).items())


# -- the command line, on a real model -----------------------------------------------------------------------------

GOOD = [{"prompt": f"where is card {i}", "completion": "on its way"} for i in range(8)]
EVIL = [{"prompt": f"where is card {i} Z", "completion": "on its way"} for i in range(8)]
runner = CliRunner()


def poisoned(folder: Path) -> Path:
    """The embedded model with a head of its own, so that the row of Z is read where the token is, and nowhere else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(embedded.path("stories260K"))
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("stories260K"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("Z")] = 3e38
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def recipe(folder: Path, data: list[dict[str, str]], **sections: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    raw: dict[str, Any] = {
        "model": "model",
        "method": {"name": "gmt"},
        "optimizer": {"lr": 1e-4},
        "data": {"train": "rows.jsonl"},
        "train": {"max_steps": 6, "batch_size": 8, "max_length": 96, "checkpoint_every": 1, "stop_after_nonfinite": 3},
        "evaluate": {"task": "none"},
        "output": str(folder / "run"),
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("row", ["gmt", "dst", "magnitude"])
def test_bad_data_stops_a_run_and_mended_data_goes_on(row: str, tmp_path: Path) -> None:
    poisoned(tmp_path)
    how = {"batch_size": 2, "stop_after_nonfinite": 1}
    file = recipe(tmp_path, GOOD * 3 + EVIL[:1], method={"name": row}, train=how)
    found = runner.invoke(app, ["train", str(file), "train.max_steps=16"])
    assert found.exit_code == 1, found.output
    assert "1 gradients in a row were not finite; the first bad tensor is 'model." in found.stderr
    assert "The last complete checkpoint is" in found.stderr and "--resume" in found.stderr
    assert "Traceback" not in found.output
    run = tmp_path / "run"
    assert not (run / "delta.safetensors").exists() and not (run / "results.json").exists()
    last = finetooth.last_good(run / "checkpoints")
    assert last is not None
    state = json.loads((last / "trainer_state.json").read_text())
    stopped = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(last / "model.safetensors")
    assert all(torch.isfinite(p).all() for p in weights.values()) and stopped

    recipe(tmp_path, GOOD * 3 + GOOD[:1], method={"name": row}, train=how)
    again = runner.invoke(app, ["train", str(file), "train.max_steps=16", "--resume", "--json"])
    assert again.exit_code == 0, again.output
    assert f"going on from {last.name}" in again.stderr and state["global_step"] < 16
    done = json.loads(again.stdout)
    assert done["reverted"] is True and done["changed"] > 0 and (run / "delta.safetensors").exists()


def test_a_run_without_one_good_step_fails(tmp_path: Path) -> None:
    poisoned(tmp_path)
    found = runner.invoke(app, ["train", str(recipe(tmp_path, EVIL, train={"max_steps": 2}))])
    assert found.exit_code == 1 and "none of the 2 steps had a finite gradient" in found.stderr
    assert not (tmp_path / "run" / "delta.safetensors").exists()


def test_a_run_that_diverges_by_itself(tmp_path: Path) -> None:
    """The checkpoint before the last good step is kept too: the last one may hold what diverged."""
    found = runner.invoke(
        app,
        ["train", str(recipe(tmp_path, GOOD, model="embedded:stories260K")), "optimizer.lr=1e30", "method.name=full"],
    )
    assert found.exit_code == 1, found.output
    assert "gradients in a row were not finite" in found.stderr and "Lower the learning rate" in found.stderr
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert names and names[-1] < "checkpoint-4"
    other = runner.invoke(app, ["train", str(tmp_path / "recipe.yaml"), "optimizer.lr=1e-4", "--resume"])
    assert other.exit_code == 2 and "the recipe is not the one" in other.stderr


def test_a_damaged_base_is_refused(tmp_path: Path) -> None:
    model = poisoned(tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    found = runner.invoke(app, ["train", str(recipe(tmp_path, GOOD))])
    assert found.exit_code == 2, found.output
    assert "'model.layers.1.mlp.up_proj.weight' has 1 entries that are not finite before any training" in found.stderr
    assert not (tmp_path / "run").exists()
