"""Law 3: exactly k units (or the stated threshold rule), for k in {0, 1, n}, and for tensors smaller than a unit."""

from dataclasses import replace

import pytest
import torch

from finetooth import METHODS, Rule, Unit, Weight, build, select
from finetooth.rule import count

from .toy import NEEDED, ROWS, Toy, own_score

UNITS = [Unit(), Unit("row"), Unit("column"), Unit("block", 4), Unit("block", 1000), Unit("matrix"), Unit("layer")]
ONLY = {"gift-sw": ("column",), "spectrum": ("matrix", "layer")}


def weights(unit: Unit, dtype: torch.dtype) -> list[Weight]:
    g = torch.Generator().manual_seed(1)
    out = []
    for name, shape in (("l.0.a.weight", (6, 4)), ("l.1.b.weight", (2, 8)), ("l.1.c.weight", (1, 4))):
        draw = [torch.randn(shape, generator=g).to(dtype) for _ in range(3)]
        stats = {f"input_norm_{r}": torch.rand(shape[1], generator=g) for r in ("inf", "2", "1")}
        out.append(
            Weight(
                name, draw[0], draw[1], draw[2], (draw[0] + 0.1).float(), stats, unit=unit, squares=draw[1].float() ** 2
            )
        )
    return out


def score_of(row: str):
    return own_score if row == "own" else METHODS[row].rule.score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("row", [r for r in ROWS if r != "full"])
def test_exactly_k(row: str, unit: Unit, dtype: torch.dtype) -> None:
    if unit.kind not in ONLY.get(row, (unit.kind,)):
        pytest.skip("the score is one of columns, or of whole matrices: other units are refused, see test_models")
    rule = Rule(score_of(row), unit, keep=1)
    if row in ("gmt", "gmt-strict"):
        rule = replace(rule, threshold=True)
    for keep in (0, 1, 1.0, 0.5):
        for w, s in zip(ws := weights(unit, dtype), select(replace(rule, keep=keep), ws).values(), strict=True):
            n = unit.count(tuple(w.value.shape))
            k = count(keep, n)
            chosen = s.index.tolist()
            assert chosen == sorted(set(chosen)) and (not chosen or 0 <= chosen[0] <= chosen[-1] < n)
            if rule.threshold:
                scores = s.unit.grid(w.grad.abs().float()).sum(-1).flatten()
                reached = (
                    scores >= scores.sort(descending=True).values[k - 1] if k else torch.zeros(n, dtype=torch.bool)
                )
                assert chosen == reached.nonzero().flatten().tolist()
            else:
                assert len(s) == k


def test_ties_fall_to_the_second_key_then_the_index() -> None:
    def flat(w: Weight) -> torch.Tensor:
        return torch.ones_like(w.value)

    w = Weight("l.0.a.weight", torch.zeros(1, 6), grad=torch.tensor([[1.0, 5.0, 1.0, 5.0, 7.0, 5.0]]))
    assert select(Rule(flat, keep=2), [w])["l.0.a.weight"].index.tolist() == [0, 1]
    flat.tie = lambda w: w.grad.abs()
    assert select(Rule(flat, keep=3), [w])["l.0.a.weight"].index.tolist() == [1, 3, 4]


def test_a_threshold_keeps_ties() -> None:
    w = Weight("l.0.a.weight", torch.zeros(1, 6), grad=torch.tensor([[1.0, 5.0, 1.0, 5.0, 7.0, 5.0]]))
    rule = Rule(METHODS["gmt"].rule.score, keep=2, threshold=True)
    assert select(rule, [w])["l.0.a.weight"].index.tolist() == [1, 3, 4, 5]


@pytest.mark.parametrize("row", [r for r in ROWS if r not in ("full", "gift-sw")])
def test_nothing_selected_is_an_error(row: str) -> None:
    ids = [torch.zeros(1, 2, dtype=torch.long)]
    with pytest.raises(ValueError, match="nothing would train"):
        build(own_score if row == "own" else row, Toy(), keep=0, calibration=ids, **NEEDED.get(row, {}))
