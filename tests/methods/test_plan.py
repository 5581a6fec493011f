"""A plan's state is the state: the understudy on tensors without values counts what the real optimizer keeps, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import finetooth
from finetooth.assemble import arranged
from finetooth.delta import Delta
from finetooth.meter import Meter, unique_bytes
from finetooth.rule import Rule, by_model, stem
from finetooth.scores import magnitude, random
from finetooth.understudy import Understudy, counted
from finetooth.units import Unit
from tests.laws.toy import NEEDED
from tests.methods.models import ids, step, tiny

DTYPES = (torch.float32, torch.bfloat16)
CALIBRATED = {name for name, row in finetooth.METHODS.items() if row.calibrated}
CHANGED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gmt", {"keep": 0.5, "targets": "blocks"}),
    ("dst", {"zero_moments": True, "keep": 3}),
    ("magnitude", {"unit": "column", "keep": 2}),
    ("magnitude", {"unit": "row", "keep": 0.25}),
    ("magnitude", {"unit": "block(8)"}),
    ("magnitude", {"rounding": "nearest"}),
    ("random", {"unit": "matrix", "keep": 0.3}),
    ("random", {"unit": "layer", "keep": 1}),
    ("random", {"decay_to": "base", "weight_decay": 0.1}),
    ("hft", {"seed": 3}),
    ("full", {"targets": ["*.mlp.*"]}),
)


def real(row: str, model: PreTrainedModel, **given: Any) -> finetooth.SelectiveAdamW:
    given = {**NEEDED.get(row, {}), **given}
    opt = finetooth.build(row, model, calibration=[ids()] if row in CALIBRATED else None, **given)
    for i in range(3):
        step(model, opt, ids(seed=i))
    return opt


def planned(row: str, model: PreTrainedModel, dtype: torch.dtype, **given: Any) -> Understudy:
    given = {**NEEDED.get(row, {}), **given}
    with FakeTensorMode(), Meter():
        bare = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
        batch = torch.ones((4, 8), dtype=torch.int64)
        opt = Understudy(**arranged(row, bare, calibration=[batch] if row in CALIBRATED else None, **given))
        for _ in range(2):
            bare(input_ids=batch, labels=batch).loss.backward()
            opt.spend(opt.gathered())
            opt.zero_grad()
    return opt


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("row", list(finetooth.METHODS))
def test_state_is_exact(row: str, family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    given = {"when": "every(4)", "window": 3} if row == "spiel" else {}  # the plan's second step lies in a window
    assert planned(row, model, dtype, **given).planned_state() == real(row, model, **given).state_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("row", "given"), CHANGED, ids=str)
def test_state_is_exact_with_other_choices(row: str, given: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    assert planned(row, model, dtype, **given).planned_state() == real(row, model, **given).state_bytes()


@pytest.mark.parametrize("row", list(finetooth.METHODS))
def test_what_trains_is_exact(row: str) -> None:
    model = tiny("llama")
    plan, opt = planned(row, model, torch.float32), real(row, model)
    chosen = {name: n for name, n in plan.chosen().items() if n}
    found = {name: s.numel for name, s in opt.selections().items() if len(s)}
    if row in ("gmt", "gmt-strict"):  # ties at the threshold are kept: tokens that did not occur leave many zeros
        assert chosen.keys() == found.keys() and all(found[name] >= n for name, n in chosen.items())
    elif row in ("fish", "spectrum"):  # which tensors is a matter of values; how much is not
        assert sum(chosen.values()) == sum(found.values())
    else:
        assert plan.exact and chosen == found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts(dtype: torch.dtype) -> None:
    model = tiny("mixtral").to(dtype)
    assert planned("magnitude", model, dtype).planned_state() == real("magnitude", model).state_bytes()


def test_a_score_of_gradients_without_calibration_chooses_at_the_first_step() -> None:
    model = tiny("llama")
    opt = finetooth.build("grad", model)
    step(model, opt, ids())
    with FakeTensorMode():
        bare = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
        plan = Understudy(**arranged("grad", bare))
        batch = torch.ones((4, 8), dtype=torch.int64)
        bare(input_ids=batch, labels=batch).loss.backward()
        dense = unique_bytes(plan.gathered().values())
        plan.spend(plan.gathered())
    assert plan.planned_state() == opt.state_bytes()
    assert dense == sum(p.numel() * 4 for n, p in model.named_parameters() if "proj" in n)


def test_counts_of_shared_budgets() -> None:
    stored = {"a.weight": ((4, 8), Unit()), "a.bias": ((4,), Unit()), "b.weight": ((2, 2), Unit())}
    assert counted(Rule(magnitude, keep=0.5, pool=stem), stored, 0) == (
        {"a.weight": 16, "a.bias": 2, "b.weight": 2},
        False,
    )
    units, exact = counted(Rule(magnitude, keep=0.5, pool=by_model), stored, 0)
    assert sum(units.values()) == 20 and not exact
    whole = {name: (shape, Unit("matrix")) for name, (shape, _) in stored.items()}
    units, exact = counted(Rule(magnitude, Unit("matrix"), keep=1, pool=by_model), whole, 0)
    assert units == {"a.weight": 1, "a.bias": 1, "b.weight": 0} and not exact  # the largest, its bias with it
    assert counted(Rule(random, Unit("matrix"), keep=1, pool=by_model), whole, 0)[1]


def test_the_meter_counts_what_lives() -> None:
    with FakeTensorMode(), Meter() as meter:
        x = torch.zeros(1000)
        y = x.view(10, 100).t()
        assert meter.now == 4000
        del x
        assert meter.now == 4000  # y looks at it
        z = torch.empty(1000)
        assert meter.now == 4000  # not written
        torch.add(y[0], 1.0, out=z[:10])
        assert meter.now == 4040
        wide = torch.empty(2, 10_000)
        wide[:, :100].fill_(1.0)
        assert meter.now == 4040 + 2 * (400 + 4096)  # the pages that two rows touch
        del y, z, wide
        assert (meter.now, meter.peak) == (0, 4040 + 2 * (400 + 4096))


@pytest.mark.parametrize("row", ["random", "gift-sw", "hft"])
def test_what_a_delta_takes(row: str) -> None:
    from finetooth.plan import ENTRY

    model = tiny("llama")
    opt = real(row, model)
    delta = Delta.extract(model, opt)
    body = sum((4 + c.selection.unit.numel(c.selection.shape) * 4) * len(c.selection) for c in delta.changes.values())
    entry = (delta.info()["bytes"] - body) / len(delta.changes)
    assert ENTRY * 0.8 < entry < ENTRY  # what names and numbers of a larger model add, and nothing else
