"""The commands on models whose files are unlike their memory, and on one that cannot be planned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JetMoeConfig,
    MixtralConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from typer.testing import CliRunner, Result

import finetooth
from finetooth import embedded, serve
from finetooth.base import open_base
from finetooth.cli.main import app
from tests.cli.test_train import recipe

runner = CliRunner()
SIZE = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2}


def saved(folder: Path, config: PretrainedConfig, inner: str = "") -> Path:
    """A model of random weights with the embedded tokenizer; with `inner`, without that name before those of its tensors."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if inner:
        model.save_pretrained(folder, state_dict={n: t.clone() for n, t in getattr(model, inner).state_dict().items()})
    else:
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded.path("stories260K") / name, folder)
    return folder


def call(*words: object) -> Result:
    return runner.invoke(app, [str(w) for w in words])


def mixtral(folder: Path) -> Path:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
    return saved(
        folder, MixtralConfig(**SIZE, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, **experts)
    )


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """TRL asked for router logits in the config for good, and what is generated after training failed; its files have other names."""
    base = mixtral(tmp_path / "mixtral")
    result = call(
        "train", recipe(tmp_path, model=str(base), method={"name": "random", "keep": 0.1}, merged=True), "--json"
    )
    assert result.exit_code == 0, result.output
    run = Path(json.loads(result.stdout)["run"])
    assert json.loads((run / "results.json").read_text())["reverted"]
    assert not json.loads((run / "merged" / "config.json").read_text())["output_router_logits"]
    delta = finetooth.Delta.load(run)
    model, tuned = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (base, run / "merged"))
    delta.apply(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tuned.parameters(), strict=True))
    refused = call("delta", "verify", base, run)
    assert refused.exit_code == 2
    assert "mixture of experts has other names in a checkpoint" in " ".join(refused.output.split())


def test_files_without_the_name_of_the_inner_model(tmp_path: Path) -> None:
    """GPT-2's on the hub: `h.0.attn.c_attn.weight`, in memory `transformer.h.0...`."""
    sizes = {"vocab_size": 512, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 256}
    base = saved(tmp_path / "gpt2", GPT2Config(**sizes), "transformer")
    assert "h.0.attn.c_attn.weight" in open_base(base).names()
    result = call("train", recipe(tmp_path, model=str(base), method={"name": "gmt"}, merged=True), "--json")
    assert result.exit_code == 0, result.output
    run, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
    assert call("delta", "apply", base, run, "--out", out).exit_code == 0
    applied, merged = (GPT2LMHeadModel.from_pretrained(folder) for folder in (out, run / "merged"))
    assert all(torch.equal(a, b) for a, b in zip(applied.parameters(), merged.parameters(), strict=True))
    assert set(open_base(out).names()) == set(open_base(base).names())
    assert call("delta", "revert", out, run, "--base", base, "--out", back).exit_code == 0
    assert all(torch.equal(open_base(base).tensor(n), open_base(back).tensor(n)) for n in open_base(base).names())
    delta = finetooth.Delta.load(run)
    serve.write(delta, tmp_path / "patches", base)
    assert {p.name for p in serve.read(tmp_path / "patches")} <= set(open_base(base).names())
    assert all(p.name.startswith("transformer.") for p in serve.patches(delta))


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (
            JetMoeConfig(**SIZE, num_key_value_heads=2, kv_channels=4, intermediate_size=24, num_local_experts=4),
            {},
            "cannot be planned: its forward looks at values",
        ),
        (MptConfig(vocab_size=512, d_model=16, n_heads=4, n_layers=2, max_seq_len=64), {}, "context of 64 tokens"),
    ],
    ids=["jetmoe", "mpt"],
)
def test_a_plan_says_why_not(config: PretrainedConfig, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", config)
    result = call("plan", recipe(tmp_path, model=str(base), method={"name": "random"}, **changes))
    assert result.exit_code != 0
    assert said in " ".join(result.output.split())
