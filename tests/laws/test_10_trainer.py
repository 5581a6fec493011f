"""Law 10: an unmodified Trainer makes the steps that a loop over the Python API makes, bit for bit, and logs their truth.

On the toy, for every row, with a schedule, accumulation, clipping and weight decay; by the callback, and with the trainer's
clipping switched off by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup
from transformers.modeling_outputs import CausalLMOutput

import finetooth

from .toy import DTYPES, ROWS, Toy, batches, build, same, snapshot, train

STEPS, SIZE = 5, 8
RATES: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 0.5}


class Answering(Toy):
    """The toy, with an output that a Trainer can read."""

    def forward(self, input_ids: Tensor, labels: Any = None, attention_mask: Any = None) -> Any:
        return CausalLMOutput(loss=super().forward(input_ids).loss)


def by_hand(row: str, dtype: str, accumulate: int) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    model = Toy(DTYPES[dtype])
    opt = build(row, model, **RATES)
    schedule, figures = get_cosine_schedule_with_warmup(opt, 2, STEPS), []
    for _ in train(model, opt, batches(STEPS, size=SIZE), accumulate):
        figures.append((opt.param_groups[0]["lr"], opt.grad_norm))
        schedule.step()
    return snapshot(model), figures


def by_trainer(
    row: str, dtype: str, accumulate: int, folder: Path, callback: bool
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    model = Answering(DTYPES[dtype])
    opt = build(row, model, **RATES)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=SIZE // accumulate,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=1,
        max_grad_norm=1.0 if callback else 0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": ids} for batch in batches(STEPS, size=SIZE) for ids in batch]
    callbacks = [finetooth.SelectiveCallback(opt)] if callback else []
    trainer = Trainer(model, args, train_dataset=rows, optimizers=(opt, None), callbacks=callbacks)
    trainer.train()
    opt.verify_frozen()
    return snapshot(model), [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_a_trainer_is_the_loop(row: str, dtype: str, tmp_path: Path) -> None:
    expected, figures = by_hand(row, dtype, 2)
    found, lines = by_trainer(row, dtype, 2, tmp_path, callback=True)
    assert all(same(found[n], expected[n]) for n in expected)
    assert [(line["learning_rate"], line["grad_norm"]) for line in lines] == figures


@pytest.mark.parametrize("row", ROWS)
def test_without_the_callback(row: str, tmp_path: Path) -> None:
    expected, _ = by_hand(row, "fp32", 1)
    found, _ = by_trainer(row, "fp32", 1, tmp_path, callback=False)
    assert all(same(found[n], expected[n]) for n in expected)
