"""A thousand small steps of bfloat16 weights go where float32 weights go, and those of nearest rounding do not."""

import pytest
import torch
from torch import nn

import finetooth

STEPS, SHAPE = 1000, (64, 96)


class Weights(nn.Module):
    """One matrix, so that the gradient can be given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05
        self.linear = nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=dtype)
        self.linear.weight.data.copy_(start.bfloat16())


def walked(row: str, dtype: torch.dtype, **given: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the weights start and where a thousand gradients, the same for every dtype, take them."""
    model = Weights(dtype)
    weight = model.linear.weight
    start = weight.detach().float().clone()
    opt = finetooth.build(row, model, lr=1e-6, targets="all", max_grad_norm=None, gradients="dense", **given)
    draw = torch.Generator().manual_seed(1)
    drift = torch.randn(SHAPE, generator=draw)
    for _ in range(STEPS):
        weight.grad = (drift + torch.randn(SHAPE, generator=draw)).to(dtype)
        opt.step()
        opt.zero_grad()
    return start, weight.detach().float()


@pytest.mark.parametrize(("row", "given"), [("random", {"keep": 0.5}), ("random", {"keep": 0.5, "unit": "column"})])
def test_compact_rows_are_the_rounded_float32_run(row: str, given: dict[str, object]) -> None:
    _, exact = walked(row, torch.float32, **given)
    start, found = walked(row, torch.bfloat16, **given)
    # Gradients in bfloat16 differ by 2^-9, so does the way by at most 1e-6 x 1000 x 2^-9 x a few; the rest is one rounding.
    spacing = torch.maximum(exact.abs() * 2**-7, torch.tensor(1e-9))
    assert ((found - exact).abs() <= 0.5 * spacing + 1e-5).all()
    assert (found != start).float().mean() > 0.4


def test_dense_rows_keep_the_mean() -> None:
    start, exact = walked("full", torch.float32)
    way = (exact - start).double()
    shares = {}
    for rounding in ("auto", "nearest"):
        moved = (walked("full", torch.bfloat16, rounding=rounding)[1] - start).double()
        shares[rounding] = float((moved * way).sum() / way.square().sum())
    # 6,144 weights, each off by less than a spacing of some 1e-4 against ways of 1e-3 at random: a share is known to 0.3 %.
    assert abs(shares["auto"] - 1) < 0.02
    assert shares["nearest"] < 0.9
