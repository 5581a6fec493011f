"""Law 12: between steps a row holds so many bytes for each entry that trains, and a gradient of so many more."""

import pytest
import torch

import finetooth

from .toy import AGAIN, DTYPES, ROWS, Toy, batches, build, train

# Bytes for each entry that trains: index 4, moments 8, and 4 for the base value and the master together (float32: 4 and none,
# bfloat16: 2 and 2). A whole matrix, column or row needs one index for all its entries.
COMPACT = 4 + 8 + 4
DENSE_ROWS = ("full", "gmt", "gmt-strict", "dst")
WHOLE = ("hft", "spectrum", "lisa", "badam")  # whole matrices and layers
DENSE = 8  # of each entry that may train: its moments. GMT adds a bit, DST a bit and the base values of what it chose.


def limit(opt: finetooth.SelectiveAdamW, row: str, size: int) -> float:
    sizes = [opt._parameter(n).numel() for n in opt._slots]
    bits = sum((n + 7) // 8 for n in sizes)
    if row == "full":
        return DENSE * sum(sizes) + 4 * len(sizes)  # one index a tensor: all of it
    if row in ("gmt", "gmt-strict"):
        return DENSE * sum(sizes) + bits
    if row == "dst":
        return DENSE * sum(sizes) + bits + size * sum(s.numel for s in opt.selections().values())
    if row == "spiel":  # an age each, and in a window a position and a sum
        return sum((COMPACT + 4 + 8) * s.numel for s in opt.selections().values())
    if row in AGAIN:  # base values of whatever trained, with their index, and an age for every unit
        ever = sum(
            len(s.replaced.index) * (4 + s.replaced.values.shape[1] * size) for s in opt._slots.values() if s.replaced
        )
        return ever + sum((COMPACT - 4) * s.numel + 8 * len(s) for s in opt.selections().values())
    return sum((COMPACT - 4) * s.numel + 4 * len(s) for s in opt.selections().values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_state(row: str, dtype: str) -> None:
    model = Toy(DTYPES[dtype])
    opt = build(row, model)
    list(train(model, opt, batches(2)))
    held = opt.state_bytes()
    assert 0 < held <= limit(opt, row, torch.finfo(DTYPES[dtype]).bits // 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [r for r in ROWS if r not in DENSE_ROWS])
def test_gradients_are_of_what_trains_alone(row: str, dtype: str) -> None:
    """Four bytes an entry where a part of a tensor trains; a tensor that trains whole has its own gradient, one that does not has none."""
    model = Toy(DTYPES[dtype])
    opt = build(row, model, **({"when": "every(4)"} if row == "spiel" else {}))  # a step outside of its window
    list(train(model, opt, batches(1)))
    for micro in batches(1)[0].chunk(2):
        model(micro).loss.backward()
    chosen, routed = opt.selections(), opt._gradients.chosen
    whole = {n for n, s in chosen.items() if s.numel == opt._parameter(n).numel()}
    if row in WHOLE:
        assert {n for n, p in model.named_parameters() if p.grad is not None} == whole and not routed
        return
    assert all(p.grad is None for p in model.parameters())
    assert sum(c.grad.untyped_storage().nbytes() for c in routed.values()) == 4 * sum(s.numel for s in chosen.values())


def test_what_is_no_longer_chosen_is_let_go() -> None:
    """Re-selection of a tenth as much holds a tenth of the moments; only base values are remembered."""
    model = Toy()
    opt = build("own", model, keep=0.5, when="every(1)")
    list(train(model, opt, batches(1)))
    ever = sum(s.numel for s in opt.selections().values())
    opt.rule = finetooth.Rule(opt.rule.score, keep=0.05)
    list(train(model, opt, batches(1)))
    entries = sum(s.numel for s in opt.selections().values())
    moments = sum(s.exp_avg.numel() + s.exp_avg_sq.numel() for s in opt._slots.values())
    assert moments == 2 * entries
    # index, moments and age of what trains; index and base value of what ever did
    assert opt.state_bytes() <= 16 * entries + 8 * (ever + entries)
