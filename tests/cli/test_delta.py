"""`finetooth delta` on checkpoints that transformers saved: exit codes, JSON, and the weights it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from typer.testing import CliRunner, Result

from finetooth.base import open_base
from finetooth.cli.delta import app
from finetooth.delta import Delta, DeltaError, Origin, apply_folder

from ..format.deltas import same


def llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


@torch.no_grad()
def train(model: Any) -> None:
    for i, p in enumerate(model.parameters()):
        if i % 3 == 0:
            p.view(-1)[i % p.numel()] += 1


def weights(folder: Path) -> dict[str, torch.Tensor]:
    held = open_base(folder)
    return {name: held.tensor(name) for name in sorted(held.names())}


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def ok(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


@pytest.fixture(params=["tied", "untied", "bf16"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A base in shards and a tuned one in a single file (and the other way round for bf16)."""
    model = llama(request.param == "tied").to(torch.bfloat16 if request.param == "bf16" else torch.float32)
    sizes = ("8KB", "1GB") if request.param != "bf16" else ("1GB", "8KB")
    model.save_pretrained(tmp_path / "base", max_shard_size=sizes[0])
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "training_args.bin").write_text("pickle")
    train(model)
    model.save_pretrained(tmp_path / "tuned", max_shard_size=sizes[1])
    return tmp_path / "base", tmp_path / "tuned"


