"""An unmodified Trainer with our callback: its checkpoints are sealed, a damaged one is passed over, what cannot work is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import finetooth
from finetooth.hf import SelectiveCallback
from finetooth.saved import MANIFEST, fault


def trainer(out: Path, **given: Any) -> tuple[Trainer, finetooth.SelectiveAdamW]:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.2, **size))
    opt = finetooth.build("gmt-strict", model, lr=1e-2)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in torch.arange(96).view(12, 8) % 64]
    settings = {"max_steps": 8, "save_steps": 2, "save_total_limit": 2, "per_device_train_batch_size": 2}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(str(out), **settings | quiet | given)
    data, callback = Dataset.from_list(rows), SelectiveCallback(opt)
    return Trainer(model, args, train_dataset=data, optimizers=(opt, None), callbacks=[callback]), opt


def test_sealed_damaged_and_resumed_from_the_one_before(tmp_path: Path) -> None:
    straight, _ = trainer(tmp_path / "straight")
    straight.train()
    broken, _ = trainer(tmp_path / "out")
    broken.train()
    sealed = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert sealed == ["checkpoint-6", "checkpoint-8", MANIFEST] and fault(tmp_path / "out" / "checkpoint-8") is None
    weights = tmp_path / "out" / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    said: list[str] = []
    good = finetooth.last_good(tmp_path / "out", said.append)
    assert good == tmp_path / "out" / "checkpoint-6" and "model.safetensors has another sha256" in said[0]
    resumed, _ = trainer(tmp_path / "out")
    resumed.train(resume_from_checkpoint=good)
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert fault(tmp_path / "out" / "checkpoint-8") is None, "written and sealed again"


def test_killed_between_writing_the_first_checkpoint_and_sealing_it(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2)[0].train()
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-2 is not used: it has no finetooth\.json"):
        assert finetooth.last_good(tmp_path) is None, "it starts at the beginning, and nobody is asked"


def test_a_checkpoint_without_the_optimizer_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, save_only_model=True)[0].train()
    with pytest.raises(ValueError, match="save_only_model"):
        finetooth.last_good(tmp_path, lambda _: None)
    with pytest.raises(ValueError, match="goes on at step 8, and its checkpoint had no optimizer state"):
        trainer(tmp_path, max_steps=10)[0].train(resume_from_checkpoint=True)


def test_deleting_before_sealing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_total_limit=1.*give 2"):
        trainer(tmp_path, save_total_limit=1)[0].train()


def test_one_step_more_than_the_last_is_refused(tmp_path: Path) -> None:
    """transformers would do it where `max_steps` ends within an epoch; where an epoch ends, it does not."""
    trainer(tmp_path / "within")[0].train()
    with pytest.raises(ValueError, match=r"the end of this training \(step 8 of 8\)"):
        trainer(tmp_path / "within")[0].train(resume_from_checkpoint=finetooth.last_good(tmp_path / "within"))
    trainer(tmp_path / "epoch", max_steps=6)[0].train()
    made, opt = trainer(tmp_path / "epoch", max_steps=6)
    made.train(resume_from_checkpoint=finetooth.last_good(tmp_path / "epoch"))
    assert opt.steps == 6


def test_a_callback_that_does_not_seal(tmp_path: Path) -> None:
    made, opt = trainer(tmp_path, save_total_limit=1)
    made.remove_callback(SelectiveCallback)
    made.add_callback(SelectiveCallback(opt, seal=False))
    made.train()
    assert not [*tmp_path.rglob(MANIFEST)]
