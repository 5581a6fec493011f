"""Law 9: dense, compact and structured gradients end equal, through whatever a training loop does to them."""

from typing import Any

import pytest
import torch
from torch import nn

import finetooth
from finetooth.linear import SelectiveLinear
from tests.methods.models import FAMILIES, ids, step, tiny

from .toy import DTYPES, Toy, batches, build, same, snapshot, train

UNITS: dict[str, Any] = {
    "element": {"keep": 0.1},
    "block(4)": {"keep": 0.2},
    "row": {"keep": 2},
    "column": {"keep": 3},
    "matrix": {"keep": 3, "pool": "model"},
}
ROUTES = ("dense", "compact", "structured")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("unit", UNITS)
def test_units(unit: str, accumulate: int, dtype: str) -> None:
    """The toy's gradients are small integers: float32 and bfloat16 sums are exact in any order."""
    ended = []
    for route in ROUTES:
        model = Toy(DTYPES[dtype])
        opt = build("random", model, unit=unit, gradients=route, weight_decay=0.1, max_grad_norm=0.5, **UNITS[unit])
        list(train(model, opt, batches(5), accumulate))
        opt.verify_frozen()
        ended.append((snapshot(model), opt.grad_norm))
    for end, norm in ended[1:]:
        assert all(same(p, ended[0][0][n]) for n, p in end.items())
        assert norm == ended[0][1] > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [*finetooth.METHODS, "own"])
def test_rows(row: str, dtype: str) -> None:
    """Rows with dense state have dense gradients whatever is asked for."""
    ended = []
    for route in ROUTES[:2] if row == "rows" else ROUTES:  # an embedding is no linear layer
        model = Toy(DTYPES[dtype])
        opt = build(row, model, gradients=route)
        list(train(model, opt, batches(4), 2))
        ended.append(snapshot(model))
    for end in ended[1:]:
        for name, p in end.items():
            if row == "gift-sw":  # the noise, which the toy's loss does not see, is added at another place
                rtol = 1e-5 if dtype == "fp32" else 2**-7  # one place of a bfloat16 weight
                torch.testing.assert_close(p, ended[0][name], rtol=rtol, atol=1e-6)
            else:
                assert same(p, ended[0][name]), name


def trained(
    family: str, route: str, checkpointing: bool = False, compiled: bool = False, **given: Any
) -> dict[str, torch.Tensor]:
    model = tiny(family)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    opt = finetooth.build("random", model, lr=1e-2, gradients=route, **given)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    for i in range(3):
        step(run, opt, ids(seed=i), accumulate=2)
    opt.verify_frozen()
    return snapshot(model)


def close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Sums over 16 tokens in another order, through Adam's first steps, which divide by their own size."""
    return all(torch.allclose(p, two[n], rtol=1e-3, atol=2e-5) for n, p in one.items())


