"""Calibration gradients: the mean over the batches, in however many passes, and never all at once."""

import weakref

import pytest
import torch

import finetooth
from finetooth.anatomy import matching, survey
from finetooth.probe import calibrate
from tests.laws.toy import same

from .models import ids, tiny


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_passes_agree_with_plain_gradients(family: str) -> None:
    model = tiny(family)
    parts = {n: p for n, p in survey(model).items() if n in matching("linear", survey(model))}
    batches = [ids(seed=1), {"input_ids": ids(seed=2)}]
    one, many = calibrate(model, batches, parts, ["grad"]), calibrate(model, iter(batches), parts, ["grad"], room=1)
    assert one[next(iter(parts))]._sweeps.group != many[next(iter(parts))]._sweeps.group
    model.eval()
    for batch in (ids(seed=1), ids(seed=2)):
        (model(input_ids=batch, labels=batch).loss / 2).backward()
    for name in parts:
        assert same(one[name]["grad"], many[name]["grad"])
        torch.testing.assert_close(one[name]["grad"], model.get_parameter(name).grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("row", ["grad", "snip"])
def test_a_selection_lets_go_of_what_it_has_read(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetooth import probe

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    real = probe._measured

    def counting(*args: object) -> probe.Stats:
        nonlocal most
        stats = real(*args)
        alive.extend(weakref.ref(s["grad"]) for s in stats.values())
        most = max(most, sum(4 * g.numel() for r in alive if (g := r()) is not None))
        return stats

    monkeypatch.setattr(probe, "_measured", counting)
    monkeypatch.setattr(probe, "ROOM", 1)
    model = tiny("llama")
    opt = finetooth.build(row, model, keep=0.1, calibration=[ids()])
    targets = sum(4 * model.get_parameter(n).numel() for n in opt.selections())
    largest = max(4 * model.get_parameter(n).numel() for n in opt.selections())
    assert most <= targets / probe.PASSES + largest < targets / 2
    assert not any(r() is not None for r in alive)


def test_bad_batches_are_refused_before_the_model_runs() -> None:
    for batches, message in (([], "no batches"), ([ids(), {"labels": ids()}], "input_ids is missing")):
        with pytest.raises(ValueError, match=message):
            finetooth.build("grad", tiny("llama"), calibration=batches)
