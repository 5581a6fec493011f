"""What is noted of a selection is what the selection is: counts exactly, shares as far as a sample goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import finetooth
from finetooth import turnover
from finetooth.rule import Rule
from finetooth.turnover import Turnover
from finetooth.when import every
from tests.laws.toy import ROWS, Toy, batches, build, own_score, train


def entries(opt: finetooth.SelectiveAdamW) -> dict[str, set[int]]:
    """Every chosen entry, from the selections themselves."""
    return {name: set(s.entries().flatten().tolist()) for name, s in opt.selections().items()}


def noted(
    opt: finetooth.SelectiveAdamW, model: Any, steps: int = 4
) -> list[tuple[dict[str, Any], dict[str, set[int]]]]:
    followed = Turnover(opt)
    return [(followed.line(), entries(opt)) for _ in train(model, opt, batches(steps))]


@pytest.mark.parametrize("row", ROWS)
def test_lines_are_what_the_selections_say(row: str) -> None:
    """The toy's tensors have fewer chosen units than the sample takes, so that the shares are exact but for four digits."""
    model = Toy()
    lines = noted(build(row, model, max_grad_norm=None), model)
    counts: dict[str, int] = {}
    first = before = lines[0][1]
    assert lines[0][0]["of"] == {n: p.numel() for n, p in model.named_parameters() if n in lines[0][0]["of"]}
    for i, (line, now) in enumerate(lines):
        counts |= line["chosen"]
        assert {n: k for n, k in counts.items() if k} == {n: len(s) for n, s in now.items() if s}
        if i:
            for key, then, gone in (("kept", first, False), ("left", before, True)):
                shared = sum(len(then[n] & now.get(n, set())) for n in then) / sum(map(len, then.values()))
                assert line[key] == pytest.approx(1 - shared if gone else shared, abs=1e-4), key
        before = now


def scored_by_step(w: Any) -> Tensor:
    """Another choice at every selection."""
    return ((torch.arange(w.value.numel()).reshape(w.value.shape) * 7919 + w.step * 104_729) % 10_007).float()


@pytest.mark.parametrize("rule", [Rule(scored_by_step, keep=0.2, targets="linear"), Rule(own_score, keep=0.2)])
def test_a_following_that_goes_on_writes_the_same_lines(rule: Rule) -> None:
    def made() -> tuple[Toy, finetooth.SelectiveAdamW]:
        model = Toy()
        return model, finetooth.SelectiveAdamW(model.named_parameters(), rule, every(2), lr=1e-2, model=model)

    model, opt = made()
    whole = [line for line, _ in noted(opt, model, 6)]
    model, opt = made()
    lines = [line for line, _ in noted(opt, model, 3)]
    state, weights = opt.state_dict(), model.state_dict()
    model, opt = made()
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    followed = Turnover(opt)
    followed.go_on(lines)
    lines += [followed.line() for _ in train(model, opt, batches(6)[3:])]
    assert lines == whole and any(line.get("left") for line in lines)


def test_a_sample_of_a_large_tensor_is_fair() -> None:
    """Of 1,000,000 entries a fifth, in flags and as a list: a share of 400 of them is off by less than four deviations, 0.08."""
    flags = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) < 0.2
    packed = finetooth.kernels.reference.pack(flags)
    slot = finetooth.slot.Slot("a", bits=packed)
    assert turnover.count(slot) == int(flags.sum())
    listed = finetooth.slot.Slot(
        "a", finetooth.Selection(flags.nonzero().flatten().int(), finetooth.Unit(), (1000, 1000))
    )
    other = torch.rand(1_000_000, generator=torch.Generator().manual_seed(1)) < 0.5
    for one in (slot, listed):
        ids = turnover.sample(one, 1_000_000, 400)
        assert 300 < len(ids) <= 400 and bool(flags[ids].all()) and bool((ids[1:] > ids[:-1]).all())
        assert bool(turnover.holds(one, ids).all())
        assert int(turnover.holds(one, (~flags).nonzero().flatten()).sum()) == 0
        assert abs(float(other[ids].double().mean()) - 0.5) < 0.08
        assert len(set((ids % 1000).tolist())) > 250, "all columns are met alike"