@pytest.mark.parametrize("unit", ["element", "column"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, unit: str) -> None:
    """Conv1D and experts go through hooks, linear layers through `SelectiveLinear`."""
    given = {"unit": unit, "keep": UNITS[unit]["keep"]}
    assert close(trained(family, "dense", **given), trained(family, "compact", **given))


@pytest.mark.parametrize("unit", ["element", "column", "row", "block(8)"])
@pytest.mark.parametrize("how", ["checkpointing", "compiled"])
def test_checkpointing_and_compile(how: str, unit: str) -> None:
    given = {"unit": unit, "keep": 2 if unit in UNITS and unit != "element" else 0.1}
    plain = trained("llama", "dense", **given)
    assert close(plain, trained("llama", "structured", **{how: True}, **given))


def test_gift_sw_compiled_and_checkpointed() -> None:
    ended = []
    for compiled, checkpointing in ((False, False), (True, False), (False, True)):
        model = tiny("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        opt = finetooth.build("gift-sw", model, keep=4, calibration=[ids()], lr=1e-2)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for i in range(3):
            step(run, opt, ids(seed=i))
        assert opt._noise is not None and opt._noise.forwards == 3
        ended.append(snapshot(model))
    assert close(ended[0], ended[1]) and close(ended[0], ended[2])


def test_autocast() -> None:
    """Under bf16 autocast the products are bf16's; the gathered gradient is a float32 sum of them."""
    grads = []
    for route in ("dense", "compact"):
        model = tiny("llama")
        opt = finetooth.build("random", model, gradients=route, keep=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        found = opt._collected()
        grads.append({n: s.gather(found[n]) if route == "dense" else found[n] for n, s in opt.selections().items()})
    for name, g in grads[0].items():  # bf16 has 8 bits: 2^-8 of the largest, and a sum of 32 terms
        assert (g - grads[1][name]).abs().max() <= 2**-6 * g.abs().max(), name


def test_tied_weights_and_losses_that_go_past_the_head() -> None:
    given = {"targets": ["model.embed_tokens.weight", "*.up_proj.weight"], "keep": 0.2}
    assert close(trained("llama-tied", "dense", **given), trained("llama-tied", "compact", **given))
    ended = []
    for route in ROUTES:  # a fused loss multiplies with the head's weight itself
        model = tiny("llama")
        opt = finetooth.build("random", model, keep=0.2, targets=["lm_head.weight"], gradients=route, lr=1e-2)
        for i in range(2):
            hidden = model.model(ids(seed=i)).last_hidden_state
            nn.functional.cross_entropy(
                (hidden @ model.lm_head.weight.t()).flatten(0, 1), ids(seed=i).flatten()
            ).backward()
            opt.step()
            opt.zero_grad()
        opt.verify_frozen()
        ended.append(snapshot(model))
    assert close(ended[0], ended[1]) and close(ended[0], ended[2])


def test_a_gradient_set_by_hand_counts() -> None:
    ended = []
    for route in ROUTES:
        model = Toy()
        opt = build("random", model, gradients=route, max_grad_norm=None)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
        opt.step()
        ended.append(snapshot(model))
    assert all(same(p, end[n]) for end in ended[1:] for n, p in ended[0].items())


def test_reselection_has_dense_gradients_when_it_selects() -> None:
    ended = []
    for route in ("dense", "compact"):
        model = Toy()
        opt = build("own", model, when="every(3)", gradients=route, calibration=None)
        for i in train(model, opt, batches(7), 2):
            modules = [m for m in model.modules() if isinstance(m, SelectiveLinear)]
            assert bool(modules) == (route == "compact")
            assert all(m.chosen.active == ((i + 1) % 3 != 0) for m in modules)
        ended.append(snapshot(model))
    assert all(same(p, ended[1][n]) for n, p in ended[0].items())


def test_no_dense_gradient_and_nothing_of_a_weights_size_is_saved() -> None:
    """Law 12: what autograd keeps for backward, beyond what a plain frozen model keeps, is of the size of what is chosen."""

    def saved(opt_given: dict[str, Any] | None) -> int:
        model = tiny("llama")
        opt = None
        if opt_given is None:
            model.requires_grad_(False)
            model.enable_input_require_grads()
        else:
            opt = finetooth.build("random", model, **opt_given)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in parameters:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        if opt is not None:
            assert all(p.grad is None for n, p in model.named_parameters())
            assert opt._gradients.names() == list(opt.selections())
        return sum(held.values())

    tokens, widths = 4 * 8, 12 * 16 + 2 * 24  # a frozen linear layer saves no input; these are all of theirs
    for given in ({"keep": 0.1}, {"unit": "column", "keep": 3}, {"unit": "row", "keep": 2}):
        indices = sum(
            s.index.untyped_storage().nbytes()
            for s in finetooth.build("random", tiny("llama"), **given).selections().values()
        )
        inputs = 4 * tokens * (14 * 3 if "unit" in given and given["unit"] == "column" else widths)
        assert saved(given) <= saved(None) + inputs + indices


def test_the_model_is_as_it_was_when_the_optimizer_is_gone() -> None:
    import gc

    model = tiny("llama")
    opt = finetooth.build("random", model)
    assert any(type(m) is SelectiveLinear for m in model.modules())
    assert list(model.state_dict()) == list(tiny("llama").state_dict())
    del opt
    gc.collect()
    assert all(type(m) is not SelectiveLinear for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"needs an nn\.Linear of its own"):
        finetooth.build("random", tiny("gpt2"), gradients="structured")
    model = tiny("llama")
    opt = finetooth.build("random", model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=ids(), labels=ids()).loss).backward()
    with pytest.raises(RuntimeError, match="gradients='dense'"):
        scaler.step(opt)
