"""What another delta changes never trains: every row, every step, after a resume; and then nothing conflicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import finetooth
from finetooth import Delta

from ..laws.toy import DTYPES, ROWS, Toy, batches, build, same, snapshot, train

TRAINED = [row for row in ROWS if row not in ("full", "rows")]


def other(dtype: torch.dtype, row: str) -> Delta:
    """A delta in the units that the row trains: columns for columns, modules for matrices, layers for layers, else entries everywhere."""
    weights = snapshot(Toy(dtype))
    tuned = {n: t.clone() for n, t in weights.items()}
    for i, (name, t) in enumerate(tuned.items()):
        if row in ("hft", "spectrum"):
            if "layers.0" in name and ("q_proj" in name or "up_proj" in name):
                t += 1
        elif row in ("lisa", "badam"):
            if "layers.0" in name:
                t += 1
        elif row == "gift-sw":
            if t.ndim == 2:
                t[:, i % 3 :: 3] += 1
        else:
            t.view(-1)[i % 2 :: 2] += 1
    return Delta.extract(tuned, weights)


def barred(delta: Delta) -> dict[str, torch.Tensor]:
    return {name: c.selection.mask() for name, c in delta.changes.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", TRAINED)
def test_an_excluded_entry_never_trains(row: str, dtype: str, tmp_path: Path) -> None:
    delta = other(DTYPES[dtype], row)
    masks, model = barred(delta), Toy(DTYPES[dtype])
    delta.save(tmp_path / "delta.safetensors")
    before = snapshot(model)
    when: dict[str, Any] = {"when": "every(2)"} if row in ("grad", "magnitude") else {}
    opt = build(row, model, exclude=tmp_path / "delta.safetensors", weight_decay=0.5, **when)
    for step in train(model, opt, batches(5)):
        chosen = opt.selections()
        assert chosen
        for name, selection in chosen.items():
            if name in masks:
                assert not bool((selection.mask() & masks[name]).any()), (step, name)
        for name, p in snapshot(model).items():
            if name in masks:
                assert same(p[masks[name]], before[name][masks[name]]), (step, name)
    opt.verify_frozen()
    mine = Delta.extract(model, before)
    assert mine.changes
    found = finetooth.conflicts([delta, mine], before)
    assert (found.total.overlap, found.total.opposed) == (0, 0)


@pytest.mark.parametrize("row", TRAINED)
def test_it_is_part_of_the_state(row: str) -> None:
    delta, ids = other(torch.float32, row), batches(6)

    def made(exclude: Any) -> tuple[Toy, Any]:
        model = Toy()
        return model, build(row, model, exclude=exclude, weight_decay=0.1)

    whole, opt = made(delta)
    list(train(whole, opt, ids))
    half, first = made(delta)
    list(train(half, first, ids[:3]))
    state = first.state_dict()
    again, second = made([delta])
    again.load_state_dict(half.state_dict())
    second.load_state_dict(state)
    list(train(again, second, ids[3:]))
    assert all(same(p, snapshot(whole)[n]) for n, p in snapshot(again).items())
    with pytest.raises(ValueError, match="exclude="):
        made(None)[1].load_state_dict(state)
    with pytest.raises(ValueError, match="exclude="):
        made(delta)[1].load_state_dict(made(None)[1].state_dict())


@pytest.mark.parametrize("unit", ["row", "column", "block(4)", "matrix", "layer"])
def test_a_unit_with_an_excluded_entry_is_left_out(unit: str) -> None:
    weights, name = snapshot(Toy()), "model.layers.0.mlp.up_proj.weight"
    tuned = {n: t.clone() for n, t in weights.items()}
    tuned[name][3, 2] += 1
    delta, model = Delta.extract(tuned, weights), Toy()
    keep = {} if unit in ("matrix", "layer") else {"keep": 1.0}
    opt = build("magnitude", model, exclude=delta, unit=unit, **{"pool": "model", "keep": 0.9, **keep})
    chosen = opt.selections()
    assert not bool(chosen[name].mask()[3, 2])
    if unit == "layer":
        assert not any(len(s) for n, s in chosen.items() if "layers.0" in n)
        assert any(len(s) for s in chosen.values())
    elif unit != "matrix":
        s = chosen[name]
        assert len(s) == s.unit.count(s.shape) - 1
        assert all(len(x) == x.unit.count(x.shape) for n, x in chosen.items() if n != name)


def test_a_budget_is_of_all_units_as_far_as_there_are_others() -> None:
    weights = snapshot(Toy())
    tuned = {n: t.clone() for n, t in weights.items()}
    name = "model.layers.1.mlp.down_proj.weight"
    tuned[name].view(-1)[:60] += 1
    delta = Delta.extract(tuned, weights)
    n = weights[name].numel()
    for keep, k in ((0.25, round(0.25 * n)), (0.9, n - 60)):
        opt = build("random", Toy(), exclude=delta, keep=keep)
        assert len(opt.selections()[name]) == k


def test_tied_weights_are_excluded_by_either_name() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(6, 4)
            self.head = torch.nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    w = torch.zeros(6, 4)
    tuned = w.clone()
    tuned[2, 1] = 1.0
    for name in ("embed.weight", "head.weight"):
        opt = finetooth.build(
            "random", Tied(), keep=1.0, targets="all", exclude=Delta.extract({name: tuned}, {name: w})
        )
        assert len(opt.selections()["embed.weight"]) == 23


def test_what_cannot_be_done_is_refused() -> None:
    delta = other(torch.float32, "grad")
    with pytest.raises(ValueError, match="'full', which trains every weight"):
        build("full", Toy(), exclude=delta)
    with pytest.raises(ValueError, match="named one by one"):
        build("rows", Toy(), exclude=delta)
    with pytest.raises(ValueError, match="quantized"):
        build("gift-sw", Toy(), exclude=other(torch.float32, "gift-sw"), rest="quantized(4)")
    with pytest.raises(ValueError, match="which is not there in this model"):
        build("grad", torch.nn.Sequential(torch.nn.Linear(2, 2)), exclude=delta, targets="all")
    weights = snapshot(Toy())
    with pytest.raises(ValueError, match="smaller unit"):
        build("random", Toy(), exclude=Delta.extract({n: t + 1 for n, t in weights.items()}, weights))
    for odd in ({"nothing": torch.tensor([0])}, {"weight": torch.tensor([4])}):
        rule = finetooth.Rule(finetooth.METHODS["random"].rule.score, targets="all", exclude=odd)  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="that this model does not have"):
            finetooth.SelectiveAdamW(torch.nn.Linear(2, 2).named_parameters(), rule)
    with pytest.raises(FileNotFoundError):
        build("grad", Toy(), exclude="nowhere.safetensors")
