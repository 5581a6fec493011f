"""apply(base, delta) is the tuned model and apply(tuned, inverse) is the base, bit for bit, through a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finetooth import codec, diff
from finetooth.base import fingerprint
from finetooth.delta import Delta, DeltaError, WrongBase
from finetooth.diff import gather
from finetooth.selection import Selection
from finetooth.units import Unit

from .deltas import copy, make, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    base, tuned = make(dtype)
    Delta.extract(tuned, base).save(tmp_path / "d")
    delta, x = Delta.load(tmp_path / "d"), copy(base)
    inverse = delta.apply(x)
    assert same(x, tuned)
    assert not same(x, base)
    inverse.save(tmp_path / "i")
    again = Delta.load(tmp_path / "i").apply(x)
    assert same(x, base)
    again.apply(x)
    assert same(x, tuned)


def test_the_cheapest_unit_is_taken() -> None:
    base, tuned = make()
    delta = Delta.extract(tuned, base)
    kinds = {name: c.selection.unit.kind for name, c in delta.changes.items()}
    assert kinds == {
        "a.weight": "element", "b.weight": "row", "c.weight": "column", "d.weight": "matrix",
        "e": "column", "n": "element", "scalar": "element",
    }  # fmt: skip
    assert delta.changes["e"].selection.index.tolist() == [8]  # column 2 of matrix 1, 6 columns each
    assert delta.info()["changed"] == 2 + 8 + 6 + 48 + 4 + 1 + 1
    assert delta.info()["share"] == pytest.approx(70 / (4 * 48 + 48 + 5 + 1 + 3))


@pytest.mark.parametrize(
    "unit", [Unit(), Unit("row"), Unit("column"), Unit("block", 3), Unit("matrix"), Unit("layer")], ids=str
)
@pytest.mark.parametrize("shape", [(6, 4), (2, 6, 3)], ids=str)
@pytest.mark.parametrize("piece", [2, 1 << 18], ids="{}-at-a-time".format)
def test_every_unit_goes_through_a_file(
    tmp_path: Path, unit: Unit, shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extract chooses four of the kinds; a file may hold them all."""
    monkeypatch.setattr(diff, "_PIECE", piece)
    old = torch.randn(shape).to(torch.bfloat16)
    chosen = Selection(torch.arange(0, unit.count(shape), 2, dtype=torch.int32), unit, shape)
    new = old.clone()
    chosen.scatter_(new, chosen.gather(old) + 1)
    changed = int((old != new).sum())
    change = codec.Change(chosen, gather(chosen, new), changed, fingerprint(old), fingerprint(new))
    Delta({"w": change}).save(tmp_path / "d")
    x = {"w": old.clone()}
    inverse = Delta.load(tmp_path / "d").apply(x)
    assert torch.equal(x["w"], new)
    inverse.apply(x)
    assert torch.equal(x["w"], old)


def test_bits_count_not_values() -> None:
    base = {"w": torch.tensor([0.0, 1.0, float("nan")])}
    tuned = {"w": torch.tensor([-0.0, 1.0, float("nan")])}
    delta = Delta.extract(tuned, base)
    assert delta.changes["w"].selection.index.tolist() == [0]  # -0.0 is a change, the same NaN is none
    delta.apply(base)
    assert same(base, tuned)


def test_new_values_must_be_finite() -> None:
    base, tuned = make()
    tuned["b.weight"][0, 0] = float("inf")
    with pytest.raises(DeltaError, match=r"'b\.weight'.*not finite"):
        Delta.extract(tuned, base)


def test_nothing_changed_is_an_empty_delta() -> None:
    base, _ = make()
    delta = Delta.extract(copy(base), base)
    assert len(delta.changes) == 0
    assert delta.info()["changed"] == 0


def test_apply_twice_is_refused_as_such() -> None:
    base, tuned = make()
    delta, x = Delta.extract(tuned, base), copy(base)
    delta.apply(x)
    with pytest.raises(WrongBase, match="already applied"):
        delta.apply(x)
    assert same(x, tuned)


def test_a_tensor_that_is_not_contiguous() -> None:
    base, tuned = {"w": torch.randn(4, 6).T}, {"w": torch.randn(4, 6).T}
    x = {"w": base["w"].clone(memory_format=torch.preserve_format)}
    assert not x["w"].is_contiguous()
    inverse = Delta.extract(tuned, base).apply(x)
    assert torch.equal(x["w"], tuned["w"])
    inverse.apply(x)
    assert torch.equal(x["w"], base["w"])


def test_reverted_is_the_base_for_a_block() -> None:
    base, tuned = make()
    delta, x = Delta.extract(tuned, base), copy(tuned)
    for check in (True, False):
        with delta.reverted(x, check=check):
            assert same(x, base)
        assert same(x, tuned)

    def fail() -> None:
        with delta.reverted(x):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert same(x, tuned)


