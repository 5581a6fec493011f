"""What the optimizer says the pretrained values are: right at every step, or an error."""

import pytest
import torch

import finetooth
from finetooth.rest import quantized
from finetooth.when import every
from tests.laws.toy import same, snapshot

from .models import ids, step, tiny


def watched(base: dict[str, torch.Tensor], seen: list[bool]):
    def score(w: finetooth.Weight) -> torch.Tensor:
        grad = w.grad.abs() + 1e-6  # first: without one, nothing is looked at
        seen.append(torch.equal(w.base, base[w.name]))
        return grad

    return score


@pytest.mark.parametrize(
    ("unit", "keep", "pool", "given"),
    [("element", 0.1, "tensor", False), ("matrix", 3, "model", True), ("matrix", 3, "model", False)],
)
def test_a_score_reads_the_pretrained_value(unit: str, keep: float, pool: str, given: bool) -> None:
    model, seen = tiny("llama"), []
    base = snapshot(model)
    opt = finetooth.build(
        watched(base, seen),
        model,
        unit=unit,
        keep=keep,
        pool=pool,
        when=every(1),
        base=base if given else None,
        lr=1e-2,
    )
    for i in range(3):
        step(model, opt, ids(seed=i))
    assert len(seen) == 3 * len(opt.selections()) and all(seen)
    opt.verify_frozen()
    assert all(same(opt.base_tensor(name), p) for name, p in base.items())


def test_a_dense_row_that_does_not_hold_the_base_says_so() -> None:
    model, seen = tiny("llama"), []
    base = snapshot(model)
    opt = finetooth.build("gmt-strict", model, score=watched(base, seen), lr=1e-2)
    step(model, opt, ids())
    with pytest.raises(ValueError, match="give base="):
        step(model, opt, ids())
    model = tiny("llama")
    opt = finetooth.build("gmt-strict", model, score=watched(base, seen), lr=1e-2, base=base)
    for i in range(3):
        step(model, opt, ids(seed=i))
    assert all(seen)


def test_a_base_that_is_not_the_model_is_refused_before_training() -> None:
    model = tiny("llama")
    base = snapshot(model)
    with pytest.raises(ValueError, match="shares its memory"):
        finetooth.build("full", model, base=model.state_dict())
    base["model.norm.weight"] += 1
    with pytest.raises(ValueError, match=r"not what training starts from: 'model.norm.weight' differs"):
        finetooth.build("full", model, base=base)
    del base["model.norm.weight"]
    with pytest.raises(ValueError, match=r"has no 'model.norm.weight'"):
        finetooth.build("full", model, base=base)


def test_quantize_then_train_finds_its_base(tmp_path) -> None:
    from transformers import LlamaForCausalLM

    tiny("llama").save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    base = snapshot(model)
    opt = finetooth.build("gift-sw", model, keep=4, rest=quantized(4), calibration=[ids()], lr=1e-2)
    step(model, opt, ids())
    opt.verify_frozen()
    with finetooth.Delta.extract(model, opt).reverted(model):
        assert all(same(p, base[name]) for name, p in snapshot(model).items())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_compact_rows_round_as_asked(rounding: str) -> None:
    def trained(rounding: str, seed: int = 0) -> tuple[finetooth.SelectiveAdamW, dict[str, torch.Tensor]]:
        model = tiny("llama").bfloat16()
        opt = finetooth.build("magnitude", model, lr=1e-3, keep=0.1, rounding=rounding, seed=seed)
        for i in range(4):
            step(model, opt, ids(seed=i))
        opt.verify_frozen()
        return opt, snapshot(model)

    (opt, moved), (auto, masters) = trained(rounding), trained("auto")
    chosen = sum(s.numel for s in opt.selections().values())
    assert auto.state_bytes() - opt.state_bytes() == 2 * chosen  # no masters
    assert any(not same(p, masters[name]) for name, p in moved.items())
    again = trained(rounding, seed=1)[1]  # the same weights are chosen: a seed only draws the rounding
    assert all(same(p, again[name]) for name, p in moved.items()) == (rounding == "nearest")


def test_a_state_of_another_method_or_order() -> None:
    model = tiny("llama")
    opt = finetooth.build("gmt", model)
    step(model, opt, ids())
    with pytest.raises(ValueError, match="of another method: mask='gradient' \\(here 'update'\\)"):
        finetooth.build("gmt-strict", model).load_state_dict(opt.state_dict())
    turned = finetooth.SelectiveAdamW(list(model.named_parameters())[::-1], None, state="dense")
    straight = finetooth.SelectiveAdamW(model.named_parameters(), None, state="dense")
    step(model, straight, ids())
    turned.load_state_dict(straight.state_dict())
    assert all(p is turned._parameters()[name] for name, p in model.named_parameters())


def test_steps_without_a_gradient_are_an_error_in_the_end() -> None:
    opt = finetooth.build("full", tiny("llama"), stop_after=3)
    opt.step()
    opt.step()
    with pytest.raises(RuntimeError, match="no weight that trains had a gradient in 3 steps"):
        opt.step()


def test_large_finite_gradients_are_clipped() -> None:
    model = tiny("llama")
    opt = finetooth.build("full", model, lr=1e-3)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e25)
    opt.step()
    assert opt.skipped == 0 and opt.steps == 1 and all(torch.isfinite(p).all() for p in model.parameters())


def test_parameter_groups_are_refused_clearly() -> None:
    with pytest.raises(ValueError, match="give \\(name, parameter\\) pairs"):
        finetooth.SelectiveAdamW([{"params": list(tiny("llama").parameters())}])
    with pytest.raises(ValueError, match="needs model="):
        finetooth.SelectiveAdamW(
            tiny("gpt2").named_parameters(), finetooth.Rule(lambda w: w.value.abs(), finetooth.Unit("column"), keep=4)
        )


def test_rows_that_verify_nothing_say_so() -> None:
    assert finetooth.build("gmt", tiny("llama")).verify_frozen() == 0
    assert finetooth.build("magnitude", tiny("llama")).verify_frozen() == len(list(tiny("llama").named_parameters()))
