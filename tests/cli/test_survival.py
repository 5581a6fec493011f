"""`finetooth delta survives`, and the two quantizers behind it, against torchao's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetooth import embedded, evaluate, quantize
from finetooth.cli.main import app
from finetooth.data import documents
from finetooth.delta import Delta, WrongBase
from finetooth.survival import FORMS, losses, quantize_, survival
from tests.cli.test_train import recipe, runner

TEXT = "Once upon a time there was a little girl.\n<|endoftext|>\nTom had a red ball. He ran and ran.\n"


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", [(5, 64), (3, 7), (1, 1), (129, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_torchaos_with_127_levels_on_both_sides(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    ao = pytest.importorskip(
        "torchao.quantization.quant_primitives", reason="finetooth[8bit] brings torchao", exc_type=ImportError
    )
    w = weight(*shape, dtype=dtype)
    row, ends = (1, shape[1]), (-127, 127)
    scale, zero = ao.choose_qparams_affine(w.float(), ao.MappingType.SYMMETRIC, row, torch.int8, *ends, eps=1e-30)
    codes = ao.quantize_affine(w.float(), row, scale, zero, torch.int8, *ends)
    theirs = ao.dequantize_affine(codes, row, scale, zero, torch.int8, *ends)
    ours = quantize.int8(w)
    assert ours.dtype == dtype
    # They multiply by 1 / scale and we divide, so a weight half-way between two levels may fall to either: one step apart, and
    # in bfloat16 rounded once more.
    apart = (ours.float() - theirs.to(dtype).float()).abs()
    assert (apart != 0).float().mean() < 0.01 and bool((apart <= scale.reshape(-1, 1) + theirs.abs() / 64).all())


@pytest.mark.parametrize("shape", [(64, 64), (32, 128)], ids=str)
def test_nf4_is_torchaos_but_for_its_rounded_scales(shape: tuple[int, int]) -> None:
    ao = pytest.importorskip("torchao.quantization", reason="finetooth[8bit] brings torchao", exc_type=ImportError)
    w = weight(*shape)
    theirs = ao.NF4Tensor.from_tensor(w, 64, w.numel() // 64 // 2)
    ours = quantize.nf4(w)
    codes = torch.stack([theirs.quantized_data >> 4, theirs.quantized_data & 15], 1).reshape(-1, 64)
    scale = w.reshape(-1, 64).abs().amax(1, keepdim=True)
    apart = torch.tensor(quantize.NF4)[codes.long()] * scale != ours.reshape(-1, 64)
    assert (
        apart.float().mean() < 1e-3
    )  # their levels have four decimals, so a weight between two may fall to the other one
    away = (theirs.get_original_weight() - ours).reshape(-1, 64)[~apart]
    assert away.abs().max() < 0.02 * scale.max()  # a scale in eight bits


def test_nf4_takes_the_nearest_level_in_odd_shapes() -> None:
    for shape in ((1, 1), (3, 7), (5, 64), (2, 65), (7, 1000)):
        w = weight(*shape)
        flat = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % 64)).view(-1, 64)
        scale = flat.abs().amax(1, keepdim=True)
        levels = torch.tensor(quantize.NF4)
        nearest = ((flat / scale)[..., None] - levels).abs().argmin(-1)
        expected = (levels[nearest] * scale).reshape(-1)[: w.numel()].view(shape)
        assert torch.equal(quantize.nf4(w), expected)
    assert not quantize.nf4(torch.zeros(2, 70)).any() and not quantize.int8(torch.zeros(2, 70)).any()


def toy() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A matrix in which one small step is lost, one large one is kept, and one moves the scale of its row."""
    w = torch.zeros(3, 64)
    w[:, 0], w[:, 1] = 127.0, 10.4
    base = {"layers.0.up_proj.weight": w, "layers.0.norm.weight": torch.ones(4)}
    tuned = {n: t.clone() for n, t in base.items()}
    tuned["layers.0.up_proj.weight"][0, 1] = 10.1  # 10, as before
    tuned["layers.0.up_proj.weight"][1, 2] = 5.0  # was 0
    tuned["layers.0.up_proj.weight"][2, 0] = 254.0  # steps of 2 now: 10.4 becomes 10, which it is, and the zeros stay
    tuned["layers.0.norm.weight"][1] = 1.0001
    return base, tuned


def test_what_survives_is_counted() -> None:
    base, tuned = toy()
    found = survival(Delta.extract(tuned, base), base, "int8")
    groups = {
        "up_proj": {"quantized": True, "changed": 3, "survived": 2, "moved": 0},
        "norm": {"quantized": False, "changed": 1, "survived": 1, "moved": 0},
    }
    assert found == {"to": "int8", "changed": 4, "survived": 3, "moved": 0, "share": 0.75, "groups": groups}
    tuned["layers.0.up_proj.weight"][2, 0] = 200.0  # 10.4 becomes 9.45 or 11.02
    assert survival(Delta.extract(tuned, base), base, "int8")["moved"] == 1
    with pytest.raises(WrongBase, match="applied here already"):
        survival(Delta.extract(tuned, base), tuned, "int8")
    with pytest.raises(ValueError, match="choose int8 or nf4"):
        survival(Delta.extract(tuned, base), base, "int3")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A delta of the embedded model: large steps in some linear weights, and a text."""
    out = tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(embedded.path("stories260K"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.view(-1)[:: 7 + i] += 0.1 * p.abs().mean()
    Delta.extract(model.state_dict(), before).save(out / "delta.safetensors")
    (out / "general.txt").write_text(TEXT)
    return out / "delta.safetensors", out / "general.txt"


@pytest.mark.parametrize("to", FORMS)
def test_four_losses_are_those_of_four_models(to: str, tuned: tuple[Path, Path]) -> None:
    delta, text = Delta.load(tuned[0]), tuned[1]
    base = embedded.path("stories260K")
    found = losses(delta, base, to, text)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, four in found.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        if "tuned" in name:
            delta.apply(model)
        if "quantized" in name:
            quantize_(model, FORMS[to])
        assert four["general_loss"] == evaluate.general_loss(model, tokenizer, documents(text), 512), name
    assert len({four["general_loss"] for four in found.values()}) == 4


def call(*words: Any) -> Any:
    return runner.invoke(app, [str(w) for w in words])


def test_the_command(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    delta, text = tuned
    base = embedded.path("stories260K")
    words = ("delta", "survives", delta, "--base", base, "--to", "nf4")
    done = call(*words, "--text", text, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert 0 < found["survived"] < found["changed"] == sum(g["changed"] for g in found["groups"].values())
    groups = found["groups"]
    assert groups["q_proj"]["quantized"] and not groups["embed_tokens"]["quantized"]
    assert groups["embed_tokens"]["survived"] == groups["embed_tokens"]["changed"]
    assert set(found["text"]) == {"base", "tuned", "quantized base", "quantized tuned"}
    table = call(*words)
    assert table.exit_code == 0 and "q_proj" in table.stdout and "embed_tokens (not quantized)" in table.stdout
    missing = call(*words, "--text", tmp_path / "none")
    assert missing.exit_code == 2 and "no text at" in missing.stderr


def test_a_recipes_own_measure(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    delta, _ = tuned
    path = recipe(tmp_path, evaluate={"task": "none", "forgetting": str(tuned[1])})
    done = call("delta", "survives", delta, "--base", embedded.path("stories260K"), "--recipe", path, "--json")
    assert done.exit_code == 0, done.output
    assert all(set(four) == {"general_loss"} for four in json.loads(done.stdout)["recipe"].values())
