"""Law 1: weights outside the selection are what `rest` says, bit for bit, with decay, clipping and momentum on."""

import copy

import pytest
import torch

from .toy import AGAIN, DTYPES, ROWS, Toy, batches, build, same, snapshot, train

MOVES_EVERYTHING = ("full", "gmt")  # what takes part may move at any step: law 2 and the GMT reference pin those


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_rest(row: str, dtype: str) -> None:
    model = Toy(DTYPES[dtype])
    base = snapshot(model)
    opt = build(row, model, weight_decay=0.1, max_grad_norm=0.5)
    before, made = base, opt.selections()
    for step in train(model, opt, batches(5)):
        now, chosen = snapshot(model), opt.selections()
        for name, p in now.items():
            if name not in chosen:
                assert same(p, base[name]), f"{name} takes no part and moved"
                continue
            if row in MOVES_EVERYTHING:
                continue
            used = made if row in AGAIN else chosen  # the next selection may be there already
            outside = ~used[name].mask()
            held = before if row == "gmt-strict" or row in AGAIN else base
            assert same(p[outside], held[name][outside]), f"{name} moved outside its selection at step {step}"
        before, made = now, chosen
    opt.verify_frozen()
    assert any(not same(p, base[n]) for n, p in before.items()), "nothing trained at all"


@pytest.mark.parametrize("row", [r for r in ROWS if r not in (*MOVES_EVERYTHING, "gmt-strict")])
def test_verify_frozen_sees_one_bit(row: str) -> None:
    model = Toy()
    opt = build(row, model)
    list(train(model, opt, batches(1 if row in AGAIN else 2)))  # what trained and rests again may differ from the base
    opt.verify_frozen()
    name, selection = next((n, s) for n, s in opt.selections().items() if s.numel < s.mask().numel())
    at = (~selection.mask()).nonzero()[0]
    with torch.no_grad():
        p = model.get_parameter(name)
        p[tuple(at)] = torch.nextafter(p[tuple(at)], torch.tensor(9.0))
    with pytest.raises(RuntimeError, match=name):
        opt.verify_frozen()


@pytest.mark.parametrize("known", ["replaced", "base"])
@pytest.mark.parametrize("row", AGAIN)
def test_verify_frozen_sees_what_trained_and_rests(row: str, known: str) -> None:
    """A weight whose turn is over: one bit of it is seen at once, in a resumed run, and when it has a turn again."""
    model, given = Toy(), {"lr": 0.2, "seed": 1}  # the smallest do not stay the smallest, and lots fall on both layers
    base = snapshot(model)
    opt = build(row, model, base=base if known == "base" else None, **given)
    list(train(model, opt, batches(8)))
    opt.verify_frozen()
    again = build(row, Toy(), base=base if known == "base" else None, **given)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    rests = {n: (model.get_parameter(n) != base[n]) & ~s.mask() for n, s in opt.selections().items()}
    name, at = next((n, places.nonzero()[0]) for n, places in rests.items() if places.any())
    p = model.get_parameter(name)
    before = p[tuple(at)].clone()
    with torch.no_grad():
        p[tuple(at)] = torch.nextafter(before, torch.tensor(9.0))
    with pytest.raises(RuntimeError, match=f"{name}.*when its rest began"):
        opt.verify_frozen()
    for n, q in again._model.named_parameters():
        q.data.copy_(model.get_parameter(n))
    with pytest.raises(RuntimeError, match=f"{name}.*when its rest began"):
        again.verify_frozen()
    for _ in train(model, opt, batches(4)):
        with pytest.raises(RuntimeError, match=f"{name}.*when its rest began"):
            opt.verify_frozen()


@pytest.mark.parametrize("row", ROWS)
def test_non_finite_gradient_writes_nothing(row: str) -> None:
    from finetooth import NonFiniteError

    model = Toy()
    opt = build(row, model, stop_after=2)
    list(train(model, opt, batches(2)))
    before, state = snapshot(model), opt.state_bytes()
    for attempt in range(2):
        model(batches(1)[0]).loss.backward()
        gathered = opt._gradients.chosen if opt._gradients else {}
        grads = {n: gathered[n].grad if n in gathered else p.grad for n, p in model.named_parameters()}
        bad = next(n for n, g in grads.items() if g is not None)
        grads[bad].view(-1)[0] = float("nan")
        if attempt == 0:
            opt.step()
        else:
            with pytest.raises(NonFiniteError, match=bad):
                opt.step()
        opt.zero_grad()
        assert all(same(p, before[n]) for n, p in snapshot(model).items())
    assert opt.skipped == 2 and opt.steps == 2 and opt.state_bytes() == state
