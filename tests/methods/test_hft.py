"""HFT draws the stated halves, and frozen matrices compute no gradient."""

import pytest
import torch

import finetooth
from finetooth.halves import halves
from finetooth.rule import stem

from .models import ids, tiny


def trained_modules(model: torch.nn.Module) -> set[str]:
    return {stem(n) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("seed", range(5))
def test_llama_halves(seed: int) -> None:
    config = tiny("llama").config
    config.num_hidden_layers = 6
    model = type(tiny("llama"))(config)
    finetooth.build("hft", model, seed=seed)
    on = trained_modules(model)
    ffn = []
    for i in range(6):
        layer = [m for m in on if m.startswith(f"model.layers.{i}.")]
        assert sum(".self_attn." in m for m in layer) == 2
        assert sum("norm" in m for m in layer) == 1
        ffn.append(sum(".mlp." in m for m in layer))
    assert sorted(ffn) == [1, 1, 1, 2, 2, 2]
    assert {"model.embed_tokens", "lm_head", "model.norm"} <= on


def test_draws_differ_by_seed_and_cover_everything() -> None:
    seen = []
    for seed in range(12):
        model = tiny("llama")
        finetooth.build("hft", model, seed=seed)
        seen.append(frozenset(trained_modules(model)))
    assert len(set(seen)) > 6
    assert frozenset.union(*seen) == {stem(n) for n, _ in tiny("llama").named_parameters()}


def test_frozen_matrices_compute_no_gradient() -> None:
    model = tiny("llama")
    opt = finetooth.build("hft", model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    for name, p in model.named_parameters():
        chosen = len(opt.selections()[name]) > 0
        assert p.requires_grad is chosen and (p.grad is not None) is chosen


def test_a_bias_goes_with_its_matrix() -> None:
    model = tiny("neox")
    finetooth.build("hft", model)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            assert p.requires_grad == model.get_parameter(name.removesuffix("bias") + "weight").requires_grad


def test_one_of_a_single_module_in_half_of_the_layers() -> None:
    drawn = halves({f"l.{i}/attention": 1 for i in range(10)}, seed=3)
    assert sorted(drawn.values()) == [0] * 5 + [1] * 5
