"""The life of GIFT-SW's noise: one per model, gone with its optimizer, its own in a copy, and never a wrong one."""

import copy
import gc

import pytest
import torch

import finetooth
from finetooth.noise import remove_noise

from .models import ids, step, tiny


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def built(model: torch.nn.Module) -> finetooth.SelectiveAdamW:
    return finetooth.build("gift-sw", model, keep=4, calibration=[ids()], lr=1e-2)


def test_a_model_has_one_noise() -> None:
    model = tiny("llama")
    opt = built(model)
    once = hooks(model)
    other = built(model)
    assert hooks(model) == once > 0
    del opt
    gc.collect()
    assert hooks(model) == once  # the first optimizer's end does not take the second's noise away
    finetooth.build("full", model)
    assert hooks(model) == 0
    del other


def test_it_goes_with_its_optimizer_or_when_asked() -> None:
    model = tiny("llama")
    opt = built(model)
    del opt
    gc.collect()
    assert hooks(model) == 0
    opt = built(model)
    remove_noise(model)
    assert hooks(model) == 0
    step(model, opt, ids())
    opt.verify_frozen()


def test_a_copy_counts_for_itself() -> None:
    model = tiny("llama")
    opt = built(model)
    twin = copy.deepcopy(model)
    for m in (model, twin):
        m.train()
    first = model(ids()).logits
    assert torch.equal(twin(ids()).logits, first)  # the copy is at the same forward as the original was
    assert not torch.equal(model(ids()).logits, first)
    opt.verify_frozen()


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_before_one_backward_under_checkpointing_are_refused(reentrant: bool) -> None:
    model = tiny("llama")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    opt = built(model)
    model.train()
    for _ in range(2):  # accumulation is one backward for each forward
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    opt.step()
    losses = [model(input_ids=ids(seed=i), labels=ids(seed=i), use_cache=False).loss for i in range(2)]
    with pytest.raises(RuntimeError, match="two training forwards before one backward"):
        sum(losses).backward()


def test_without_checkpointing_every_forward_keeps_its_noise() -> None:
    def grads(together: bool) -> list[torch.Tensor]:
        model = tiny("llama")
        opt = built(model)
        model.train()
        losses = []
        for i in range(2):
            losses.append(model(input_ids=ids(seed=i), labels=ids(seed=i)).loss)
            if not together:
                losses[-1].backward()
        if together:
            sum(losses).backward()
        del opt
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(grads(True), grads(False), strict=True))
