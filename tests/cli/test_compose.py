"""The verbs for several deltas, through the program: exit codes, JSON, tables, and the weights that come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from finetooth import Delta, embedded
from finetooth.cli.main import app as program

from .test_delta import llama, ok, run, weights
from .test_train import call, recipe


@torch.no_grad()
def tuned(folder: Path, out: Path, name: str, at: int, by: float = 1.0) -> Path:
    """The model of a folder with a little more in one tensor, saved."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.get_parameter(name).view(-1)[at : at + 4] += by
    model.save_pretrained(out)
    return out


Q, NORM, UP = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A base; a and b, which both change q; c, which is made of the base too and changes another tensor."""
    llama(True).save_pretrained(tmp_path / "base")
    for name, tensor, at, by in (("a", Q, 0, 1.0), ("b", Q, 2, -2.0), ("c", UP, 0, 1.0)):
        tuned(tmp_path / "base", tmp_path / f"{name}.model", tensor, at, by)
        ok("extract", tmp_path / "base", tmp_path / f"{name}.model", "-o", tmp_path / name)
    return tmp_path


def test_merge(lab: Path) -> None:
    facts = ok("merge", lab / "a", lab / "b", "--base", lab / "base", "-o", lab / "m", "--weights", "1,0.5")
    assert (facts["method"], facts["changed"], facts["tensors"]) == ("merge", 4, 1)  # 2 entries: 1 - 1 = 0
    assert {k: facts["conflicts"][k] for k in ("changed", "overlap", "opposed")} == {
        "changed": 6,
        "overlap": 2,
        "opposed": 2,
    }
    ok("apply", lab / "base", lab / "m", "-o", lab / "merged", "--inverse", lab / "back")
    base, merged = weights(lab / "base"), weights(lab / "merged")
    expected = base[Q].clone()
    expected.view(-1)[0:2] += 1
    expected.view(-1)[4:6] -= 1
    assert torch.allclose(merged[Q], expected, atol=1e-7)  # a difference of two rounded sums
    assert all(torch.equal(merged[n], t) for n, t in base.items() if n != Q)
    ok("apply", lab / "merged", lab / "back", "-o", lab / "again")
    assert all(torch.equal(weights(lab / "again")[n], t) for n, t in base.items())
    assert "recipe" not in facts and json.dumps(Delta.load(lab / "m").recipe).count(str(lab)) == 0
    for how, more in (("average", []), ("ties", ["--density", "0.5"]), ("dare", ["--density", "0.5", "--seed", "1"])):
        ok("merge", lab / "a", lab / "b", lab / "c", "--base", lab / "base", "-o", lab / how, "--how", how, *more)
        assert ok("info", lab / how)["recipe"]["merge"]["how"] == how
    shown = run("merge", lab / "a", lab / "b", "--base", lab / "base", "-o", lab / "t").stdout
    assert "opposed" in shown and "merge" in shown


def test_conflicts_and_diff(lab: Path) -> None:
    found = ok("conflicts", lab / "a", lab / "b", lab / "c", "--base", lab / "base")
    assert [x["name"] for x in found["layers"]] == ["model.layers.0", "model.layers.1"]
    assert (found["overlap"], found["opposed"], found["counted"]) == (2, 2, "changed")
    blind = ok("conflicts", lab / "a", lab / "b")
    assert (blind["opposed"], blind["counted"]) == (None, "listed")
    table = run("conflicts", lab / "a", lab / "b", lab / "c", "--base", lab / "base", "--tensors").stdout
    assert "q_proj" in table and "up_proj" not in table and "1 more without any" in table
    assert "–" in run("conflicts", lab / "a", lab / "b").stdout
    found = ok("diff", lab / "a", lab / "b", "--base", lab / "base")
    assert [found[k] for k in ("first", "second", "same", "different")] == [2, 2, 0, 2]
    assert found["cosine"] == pytest.approx(-0.5, abs=1e-6)  # of differences that are rounded
    assert ok("diff", lab / "a", lab / "a")["same"] == 4
    last = next(line for line in run("diff", lab / "a", lab / "b").stdout.splitlines() if line.startswith("│ all"))
    assert [cell.strip() for cell in last.split("│")[2:6]] == ["2", "2", "0", "2"]


def test_trim(lab: Path) -> None:
    assert ok("trim", lab / "a", "--keep", "0.5", "--base", lab / "base", "-o", lab / "half")["changed"] == 2
    assert (
        ok("trim", lab / "a", "--keep", "3", "--by", "tensor", "--base", lab / "base", "-o", lab / "three")["changed"]
        == 3
    )
    ok("apply", lab / "base", lab / "half", "-o", lab / "out")
    assert ok("verify", lab / "out", lab / "half")["state"] == "applied"


def test_a_chain(lab: Path) -> None:
    tuned(lab / "a.model", lab / "ad.model", NORM, 0)
    ok("extract", lab / "a.model", lab / "ad.model", "-o", lab / "d0")
    refused = run("apply", lab / "base", lab / "a", lab / "d0", "-o", lab / "x")
    assert refused.exit_code == 2 and "finetooth delta link" in refused.stderr
    facts = ok("link", lab / "d0", "--after", lab / "a", "--base", lab / "a.model", "-o", lab / "d")
    assert facts["after"] == 1
    for wrong in (["d"], ["d", "a"], ["b", "d"]):
        refused = run("apply", lab / "base", *(lab / w for w in wrong), "-o", lab / "x")
        assert refused.exit_code == 2 and refused.stderr.count("\n") == 1, refused.output
        assert not (lab / "x").exists()
    ok("apply", lab / "base", lab / "a", lab / "d", "-o", lab / "both", "--inverse", lab / "back")
    assert all(torch.equal(weights(lab / "both")[n], t) for n, t in weights(lab / "ad.model").items())
    ok("apply", lab / "both", lab / "back", "-o", lab / "again")
    assert all(torch.equal(weights(lab / "again")[n], t) for n, t in weights(lab / "base").items())
    ok("apply", lab / "a.model", lab / "d", "-o", lab / "later")  # on what it was made from
    one = ok("compose", lab / "a", lab / "d", "--base", lab / "base", "-o", lab / "one")
    assert one["changed"] == 8 and ok("verify", lab / "both", lab / "one")["state"] == "applied"


def test_bad_input_is_one_line_and_exit_code_2(lab: Path) -> None:
    llama(False).save_pretrained(lab / "other")
    base = ("--base", lab / "base")
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("merge", lab / "a", *base, "-o", lab / "x"), "at least 2"),
        (("merge", lab / "a", lab / "b", *base, "-o", lab / "a"), "exists"),
        (("merge", lab / "a", lab / "b", *base, "-o", lab / "x", "--weights", "1,x"), "not a number"),
        (("merge", lab / "a", lab / "b", *base, "-o", lab / "x", "--weights", "1"), "one for each"),
        (("merge", lab / "a", lab / "b", *base, "-o", lab / "x", "--density", "0.5"), "no meaning"),
        (("merge", lab / "a", lab / "b", "--base", lab / "other", "-o", lab / "x"), "is not that of the base"),
        (("merge", lab / "a", lab / "a", *base, "-o", lab / "x", "--weights", "1,-1"), "nothing is left"),
        (("merge", lab / "a", lab / "none", *base, "-o", lab / "x"), "no delta file"),
        (("conflicts", lab / "a"), "at least 2"),
        (("diff", lab / "a", lab / "b", "--base", lab / "none"), "no file or folder"),
        (("trim", lab / "a", "--keep", "2.5", *base, "-o", lab / "x"), "out of range"),
        (("compose", lab / "a", lab / "c", *base, "-o", lab / "x"), "made on top"),
        (("link", lab / "c", "--after", lab / "a", *base, "-o", lab / "x"), "as they leave it"),
    ]
    before = sorted(lab.rglob("*"))
    for args, says in cases:
        result = run(*args)
        assert result.exit_code == 2, (args, result.output)
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
        assert says in result.stderr, result.stderr
    assert sorted(lab.rglob("*")) == before


def test_training_around_another_run(tmp_path: Path) -> None:
    """Two runs through the program: the second trains nothing that the first changed, and the merge is both."""
    method, base = {"name": "magnitude", "keep": 0.3}, embedded.path("stories260K")
    less = {"evaluate": {"task": "none"}, "train": {"max_steps": 2}}
    call("train", recipe(tmp_path, method=method, output=str(tmp_path / "first"), **less), "--json")
    second = recipe(tmp_path, method={**method, "exclude": "first"}, output=str(tmp_path / "second"), **less)
    assert any("method.exclude was not looked at" in note for note in call("plan", second, "--json")["notes"])
    call("train", second, "--json")
    found = call("delta", "conflicts", tmp_path / "first", tmp_path / "second", "--base", base, "--json")
    assert found["overlap"] == 0 and found["changed"] > 0
    call("delta", "merge", tmp_path / "first", tmp_path / "second", "--base", base, "-o", tmp_path / "both", "--json")
    call("delta", "apply", base, tmp_path / "both", "-o", tmp_path / "merged", "--json")
    merged, parts = weights(tmp_path / "merged"), [Delta.load(tmp_path / n) for n in ("first", "second")]
    expected = {n: t.clone() for n, t in weights(base).items()}
    for n, c in ((n, c) for d in parts for n, c in d.changes.items()):
        where = c.selection.entries().flatten()
        moved = c.values.flatten() != weights(base)[n].view(-1)[where]
        expected[n].view(-1)[where[moved]] = c.values.flatten()[moved]
    assert all(torch.equal(t, expected[n]) for n, t in merged.items())
    noted = parts[1].recipe["method"]["exclude"]
    assert noted == "first"  # the last part of a path
    other = CliRunner().invoke(program, ["train", str(second), "method.exclude=nowhere.safetensors", "--json"])
    assert other.exit_code == 2 and "method.exclude: 'nowhere.safetensors'" in other.stderr
    full = CliRunner().invoke(program, ["train", str(second), "method={name: full, exclude: first}"])
    assert full.exit_code == 2 and "has no meaning for 'full'" in full.stderr
