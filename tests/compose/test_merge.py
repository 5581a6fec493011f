"""Merging equals dense references, which are written here from the papers on whole tensors, bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import finetooth
from finetooth import Delta, DeltaError, Unit, WrongBase, merge
from finetooth.base import Base
from finetooth.kernels import reference

from .models import SHAPES, UNITS, Weights, applied, base, delta

Dense = Callable[[list[dict[str, Tensor]], list[float], float, list[Delta]], dict[str, Tensor]]


def add(taus: list[Tensor], weights: list[float]) -> Tensor:
    out = torch.zeros_like(taus[0])
    for w, tau in zip(weights, taus, strict=True):
        out = out + w * tau
    return out


def dense_sum(taus: list[dict[str, Tensor]], weights: list[float], density: float, deltas: list[Delta]) -> Weights:
    return {n: add([t[n] for t in taus], weights) for n in SHAPES}


def dense_average(taus: list[dict[str, Tensor]], weights: list[float], density: float, deltas: list[Delta]) -> Weights:
    return {n: add([t[n] for t in taus], weights) / sum(weights) for n in SHAPES}


def dense_ties(taus: list[dict[str, Tensor]], weights: list[float], density: float, deltas: list[Delta]) -> Weights:
    trimmed = []
    for tau in taus:
        flat = torch.cat([tau[n].flatten() for n in sorted(SHAPES)])
        k = max(1, round(density * int((flat != 0).sum())))
        order = flat.abs().sort(descending=True, stable=True).indices  # equal ones: the earlier
        left = torch.zeros_like(flat)
        left[order[:k]] = flat[order[:k]]
        parts = left.split([tau[n].numel() for n in sorted(SHAPES)])
        trimmed.append({n: p.view_as(tau[n]) for n, p in zip(sorted(SHAPES), parts, strict=True)})
    out = {}
    for n in SHAPES:
        mine = [t[n] for t in trimmed]
        sign = add(mine, weights).sign()
        agree = [((t.sign() == sign) & (sign != 0)) for t in mine]
        top = add([torch.where(a, t, 0.0) for a, t in zip(agree, mine, strict=True)], weights)
        share = add([a.float() for a in agree], weights)
        out[n] = torch.where(share > 0, top / share, 0.0)
    return out


def dense_dare(taus: list[dict[str, Tensor]], weights: list[float], density: float, deltas: list[Delta]) -> Weights:
    thinned = []
    for tau, d in zip(taus, deltas, strict=True):
        left = {}
        for n, t in tau.items():
            result = d.changes[n].result if n in d.changes else ""
            draw = reference.uniform(t.numel(), reference.key(3, "dare", n, result)).view_as(t)
            left[n] = torch.where(draw < density, t * (1.0 / density), 0.0)
        thinned.append(left)
    return dense_sum(thinned, weights, density, deltas)


DENSE: dict[str, Dense] = {"sum": dense_sum, "average": dense_average, "ties": dense_ties, "dare": dense_dare}


@st.composite
def deltas(draw: Any, weights: Weights) -> list[Delta]:
    found = []
    for i in range(draw(st.integers(2, 3))):
        names = draw(st.lists(st.sampled_from(list(SHAPES)), min_size=1, unique=True))
        units = {}
        for n in names:
            allowed = [u for u in UNITS if len(SHAPES[n]) > 1 or u.kind in ("element", "matrix")]
            ids = draw(st.lists(st.integers(0, 23), min_size=1, max_size=8))
            units[n] = (draw(st.sampled_from(allowed)), ids)
        found.append(delta(weights, units, draw(st.integers(0, 99)) * 3 + i))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("how", DENSE)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_the_dense_reference(how: str, dtype: torch.dtype, data: st.DataObject) -> None:
    weights = base(dtype)
    parts = data.draw(deltas(weights))
    factors = data.draw(st.lists(st.sampled_from([0.5, 0.75, 2.0]), min_size=len(parts), max_size=len(parts)))
    scale, density = data.draw(st.sampled_from([1.7, 0.25])), data.draw(st.sampled_from([0.3, 1.0]))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    taus = [{n: applied(weights, d)[n].to(wide) - w.to(wide) for n, w in weights.items()} for d in parts]
    dense = DENSE[how](taus, factors, density, parts)
    options: dict[str, Any] = {"density": density} if how in ("ties", "dare") else {}
    options |= {"seed": 3} if how == "dare" else {}
    merged = merge(parts, weights, how, weights=factors, scale=scale, **options)
    found = applied(weights, merged)
    for n, w in weights.items():
        # No factor is exactly 1 here, so that nothing is taken over as it is: the same operations in the same order.
        assert torch.equal(found[n], (w.to(wide) + scale * dense[n]).to(dtype)), n
    inverse = merged.inverse(weights)
    inverse.apply(found)
    assert all(torch.equal(found[n], w) for n, w in weights.items())
    union = {n for d in parts for n in d.changes}
    assert set(merged.changes) <= union


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_does_not_overlap_is_exactly_both(dtype: torch.dtype) -> None:
    weights = base(dtype)
    a = delta(weights, {"model.layers.0.a.weight": (Unit("row"), [0, 2]), "norm.weight": (Unit(), [1])}, 1)
    b = delta(
        weights, {"model.layers.0.a.weight": (Unit(), [6, 20]), "model.layers.1.b.weight": (Unit("column"), [5])}, 2
    )
    both = applied(weights, a)
    for n, c in b.changes.items():
        c.selection.scatter_(both[n], c.values)
    for how, more in (("sum", {}), ("ties", {"density": 1.0}), ("dare", {"density": 1.0})):
        for order in ([a, b], [b, a]):
            found = applied(weights, merge(order, weights, how, **more))  # type: ignore[arg-type]
            assert all(torch.equal(found[n].view(torch.uint8), t.view(torch.uint8)) for n, t in both.items()), how


def test_what_comes_out_as_the_base_drops_out() -> None:
    weights = base(torch.float32)
    a = delta(weights, {"norm.weight": (Unit(), [0, 3]), "model.layers.0.a.weight": (Unit(), [7])}, 1)
    merged = merge([a, a], weights, "sum", weights=[1, -1])
    assert not merged.changes
    minus_zero = {"w": torch.tensor([-0.0, 1.0, 2.0, 3.0])}
    tuned = {"w": torch.tensor([-0.0, 2.0, 4.0, 3.0])}
    one, two = Delta.extract(tuned, minus_zero), Delta.extract({"w": torch.tensor([0.0, 2.0, 2.0, 3.0])}, minus_zero)
    merged = merge([one, two], minus_zero, "ties", density=1 / 3)  # of the three changes, each keeps one
    assert (
        applied(minus_zero, merged)["w"].view(torch.int32).tolist()
        == torch.tensor([-0.0, 2.0, 4.0, 3.0]).view(torch.int32).tolist()
    )
    assert len(merged.changes["w"].selection) == 2


def test_dare_drops_by_seed_delta_and_index() -> None:
    weights = {"w": torch.zeros(4000)}
    a, b = ({"w": torch.full((4000,), x)} for x in (1.0, 2.0))
    parts = [Delta.extract(a, weights), Delta.extract(b, weights)]
    found = applied(weights, merge(parts, weights, "dare", density=0.25, seed=5))["w"]
    kept = {float(x): int((found == x).sum()) for x in found.unique()}
    assert set(kept) == {0.0, 4.0, 8.0, 12.0}  # the two draw apart: some entries have one, some the other, some both
    assert abs((kept[4.0] + kept[12.0]) / 4000 - 0.25) < 0.04  # six standard deviations of a binomial
    turned = applied(weights, merge(parts[::-1], weights, "dare", density=0.25, seed=5))["w"]
    assert torch.equal(found, turned)
    assert not torch.equal(found, applied(weights, merge(parts, weights, "dare", density=0.25, seed=6))["w"])


def test_tied_names_are_one_tensor() -> None:
    embed = torch.randn(6, 4)
    weights = {"embed.weight": embed, "head.weight": embed, "w": torch.randn(3)}

    def tuned(i: int, name: str) -> Delta:
        new = {n: t.clone() for n, t in weights.items()}
        new["embed.weight"][i] += 1
        new["head.weight"] = new["embed.weight"]
        other = "head.weight" if name == "embed.weight" else "embed.weight"
        first = {name: new[name], other: new[other], "w": new["w"]}
        return Delta.extract(first, {n: weights[n] for n in first})

    a, b = tuned(1, "embed.weight"), tuned(2, "head.weight")
    assert set(a.changes) != set(b.changes)  # the same storage under two names
    merged = merge([a, b], weights)
    assert len(merged.changes) == 1 and len(merged.tied) == 1
    model = {"embed.weight": embed.clone(), "w": weights["w"].clone()}
    model["head.weight"] = model["embed.weight"]
    merged.apply(model)
    expected = embed.clone()
    expected[1:3] += 1
    assert torch.equal(model["head.weight"], expected)
    apart = Delta.extract({"embed.weight": embed + 1, "head.weight": embed + 2, "w": weights["w"]},
                          {"embed.weight": embed.clone(), "head.weight": embed.clone(), "w": weights["w"]})  # fmt: skip
    with pytest.raises(DeltaError, match="changes apart"):
        merge([a, apart], weights)


def test_a_merge_is_a_delta_like_any(tmp_path: Path) -> None:
    weights = base(torch.bfloat16)
    a = delta(weights, {"norm.weight": (Unit(), [0, 3])}, 1)
    b = delta(weights, {"norm.weight": (Unit("matrix"), [0])}, 2)
    a.save(tmp_path / "a.safetensors")
    merged = merge([tmp_path / "a.safetensors", b], weights, "ties", density=0.5, weights=[1, 2])
    merged.save(tmp_path / "merged.safetensors")
    back = Delta.load(tmp_path / "merged.safetensors")
    assert back.method == "merge" and back.base.id == "org/base"
    recipe = back.recipe["merge"]
    assert (recipe["how"], recipe["weights"], recipe["density"]) == ("ties", [1.0, 2.0], 0.5)
    assert [p["name"] for p in recipe["parts"]] == ["a.safetensors", None]  # never a whole path
    found = applied(weights, back)
    assert back.verify(found) == "applied"


def test_what_does_not_belong_together_is_refused() -> None:
    weights, others = base(torch.float32), base(torch.float32, seed=1)
    a, b = (delta(w, {"norm.weight": (Unit(), [0])}, 1) for w in (weights, others))
    with pytest.raises(DeltaError, match=r"different bases.*norm\.weight.*org/base"):
        merge([a, b], weights)
    with pytest.raises(WrongBase, match=r"norm\.weight"):
        merge([a, a], others)
    with pytest.raises(DeltaError, match="inverse"):
        merge([a, a.inverse(weights)], weights)
    with pytest.raises(DeltaError, match="at least 2"):
        merge([a], weights)
    small = {"norm.weight": torch.zeros(3)}
    with pytest.raises(WrongBase, match=r"norm\.weight"):
        merge([a, a], small)
    with pytest.raises(DeltaError, match="has no"):
        merge([a, a], {"other": torch.zeros(1)})
    whole = {"n": torch.zeros(2, dtype=torch.int64)}
    counts = Delta.extract({"n": torch.ones(2, dtype=torch.int64)}, whole)
    with pytest.raises(DeltaError, match="floating-point"):
        merge([counts, counts], whole)
    high = {"h": torch.full((2,), 60000.0, dtype=torch.float16)}
    more = Delta.extract({"h": high["h"] + 4000}, high)
    with pytest.raises(DeltaError, match="not finite"):
        merge([more, more], high)


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"how": "mean"}, "choose one of sum, average, ties, dare"),
    ({"weights": [1]}, "give one for each"),
    ({"weights": [1, float("nan")]}, "finite"),
    ({"how": "average", "weights": [1, -1]}, "no average"),
    ({"how": "ties", "weights": [1, -1]}, "positive"),
    ({"density": 0.5}, "no meaning"),
    ({"how": "ties", "seed": 1}, "no meaning"),
    ({"how": "ties", "density": 1.5}, "out of range"),
]


@pytest.mark.parametrize(("options", "says"), ARGUMENTS, ids=[says for _, says in ARGUMENTS])
def test_arguments_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    weights = base(torch.float32)
    a = delta(weights, {"norm.weight": (Unit(), [0])}, 1)
    with pytest.raises(DeltaError, match=says):
        finetooth.merge([a, a], weights, **options)


def test_one_tensor_of_the_base_is_alive_at_a_time() -> None:
    class Counted(Base):
        alive, most = 0, 0

        def names(self) -> list[str]:
            return [f"w{i}" for i in range(8)]

        def tensor(self, name: str) -> Tensor:
            t = torch.zeros(64)
            weakref.finalize(t, self.gone)
            self.alive += 1
            self.most = max(self.most, self.alive)
            return t

        def gone(self) -> None:
            self.alive -= 1

    weights = {f"w{i}": torch.zeros(64) for i in range(8)}
    parts = [Delta.extract({n: t + (torch.arange(64) == k) for n, t in weights.items()}, weights) for k in (1, 2)]
    for how in DENSE:
        counted = Counted()
        merged = merge(parts, counted, how, **({"density": 1.0} if how in ("ties", "dare") else {}))  # type: ignore[arg-type]
        assert sum(c.changed for c in merged.changes.values()) == 16
        assert counted.most <= 3  # the last one, the one being read, and a second name of it
