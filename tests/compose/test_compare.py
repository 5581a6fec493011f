"""Conflicts, contrasts and trimmed deltas, counted here by hand or on whole tensors."""

from __future__ import annotations

import pytest
import torch

from finetooth import Delta, DeltaError, Unit, WrongBase, conflicts, trim
from finetooth.contrast import contrast, together

from .models import applied, base, delta

ZERO = {"model.layers.3.w": torch.zeros(2, 3), "norm": torch.zeros(3)}


def tuned(w: list[list[float]], norm: list[float]) -> Delta:
    return Delta.extract({"model.layers.3.w": torch.tensor(w).float(), "norm": torch.tensor(norm).float()}, ZERO)


A = tuned([[1, 2, 0], [0, 0, 4]], [0, 0, 0])
B = tuned([[1, -2, 0], [3, 0, 4]], [1, 0, 0])
C = tuned([[-1, 0, 0], [0, 0, 0]], [2, 0, 0])


def test_conflicts_by_tensor_and_layer() -> None:
    found = conflicts([A, B], ZERO)
    assert found.facts() == {
        "counted": "changed", "changed": 5, "overlap": 3, "opposed": 1, "share": 3 / 5,
        "layers": [
            {"name": "model.layers.3", "changed": 4, "overlap": 3, "opposed": 1, "share": 3 / 4},
            {"name": "norm", "changed": 1, "overlap": 0, "opposed": 0, "share": 0.0},
        ],
        "tensors": [
            {"name": "model.layers.3.w", "changed": 4, "overlap": 3, "opposed": 1, "share": 3 / 4},
            {"name": "norm", "changed": 1, "overlap": 0, "opposed": 0, "share": 0.0},
        ],
    }  # fmt: skip
    three = conflicts([A, B, C], ZERO)
    assert (three.total.changed, three.total.overlap, three.total.opposed) == (5, 4, 2)


def test_without_the_base_listed_entries_count() -> None:
    weights = base(torch.float32)
    a = delta(weights, {"model.layers.0.a.weight": (Unit("row"), [1])}, 1)
    b = delta(weights, {"model.layers.0.a.weight": (Unit("column"), [2])}, 2)
    found = conflicts([a, b])
    assert found.facts()["counted"] == "listed"
    assert (found.total.changed, found.total.overlap, found.total.opposed) == (6 + 4 - 1, 1, None)
    assert conflicts([a, b], weights).total.changed == sum(
        d.changes["model.layers.0.a.weight"].changed for d in (a, b)
    ) - (conflicts([a, b], weights).total.overlap)


def test_a_contrast() -> None:
    whole = together(contrast(A, B, ZERO))
    assert (whole.first, whole.second, whole.same, whole.different) == (0, 2, 2, 1)
    a, b = torch.tensor([1.0, 2, 0, 4, 0]), torch.tensor([1.0, -2, 3, 4, 1])
    assert whole.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
    (w, norm) = contrast(A, B, ZERO)
    assert norm.cosine is None and norm.second == 1 and w.facts()["same"] == 2
    blind = together(contrast(A, B))
    assert blind.cosine is None and (blind.same, blind.different) == (2, 1)
    assert together(contrast(A, A, ZERO)).cosine == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by", ["file", "tensor"])
def test_trim_keeps_the_largest(by: str, dtype: torch.dtype) -> None:
    weights = base(dtype)
    d = delta(
        weights, {"model.layers.0.a.weight": (Unit("column"), [0, 3, 5]), "norm.weight": (Unit("matrix"), [0])}, 4
    )
    moved = {n: (t.float() - weights[n].float()).abs() for n, t in applied(weights, d).items()}
    small = trim(d, weights, keep=0.5, by=by)  # type: ignore[arg-type]
    found = applied(weights, small)
    groups = [["model.layers.0.a.weight", "norm.weight"]] if by == "file" else [[n] for n in d.changes]
    for names in groups:
        sizes = torch.cat([moved[n].flatten() for n in names])
        stayed = torch.cat([(found[n] != weights[n]).flatten() for n in names])
        k = max(1, round(0.5 * int((sizes > 0).sum())))
        assert int(stayed.sum()) == k
        assert sizes[stayed].min() >= sizes[~stayed].max()
    for n, t in applied(weights, d).items():
        assert torch.equal(found[n], torch.where(found[n] != weights[n], t, weights[n]))
    assert small.recipe["trim"]["keep"] == 0.5 and small.method == "grad"
    all_of_it = applied(weights, trim(d, weights, keep=1.0))
    assert all(torch.equal(t, applied(weights, d)[n]) for n, t in all_of_it.items())
    assert sum(c.changed for c in trim(d, weights, keep=2).changes.values()) == 2


def test_bad_arguments() -> None:
    weights = base(torch.float32)
    d = delta(weights, {"norm.weight": (Unit(), [0])}, 1)
    with pytest.raises(DeltaError, match=r"keep=1\.5 is out of range"):
        trim(d, weights, keep=1.5)
    with pytest.raises(DeltaError, match="leaves nothing"):
        trim(d, weights, keep=0)
    with pytest.raises(DeltaError, match="choose file or tensor"):
        trim(d, weights, by="row")  # type: ignore[arg-type]
    with pytest.raises(WrongBase):
        trim(d, base(torch.float32, seed=1))
    other = delta(base(torch.float32, seed=1), {"norm.weight": (Unit(), [0])}, 1)
    for compared in (conflicts, lambda pair: contrast(*pair)):
        with pytest.raises(DeltaError, match="different bases"):
            compared([d, other])
