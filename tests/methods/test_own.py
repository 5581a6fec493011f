"""A user's own rule, through `build` and `SelectiveAdamW`, static and re-selecting."""

import pytest
import torch

import finetooth
from finetooth import Rule, SelectiveAdamW, Unit, Weight
from finetooth.kernels import reference
from finetooth.rest import frozen, reset
from finetooth.when import at, every
from tests.laws.toy import Toy, batches, same, snapshot, train

from .models import ids, step, tiny


def wandering(w: Weight) -> torch.Tensor:
    """Another random choice at every selection."""
    return reference.uniform(w.value.numel(), reference.key(w.step, w.name)).view_as(w.value)


def test_through_selective_adamw() -> None:
    def my_score(w: Weight) -> torch.Tensor:
        return (w.value * w.grad).abs()

    model = tiny("llama")
    base = snapshot(model)
    opt = SelectiveAdamW(model.named_parameters(), rule=Rule(score=my_score, keep=0.05), lr=1e-2)
    assert opt.selections() == {}  # a score of gradients is settled by the first step's
    for i in range(3):
        step(model, opt, ids(seed=i))
    assert len(opt.selections()) == 14
    opt.verify_frozen()
    delta = finetooth.Delta.extract(model, opt)
    with delta.reverted(model):
        assert all(same(p, base[n]) for n, p in snapshot(model).items())


@pytest.mark.parametrize("rest", [frozen(), reset()], ids=["frozen", "reset"])
def test_reselection_carries_what_stays(rest) -> None:
    model = Toy()
    base = snapshot(model)
    opt = SelectiveAdamW(model.named_parameters(), Rule(wandering, keep=0.3), every(2), rest, lr=1e-2)
    last: dict[str, torch.Tensor] = {}
    for i in train(model, opt, batches(6)):
        name, slot = "model.layers.0.mlp.up_proj.weight", opt._slots["model.layers.0.mlp.up_proj.weight"]
        p, mask = model.get_parameter(name).detach(), slot.selection.mask()
        if rest.kind == "reset":
            assert same(p[~mask], base[name][~mask])
        if i % 2:  # the selection of the next step is made after this one, as `wandering` reads no gradient
            kept = mask.flatten()[last["index"]]
            ages = dict(
                zip(
                    slot.selection.index.tolist(),
                    torch.as_tensor(slot.age).expand(len(slot.selection)).tolist(),
                    strict=True,
                )
            )
            assert 0 < int(kept.sum()) < len(kept)
            for index, stays, age in zip(last["index"].tolist(), kept.tolist(), last["age"].tolist(), strict=True):
                assert (ages[index] == age + 1) if stays else index not in ages
            assert {a for i, a in ages.items() if i not in set(last["index"].tolist())} == {0}
        last = {
            "index": slot.selection.index.clone(),
            "age": torch.as_tensor(slot.age).expand(len(slot.selection)).clone(),
        }
    opt.verify_frozen()
    delta = finetooth.Delta.extract(model, opt)
    trained = snapshot(model)
    with delta.reverted(model):
        assert all(same(p, base[n]) for n, p in snapshot(model).items())
    assert all(same(p, trained[n]) for n, p in snapshot(model).items())


def test_reselection_resumes_exactly() -> None:
    def run(cut: int | None) -> dict[str, torch.Tensor]:
        model = Toy()
        opt = SelectiveAdamW(model.named_parameters(), Rule(wandering, keep=0.3), at([0, 3, 5]), reset(), lr=1e-2)
        for i in train(model, opt, batches(8)):
            if i == cut:
                state, weights = opt.state_dict(), snapshot(model)
                model = Toy()
                opt = SelectiveAdamW(
                    model.named_parameters(), Rule(wandering, keep=0.3), at([0, 3, 5]), reset(), lr=1e-2
                )
                model.load_state_dict(weights)
                opt.load_state_dict(state)
                list(train(model, opt, batches(8)[cut + 1 :]))
                break
        opt.verify_frozen()
        return snapshot(model)

    straight = run(None)
    for cut in (2, 3, 6):
        assert all(same(p, straight[n]) for n, p in run(cut).items())


def test_decay_to_the_base() -> None:
    model = Toy()
    opt = finetooth.build("magnitude", model, keep=0.5, lr=0.1, weight_decay=1.0, decay_to="base", max_grad_norm=None)
    base = snapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    opt.step()
    name, selection = next(iter(opt.selections().items()))
    mask = selection.mask()
    torch.testing.assert_close(model.get_parameter(name)[mask], base[name][mask] + 0.9)


def test_scores_are_checked() -> None:
    model = Toy()
    for bad, message in (
        (lambda w: w.value, "negative"),
        (lambda w: w.value.abs().mean(0), "returned shape"),
        (lambda w: w.value.abs() / 0, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            finetooth.build(bad, model)


def test_a_trainer_sees_an_ordinary_optimizer() -> None:
    model = Toy()
    opt = finetooth.build("random", model, keep=0.1, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (step + 1))
    assert isinstance(opt, torch.optim.Optimizer)
    list(train(model, opt, batches(1)))
    schedule.step()
    assert opt.param_groups[0]["lr"] == 0.5
    assert Unit("column") != Unit()


def test_parameters_that_a_batch_does_not_use() -> None:
    """No gradient counts as a gradient of zero when choosing; nothing is written there."""
    model = Toy()
    model.unused = torch.nn.Module()
    model.unused.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    before = snapshot(model)
    for row in ("grad", "gmt", "gmt-strict", "dst"):
        opt = finetooth.build(row, model, keep=0.1, lr=1e-2)
        list(train(model, opt, batches(2)))
        opt.verify_frozen()
        assert same(model.unused.layers[0].weight.data, before["unused.layers.0.weight"])
    calibrated = finetooth.build("grad", model, keep=0.1, calibration=[{"input_ids": batches(1)[0]}])
    assert len(calibrated.selections()["unused.layers.0.weight"]) == 2  # ties at zero fall to the first indices


def test_float16_gradients_above_its_largest_norm() -> None:
    model = Toy(torch.float16)
    opt = finetooth.build("full", model, lr=1e-3)
    for p in model.parameters():
        p.grad = torch.full_like(p, 30000.0)
    opt.step()
    assert opt.skipped == 0 and 65504 < opt.grad_norm < float("inf")


def test_parameters_cannot_be_added_later() -> None:
    opt = finetooth.build("full", Toy())
    with pytest.raises(ValueError, match="build a new one"):
        opt.add_param_group({"params": [("x", torch.nn.Parameter(torch.zeros(1)))]})
