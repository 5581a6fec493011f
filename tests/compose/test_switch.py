"""One model, many deltas: exact, all or nothing, with tied weights, bf16, overlaps and threads."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetooth import Delta, DeltaError, DeltaSwitch, WrongBase, switch


def llama(dtype: torch.dtype = torch.float32, tied: bool = True) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    ).to(dtype)  # fmt: skip


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t.view(torch.uint8), weights[n].view(torch.uint8)) for n, t in model.state_dict().items())


@torch.no_grad()
def tuned(model: Any, every: int) -> tuple[Delta, dict[str, torch.Tensor]]:
    """A delta that changes some of every tensor (a matrix, a column, entries), and the weights it leads to."""
    other = copy.deepcopy(model)
    for i, p in enumerate(other.parameters()):
        if i % 3 == 0:
            p += every
        elif i % 3 == 1 and p.ndim == 2:
            p[:, every] += 1
        else:
            p.view(-1)[::every] += 1
    return Delta.extract(other, model), state(other)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_switch_is_exact(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = llama(dtype, tied)
    base = state(model)
    (math, wants_math), (code, wants_code) = tuned(model, 2), tuned(model, 3)
    code.save(tmp_path / "code.safetensors")
    weights = {None: base, "math": wants_math, "code": wants_code}
    on = DeltaSwitch(model, {"math": math, "code": tmp_path / "code.safetensors"})
    for name in ("math", "code", "code", None, "code", "math", None):
        on.to(name)
        assert on.active == name and same(model, weights[name])
    on.to("math")
    with on.using("code") as inside:
        assert inside is model and same(model, wants_code)
        with on.using(None):
            assert same(model, base)
        assert same(model, wants_code)
    assert on.active == "math" and same(model, wants_math)
    on.add("again", code)  # made for the base, while another one is on
    assert on.active == "math" and same(model, wants_math)
    on.remove("math")
    assert on.active is None and same(model, base) and on.names == ["code", "again"]


def test_memory_is_the_model_and_k_values() -> None:
    model = llama(torch.bfloat16)
    (math, _), (code, _) = tuned(model, 2), tuned(model, 3)
    kept = {n: c.values.clone() for n, c in math.changes.items()}
    on = DeltaSwitch(model, {"math": math, "code": code})
    held = sum(c.selection.index.numel() * 4 + c.values.numel() * 2 for d in (math, code) for c in d.changes.values())
    for name in (None, "math", "code"):
        on.to(name)
        assert on.nbytes() == held
    assert all(torch.equal(c.values, kept[n]) for n, c in math.changes.items())  # the delta's own, not the switch's


def test_an_error_inside_leaves_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    base = state(model)
    (math, wants_math), (code, wants_code) = tuned(model, 2), tuned(model, 3)
    on = DeltaSwitch(model, {"math": math, "code": code})
    with pytest.raises(ZeroDivisionError), on.using("math"):
        raise ZeroDivisionError
    assert on.active is None and same(model, base)
    real, calls = switch.scatter_, [0]
    total = len(math.changes) + len(code.changes)
    for fails_at in range(1, total + 1):
        on.to("math")
        calls[0] = 0

        def breaks(selection: Any, x: Any, values: Any, at: int = fails_at) -> None:
            calls[0] += 1
            if calls[0] == at:
                real(selection, x, torch.zeros_like(values))  # half done
                raise KeyboardInterrupt
            real(selection, x, values)

        monkeypatch.setattr(switch, "scatter_", breaks)
        with pytest.raises(KeyboardInterrupt):
            on.to("code")
        monkeypatch.setattr(switch, "scatter_", real)
        assert on.active == "math" and same(model, wants_math)
        on.to("code")
        assert same(model, wants_code)
        on.to(None)
        assert same(model, base)


def test_it_is_checked_when_it_is_added() -> None:
    model = llama()
    math, wants_math = tuned(model, 2)
    before = state(model)
    other = copy.deepcopy(model)
    other.load_state_dict(wants_math)
    with pytest.raises(WrongBase, match="already applied"):
        DeltaSwitch(other, {"math": math})
    moved = copy.deepcopy(model)
    moved.model.norm.weight.data[0] += 1
    with pytest.raises(WrongBase, match=r"norm\.weight"):
        DeltaSwitch(moved, {"math": math})
    DeltaSwitch(moved, {"math": math}, check=False).to("math")  # as asked
    for wrong, says in ((llama(torch.bfloat16), "BF16"), (torch.nn.Linear(2, 2), "has no")):
        for check in (True, False):
            with pytest.raises(DeltaError, match=says):
                DeltaSwitch(wrong, {"math": math}, check=check)
    on = DeltaSwitch(model, {"math": math})
    with pytest.raises(DeltaError, match="there is no delta 'maths': there are math"):
        on.to("maths")
    with pytest.raises(DeltaError, match="is a delta 'math' already"):
        on.add("math", math)
    with pytest.raises(DeltaError, match="inverse"):
        on.add("back", math.inverse())
    with pytest.raises(DeltaError, match="module"):
        DeltaSwitch(before)  # type: ignore[arg-type]
    assert on.active is None and same(model, before)


def test_a_delta_of_a_tied_model_on_one_whose_head_is_a_copy() -> None:
    model = llama(tied=True)
    delta, wants = tuned(model, 2)
    apart = llama(tied=False)
    apart.load_state_dict(state(model))
    on = DeltaSwitch(apart, {"a": delta})
    on.to("a")
    assert same(apart, wants)


def test_threads_wait_for_each_other() -> None:
    model = llama()
    (math, wants_math), (code, wants_code) = tuned(model, 2), tuned(model, 3)
    on, wrong = DeltaSwitch(model, {"math": math, "code": code}), []
    start = threading.Barrier(4)

    def work(name: str, wanted: dict[str, torch.Tensor]) -> None:
        start.wait()
        for _ in range(20):
            with on.using(name):
                if not same(model, wanted):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=a) for a in (("math", wants_math), ("code", wants_code)) * 2]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and on.active is None


def test_gradients_and_generation_between_switches() -> None:
    model, ids = llama(), torch.arange(6)[None]
    delta, wants = tuned(model, 2)
    other = llama()
    other.load_state_dict(wants)
    on = DeltaSwitch(model, {"a": delta})
    with on.using("a"):
        assert torch.equal(model(ids).logits, other(ids).logits)
        model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.norm.weight.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_on_a_gpu_and_moved_between() -> None:
    model = llama(torch.bfloat16).cuda()
    base = state(model)
    (math, wants_math), (code, wants_code) = tuned(model, 2), tuned(model, 3)
    on = DeltaSwitch(model, {"math": math, "code": code})
    on.to("math")
    assert same(model, wants_math)
    model.cpu()
    on.to("code")
    assert same(model, {n: t.cpu() for n, t in wants_code.items()})
    model.cuda()
    on.to(None)
    assert same(model, base)