def test_extract_apply_verify_revert(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    facts = ok("extract", base, tuned, "-o", tmp_path / "d")
    assert 0 < facts["changed"] == ok("info", tmp_path / "d")["changed"] < 20
    assert facts["base"] == "base"
    ok("apply", base, tmp_path / "d", "-o", tmp_path / "applied", "--inverse", tmp_path / "i")
    assert same(weights(tmp_path / "applied"), weights(tuned))
    assert ok("verify", tmp_path / "applied", tmp_path / "d")["state"] == "applied"
    assert ok("verify", base, tmp_path / "d", "--expect", "base")["state"] == "base"
    ok("revert", tuned, tmp_path / "d", "--base", base, "-o", tmp_path / "r1")
    ok("revert", tuned, tmp_path / "i", "-o", tmp_path / "r2")
    ok("apply", tmp_path / "applied", tmp_path / "i", "-o", tmp_path / "r3")
    for name in ("r1", "r2", "r3"):
        assert same(weights(tmp_path / name), weights(base))
    for file in base.glob("*.safetensors*"):  # the same shards, byte for byte, headers included
        assert (tmp_path / "r3" / file.name).read_bytes() == file.read_bytes()


def test_the_folder_is_a_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    model = LlamaForCausalLM.from_pretrained(tuned)
    delta = Delta.extract(model, base)
    apply_folder(base, tmp_path / "out", delta)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert "training_args.bin" not in names
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    pretrained = LlamaForCausalLM.from_pretrained(base)
    delta.apply(pretrained)
    assert same(dict(pretrained.state_dict()), dict(model.state_dict()))
    assert list(tmp_path.glob(".*")) == []  # no temporary folder stays


def test_export_as_a_checkpoint(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    ok("extract", base, tuned, "-o", tmp_path / "run" / "delta.safetensors")
    found = ok("export", tmp_path / "run", "--base", base, "--to", tmp_path / "out")
    assert found["form"] == "checkpoint" and len([*base.glob("*.safetensors")]) == len(
        [*(tmp_path / "out").glob("*.safetensors")]
    )
    loaded, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", tuned))
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    refused = run("export", tmp_path / "run", "--base", base, "--to", tmp_path / "x", "--as", "shira")
    assert refused.exit_code == 2 and "--as checkpoint" in refused.stderr and not (tmp_path / "x").exists()


def test_export_as_an_adapter_and_back(tmp_path: Path) -> None:
    model = llama(tied=False)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(torch.where(torch.rand(24, 16) < 0.1, 1.25, 1.0))
    model.save_pretrained(tmp_path / "tuned")
    ok("extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "d")
    found = ok("export", tmp_path / "d", "--base", tmp_path / "base", "--to", tmp_path / "adapter", "--as", "shira")
    assert (found["inexact"], found["modules"], found["changed"] + found["padding"]) == (0, 1, 40 * found["r"])
    back = ok("extract", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "back")
    assert back["changed"] == found["changed"] and back["method"] == "shira"
    assert ok("verify", tmp_path / "tuned", tmp_path / "back")["state"] == "applied"
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused = run("extract", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "x")
    assert refused.exit_code == 2 and "merge it first" in refused.stderr and refused.stderr.count("\n") == 1


def test_pack_unpack_and_quick(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    ok("extract", base, tuned, "-o", tmp_path / "d")
    coded = ok("extract", base, tuned, "-o", tmp_path / "c", "--code-values")
    packed = ok("pack", tmp_path / "d", "-o", tmp_path / "p", "--base", base)
    assert (tmp_path / "p").read_bytes() == (tmp_path / "c").read_bytes() and coded["codings"] == packed["codings"]
    plain = ok("unpack", tmp_path / "c", "-o", tmp_path / "u", "--base", base)
    assert set(plain["codings"]) == {"plain + plain"}
    ok("pack", tmp_path / "u", "-o", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "d").read_bytes()
    ok("apply", base, tmp_path / "c", "-o", tmp_path / "out", "--inverse", tmp_path / "i", "--quick")
    assert same(weights(tmp_path / "out"), weights(tuned))
    assert ok("verify", tmp_path / "out", tmp_path / "d", "--quick")["state"] == "applied"
    ok("revert", tmp_path / "out", tmp_path / "i", "-o", tmp_path / "r1", "--quick")
    ok("revert", tmp_path / "out", tmp_path / "c", "--base", base, "-o", tmp_path / "r2", "--quick")
    assert same(weights(tmp_path / "r1"), weights(base)) and same(weights(tmp_path / "r2"), weights(base))
    refused = run("apply", tuned, tmp_path / "d", "-o", tmp_path / "x", "--quick")
    assert refused.exit_code == 2 and "already applied" in refused.stderr
    assert run("pack", tmp_path / "d", "-o", tmp_path / "p").exit_code == 2  # it exists
    assert run("pack", tmp_path / "d", "-o", tmp_path / "w", "--base", tuned).exit_code == 2
    assert not (tmp_path / "w").exists()


def test_bad_input_is_one_line_and_exit_code_2(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    ok("extract", base, tuned, "-o", tmp_path / "d")
    (tmp_path / "cut").write_bytes((tmp_path / "d").read_bytes()[:-1])
    llama(False).save_pretrained(tmp_path / "other")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("info", tmp_path / "none"), "no delta file"),
        (("info", tmp_path / "cut"), "not a whole"),
        (("extract", base, tmp_path / "none", "-o", tmp_path / "x"), "no file or folder"),
        (("extract", base, base, "-o", tmp_path / "x"), "nothing to extract"),
        (("extract", base, tuned, "-o", tmp_path / "d"), "exists"),
        (("apply", tuned, tmp_path / "d", "-o", tmp_path / "x"), "already applied"),
        (("apply", tmp_path / "other", tmp_path / "d", "-o", tmp_path / "x"), "is not that of|in the delta"),
        (("apply", base, tmp_path / "d", "-o", tuned), "exists"),
        (("apply", base, tmp_path / "d", "-o", base / "x"), "lies inside"),
        (("revert", tuned, tmp_path / "d", "-o", tmp_path / "x"), "--base"),
        (("verify", base, tmp_path / "d", "--expect", "maybe"), "maybe"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for args, says in cases:
        result = run(*args)
        assert result.exit_code == 2, (args, result.output)
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert any(part in result.stderr for part in says.split("|")), result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_verify_fails_with_exit_code_1(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    ok("extract", base, tuned, "-o", tmp_path / "d")
    model = LlamaForCausalLM.from_pretrained(tuned)
    with torch.no_grad():
        next(model.parameters()).view(-1)[5] += 1
    model.save_pretrained(tmp_path / "moved")
    result = run("verify", tmp_path / "moved", tmp_path / "d", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["state"] == "neither"
    assert run("verify", base, tmp_path / "d", "--expect", "applied").exit_code == 1


def test_tables_for_people(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("extract", *folders, "-o", tmp_path / "d")
    assert "changed" in result.stdout
    assert "share" in run("info", tmp_path / "d").stdout


def test_a_terminal_is_not_told_what_to_do(tmp_path: Path) -> None:
    """What a file calls its base is shown, and not obeyed."""
    delta = Delta.extract({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    replace(delta, base=Origin("\x1b[2Jorg/name")).save(tmp_path / "d")
    shown = run("info", tmp_path / "d")
    refused = run("revert", tmp_path, tmp_path / "d", "-o", tmp_path / "x")
    assert shown.exit_code == 0 and refused.exit_code == 2
    for text in (shown.output, refused.output):
        assert "\x1b" not in text and r"\x1b[2Jorg/name" in text


def test_gpt2_in_memory_and_on_disk(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "base")
    train(model)
    delta = Delta.extract(model, tmp_path / "base")
    assert dict(delta.tied) == {"lm_head.weight": "transformer.wte.weight"}
    with delta.reverted(model):
        assert delta.verify(model) == "base"
    apply_folder(tmp_path / "base", tmp_path / "out", delta)
    assert delta.verify(tmp_path / "out") == "applied"


def test_experts_have_other_names_in_memory(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "base")
    assert set(open_base(tmp_path / "base").names()) != set(state)  # else this test shows nothing
    train(model)
    with pytest.raises(DeltaError, match=r"mixture-of-experts.*state dict"):
        Delta.extract(model, tmp_path / "base")
    assert Delta.extract(model, state).verify(state) == "base"
    model.save_pretrained(tmp_path / "tuned")  # two checkpoints have the same names again
    delta = Delta.extract(tmp_path / "tuned", tmp_path / "base")
    assert delta.verify(tmp_path / "tuned") == "applied"


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from finetooth.cli.delta import app; "
        "r = CliRunner().invoke(app, ['extract', '--help']); "
        "sys.exit(r.exit_code or 10 * ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
