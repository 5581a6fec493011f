"""What single rows of the family promise beyond the laws."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import finetooth
from finetooth import Rule, Unit, Weight, scores, select
from finetooth.method import rows
from finetooth.rule import cosine, linear, stem
from tests.laws.toy import Toy, batches, build, same, snapshot, train

from .models import ids, step, tiny


def trained_now(model: nn.Module) -> set[str]:
    """Layers whose weights ask for a gradient; all that is outside is one."""
    return {n.split(".")[2] if ".layers." in n else "outside" for n, p in model.named_parameters() if p.requires_grad}


# -- nano, ssu: the smallest, exactly ------------------------------------------------------------------


def test_small_values_are_told_apart_to_the_last_bit() -> None:
    x = torch.tensor([[3e-8, 0.0, -3.0000002e-8, 1.0, -1e-40]])
    assert select(Rule(scores.smallest, keep=3), [Weight("l.0.a.weight", x)])["l.0.a.weight"].index.tolist() == [
        0,
        1,
        4,
    ]


def test_ssu_leaves_alone_what_matters_on_the_source() -> None:
    model = tiny("llama")
    seen: dict[str, list[torch.Tensor]] = {}
    name = "model.layers.1.mlp.down_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.setdefault(name, []).append(x[0]))
    model.eval()(input_ids=ids())
    handle.remove()
    inputs = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen[name]])
    matters = (model.get_submodule(name).weight.abs() * inputs.norm(dim=0)).sum(0)
    opt = finetooth.build("ssu", model, keep=0.25, calibration=[ids()])
    chosen = opt.selections()[f"{name}.weight"]
    assert chosen.index.tolist() == matters.argsort()[: len(chosen)].sort().values.tolist() and len(chosen) == 6


# -- fish ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fisher_is_a_sum_over_rows(family: str) -> None:
    model = tiny(family)
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    model.eval()
    for row in ids(rows=5):
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for n, p in model.named_parameters():
            squares[n] += p.grad.square()
        model.zero_grad()
    opt = finetooth.build("fish", model, keep=40, calibration=[ids(rows=5)[:3], ids(rows=5)[3:]])
    taking = {n: squares[n] for n in opt.selections()}
    cut = torch.cat([s.flatten() for s in taking.values()]).sort(descending=True).values[39]
    for n, chosen in opt.selections().items():
        assert chosen.index.tolist() == (taking[n].flatten() >= cut).nonzero().flatten().tolist()


# -- lift, spectrum ---------------------------------------------------------------------------------------


def test_principal_weights() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=g)
    u, s, vh = torch.linalg.svd(x)
    by_hand = sum(s[i] * u[:, i, None] * vh[i] for i in range(2))
    torch.testing.assert_close(scores.principal(2)(Weight("a", x)), by_hand.abs())  # float32 sums in another order
    assert same(scores.principal(5)(Weight("a", x)), x.abs())


def test_the_ratio_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 40, generator=g) + 3.0 * torch.outer(torch.ones(24), torch.randn(40, generator=g))
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    edge = (np.quantile(s, 0.75) - np.quantile(s, 0.25)) / 1.349 * (1 + np.sqrt(24 / 40))
    by_hand = s[s > edge].sum() / s[s <= edge].sum() / s.max()
    found = scores.signal_to_noise(Weight("l.0.q.weight", x, unit=Unit("matrix")))
    assert found.tolist() == pytest.approx([by_hand], rel=1e-5)  # float32
    one = scores.signal_to_noise(Weight("l.0.q.weight", torch.ones(4, 4), unit=Unit("matrix")))
    assert one.isfinite().all() and one > 0


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_spectrum_takes_a_share_of_each_kind(family: str) -> None:
    model = tiny(family)
    opt = finetooth.build("spectrum", model)
    on = {stem(n) for n, s in opt.selections().items() if len(s)}
    kinds = Counter(name.split(".", 3)[-1] for name in on if any(part.isdigit() for part in name.split(".")))
    assert set(kinds.values()) == {1}  # of two layers
    assert all(p.requires_grad == (n in opt.selections() and stem(n) in on) for n, p in model.named_parameters())


# -- rows ---------------------------------------------------------------------------------------------------


def test_rows_of_tied_and_resized_embeddings() -> None:
    for family in ("llama", "llama-tied"):
        model = tiny(family)
        model.resize_token_embeddings(52, mean_resizing=False)
        base = snapshot(model)
        opt = finetooth.build("rows", model, rows=[3, range(48, 50), "50-51"], weight_decay=0.1, lr=1e-2)
        step(model, opt, torch.arange(40, 52)[None])
        opt.verify_frozen()
        moved = {n for n, p in model.named_parameters() if not same(p, base[n])}
        assert (
            moved
            == set(opt.selections())
            == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if family == "llama" else set())
        )
        for n in moved:
            changed = (model.get_parameter(n) != base[n]).any(1).nonzero().flatten().tolist()
            assert changed == [3, 48, 49, 50, 51]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs rows="),
        ({"rows": ["<tool>"]}, "takes a tokenizer"),
        ({"rows": [-1]}, "names no row"),
        ({"rows": [True]}, "names no row"),
        ({"rows": [48]}, "which has 48 rows: resize"),
        ({"rows": []}, "nothing would train"),
    ],
)
def test_rows_that_are_not_there(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        finetooth.build("rows", tiny("llama"), **given)


def test_one_range_or_one_number() -> None:
    assert rows(range(4))["keep"] == 4 and rows("2-5")["keep"] == 4 and rows(7)["keep"] == 1


# -- lisa, badam: turns ---------------------------------------------------------------------------------------


def deep(layers: int = 4) -> nn.Module:
    config = tiny("llama").config
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    return type(tiny("llama"))(config)


@pytest.mark.parametrize(("row", "given"), [("lisa", {"keep": 2}), ("badam", {})])
def test_what_rests_computes_no_gradient_and_holds_no_state(row: str, given: dict[str, Any]) -> None:
    model, turns = deep(), Counter[str]()
    base = snapshot(model)
    opt = finetooth.build(row, model, lr=1e-2, when="every(2)", base=base, **given)
    for i in range(16):
        now, before = trained_now(model) - {"outside"}, snapshot(model)
        assert len(now) == given.get("keep", 1)
        model(input_ids=ids(seed=i), labels=ids(seed=i)).loss.backward()
        for n, p in model.named_parameters():
            assert (p.grad is not None) == p.requires_grad, n
        opt.step()
        opt.zero_grad()
        moved = {n.split(".")[2] for n, p in model.named_parameters() if ".layers." in n and not same(p, before[n])}
        assert moved == now  # also those that were frozen when the optimizer was built
        turns.update(now if i % 2 else ())
    assert set(turns) == {"0", "1", "2", "3"}
    if row == "badam":
        assert set(turns.values()) == {2}  # two rounds of four turns
    held = {n for n, slot in opt._slots.items() if slot.exp_avg is not None and slot.exp_avg.numel()}
    assert held == {n for n, p in model.named_parameters() if p.requires_grad}
    outside = trained_now(model) - {"0", "1", "2", "3"}
    assert outside == ({"outside"} if row == "lisa" else set())


@pytest.mark.parametrize(("order", "expected"), [("ascending", "01230123"), ("descending", "32103210")])
def test_orders(order: str, expected: str) -> None:
    model, seen = deep(), ""
    opt = finetooth.build("badam", model, when="every(1)", order=order)
    for i in range(8):
        seen += next(iter(trained_now(model)))
        step(model, opt, ids(seed=i))
    assert seen == expected


def test_an_order_that_is_none() -> None:
    with pytest.raises(ValueError, match="ascending"):
        finetooth.build("badam", tiny("llama"), order="upwards")


def test_ddp_gets_everything_back() -> None:
    """A row that takes turns keeps its tensors from DDP for as long as it is the model's optimizer."""
    model = Toy()
    opt = build("lisa", model)
    assert len(model.__dict__["_ddp_params_and_buffers_to_ignore"]) == len(list(model.parameters())) - 1
    build("full", model)
    assert model.__dict__["_ddp_params_and_buffers_to_ignore"] == []
    opt = build("badam", model)
    del opt
    gc.collect()
    assert model.__dict__["_ddp_params_and_buffers_to_ignore"] == []


