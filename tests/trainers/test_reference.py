"""The reference model is the model with its delta taken off: the base bit for bit, and nothing held for it."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

import finetooth
from finetooth.meter import Meter

from ..laws.toy import DTYPES, ROWS, Toy, batches, same, snapshot, train
from ..laws.toy import build as build_toy
from .cases import build, load, trainer

WHOLE = ("full", "gmt", "gmt-strict")  # rows that train every entry: their base is read


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_the_base_and_back(row: str, dtype: str) -> None:
    model = Toy(DTYPES[dtype])
    before = snapshot(model)
    opt = build_toy(row, model, base=before if row in WHOLE else None)
    with opt.reverted():
        assert all(same(p, before[n]) for n, p in snapshot(model).items())
    list(train(model, opt, batches(3)))
    after, held = snapshot(model), opt.state_bytes()
    assert not all(same(after[n], before[n]) for n in before)
    with contextlib.suppress(KeyError), opt.reverted():
        assert all(same(p, before[n]) for n, p in snapshot(model).items())
        raise KeyError
    assert all(same(p, after[n]) for n, p in snapshot(model).items())
    assert opt.state_bytes() == held
    opt.verify_frozen()


def test_another_choice_is_followed() -> None:
    """A selection that changes remembers all that it ever replaced."""
    model = Toy()
    before = snapshot(model)
    opt = build_toy("random", model, when="every(1)")
    list(train(model, opt, batches(3)))
    with opt.reverted():
        assert all(same(p, before[n]) for n, p in snapshot(model).items())


def test_the_columns_that_were_rounded() -> None:
    """rest=quantized rewrites the rest: the base before that is read."""
    model = Toy()
    before = snapshot(model)
    opt = build_toy("gift-sw", model, rest="quantized(4)", base=before)
    list(train(model, opt, batches(1)))
    with opt.reverted():
        assert all(same(p, before[n]) for n, p in snapshot(model).items())


@pytest.mark.parametrize("row", ["grad", "gmt"])
def test_between_forward_and_backward(row: str) -> None:
    """The graph of the policy is alive while the reference runs, as in DPO, under autocast too."""
    gradients = []
    for referring in (False, True):
        model = load()
        opt = build(row, model, gradients="dense")
        ids = torch.arange(3, 35).reshape(2, 16)
        for _ in range(2):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
                if referring:
                    found = finetooth.Reference(model, opt)(input_ids=ids).logits
                    assert torch.equal(found, load()(input_ids=ids).logits)
            loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            opt.step()
    half = len(gradients) // 2
    for plain, beside in zip(gradients[:half], gradients[half:], strict=True):
        assert plain and all(torch.equal(a, b) for a, b in zip(plain, beside, strict=True))


def test_under_compile(tmp_path: Path) -> None:
    """accelerate compiles the reference too: its exchange of weights must stay out of that."""
    model = load()
    opt = build("grad", model)
    more = {"ref_model": finetooth.Reference(model, opt)}
    given = {
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
        "bf16": False,
        "gradient_checkpointing": False,
    }
    seen = watch(more["ref_model"])
    trainer("dpo", model, opt, tmp_path, more, **given).train()
    assert len(seen) == 3 and opt.steps == 3
    opt.verify_frozen()


def test_what_a_trainer_sees() -> None:
    model = load().train()
    opt = build("gift-sw", model)
    reference = finetooth.Reference(model, opt)
    ids = torch.arange(3, 19).reshape(1, 16)
    drawn = opt._noise.forwards
    expected = load()(input_ids=ids).logits
    for p in model.parameters():
        p.data[..., 0] += 0.0
    assert torch.equal(reference(input_ids=ids).logits, expected)
    assert opt._noise.forwards == drawn, "a reference pass draws no noise"
    assert all(m.training for m in model.modules()) and not reference.training
    assert list(reference.parameters()) == [] and list(reference.modules()) == [reference]
    assert reference.to(torch.float16) is reference and model.dtype == torch.float32
    assert reference.config is model.config and reference.dtype == model.dtype
    assert not hasattr(reference, "_is_accelerate_prepared")
    model._is_accelerate_prepared = True
    assert not hasattr(reference, "_is_accelerate_prepared")


def test_generation_and_state_dict_are_the_base() -> None:
    model = load()
    opt = build("grad", model, lr=0.1)
    ids = torch.arange(3, 19).reshape(1, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    base, reference = load(), finetooth.Reference(model, opt)
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(reference.generate(ids, **how), base.generate(ids, **how))
    assert not torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert all(torch.equal(t, base.state_dict()[name]) for name, t in reference.state_dict().items())


@pytest.mark.parametrize(("row", "keep"), [("grad", 0.05), ("dst", 0.05), ("gift-sw", 4)])
def test_it_sets_aside_what_trains_and_no_more(row: str, keep: float) -> None:
    """Alive in the block: 4 bytes for the value of each chosen entry, and for dst, which holds flags, 8 for its position."""
    model = load()
    opt = build(row, model, keep=keep)
    ids = torch.arange(3, 19).reshape(1, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    chosen = sum(s.numel for s in opt.selections().values())
    assert 0 < 12 * chosen < 0.8 * sum(p.numel() * 4 for p in model.parameters())
    with Meter() as meter:
        start = meter.hold([*model.parameters(), *(t for slot in opt._slots.values() for t in slot.tensors())])
        with opt.reverted():
            assert 4 * chosen <= meter.now - start <= (12 if row == "dst" else 4) * chosen
        assert meter.now == start


def test_a_base_that_is_not_known_is_refused() -> None:
    model = Toy()
    opt = build_toy("gmt", model)
    with pytest.raises(ValueError, match="build with base="):
        finetooth.Reference(model, opt)
    with pytest.raises(ValueError, match="build with base="), opt.reverted():
        pass
    with pytest.raises(TypeError, match="AdamW"):
        finetooth.Reference(model, torch.optim.AdamW(model.parameters()))


RUNS = [
    *[("dpo", row, torch.float32, True) for row in ("gmt", "dst", "gift-sw", "grad", "hft", "full")],
    *[("dpo", row, torch.bfloat16, False) for row in ("gmt", "dst", "grad")],
    *[("kto", row, torch.float32, True) for row in ("dst", "gift-sw")],  # it has DPO's way to a reference
]


def watch(module: torch.nn.Module) -> list[torch.Tensor]:
    """The log-probabilities that come out of a reference model."""
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda m, args, out: seen.append(out.log_probs.clone()))
    return seen


@pytest.mark.parametrize(("kind", "row", "dtype", "mixed"), RUNS)
def test_the_trajectory_is_that_of_a_second_model(
    kind: str, row: str, dtype: torch.dtype, mixed: bool, tmp_path: Path
) -> None:
    """With TRL's defaults (bf16 autocast, checkpointing): the same log-probabilities, logs and weights, bit for bit."""
    ends, logs, seen = [], [], []
    for shared in (False, True):
        model = load(dtype)
        opt = build(row, model)
        reference: Any = finetooth.Reference(model, opt) if shared else load(dtype)
        seen.append(watch(reference))
        more = {"ref_model": reference, "callbacks": [finetooth.SelectiveCallback(opt)]}
        given = {"logging_steps": 1, "bf16": mixed, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
        made = trainer(kind, model, opt, tmp_path, more, **given)
        made.train()
        ends.append([p.detach().clone() for p in model.parameters()])
        own = ("runtime", "per_second")
        logs.append([{k: v for k, v in line.items() if not k.endswith(own)} for line in made.state.log_history])
    assert len(seen[0]) == len(seen[1]) > 3 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert logs[0] == logs[1] and logs[0][1].get("rewards/chosen", logs[0][1].get("rewards/rejected"))
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


@pytest.mark.parametrize("row", ["gmt", "gift-sw", "dst"])
def test_grpo(row: str, tmp_path: Path) -> None:
    """The reference is given to the finished trainer, which was made without one: it loads no second model."""
    ends = []
    for shared in (False, True):
        torch.manual_seed(0)
        model = load()
        opt = build(row, model)
        made = trainer("grpo", model, opt, tmp_path, beta=0.0 if shared else 0.1, max_steps=4, logging_steps=1)
        if shared:
            assert made.ref_model is None
            made.beta, made.ref_model = 0.1, finetooth.Reference(model, opt)
        seen = watch(made.ref_model)
        made.train()
        assert any("kl" in line for line in made.state.log_history)
        ends.append((seen, [p.detach().clone() for p in model.parameters()]))
    for a, b in zip(ends[0][0], ends[1][0], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(p, q) for p, q in zip(ends[0][1], ends[1][1], strict=True))
