"""GIFT-SW: columns against a slow reference, the noise's size and freshness, and where it must not be."""

import itertools
import math

import pytest
import torch

import finetooth
from finetooth import quantize
from finetooth.linear import noise_key
from finetooth.noise import perturbation
from finetooth.rest import kept_columns, oriented, quantized, quantized_rest
from tests.laws.toy import same, snapshot

from .models import ids, step, tiny

INF = math.inf


def slow_steps(w: torch.Tensor, bits: int) -> list[float]:
    """Row by row, fraction by fraction, as the definition reads."""
    levels, out = 2 ** (bits - 1) - 1, []
    for row in w:
        alpha, best, chosen = row.abs().max(), INF, 0.0
        for shrink in range(80):
            delta = alpha * (1 - 0.01 * shrink) / levels
            q = (row / delta).round().clamp(-levels, levels) * delta
            error = float(((row - q) ** 2).sum())
            if error < best * (1 - 1e-6):
                best, chosen = error, float(delta)
        out.append(chosen)
    return out


def slow_saliency(w, x, bits: int, gamma: float, tau: float, rho: float) -> list[float]:
    levels, delta = 2 ** (bits - 1) - 1, torch.tensor(slow_steps(w, bits))[:, None]
    error = w - (w / delta).round().clamp(-levels, levels) * delta
    norm = {INF: lambda v: v.abs().max(), 2: lambda v: (v**2).sum().sqrt(), 1: lambda v: v.abs().sum()}
    return [float(norm[tau](error[:, j]) * norm[rho](x[:, j]) ** gamma) for j in range(w.shape[1])]


CASES = [(b, g, t, r) for b, g in ((4, 1.0), (3, 0.5), (2, 2.0)) for t, r in itertools.product((INF, 2, 1), repeat=2)]


@pytest.mark.parametrize(("bits", "gamma", "tau", "rho"), CASES)
def test_columns_are_those_of_the_formula(bits: int, gamma: float, tau: float, rho: float) -> None:
    for family, layer, weight in (
        ("llama", "model.layers.1.mlp.down_proj", lambda m: m.weight),
        ("gpt2", "transformer.h.1.mlp.c_proj", lambda m: m.weight.t()),
    ):
        model, batches = tiny(family), [ids(seed=1), ids(seed=2)]
        module, seen = model.get_submodule(layer), []
        handle = module.register_forward_hook(
            lambda m, a, o, seen=seen: seen.append(a[0].detach().reshape(-1, a[0].shape[-1]))
        )
        model.eval()
        for batch in batches:
            model(input_ids=batch)
        handle.remove()
        expected = slow_saliency(weight(module).detach(), torch.cat(seen), bits, gamma, tau, rho)
        opt = finetooth.build("gift-sw", model, keep=5, calibration=batches, bits=bits, gamma=gamma, tau=tau, rho=rho)
        chosen = opt.selections()[f"{layer}.weight"].index.tolist()
        assert chosen == sorted(sorted(range(len(expected)), key=lambda j: -expected[j])[:5])


def test_128_columns_or_all_of_a_small_matrix() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(300, 4), torch.nn.Linear(40, 4)])})
    model.forward = lambda input_ids, labels=None: (
        (model["layers"][0](torch.ones(1, 300)), model["layers"][1](torch.ones(1, 40)))[0].sum()
        and type("O", (), {"loss": None})()
    )
    opt = finetooth.build("gift-sw", model, calibration=[ids()])
    assert {n: len(s) for n, s in opt.selections().items()} == {"layers.0.weight": 128, "layers.1.weight": 40}


def test_padding_does_not_count() -> None:
    batch, mask = ids(), torch.ones(4, 8, dtype=torch.long)
    mask[:, 5:] = 0
    other = batch.clone()
    other[:, 5:] = 7
    stats = [
        finetooth.build(
            "gift-sw", tiny("llama"), keep=3, calibration=[{"input_ids": b, "attention_mask": mask}]
        ).selections()
        for b in (batch, other)
    ]
    assert all(torch.equal(stats[0][n].index, stats[1][n].index) for n in stats[0])


def test_padding_does_not_count_where_experts_flatten_their_inputs() -> None:
    from finetooth.anatomy import survey
    from finetooth.probe import calibrate

    model = tiny("mixtral")
    parts = {n: p for n, p in survey(model).items() if n.endswith("gate.weight") or "q_proj" in n}
    padded, mask = torch.cat([ids(2, 6), ids(2, 2, seed=9)], 1), torch.tensor([[1] * 6 + [0] * 2] * 2)
    for name in parts:  # routers are no linear layers to transformers, but take [tokens, hidden] all the same
        parts[name] = type(parts[name])(name, "linear", parts[name].layer, parts[name].place)
    one = calibrate(model, [{"input_ids": padded, "attention_mask": mask}], parts, ["input_norm_2"])
    two = calibrate(model, [{"input_ids": padded[:, :6], "attention_mask": mask[:, :6]}], parts, ["input_norm_2"])
    for name in parts:
        assert torch.allclose(one[name]["input_norm_2"], two[name]["input_norm_2"], rtol=1e-5), name


