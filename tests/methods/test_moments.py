"""Moments in eight bits: what they save, how far they are off, and that a state of them resumes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import finetooth
from finetooth import moments
from tests.laws.toy import same, snapshot

from .models import ids, tiny

pytest.importorskip("torchao", reason="moments in eight bits need torchao: pip install -e '.[8bit]'")


def wide() -> torch.nn.Module:
    """Matrices of at least 4,096 entries: smaller ones stay in float32."""
    torch.manual_seed(0)
    size = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=4))


def learn(model: torch.nn.Module, opt: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("signed", [True, False])
def test_a_moment_is_known_to_two_digits(signed: bool) -> None:
    x = torch.randn(70, 100, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.square()
    held = moments.EightBit.zeros((70, 100), signed, torch.device("cpu"))
    assert not held.full().any()
    held.keep(x)
    found, largest = held.full(), x.abs().max()
    assert held.codes.numel() == 7168 and held.scale.numel() == 28  # blocks of 256, the last one filled up
    # The map's relative spacing is 1.6 % in its upper decade and doubles with every decade below (arXiv 2110.02861, figure 2).
    upper = x.abs() > 0.1 * largest
    assert ((found - x).abs()[upper] <= 0.016 * x.abs().max()).all()
    assert ((found - x).abs() <= 0.016 * largest).all()


def trained(row: str, kind: str, steps: int = 6) -> tuple[torch.nn.Module, finetooth.SelectiveAdamW, list[float]]:
    model = wide()
    opt = finetooth.build(row, model, lr=3e-3, keep=None if row in ("full", "hft") else 0.6, moments=kind)
    losses = learn(model, opt, steps)
    opt.verify_frozen()
    return model, opt, losses


@pytest.mark.parametrize("row", ["full", "gmt", "gmt-strict", "dst", "random", "hft"])
def test_rows_learn_as_with_float32_moments(row: str) -> None:
    start = snapshot(wide())
    (exact, opt, losses), (rough, small, rough_losses) = trained(row, "fp32"), trained(row, "8bit")
    assert losses[-1] < losses[0]
    assert abs(rough_losses[-1] - losses[-1]) < 0.1 * (losses[0] - losses[-1])
    moved = [torch.cat([(p - start[n]).flatten() for n, p in m.named_parameters()]) for m in (exact, rough)]
    assert torch.cosine_similarity(*moved, dim=0) > 0.9
    assert not same(*moved)
    large = [s for s in small._slots.values() if isinstance(s.exp_avg, moments.EightBit)]
    entries = sum(s.exp_avg.full().numel() for s in large)
    assert entries and opt.state_bytes() - small.state_bytes() >= (6 - 2 * 4 / 256) * entries - 512 * 2 * len(large)


def test_resume_is_exact_and_the_kind_is_part_of_the_state() -> None:
    model, opt, _ = trained("full", "8bit", 4)
    straight, other = snapshot(model), wide()
    half, first, _ = trained("full", "8bit", 2)
    other.load_state_dict(half.state_dict())
    second = finetooth.build("full", other, lr=3e-3, moments="8bit")
    second.load_state_dict(first.state_dict())
    learn(other, second, 2)
    assert all(same(p, straight[n]) for n, p in snapshot(other).items())
    assert opt.steps == second.steps
    with pytest.raises(ValueError, match="moments='8bit' \\(here 'fp32'\\)"):
        finetooth.build("full", wide()).load_state_dict(opt.state_dict())


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError

    monkeypatch.setattr(moments, "_library", missing)
    with pytest.raises(ValueError, match="pip install 'finetooth\\[8bit\\]'"):
        finetooth.build("full", tiny("llama"), moments="8bit")
