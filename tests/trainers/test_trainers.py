"""Unmodified trainers, a bare loop and accelerate: one line changes, and everything the user has set is done."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainerCallback, get_cosine_schedule_with_warmup

import finetooth

from .cases import TEXTS, build, load, tokenizer, trainer

RUNS = [
    *[("sft", row) for row in ("full", "gmt", "dst", "gift-sw", "hft", "grad")],
    *[(kind, row) for kind in ("trainer", "dpo", "kto", "orpo", "grpo") for row in ("gmt", "gift-sw")],
]


def holds(opt: finetooth.SelectiveAdamW, model: Any, steps: int) -> None:
    """The steps were made, nothing moved that must not, and the delta gives the trained model, bit for bit."""
    assert opt.steps == steps and opt.skipped == 0
    opt.verify_frozen()
    delta, fresh = finetooth.Delta.extract(model, opt), load()
    delta.apply(fresh)
    assert delta.info()["changed"]
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "row"), RUNS)
def test_one_line(kind: str, row: str, tmp_path: Path) -> None:
    """With the trainer's own defaults: TRL's are bf16 autocast, gradient checkpointing and clipping."""
    model = load()
    opt = build(row, model)
    made = trainer(kind, model, opt, tmp_path, gradient_accumulation_steps=2)
    assert made.args.max_grad_norm == 1.0 and (
        kind == "trainer" or (made.args.gradient_checkpointing and made.args.bf16)
    )
    made.train()
    holds(opt, model, 3)


class Reporter(TrainerCallback):
    """Stands for TensorBoard: transformers puts it before what a user gives."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo", "kto", "orpo", "grpo"])
@pytest.mark.parametrize("row", ["gmt", "grad"])
def test_the_logs_are_true(kind: str, row: str, tmp_path: Path) -> None:
    """Whoever reads them: the norm of the gradients in use, and the rate of the step under a schedule."""
    norms: list[float] = []

    class Noted(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            norms.append(opt.grad_norm)

    model, reporter = load(), Reporter()
    opt = build(row, model, max_grad_norm=0.1)
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    callbacks = [reporter, Noted(), finetooth.SelectiveCallback(opt)]
    made = trainer(kind, model, opt, tmp_path, {"callbacks": callbacks}, max_steps=5, logging_steps=1, **schedule)
    made.train()
    plain = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    expected = get_cosine_schedule_with_warmup(plain, 2, 5)
    rates = []
    for _ in range(5):
        rates.append(plain.param_groups[0]["lr"])
        plain.step()
        expected.step()
    for logs in (reporter.logs, made.state.log_history):
        lines = [line for line in logs if "learning_rate" in line]
        assert [line["learning_rate"] for line in lines] == rates
        assert [line["grad_norm"] for line in lines] == norms and min(norms) > 0
        assert not any("grad_norm" in line for line in logs if "learning_rate" not in line)
    assert made.args.max_grad_norm == 0.0  # the optimizer clips


def batch() -> dict[str, torch.Tensor]:
    ids = [tokenizer()(prompt + good)["input_ids"][:8] for prompt, good, _ in TEXTS]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}


def test_a_bare_loop() -> None:
    model = load()
    opt = build("gmt", model)
    schedule, data = get_cosine_schedule_with_warmup(opt, 1, 4), batch()
    for _ in range(4):
        for micro in range(2):
            half = {name: t[2 * micro : 2 * micro + 2] for name, t in data.items()}
            (model(**half).loss / 2).backward()
        opt.step()
        schedule.step()
        opt.zero_grad()
    holds(opt, model, 4)


@pytest.fixture
def _own_state() -> None:
    """accelerate's state is one for the process: an earlier trainer's mixed precision would be this test's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("_own_state")
@pytest.mark.parametrize("row", ["gmt", "gift-sw", "dst"])
def test_accelerate(row: str) -> None:
    """Accumulation by accelerate makes the same steps as a loop that accumulates itself."""
    ends = []
    for accelerated in (False, True):
        model = load()
        opt: Any = build(row, model)
        data = batch()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        wrapped, used = accelerator.prepare(model, opt) if accelerated else (model, opt)
        wrapped.train()
        for step in range(6):
            half = {name: t[step % 2 :: 2] for name, t in data.items()}
            if accelerated:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(wrapped(**half).loss)
                    used.step()
                    used.zero_grad()
            else:
                (wrapped(**half).loss / 2).backward()
                if step % 2:
                    used.step()
                    used.zero_grad()
        holds(opt, model, 3)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
