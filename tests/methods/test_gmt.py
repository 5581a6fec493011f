"""GMT on a real Llama: to the bit what everyone runs, and its strict twin."""

import pytest
import torch

import finetooth
from tests.laws.toy import same, snapshot

from .models import ids, step, tiny

RATES = {"lr": 1e-2, "weight_decay": 0.1}


def masked_by_hand(model: torch.nn.Module, keep: float) -> None:
    for p in model.parameters():
        k = max(1, round(keep * p.numel()))
        threshold = p.grad.abs().flatten().sort(descending=True).values[k - 1]
        p.grad.mul_(p.grad.abs() >= threshold)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("keep", [0.05, 0.2, 0.9])
def test_gmt_is_masking_the_gradient_then_adamw(keep: float, accumulate: int) -> None:
    ours, theirs = tiny("llama-tied"), tiny("llama-tied")
    opt = finetooth.build("gmt", ours, keep=keep, max_grad_norm=None, kernels="reference", **RATES)
    adamw = torch.optim.AdamW(theirs.parameters(), foreach=False, **RATES)
    adamw.register_step_pre_hook(lambda *_: masked_by_hand(theirs, keep))
    for i in range(5):
        step(ours, opt, ids(seed=i), accumulate)
        step(theirs, adamw, ids(seed=i), accumulate)
        assert all(same(p.data, q.data) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_gmt_clips_to_the_norm_of_the_masked_gradient() -> None:
    ours, theirs = tiny("llama"), tiny("llama")
    opt = finetooth.build("gmt", ours, max_grad_norm=0.1, **RATES)
    adamw = torch.optim.AdamW(theirs.parameters(), foreach=False, **RATES)
    norms = []

    def mask_then_clip(*_: object) -> None:
        masked_by_hand(theirs, 0.2)
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)))

    adamw.register_step_pre_hook(mask_then_clip)
    for i in range(3):
        step(ours, opt, ids(seed=i))
        step(theirs, adamw, ids(seed=i))
        assert opt.grad_norm == pytest.approx(norms[-1], rel=1e-6)  # summed in another order
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)  # the factor inherits that difference


@pytest.mark.parametrize("pool", ["tensor", "model"])
def test_strict_moves_exactly_what_is_chosen(pool: str) -> None:
    """Against a dense reference: AdamW on a copy, its update written where |g| >= T."""
    model = tiny("llama")
    opt = finetooth.build("gmt-strict", model, keep=0.2, max_grad_norm=None, pool=pool, kernels="reference", **RATES)
    shadow = [p.detach().clone().requires_grad_() for p in model.parameters()]
    adamw = torch.optim.AdamW(shadow, foreach=False, **RATES)
    for i in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        model(input_ids=ids(seed=i), labels=ids(seed=i)).loss.backward()
        masks = by_threshold([p.grad for p in model.parameters()], 0.2, whole=pool == "model")
        for s, p in zip(shadow, model.parameters(), strict=True):
            s.data.copy_(p.data)
            s.grad = p.grad.clone()
        adamw.step()
        opt.step()
        opt.zero_grad()
        for p, old, s, mask in zip(model.parameters(), before, shadow, masks, strict=True):
            assert same(p.data, torch.where(mask, s.data, old))
            assert not mask.all()


def by_threshold(grads: list[torch.Tensor], keep: float, whole: bool) -> list[torch.Tensor]:
    def cut(g: torch.Tensor) -> torch.Tensor:
        return g.abs().flatten().sort(descending=True).values[max(1, round(keep * g.numel())) - 1]

    if whole:
        threshold = cut(torch.cat([g.flatten() for g in grads]))
        return [g.abs() >= threshold for g in grads]
    return [g.abs() >= cut(g) for g in grads]


@pytest.mark.parametrize("row", ["gmt", "gmt-strict"])
def test_fast_kernels_choose_the_same_weights(row: str) -> None:
    """From equal weights and gradients: equal selections, and weights within a few units in the last place."""
    ours, theirs = tiny("llama"), tiny("llama")
    opts = [finetooth.build(row, m, kernels=k, **RATES) for m, k in ((ours, "auto"), (theirs, "reference"))]
    for i in range(4):
        step(ours, opts[0], ids(seed=i))
        step(theirs, opts[1], ids(seed=i))
        for name, s in opts[1].selections().items():
            assert torch.equal(opts[0].selections()[name].index, s.index), name
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # Adam's first steps divide by sqrt(v) near zero
            p.data.copy_(q.data)


def test_the_mask_is_of_the_accumulated_gradient() -> None:
    """Micro-batches whose gradients cancel: a mask of the last one alone would choose them."""
    model = torch.nn.Linear(4, 1, bias=False)
    opt = finetooth.build("gmt-strict", model, keep=1, max_grad_norm=None)
    before = snapshot(model)["weight"]
    for g in ([9.0, 1.0, 0.0, 0.0], [-9.0, 1.0, 0.5, 0.0]):
        (model.weight * torch.tensor([g])).sum().backward()
    opt.step()
    moved = snapshot(model)["weight"] != before
    assert moved.tolist() == [[False, True, False, False]]