def test_reverted_from_a_file_needs_the_old_values(tmp_path: Path) -> None:
    base, tuned = make()
    Delta.extract(tuned, base).save(tmp_path / "d")
    delta, x = Delta.load(tmp_path / "d"), copy(tuned)
    with pytest.raises(DeltaError, match="new values only"), delta.reverted(x):
        pass
    assert same(x, tuned)
    delta.inverse(base).apply(x)
    assert same(x, base)
    delta.apply(x)  # now it knows them
    with delta.reverted(x):
        assert same(x, base)


def test_verify_tells_the_four_states() -> None:
    base, tuned = make()
    delta = Delta.extract(tuned, base)
    assert delta.verify(base) == "base"
    assert delta.verify(tuned) == "applied"
    with pytest.raises(WrongBase, match="partly applied"):
        delta.verify(base | {"a.weight": tuned["a.weight"]})
    with pytest.raises(WrongBase, match=r"'b\.weight' is neither"):
        delta.verify(base | {"b.weight": torch.zeros(6, 8)})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("angles", torch.arange(3.0))


@pytest.mark.parametrize("lacks", ["head.weight", "embed.weight", "nothing"])
def test_tied_tensors_are_stored_once(tmp_path: Path, lacks: str) -> None:
    """A checkpoint may lack either name, and the buffer."""
    model = Tied()
    base = {name: t.clone() for name, t in model.state_dict().items() if name not in (lacks, "angles")}
    with torch.no_grad():
        model.embed.weight[2, 1] += 1
    delta = Delta.extract(model, base)
    assert list(delta.changes) == ["embed.weight"]
    assert dict(delta.tied) == {"head.weight": "embed.weight"}
    delta.save(tmp_path / "d")
    Delta.load(tmp_path / "d").apply(base)  # where the alias is a copy of its own, it is written too
    assert all(torch.equal(t, model.embed.weight) for t in base.values())
    with delta.reverted(model):
        assert not torch.equal(base[next(iter(base))], model.head.weight)


def test_an_alias_that_is_not_equal_is_a_tensor_of_its_own() -> None:
    model = Tied()
    base = {"embed.weight": model.embed.weight.detach().clone(), "head.weight": torch.zeros(5, 3)}
    delta = Delta.extract(model, base)
    assert dict(delta.tied) == {}
    assert list(delta.changes) == ["head.weight"]
    base = {"embed.weight": torch.ones(5, 3), "head.weight": torch.zeros(5, 3)}
    delta = Delta.extract(model, base)
    with pytest.raises(DeltaError, match="the target ties"):
        delta.apply(Tied())


def test_a_copy_of_a_tied_tensor_saved_on_one_side_only() -> None:
    base, tuned = make()
    tuned["z.weight"] = tuned["a.weight"].clone()
    assert dict(Delta.extract(tuned, base).tied) == {"z.weight": "a.weight"}
    tuned["z.weight"][0, 0] += 1
    with pytest.raises(DeltaError, match=r"'z\.weight' is missing in the base"):
        Delta.extract(tuned, base)


class Optimizer:
    """What `extract` needs of an optimizer."""

    def __init__(self, known: dict[str, Tensor], unknown: str = ""):
        self.known, self.unknown = known, unknown

    def names(self) -> list[str]:
        return list(self.known)

    def base_tensor(self, name: str) -> Tensor | None:
        return None if name == self.unknown else self.known[name]


def test_the_optimizer_is_a_base() -> None:
    base, tuned = make()
    delta = Delta.extract(tuned, Optimizer(base))
    assert same(base, copy(base))
    delta.apply(base)
    assert same(base, tuned)
    with pytest.raises(DeltaError, match=r"'c\.weight'.*give base="):
        Delta.extract(tuned, Optimizer(base, unknown="c.weight"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a.weight": torch.zeros(6, 7)}, r"'a\.weight' is F32 \[6, 7\] in the tuned model and F32 \[6, 8\]"),
        ({"n": torch.zeros(5).half(), "same": torch.zeros(2)}, r"'n' is F16.*1 more"),
        ({"more": torch.zeros(2), "yet": torch.zeros(2)}, r"'more' is missing in the base and 1 more"),
    ],
)
def test_two_models_that_do_not_belong_together(change: dict[str, Tensor], says: str) -> None:
    base, tuned = make()
    with pytest.raises(DeltaError, match=says):
        Delta.extract(tuned | change, base)


def test_the_sources_that_are_no_weights() -> None:
    base, _ = make()
    with pytest.raises(DeltaError, match="cannot be read from a int"):
        Delta.extract(base, 3)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Delta.extract(base, "nowhere")