def test_noise_has_the_stated_deviation() -> None:
    """Over 20,000 draws a standard deviation is known to 0.5 % (1/sqrt(2n)); five of them are allowed."""
    w = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [0.1], [10.0]])
    kept = torch.zeros(20000, dtype=torch.bool)
    kept[:5] = True
    delta = quantize.steps(w, 4, kept)
    assert torch.allclose(delta.flatten(), torch.tensor(slow_steps(w[:, 5:], 4)), rtol=1e-5)
    e = perturbation(delta / 2, kept, key=3)
    assert not e[:, :5].any()
    ratio = e[:, 5:].std(1) / (delta.flatten() / 2)
    assert ((ratio - 1).abs() < 0.025).all()
    assert (e[:, 5:].mean(1).abs() < 5 * delta.flatten() / 2 / math.sqrt(20000)).all()
    assert torch.equal(e, perturbation(delta / 2, kept, key=3)) and not torch.equal(
        e, perturbation(delta / 2, kept, key=4)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_noise_is_fresh_in_training_and_absent_elsewhere(family: str) -> None:
    model = tiny(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch, base = ids(), snapshot(model)
    model.eval()
    clean = model(input_ids=batch).logits.detach()
    opt = finetooth.build("gift-sw", model, keep=4, calibration=[batch])
    assert torch.equal(model.eval()(input_ids=batch).logits, clean)
    model.train()
    one, two = model(input_ids=batch).logits.detach(), model(input_ids=batch).logits.detach()
    assert not torch.equal(one, clean) and not torch.equal(one, two)
    assert all(same(p, base[n]) for n, p in snapshot(model).items())
    step(model, opt, batch)
    opt.verify_frozen()
    kept = opt.selections()
    for name, p in snapshot(model).items():
        outside = ~kept[name].mask() if name in kept else torch.ones_like(p, dtype=torch.bool)
        assert same(p[outside], base[name][outside])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_backward_sees_the_noise_of_its_forward(family: str) -> None:
    """Gradients are those of a plain model whose weights hold W + E."""
    model = tiny(family)
    opt = finetooth.build("gift-sw", model, keep=4, calibration=[ids()])
    model.train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    ours = {n: opt._gradients.chosen[n].grad for n in opt.selections()}
    plain = tiny(family)
    with torch.no_grad():
        for name, selection in opt.selections().items():
            p, kept = plain.get_parameter(name), kept_columns(selection)
            half = quantize.steps(oriented(p, selection), 4, kept) / 2
            oriented(p, selection).add_(perturbation(half, kept, noise_key(0, name, 1)))
    plain.train()
    plain(input_ids=ids(), labels=ids()).loss.backward()
    for name, selection in opt.selections().items():
        expected = selection.gather(plain.get_parameter(name).grad)
        # sums over 32 tokens through two layers, in another order and with noise added at another place
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputed_layers_see_the_same_noise(checkpointing: bool) -> None:
    grads = []
    for use in (False, checkpointing):
        model = tiny("llama")
        if use:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        opt = finetooth.build("gift-sw", model, keep=4, calibration=[ids()])
        model.train()
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        grads.append({n: c.grad for n, c in opt._gradients.chosen.items()})
    assert grads[0] and all(torch.allclose(g, grads[1][n], rtol=1e-5, atol=1e-8) for n, g in grads[0].items())


def test_the_noise_goes_on_where_it_was_after_a_resume() -> None:
    def trained(resume: bool) -> dict[str, torch.Tensor]:
        model = tiny("llama")
        opt = finetooth.build("gift-sw", model, keep=4, calibration=[ids()], lr=1e-2)
        for i in range(4):
            if resume and i == 2:
                weights, state = snapshot(model), opt.state_dict()
                model = tiny("llama")
                opt = finetooth.build("gift-sw", model, keep=4, calibration=[ids()], lr=1e-2)
                model.load_state_dict(weights, strict=False)
                opt.load_state_dict(state)
            step(model, opt, ids(seed=i))
        return snapshot(model)

    straight, resumed = trained(False), trained(True)
    assert all(same(p, resumed[n]) for n, p in straight.items())


def test_quantize_then_train() -> None:
    model = tiny("llama")
    base = snapshot(model)
    opt = finetooth.build("gift-sw", model, keep=4, calibration=[ids()], rest=quantized(bits=4))
    for name, selection in opt.selections().items():
        w, mask = snapshot(model)[name], selection.mask()
        assert same(w[mask], base[name][mask]) and not same(w[~mask], base[name][~mask])
        levels = [row[~mask[0]].unique().numel() for row in w]
        assert max(levels) <= 15  # 2^4 - 1 values, symmetric
    step(model, opt, ids())
    opt.verify_frozen()
    delta = finetooth.Delta.extract(model, base)
    fresh = tiny("llama")
    delta.apply(fresh)
    assert all(same(p, snapshot(model)[n]) for n, p in snapshot(fresh).items())


def test_quantized_after_training_and_back() -> None:
    model = tiny("llama")
    opt = finetooth.build("gift-sw", model, keep=4, calibration=[ids()], lr=1e-2)
    for i in range(3):
        step(model, opt, ids(seed=i))
    trained, losses = snapshot(model), {}
    for bits in (8, 2):
        with quantized_rest(model.eval(), opt.selections(), bits):
            losses[bits] = model(input_ids=ids(), labels=ids()).loss.item()
            for name, selection in opt.selections().items():
                mask = selection.mask()
                assert same(snapshot(model)[name][mask], trained[name][mask])
                assert not same(snapshot(model)[name][~mask], trained[name][~mask])
        assert all(same(p, trained[n]) for n, p in snapshot(model).items())
    clean = model(input_ids=ids(), labels=ids()).loss.item()
    assert abs(losses[8] - clean) < abs(losses[2] - clean)


def test_without_calibration_it_says_what_to_give() -> None:
    with pytest.raises(ValueError, match="calibration=batches"):
        finetooth.build("gift-sw", tiny("llama"))
    with pytest.raises(ValueError, match="no batches"):
        finetooth.build("gift-sw", tiny("llama"), calibration=[])
    with pytest.raises(ValueError, match="the unit is row"):
        finetooth.build("gift-sw", tiny("llama"), calibration=[ids()], unit="row")
