"""Law 2: keep=1.0 equals torch.optim.AdamW.

In float32 to the bit, with `foreach=False` (the same operations in the same order). In bfloat16 against AdamW on
float32 copies fed the same gradients: compact rows hold such a copy, and must round it to the bit; dense rows round
stochastically, so one step lands on one of the two neighbours of the exact value.
"""

import pytest
import torch

from .toy import ROWS, Toy, batches, build, same, train

RATES = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


DENSE = ("full", "gmt", "gmt-strict", "dst")


def everything(row: str) -> dict[str, float]:
    return {} if row == "full" else {"keep": 1.0}


def test_the_reference_is_not_trivial() -> None:
    """The toy's gradients are not all equal, so that a wrong moment could not hide."""
    model = Toy()
    model(batches(1)[0]).loss.backward()
    assert len(model.lm_head.weight.grad.unique()) > 5


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("row", ROWS)
def test_fp32(row: str, clip: float | None, kernels: str) -> None:
    """The reference kernels to the bit; the fastest installed ones to a few units in the last place, over six steps."""
    ours, theirs = Toy(), Toy()
    opt = build(row, ours, max_grad_norm=clip, kernels=kernels, **everything(row), **RATES)
    names = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert set(names) == {n for n, s in opt.selections().items() if s.numel} or not opt.selections()
    adamw = torch.optim.AdamW([theirs.get_parameter(n) for n in names], foreach=False, **RATES)
    if clip:
        adamw.register_step_pre_hook(
            lambda o, *_: torch.nn.utils.clip_grad_norm_(o.param_groups[0]["params"], clip) and None
        )
    ids = batches(6)
    for _ in zip(train(ours, opt, ids), train(theirs, adamw, ids), strict=True):
        for name in names:
            p, q = ours.get_parameter(name).data, theirs.get_parameter(name).data
            if kernels == "reference":
                assert same(p, q), name
            else:
                torch.testing.assert_close(p, q, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_bf16(row: str) -> None:
    ours, theirs = Toy(torch.bfloat16), Toy(torch.bfloat16).float()
    opt = build(row, ours, max_grad_norm=None, **everything(row), **RATES)
    names = [n for n, p in ours.named_parameters() if p.requires_grad]
    adamw = torch.optim.AdamW([theirs.get_parameter(n) for n in names], foreach=False, **RATES)
    compact = row not in DENSE
    steps = 1 if not compact else 5
    ids = batches(steps)
    for _ in zip(train(ours, opt, ids), train(theirs, adamw, ids), strict=True):
        for name in names:
            p, exact = ours.get_parameter(name).data, theirs.get_parameter(name).data
            if compact:
                assert same(p, exact.bfloat16()), name
            else:  # a neighbour: less than one unit in the last of 8 bits away (2^-7 of the power of two below)
                ulp = torch.ldexp(torch.ones_like(exact), exact.abs().clamp_min(1e-30).log2().floor().int() - 7)
                assert ((p.float() - exact).abs() < ulp).all(), name
