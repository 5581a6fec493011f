"""Trainers that write their own texts go on where none are left from the last generation, in the order of the right epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import finetooth
from finetooth.hf import SelectiveCallback
from tests.trainers import cases

# 16 prompts with two texts each: a generation writes four batches of two, used twice, which are four steps; four generations
# are an epoch of sixteen.
KEPT: dict[str, Any] = {
    "steps_per_generation": 4,
    "num_iterations": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "logging_steps": 1,
}


def grpo(out: Path, **given: Any) -> tuple[Any, finetooth.SelectiveAdamW]:
    torch.manual_seed(0)
    model = cases.load()
    opt = finetooth.build("random", model, lr=1e-3, keep=0.1)
    return cases.trainer("grpo", model, opt, out, {"callbacks": [SelectiveCallback(opt)]}, **(KEPT | given)), opt


def test_goes_on_in_the_second_epoch(tmp_path: Path) -> None:
    straight, _ = grpo(tmp_path / "straight", max_steps=24, save_steps=20)
    straight.train()
    assert straight.state.epoch > 1
    resumed, opt = grpo(tmp_path / "resumed", max_steps=24, save_steps=20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-20"))
    assert opt.steps == 24
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_save_between_two_generations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"save_steps=6 saves what cannot be gone on from.*for 8 batches.*multiple of 4"
    ):
        grpo(tmp_path, max_steps=12, save_steps=6)[0].train()
    made, opt = grpo(tmp_path, max_steps=2, save_steps=1)
    made.remove_callback(SelectiveCallback)
    made.add_callback(SelectiveCallback(opt, seal=False))
    made.train()
    with pytest.raises(ValueError, match=r"the checkpoint is of step 1; texts are written for 8 batches"):
        grpo(tmp_path, max_steps=2, save_steps=4)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
