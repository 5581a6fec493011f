"""An unmodified SFTTrainer, with TRL's own defaults (bf16 autocast, gradient checkpointing, its clipping): one line changes."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import finetooth
from finetooth import embedded


@pytest.mark.parametrize("row", ["gmt", "gift-sw", "hft"])
def test_sft_trainer(row: str, tmp_path: Path) -> None:
    source = str(embedded.path("stories260K"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    calibration = [tokenizer(["Once upon a time"] * 2, return_tensors="pt")]
    keep = 8 if row == "gift-sw" else None
    opt = finetooth.build(row, model, lr=1e-3, keep=keep, calibration=calibration)
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    assert args.gradient_checkpointing and args.bf16 and args.max_grad_norm == 1.0
    rows = Dataset.from_list([{"prompt": "Where is my card? ", "completion": "card arrival"}] * 12)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, optimizers=(opt, None))
    trainer.train()
    assert opt.steps == 3 and opt.skipped == 0
    opt.verify_frozen()
    delta = finetooth.Delta.extract(model, opt)
    fresh = AutoModelForCausalLM.from_pretrained(source)
    delta.apply(fresh)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), model.parameters(), strict=True))
