"""Deltas on top of deltas: the order is checked, also where they touch different tensors, and a chain is one delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetooth import Delta, DeltaError, Unit, WrongBase, compose, link, merge
from finetooth.delta import apply_folder

from ..format.deltas import rewrite
from .models import Weights, applied, base, delta

A, B, N = "model.layers.0.a.weight", "model.layers.1.b.weight", "norm.weight"


def equal(x: Weights, y: Weights) -> bool:
    return all(torch.equal(t.view(torch.uint8), y[n].view(torch.uint8)) for n, t in x.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_composed_is_the_chain(dtype: torch.dtype) -> None:
    first = base(dtype)
    one = delta(first, {A: (Unit("row"), [0, 2]), N: (Unit(), [1])}, 1)
    second = applied(first, one)
    two = delta(second, {A: (Unit("column"), [1]), B: (Unit("block", 2), [3])}, 2)
    third = applied(second, two)
    back = Delta.extract({**third, N: first[N]}, third)  # the last one takes a part of the first off again
    end = applied(third, back)
    whole = compose([one, two, back], first)
    assert equal(applied(first, whole), end)
    assert set(whole.changes) == {A, B} and whole.method == "chain" and len(whole.recipe["chain"]["parts"]) == 3
    for wrong in ([two, one], [one, one], [one, link(back, [one, two], third)]):
        with pytest.raises(DeltaError):
            compose(wrong, first)
    with pytest.raises(WrongBase):
        compose([one, two], second)


def test_the_order_is_noted_where_tensors_do_not_overlap(tmp_path: Path) -> None:
    first = base(torch.float32)
    one, apart = delta(first, {A: (Unit(), [1, 5])}, 1), delta(first, {B: (Unit(), [2])}, 2)
    second = applied(first, one)
    with pytest.raises(DeltaError, match="does not say that it was made on top"):
        compose([one, apart], first)
    two = link(apart, [one], second)
    two.save(tmp_path / "two.safetensors")
    two = Delta.load(tmp_path / "two.safetensors")
    assert dict(two.base.after) == {A: one.changes[A].result}
    target = {n: t.clone() for n, t in first.items()}
    with pytest.raises(DeltaError, match=rf"made on top of others, and '{A}'"):
        two.apply(target)
    assert equal(target, first)
    one.apply(target)
    inverse = two.apply(target)
    assert equal(target, applied(first, compose([one, two], first)))
    inverse.apply(target)
    assert equal(target, second)
    with pytest.raises(DeltaError):
        compose([two], first)
    three = link(delta(applied(second, two), {N: (Unit(), [0])}, 3), [one, two], applied(second, two))
    assert set(three.base.after) == {A, B}
    whole = compose([one, two, three], first)
    assert not whole.base.after
    assert equal(applied(first, whole), applied(applied(second, two), three))
    both = compose([two, three], second)  # a part of a chain belongs where its first belongs
    assert dict(both.base.after) == {A: one.changes[A].result}
    with pytest.raises(DeltaError, match="different bases"):
        merge([delta(first, {A: (Unit(), [0])}, 4), two], first)


def test_a_link_needs_the_base_it_speaks_of() -> None:
    first = base(torch.float32)
    one, apart = delta(first, {A: (Unit(), [1, 5])}, 1), delta(first, {B: (Unit(), [2])}, 2)
    with pytest.raises(DeltaError, match="made on top of others"):
        link(apart, [one], first)
    with pytest.raises(DeltaError, match="is the result of the delta"):
        link(apart, [one], applied(applied(first, one), apart))


def test_a_folder_is_checked_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    first = base(torch.float32)
    (tmp_path / "base").mkdir()
    save_file(first, tmp_path / "base" / "model.safetensors")
    one, apart = delta(first, {A: (Unit(), [1, 5])}, 1), delta(first, {B: (Unit(), [2])}, 2)
    two = link(apart, [one], applied(first, one))
    with pytest.raises(DeltaError, match="made on top of others"):
        apply_folder(tmp_path / "base", tmp_path / "out", two)
    assert not (tmp_path / "out").exists()
    apply_folder(tmp_path / "base", tmp_path / "one", one)
    apply_folder(tmp_path / "one", tmp_path / "two", two)
    assert two.verify(tmp_path / "two") == "applied"
    one_step = compose([one, two], tmp_path / "base")
    assert one_step.verify(tmp_path / "two") == "applied"


@pytest.mark.parametrize("after", ["[]", '{"w": 1}', '{"w": "sha256:0"}', '"w"'])
def test_a_note_that_is_none_is_refused(after: str, tmp_path: Path) -> None:
    first = base(torch.float32)
    delta(first, {A: (Unit(), [1, 5])}, 1).save(tmp_path / "d")

    def lie(header: Any, entries: Any, data: Any) -> None:
        header["__metadata__"]["base"] = header["__metadata__"]["base"][:-1] + f',"after":{after}}}'

    rewrite(tmp_path / "d", lie)
    with pytest.raises(DeltaError, match="after"):
        Delta.load(tmp_path / "d")
