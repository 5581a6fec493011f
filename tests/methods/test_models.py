"""Every row on every family of models, through the real transformers classes."""

import pytest
import torch

import finetooth
from finetooth.anatomy import survey
from finetooth.rest import noise, quantized, reset
from finetooth.when import every
from tests.laws.toy import own_score, same, snapshot

from .models import FAMILIES, ids, step, tiny

KEEP = {"gift-sw": 4}


@pytest.mark.parametrize("row", [*finetooth.METHODS, "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_reverts(family: str, row: str) -> None:
    model = tiny(family)
    base = snapshot(model)
    method = own_score if row == "own" else row
    opt = finetooth.build(method, model, lr=1e-2, keep=KEEP.get(row), calibration=[ids()])
    for i in range(3):
        step(model, opt, ids(seed=i), accumulate=2)
    opt.verify_frozen()
    trained = snapshot(model)
    assert any(not same(p, base[n]) for n, p in trained.items())
    delta = finetooth.Delta.extract(model, base)
    with delta.reverted(model):
        assert all(same(p, base[n]) for n, p in snapshot(model).items())
    assert all(same(p, trained[n]) for n, p in snapshot(model).items())


KINDS = {
    "llama": {"linear": 14, "embedding": 1, "head": 1, "norm": 5},
    "llama-tied": {"linear": 14, "embedding": 1, "norm": 5},
    "gpt2": {"linear": 8, "embedding": 2, "norm": 5, "bias": 13},
    "neox": {"linear": 8, "embedding": 1, "head": 1, "norm": 5, "bias": 13},
    "mixtral": {"linear": 8, "expert": 4, "embedding": 1, "head": 1, "norm": 5, "other": 2},
}


@pytest.mark.parametrize("family", KINDS)
def test_survey(family: str) -> None:
    parts = survey(tiny(family)).values()
    assert {kind: sum(p.kind == kind for p in parts) for kind in {p.kind for p in parts}} == KINDS[family]
    assert all(p.transposed == (family == "gpt2" and p.kind == "linear") for p in parts)
    places = {p.place for p in parts if p.layer}
    assert places == {"attention", "ffn", "norm"}


def test_transposed_experts_are_known() -> None:
    parts = survey(tiny("gpt-oss"))
    assert {p.transposed for p in parts.values() if p.kind == "expert"} == {True}


def test_a_column_is_an_input_feature_in_gpt2() -> None:
    """An input that is never used: its column has no gradient and no saliency, so it is not chosen."""
    model = tiny("gpt2")
    c_fc = model.transformer.h[0].mlp.c_fc  # stored [16, 64]
    assert tuple(c_fc.weight.shape) == (16, 64)
    with torch.no_grad():
        model.transformer.h[0].ln_2.weight[5] = 0.0
        model.transformer.h[0].ln_2.bias[5] = 0.0
    for row in ("gift-sw", "grad"):
        opt = finetooth.build(row, model, keep=15, unit="column", calibration=[ids()])
        selection = opt.selections()["transformer.h.0.mlp.c_fc.weight"]
        assert selection.shape == (16, 64) and str(selection.unit) == "row"
        assert selection.index.tolist() == [i for i in range(16) if i != 5]
        if opt._noise:
            opt._noise.remove()


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_expert_columns_are_columns_of_one_expert(family: str) -> None:
    model = tiny(family)
    opt = finetooth.build("magnitude", model, keep=3, unit="column", targets=["*.experts.down_proj"], lr=1e-2)
    before = snapshot(model)
    for i in range(2):
        step(model, opt, ids(seed=i))
    name, selection = next(iter(opt.selections().items()))
    w = before[name] if family == "mixtral" else before[name].transpose(-1, -2)  # [expert, out, in]
    top = w.abs().sum(1).flatten().topk(3).indices.sort().values
    assert selection.index.tolist() == top.tolist()
    now = snapshot(model)[name] if family == "mixtral" else snapshot(model)[name].transpose(-1, -2)
    moved = (now != w).any(1).flatten().nonzero().flatten()
    assert set(moved.tolist()) <= set(top.tolist())


def test_a_tied_weight_is_one_weight() -> None:
    model = tiny("llama-tied")
    opt = finetooth.build("full", model, lr=1e-2)
    assert "lm_head.weight" not in opt.selections()
    step(model, opt, ids())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_errors_name_the_choices() -> None:
    model = tiny("llama")
    for given, message in (
        ({"method": "gmtt"}, "Did you mean 'gmt'"),
        ({"method": "dst", "relativ": True}, "Did you mean 'relative'"),
        ({"method": "grad", "keep": 1.3}, "out of range"),
        ({"method": "grad", "keep": 0.0}, "out of range"),
        ({"method": "grad", "keep": -1}, "out of range"),
        ({"method": "grad", "targets": ["*.nope.*"]}, "no parameter matches"),
        ({"method": "grad", "pool": "tensors"}, "choose one of"),
        ({"method": "grad", "unit": "diagonal"}, "choose one of"),
        ({"method": "grad", "gradients": "sparse"}, "choose"),
        ({"method": "grad", "rounding": "up"}, "choose"),
        ({"method": "full", "keep": 0.5}, "no meaning"),
        ({"method": "grad", "lr": -1.0}, "out of range"),
        ({"method": "grad", "max_grad_norm": float("nan")}, "out of range"),
        ({"method": "gift-sw", "when": every(2), "calibration": [ids()]}, "selection made once"),
        ({"method": "random", "rest": noise(4)}, "the unit is element"),
        ({"method": "gmt", "rest": reset()}, 'needs mask="update"'),
        ({"method": "full", "rest": quantized(4)}, "selection made once"),
        ({"method": "gift-sw", "tau": 3.0, "calibration": [ids()]}, "choose inf, 2 or 1"),
    ):
        with pytest.raises(ValueError, match=message):
            finetooth.build(given.pop("method"), model, **given)
