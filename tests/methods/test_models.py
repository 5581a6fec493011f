"""Every row on every family of models, through the real transformers classes."""

import pytest
import torch

import finetooth
from finetooth.anatomy import survey
from finetooth.rest import noise, quantized, reset
from finetooth.when import at, every
from tests.laws.toy import NEEDED, own_score, same, snapshot

from .models import FAMILIES, ids, step, tiny

KEEP = {"gift-sw": 4}


@pytest.mark.parametrize("row", [*finetooth.METHODS, "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_reverts(family: str, row: str) -> None:
    model = tiny(family)
    base = snapshot(model)
    method = own_score if row == "own" else row
    opt = finetooth.build(method, model, lr=1e-2, keep=KEEP.get(row), calibration=[ids()], **NEEDED.get(row, {}))
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


def test_experts_that_do_not_say_how_they_are_stored() -> None:
    """Llama 4 stores [expert, in, out] and does not say so; of an unknown class a column is refused."""

    class Block(torch.nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.experts = type(kind, (torch.nn.Module,), {})()
            self.experts.w = torch.nn.Parameter(torch.randn(2, 6, 4))
            self.conv1d = torch.nn.Conv1d(4, 4, 2, groups=4)

    for kind, transposed in (("Llama4TextExperts", True), ("SomeExperts", None)):
        model = torch.nn.ModuleList([Block(kind)])
        parts = survey(model)
        assert parts["0.experts.w"].transposed is transposed
        assert parts["0.conv1d.weight"].kind == "other"
        given = {"unit": "column", "keep": 2, "targets": ["*.w"]}
        if transposed:
            (selection,) = finetooth.build("magnitude", model, **given).selections().values()
            assert (selection.unit.kind, len(selection)) == ("row", 2)  # 12 input features in two experts
        else:
            with pytest.raises(ValueError, match="stored either way round"):
                finetooth.build("magnitude", model, **given)


def test_a_tied_name_in_targets() -> None:
    with pytest.raises(ValueError, match=r"'lm_head.weight' is tied to 'model.embed_tokens.weight'"):
        finetooth.build("magnitude", tiny("llama-tied"), targets=["lm_head.weight"])


@pytest.mark.parametrize(("unit", "keep"), [("matrix", 0.25), ("layer", 0.5)])
def test_whole_units_have_the_model_as_their_pool(unit: str, keep: float) -> None:
    opt = finetooth.build("random", tiny("llama"), unit=unit, keep=keep)
    chosen = {name for name, s in opt.selections().items() if len(s)}
    assert len(chosen) == {"matrix": 4, "layer": 7}[unit]  # of 14 matrices, and of 2 layers of 7


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
        ({"method": "full", "rest": quantized(4)}, "no meaning"),
        ({"method": "random", "when": at([5])}, "first selection is at step 0"),
        ({"method": "random", "when": "warmup(3)"}, "first selection is at step 0"),
        ({"method": "random", "state": "dense", "weight_decay": 0.1}, 'mask="update"'),
        ({"method": "random", "unit": "matrix", "pool": "tensor", "keep": 0.1}, "choose pool='model'"),
        ({"method": "random", "unit": "layer", "pool": "silo", "keep": 0.1}, "choose pool='model'"),
        ({"method": "random", "when": "often"}, "choose one of once, every"),
        ({"method": "random", "rest": "noise(4, 2)"}, "wrong number of arguments"),
        ({"method": "random", "score": "snipp"}, "choose one of gradient, snip"),
        ({"method": "gift-sw", "bits": "four", "calibration": [ids()]}, "expected a whole number"),
        ({"method": "gmt", "decay_to": "base"}, "give base="),
        ({"method": "magnitude", "rest": noise(4), "unit": "column", "targets": "all"}, "acts on linear layers"),
        ({"method": "gift-sw", "tau": 3.0, "calibration": [ids()]}, "choose inf, 2 or 1"),
    ):
        with pytest.raises(ValueError, match=message):
            finetooth.build(given.pop("method"), model, **given)
