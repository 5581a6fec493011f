"""Law 7: apply after revert is the identity, and apply(base, delta) is the trained model, bit for bit."""

from pathlib import Path

import pytest

from finetooth import Delta

from .toy import DTYPES, ROWS, Toy, batches, build, same, snapshot, train

NEEDS_BASE = ("full", "gmt", "gmt-strict")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_round_trip(row: str, dtype: str, tmp_path: Path) -> None:
    model, untouched = Toy(DTYPES[dtype]), Toy(DTYPES[dtype])
    base = snapshot(model)
    opt = build(row, model)
    list(train(model, opt, batches(3)))
    trained = snapshot(model)
    delta = Delta.extract(model, base if row in NEEDS_BASE else opt)
    delta.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    inverse = loaded.apply(untouched)
    assert all(same(p, trained[n]) for n, p in snapshot(untouched).items())
    with loaded.reverted(model):
        assert all(same(p, base[n]) for n, p in snapshot(model).items())
    assert all(same(p, trained[n]) for n, p in snapshot(model).items())
    inverse.apply(model)
    assert all(same(p, base[n]) for n, p in snapshot(model).items())


@pytest.mark.parametrize("row", NEEDS_BASE)
def test_a_dense_row_says_that_it_needs_the_base(row: str) -> None:
    model = Toy()
    opt = build(row, model)
    list(train(model, opt, batches(1)))
    with pytest.raises(ValueError, match="base"):
        Delta.extract(model, opt)
