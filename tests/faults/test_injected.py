"""A fault in a gradient, a loss, a base or a score, for every row: nothing is written, it is counted, and the run stops by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from finetooth import NonFiniteError, build
from tests.faults.injected import BEFORE, FAULTS, Fault, cases, outcome, short
from tests.laws.toy import ROWS, Toy, batches, same, snapshot, train
from tests.laws.toy import build as toy_build


def named(case: tuple[Fault, str, str, str]) -> str:
    return "-".join([case[0].name, *case[1:]])


@pytest.mark.parametrize("case", list(short()), ids=named)
def test_a_fault_in_a_step(case: tuple[Fault, str, str, str]) -> None:
    assert outcome(*case) == case[0].outcome


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_precision_and_route(fault: Fault) -> None:
    wrong = {named(case): found for case in cases() if case[0] is fault and (found := outcome(*case)) != fault.outcome}
    assert not wrong


@pytest.mark.parametrize(("name", "happens", "rows"), BEFORE, ids=[name for name, _, _ in BEFORE])
def test_a_fault_before_training(name: str, happens: Callable[[str], str], rows: tuple[str, ...]) -> None:
    assert {row: happens(row) for row in rows} == dict.fromkeys(rows, "refused")


@pytest.mark.parametrize("row", ROWS)
def test_a_closure_whose_loss_is_not_finite(row: str) -> None:
    """Gradients may be finite where the loss is not: an answer that is masked out has the loss inf."""
    model = Toy()
    opt = toy_build(row, model, stop_after=2)
    list(train(model, opt, batches(2)))
    before = snapshot(model)

    def closure() -> float:
        opt.zero_grad()
        loss = model(batches(1)[0]).loss
        loss.backward()
        return float(loss.detach()) + float("inf")

    opt.step(closure)
    assert (opt.skipped, opt.steps) == (1, 2)
    with pytest.raises(NonFiniteError, match="the loss itself is not"):
        opt.step(closure)
    assert all(same(p, before[n]) for n, p in snapshot(model).items())


@pytest.mark.parametrize("row", ["full", "gmt", "gmt-strict", "dst"])
def test_a_loss_scaler_skips_by_itself(row: str) -> None:
    """Of fp16 autocast: the scaler looks at the gradients before the optimizer does, and calls no step."""
    model = Toy()
    opt = toy_build(row, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(model)
    for value, scale in ((float("inf"), 2.0), (1.0, 2.0)):
        scaler.scale(model(batches(1)[0]).loss * value).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert scaler.get_scale() == scale
        assert all(same(p, before[n]) for n, p in snapshot(model).items()) is (value != 1.0)
    assert (opt.steps, opt.skipped) == (1, 0)


def test_a_loss_scaler_and_gathered_gradients_are_refused() -> None:
    model = Toy()
    opt = toy_build("magnitude", model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(batches(1)[0]).loss).backward()
    with pytest.raises(RuntimeError, match="a loss scaler does not see gathered gradients"):
        scaler.step(opt)


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1.0])
def test_a_rate_that_is_no_number(lr: float) -> None:
    model = Toy()
    with pytest.raises(ValueError, match="lr="):
        build("full", model, lr=lr)
    opt = build("full", model)
    before = snapshot(model)
    opt.param_groups[0]["lr"] = lr
    model(batches(1)[0]).loss.backward()
    with pytest.raises(ValueError, match="nothing was written"):
        opt.step()
    assert all(same(p, before[n]) for n, p in snapshot(model).items()) and opt.steps == opt.skipped == 0
