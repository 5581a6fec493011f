"""DST against a dense reference that keeps a full copy of the base."""

import pytest
import torch

import finetooth
from finetooth.rule import stem
from tests.laws.toy import same, snapshot

from .models import ids, step, tiny

RATES = {"lr": 1e-2, "weight_decay": 0.05}


def dense_reference(base, now, proposed, grads, keep: float, relative: bool):
    """The definition, silo by silo, with a lexicographic sort: distance, then |g|, then the smaller index."""
    silos: dict[str, list[str]] = {}
    for name in now:
        silos.setdefault(stem(name), []).append(name)
    out = {}
    for names in silos.values():
        cat = {k: torch.cat([d[n].flatten() for n in names]) for k, d in (("b", base), ("p", proposed), ("g", grads))}
        far = (cat["p"] - cat["b"]).abs()
        far = far / (cat["b"].abs() + 1e-8) if relative else far
        order = sorted(range(far.numel()), key=lambda i: (-far[i].item(), -cat["g"][i].abs().item(), i))
        kept = torch.zeros(far.numel(), dtype=torch.bool)
        kept[order[: max(1, round(keep * far.numel()))]] = True
        new = torch.where(kept, cat["p"], cat["b"])
        for n, part in zip(names, new.split([now[n].numel() for n in names]), strict=True):
            out[n] = part.view_as(now[n])
    return out


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_against_a_dense_reference(family: str, relative: bool) -> None:
    model = tiny(family)
    base = snapshot(model)
    opt = finetooth.build("dst", model, keep=0.1, relative=relative, max_grad_norm=None, kernels="reference", **RATES)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".0." in n or ".1." in n for n in names) and len(names) > 10
    shadow = {n: model.get_parameter(n).detach().clone().requires_grad_() for n in names}
    adamw = torch.optim.AdamW(list(shadow.values()), foreach=False, **RATES)
    for i in range(4):
        model.train()
        model(input_ids=ids(seed=i), labels=ids(seed=i)).loss.backward()
        for n, s in shadow.items():
            s.data.copy_(model.get_parameter(n).data)
            s.grad = model.get_parameter(n).grad.clone()
        adamw.step()
        grads = {n: s.grad for n, s in shadow.items()}
        expected = dense_reference(
            base, {n: base[n] for n in names}, {n: s.data for n, s in shadow.items()}, grads, 0.1, relative
        )
        opt.step()
        opt.zero_grad()
        silos: dict[str, list[int]] = {}
        for n in names:
            p = model.get_parameter(n).data
            assert same(p, expected[n]), (n, i)
            differ, size = silos.setdefault(stem(n), [0, 0])
            silos[stem(n)] = [differ + int((p != base[n]).sum()), size + p.numel()]
        assert all(differ == max(1, round(0.1 * size)) for differ, size in silos.values()), silos
        opt.verify_frozen()


def test_no_second_copy_of_the_model() -> None:
    """State: two float32 moments and one bit for each entry, and the base value of the chosen ones."""
    model = tiny("llama")
    opt = finetooth.build("dst", model, keep=0.1)
    step(model, opt, ids())
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    k = sum(s.numel for s in opt.selections().values())
    assert opt.state_bytes() == 8 * sum(sizes) + 4 * k + sum((size + 7) // 8 for size in sizes)
    assert sum(s.held.numel() for s in opt._slots.values()) == k


def test_moments_of_reset_entries() -> None:
    kept, cleared = tiny("llama"), tiny("llama")
    for model, zero in ((kept, False), (cleared, True)):
        opt = finetooth.build("dst", model, keep=0.1, zero_moments=zero)
        step(model, opt, ids())
        name, selection = next(iter(opt.selections().items()))
        outside = opt._slots[name].exp_avg[~selection.mask()]
        assert bool(outside.any()) is not zero


def test_a_dense_warm_up_is_projected_afterwards() -> None:
    from finetooth.when import warmup

    model = tiny("llama")
    base = snapshot(model)
    opt = finetooth.build("dst", model, keep=0.1, when=warmup(2), lr=1e-2)
    for i in range(3):
        step(model, opt, ids(seed=i))
        n = sum(p.numel() for p in model.parameters() if p.requires_grad)
        moved = sum(int((p != base[m]).sum()) for m, p in snapshot(model).items())
        assert (moved > 0.9 * n) if i < 2 else (moved < 0.11 * n)
        opt.verify_frozen()
