"""SHiRA adapters, there and back, through the real peft: logits, weights, and what cannot be an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import finetooth
from finetooth import embedded, shira
from finetooth.delta import Delta, DeltaError, WrongBase, apply_folder
from finetooth.diff import scatter_
from tests.laws.toy import NEEDED

from .deltas import same

peft = pytest.importorskip("peft", reason="peft reads and writes the adapters: pip install 'finetooth[dev]'")
IDS = torch.arange(24).reshape(2, 12)


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **size)).to(dtype)


def linears(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}


@torch.no_grad()
def tune(model: Any, share: float = 0.05, step: float = 0.1) -> None:
    """Some entries of most linear layers, moved by a part of their size; two layers not at all."""
    for p in list(linears(model).values())[2:]:
        p += torch.where(torch.rand(p.shape) < share, step * p, torch.zeros_like(p))


def saved(model: Any, folder: Path) -> Path:
    """The base, in shards."""
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len([*folder.glob("*.safetensors")]) > 1
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


def loaded(base: Path, dtype: torch.dtype) -> Any:
    """As a user has it: `model.to(dtype)` would also round the rotary frequencies, which a load does not."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def adapted(base: Path, adapter: Path, dtype: torch.dtype) -> Any:
    return peft.PeftModel.from_pretrained(loaded(base, dtype), str(adapter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_computes_what_the_tuned_model_does(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype)
    with torch.no_grad():  # a spare place, to be filled up: its sign must stay
        model.model.layers[1].mlp.up_proj.weight[0, :4] = -0.0
    base = saved(model, tmp_path / "base")
    model = loaded(base, dtype)
    tune(model)
    delta = Delta.extract(model, base)
    found = shira.write(delta, base, tmp_path / "adapter")
    assert found["inexact"] == 0 and found["padding"] > 0 and found["modules"] == len(delta.changes)
    wrapped = adapted(base, tmp_path / "adapter", dtype)
    assert torch.equal(logits(wrapped), logits(model))
    assert same(dict(wrapped.merge_and_unload().state_dict()), dict(model.state_dict()))
    back = shira.read(tmp_path / "adapter", base)
    assert same(values(back), values(delta)) and back.base == delta.base and back.method == "shira"


def values(delta: Delta) -> dict[str, Tensor]:
    """The tuned tensors' new entries in their places, zero elsewhere: equal whatever the units are."""
    out = {}
    for name, c in delta.changes.items():
        out[name] = torch.zeros(c.selection.shape, dtype=c.values.dtype)
        scatter_(c.selection, out[name], c.values)
    return out


def test_a_bfloat16_delta_on_a_base_loaded_in_float32(tmp_path: Path) -> None:
    """As PEFT is often used: the sums are float32 then, and must be the bfloat16 values all the same."""
    base = saved(llama(torch.bfloat16), tmp_path / "base")
    model = loaded(base, torch.bfloat16)
    tune(model)
    delta = Delta.extract(model, base)
    shira.write(delta, base, tmp_path / "adapter")
    apply_folder(base, tmp_path / "tuned", delta)
    expected = logits(loaded(tmp_path / "tuned", torch.float32))
    assert torch.equal(logits(adapted(base, tmp_path / "adapter", torch.float32)), expected)


FIT = {
    "gift-sw",
    "random",
    "grad",
    "snip",
    "magnitude",
    "fish",
    "lift",
    "nano",
    "ssu",
    "spiel",
}  # the other rows train embeddings or norms too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", sorted(FIT))
def test_rows_of_linear_layers_on_the_real_model(row: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = loaded(Path(embedded.path("stories260K")), dtype)
    model.save_pretrained(tmp_path / "base")
    batch = {"input_ids": IDS, "labels": IDS}
    opt = finetooth.build(row, model, lr=1e-3, keep=8 if row == "gift-sw" else 0.02, calibration=[batch])
    for _ in range(3):
        model(**batch).loss.backward()
        opt.step()
        opt.zero_grad()
    found = shira.write(Delta.extract(model, opt), tmp_path / "base", tmp_path / "adapter")
    said = logits(adapted(tmp_path / "base", tmp_path / "adapter", dtype)), logits(model.eval())
    if dtype == torch.bfloat16:
        assert found["inexact"] == 0
    # A small weight that grew is seldom reached to the last bit by adding to what it was, and nano trains the smallest.
    # Weights that became several times smaller lose their last bits to the size they had: few, and by very little.
    assert found["inexact"] < (1.0 if row == "nano" else 0.02) * found["changed"] and found["largest_error"] < 1e-8
    # Five layers on: far below what float32 logits of size 10 resolve in a sum of 64 products.
    torch.testing.assert_close(*said, rtol=0, atol=1e-4 if found["inexact"] else 0)


@pytest.mark.parametrize("row", sorted(set(finetooth.METHODS) - FIT))
def test_the_other_rows_are_refused(row: str, tmp_path: Path) -> None:
    base = Path(embedded.path("stories260K"))
    model = loaded(base, torch.float32)
    opt = finetooth.build(row, model, lr=1e-3, **NEEDED.get(row, {}))
    model(input_ids=IDS, labels=IDS).loss.backward()
    opt.step()
    with pytest.raises(DeltaError, match=r"is not the weight of an nn.Linear.*--as checkpoint"):
        shira.write(Delta.extract(model, base), base, tmp_path / "adapter")


def test_what_float32_cannot_reach_is_counted(tmp_path: Path) -> None:
    model = llama()
    base = saved(model, tmp_path / "base")
    with torch.no_grad():
        linears(model)["lm_head.weight"][0, :3] *= 1e-6
    found = shira.write(Delta.extract(model, base), base, tmp_path / "adapter")
    assert 0 < found["inexact"] <= 3 and 0 < found["largest_error"] < 1e-8
    merged = adapted(base, tmp_path / "adapter", torch.float32).merge_and_unload().state_dict()
    error = (merged["lm_head.weight"] - model.lm_head.weight.detach()).abs()
    assert int((error > 0).sum()) == found["inexact"] and float(error.max()) == pytest.approx(found["largest_error"])


def test_no_other_difference_comes_nearer() -> None:
    old, new = torch.randn(100_000), torch.randn(100_000)
    d, error = shira.differences(old, new)
    assert 0 < int((error > 0).sum()) < 50_000
    for far in (-torch.inf, torch.inf):
        assert bool(((old + torch.nextafter(d, torch.full_like(d, far)) - new).abs() >= error).all())


def _embedding(model: Any) -> None:
    model.model.embed_tokens.weight[0, 0] += 1


def _norm(model: Any) -> None:
    model.model.norm.weight[0] += 1


def _everything(model: Any) -> None:
    for p in linears(model).values():
        p += 1


@pytest.mark.parametrize(
    ("edit", "tied", "says"),
    [
        (_embedding, False, r"'model.embed_tokens.weight' is not the weight of an nn.Linear.*--as checkpoint"),
        (_embedding, True, r"'model.embed_tokens.weight' is not the weight of an nn.Linear"),
        (_norm, False, r"'model.norm.weight' is not"),
        (
            _everything,
            False,
            r"has 1024 changed entries, which takes r=13; '.*' \[16, 16\] has room for r=8.*--as checkpoint",
        ),
    ],
)
def test_what_is_no_adapter_is_refused_by_name(edit: Any, tied: bool, says: str, tmp_path: Path) -> None:
    model = llama(tied=tied)
    base = saved(model, tmp_path / "base")
    with torch.no_grad():
        edit(model)
    with pytest.raises(DeltaError, match=says):
        shira.write(Delta.extract(model, base), base, tmp_path / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_conv1d_and_another_base_are_refused(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, 0] += 1
    with pytest.raises(DeltaError, match=r"c_attn.weight' is not the weight of an nn.Linear"):
        shira.write(Delta.extract(model, tmp_path / "gpt2"), tmp_path / "gpt2", tmp_path / "x")
    other = llama()
    base = saved(other, tmp_path / "base")
    tune(other)
    with pytest.raises(WrongBase):
        shira.write(Delta.extract(other, base), saved(llama(), tmp_path / "fresh"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_peft_made_becomes_a_delta(dtype: torch.dtype, tmp_path: Path) -> None:
    base = saved(llama(dtype), tmp_path / "base")
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    made = peft.get_peft_model(fresh, peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False))
    made.save_pretrained(tmp_path / "adapter")
    delta = shira.read(tmp_path / "adapter", base)
    assert len(delta.changes) == 4 and delta.base.id == "base"
    apply_folder(base, tmp_path / "applied", delta)
    applied = AutoModelForCausalLM.from_pretrained(tmp_path / "applied", dtype=dtype)
    assert same(dict(applied.state_dict()), dict(made.merge_and_unload().state_dict()))


def test_other_adapters_are_refused_by_name(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(DeltaError, match=r"is a LORA adapter.*merge_and_unload.*delta extract"):
        shira.read(tmp_path / "lora", base)


def _out_of_range(tensors: dict[str, Tensor]) -> None:
    next(t for n, t in tensors.items() if n.endswith("indices"))[1, 0] = 16


def _short(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("weight"))
    tensors[name] = tensors[name][1:].clone()


def _alone(tensors: dict[str, Tensor]) -> None:
    del tensors[next(n for n in tensors if n.endswith("weight"))]


def _whole_layer(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros(64, 16)


def _elsewhere(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("q_proj", "p_proj")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_out_of_range, "expected places in that matrix"),
        (_short, "expected places in that matrix"),
        (_alone, "shira_weight' is not in its place"),
        (_whole_layer, "not in its place"),
        (_elsewhere, "p_proj.weight', which 'base' does not have"),
    ],
)
def test_a_damaged_adapter_is_refused(edit: Any, says: str, tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    made = peft.get_peft_model(llama(), peft.ShiraConfig(r=1, target_modules=["q_proj"], init_weights=False))
    made.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / shira.WEIGHTS
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(DeltaError, match=says):
        shira.read(tmp_path / "adapter", base)


def test_the_configuration_names_no_path(tmp_path: Path) -> None:
    model = llama()
    base = saved(model, tmp_path / "base")
    tune(model)
    shira.write(Delta.extract(model, base), base, tmp_path / "adapter")
    text = (tmp_path / "adapter" / shira.CONFIG).read_text()
    assert str(tmp_path) not in text and json.loads(text)["base_model_name_or_path"] == "base"
