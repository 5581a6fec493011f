"""Families of models that are unlike a Llama: what each of them broke once."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    Llama4TextConfig,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    RwkvConfig,
)

import finetooth
from finetooth.anatomy import survey
from tests.laws.toy import same, snapshot

from .models import VOCAB, ids, step, tiny

SIZE = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2}


def made(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def llama4() -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    return made(Llama4TextConfig(**SIZE, **heads, **experts, intermediate_size=24, intermediate_size_mlp=24))


def test_rows_of_positions_are_no_tokens() -> None:
    """`rows` chose rows of GPT-2's position table, and refused a new token that this table does not have."""
    model = tiny("gpt2")  # 48 tokens, 32 positions
    opt = finetooth.build("rows", model, rows=[1, 40])
    assert set(opt.selections()) == {"transformer.wte.weight"}
    model = made(
        OPTConfig(**SIZE, num_attention_heads=4, ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=8)
    )
    opt = finetooth.build("rows", model, rows=[1, 40])
    assert set(opt.selections()) == {"model.decoder.embed_tokens.weight"}


def test_a_router_that_is_a_linear_layer_sees_no_noise() -> None:
    """Llama 4's gives scores and logits: adding to that was a TypeError in the first forward."""
    model = llama4()
    assert {part.kind for name, part in survey(model).items() if "router" in name} == {"other"}
    opt = finetooth.build("gift-sw", model, lr=1e-2, keep=3, calibration=[ids()])
    base = snapshot(model)
    step(model, opt, ids())
    opt.verify_frozen()
    assert any(not same(p, base[name]) for name, p in snapshot(model).items())

    class Gate(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(super().forward(x))

    plain = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Sequential(Gate(4, 4))])})
    with pytest.raises(ValueError, match=r"noise has no meaning for 'layers\.0\.0\.weight'.*Gate"):
        finetooth.build("random", plain, unit="column", keep=2, rest="noise(4)", targets=["*.weight"])


def test_a_layer_that_no_calibration_reaches_is_named() -> None:
    """Mamba multiplies with dt_proj itself; the error asked for calibration, which was given."""
    model = made(MambaConfig(**SIZE, state_size=4))
    with pytest.raises(
        ValueError, match=r"no calibration batch came through the layer of '.*dt_proj\.weight' and 1 more"
    ):
        finetooth.build("gift-sw", model, keep=3, calibration=[ids()])
    targets = ["*.in_proj.weight", "*.x_proj.weight", "*.out_proj.weight"]
    assert len(finetooth.build("gift-sw", model, keep=3, calibration=[ids()], targets=targets).selections()) == 6


def test_calibration_keeps_nothing_for_a_next_token() -> None:
    """RWKV writes its state in place when it keeps one, and backward then fails."""
    model = made(RwkvConfig(**SIZE, attention_hidden_size=16, context_length=64))
    kinds = {part.kind for name, part in survey(model).items() if "time_mix" in name}
    assert kinds == {"other"}, "vectors stored [1, 1, n] are no experts"
    assert finetooth.build("grad", model, keep=0.1, calibration=[ids()]).selections()
    assert model.config.use_cache


def test_experts_that_are_stored_flat() -> None:
    """DBRX has them as [experts * ffn, d], which looked like nothing."""
    feed = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
    model = made(
        DbrxConfig(vocab_size=VOCAB, d_model=16, n_heads=4, n_layers=2, attn_config=attention, ffn_config=feed)
    )
    experts = {name for name, part in survey(model).items() if part.kind == "expert"}
    assert len(experts) == 6
    assert experts <= set(finetooth.build("random", model, keep=0.1).selections())


def test_an_optimizer_on_a_compiled_model() -> None:
    """torch.compile puts `_orig_mod.` before every name; nothing is compiled before a forward."""
    model = tiny("llama")
    base = snapshot(model)
    opt = finetooth.build("random", torch.compile(model), lr=1e-2, keep=0.1)
    step(model, opt, ids())
    delta = finetooth.Delta.extract(torch.compile(model), opt)
    assert not any(name.startswith("_orig_mod") for name in delta.changes)
    with delta.reverted(model):
        assert all(same(p, base[n]) for n, p in snapshot(model).items())


def test_an_optimizer_that_is_built_again() -> None:
    """The first one, once it is gone, took `zero_grad` and DDP's list from the second."""
    once, model = tiny("llama"), tiny("llama")
    kept = [finetooth.build("random", m, keep=0.1) for m in (once, model)]
    kept[1] = finetooth.build("random", model, keep=0.1)
    gc.collect()
    assert model._ddp_params_and_buffers_to_ignore == once._ddp_params_and_buffers_to_ignore != []
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert any(chosen.grad is not None for chosen in model._finetooth_gradients.chosen.values())
    model.zero_grad()
    assert all(chosen.grad is None for chosen in model._finetooth_gradients.chosen.values())


def test_a_context_under_another_name() -> None:
    from transformers import MptConfig

    from finetooth.pretrained import context

    assert context(MptConfig(max_seq_len=256)) == 256
    assert context(RwkvConfig(context_length=64)) == 64
    assert context(MambaConfig()) is None
