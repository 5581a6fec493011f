"""What users do around a step, with a model whose gradients are gathered: none of it may go wrong in silence."""

import copy
import gc
import io

import pytest
import torch
from torch import nn

import finetooth
from finetooth.linear import SelectiveLinear
from tests.laws.toy import same

from .models import ids, tiny

ROUTES = ("dense", "compact")


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12, bias=False)).to(dtype)


def build(m: nn.Module, route: str = "compact", **given: object) -> finetooth.SelectiveAdamW:
    settings = {"keep": 0.3, "lr": 1e-3, "targets": ["*.weight"], "max_grad_norm": None, **given}
    return finetooth.build("random", m, gradients=route, **settings)


def backward(m: nn.Module, seed: int = 0) -> None:
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)).to(m[0].weight.dtype)
    m(x).float().square().sum().backward()


def norm(opt: finetooth.SelectiveAdamW) -> float:
    opt.step()
    return opt.grad_norm


def test_zero_grad_of_the_model_forgets() -> None:
    norms = []
    for route in ROUTES:
        m = model()
        opt = build(m, route)
        backward(m)
        m.zero_grad()
        backward(m, seed=1)
        norms.append(norm(opt))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    del opt
    gc.collect()
    assert "zero_grad" not in m.__dict__


def test_loading_a_state_keeps_the_window() -> None:
    norms = []
    for route in ROUTES:
        m = model()
        opt = build(m, route)
        backward(m)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        backward(m, seed=1)
        norms.append(norm(opt))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_copy_of_the_model_learns_by_itself() -> None:
    m = model()
    opt = build(m)
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    for twin in (copy.deepcopy(m), torch.load(file, weights_only=False)):  # noqa: TID251  our own file
        plain = torch.optim.SGD(twin.parameters(), lr=0.1)
        before = twin[0].weight.detach().clone()
        backward(m)
        backward(twin)
        twin.zero_grad()
        assert twin[0].weight.grad is None and opt._gradients.chosen["0.weight"].grad is not None
        backward(twin)
        plain.step()
        assert not same(twin[0].weight.detach(), before)
        opt.zero_grad()
    assert getattr(copy.deepcopy(m), "_ddp_params_and_buffers_to_ignore", []) == []


def test_a_frozen_weight_and_hooks_of_others() -> None:
    m = model()
    opt = build(m)
    seen = []
    m[0].weight.register_hook(seen.append)
    backward(m)
    assert norm(opt) > 0 and not seen  # no gradient of the weight itself is ever made
    opt.zero_grad()
    m[0].weight.requires_grad_(False)
    m(torch.ones(2, 12, requires_grad=True)).sum().backward()
    assert opt._collected() == {}


def test_another_parameter_is_an_error() -> None:
    m = model()
    opt = build(m)
    m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True)
    backward(m)
    with pytest.raises(RuntimeError, match="another parameter now"):
        opt.step()


@pytest.mark.parametrize(("was", "now"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")])
def test_another_precision_is_an_error(was: str, now: str) -> None:
    m = model(getattr(torch, was))
    opt = build(m)
    backward(m)
    opt.step()
    opt.zero_grad()
    m.to(getattr(torch, now))
    backward(m)
    with pytest.raises(RuntimeError, match=rf"is torch.{now} \[12, 12\] and was torch.{was} \[12, 12\]"):
        opt.step()
    other = build(m)
    with pytest.raises(ValueError, match=f"was {was}, here it is {now}"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_put_back_stay_back(dtype: str) -> None:
    """A master follows a weight that somebody else writes."""
    m = model(getattr(torch, dtype))
    opt = build(m, lr=1e-2)
    before = copy.deepcopy(m.state_dict())
    for _ in range(10):
        backward(m)
        opt.step()
        opt.zero_grad()
    m.load_state_dict(before)
    backward(m)
    opt.step()
    assert (m[0].weight - before["0.weight"]).abs().max() < 0.012  # one step, not eleven


def test_a_patched_forward_outlives_the_optimizer() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    m = model()
    opt = build(m)
    add_hook_to_module(m[0], ModelHook())
    del opt
    gc.collect()
    assert type(m[0]) is not SelectiveLinear
    assert m(torch.randn(2, 12)).shape == (2, 12)


def test_norms_of_old_do_not_stand_in_the_way() -> None:
    m = model()
    torch.nn.utils.spectral_norm(m[0])
    m.append(nn.Linear(12, 12))
    finetooth.build("random", m, targets=["1.weight"], keep=0.3)


def test_pools_of_two_precisions_and_empty_ones() -> None:
    found = []
    for kernels in ("auto", "reference"):
        torch.manual_seed(0)
        m = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64).bfloat16())
        opt = finetooth.build("gmt", m, keep=0.2, pool="model", kernels=kernels)
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
        m[1](m[0](x).bfloat16()).float().pow(3).sum().backward()
        opt.step()
        found.append({n: s.index.tolist() for n, s in opt.selections().items()})
    assert found[0] == found[1]
    m = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    opt = finetooth.build("gmt-strict", m, keep={"0.weight": 0, "1.weight": 4})
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    m[0].weight.grad[0, 0] = float("nan")
    opt.step()
    assert opt.skipped == 1


def test_noise_is_fresh_where_the_inner_model_is_called() -> None:
    m = tiny("llama")
    opt = finetooth.build("gift-sw", m, keep=4, calibration=[ids()])
    m.train()
    first, second = (m.model(ids()).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second) and opt._noise.forwards == 2
    m(ids())
    assert opt._noise.forwards == 3