# -- spiel ----------------------------------------------------------------------------------------------------


def test_turnover_falls() -> None:
    assert linear(0.2, 10)(5) == pytest.approx(0.1) and linear(0.2, 10)(12) == 0
    assert cosine(0.2, 10)(5) == pytest.approx(0.1) and cosine(0.2, 10)(10) == pytest.approx(0)


@pytest.mark.parametrize("given", [{"state": "dense", "mask": "update"}, {"when": "once"}, {"unit": "matrix"}])
def test_an_exchange_that_would_be_ignored(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a rule that exchanges needs"):
        finetooth.build("spiel", tiny("llama"), **given)


def test_drop_and_grow_against_dense_tensors() -> None:
    """Every choice made again from whole gradients; the toy's are whole numbers, so that sums are exact."""
    model, name = Toy(), "model.layers.0.self_attn.q_proj.weight"
    base = snapshot(model)[name]
    opt = build("spiel", model, keep=20, when="every(4)", window=2, turnover=0.5, steps=16, max_grad_norm=None)
    chosen, sums, moved_on = opt.selections()[name].mask(), torch.zeros_like(base), 0
    for i, batch in enumerate(batches(12)):
        model(batch).loss.backward()
        fresh = Toy()
        fresh(batch).loss.backward()  # the toy's gradient is the same whatever the weights are
        g = fresh.get_parameter(name).grad
        if i % 4 == 2:
            away = torch.where(chosen, -1.0, g.abs())
            top = away.flatten().sort(descending=True, stable=True).indices[:20]
            candidates = torch.zeros_like(base).flatten().index_fill(0, top, 1.0).view_as(base)
            sums = g * candidates
        elif i % 4 == 3:
            sums = sums + g * candidates
        now = opt.selections()[name]
        assert torch.equal(now.mask(), chosen)
        opt.step()
        opt.zero_grad()
        if i % 4 == 3:
            d = round(0.5 * (1 - (i + 1) / 16) * 20)
            distance = torch.where(chosen, (model.get_parameter(name) - base).abs(), 9e9)
            after = opt.selections()[name].mask()
            dropped, grown = chosen & ~after, after & ~chosen
            assert int(dropped.sum()) == int(grown.sum()) == d
            assert same(model.get_parameter(name)[dropped], base[dropped])
            assert sums[grown].abs().min() >= torch.where(chosen | grown, 0.0, sums.abs()).max()
            stayed = chosen & after
            assert distance[stayed].min() > 0
            chosen, moved_on = after, moved_on + 1
    assert moved_on == 3
    opt.verify_frozen()


def test_resumed_within_a_window() -> None:
    given = {"keep": 0.1, "when": "every(4)", "window": 3, "steps": 20}
    whole = Toy()
    one = build("spiel", whole, **given)
    half: dict[str, Any] = {}
    for i in train(whole, one, batches(10)):
        if i == 5:  # the fifth and sixth of a window of three
            half = copy.deepcopy({"model": snapshot(whole), "opt": one.state_dict()})
            assert all("window" in s for s in half["opt"]["selective"]["slots"].values())
    resumed = Toy()
    two = build("spiel", resumed, **given)
    resumed.load_state_dict(half["model"])
    two.load_state_dict(half["opt"])
    list(train(resumed, two, batches(10)[6:]))
    assert all(same(p, snapshot(resumed)[n]) for n, p in snapshot(whole).items())
