"""What goes wrong, put into one training of the toy: where, and what an optimizer must have made of it.

    fault -> row -> precision -> route of gradients -> outcome

An outcome is one word. `skipped`: weights and state are bit for bit what they were, the step is counted, the next good step is the
one that a run without the bad batch makes, and after `stop_after` in a row NonFiniteError names the tensor. `not used`: the step is that of a run without the fault,
bit for bit. `clipped`: the step is made, and weights and moments are finite. `refused`: an error before training, by name.
Anything else is a failure, and says what happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from finetooth import NonFiniteError
from tests.laws.toy import DTYPES, ROWS, Toy, batches, build, own_score, same, snapshot

NAN, INF = math.nan, math.inf
GOOD, MICRO = 2, 4  # good steps before the fault, micro-batches of each
DENSE = ("full", "gmt", "gmt-strict", "dst")  # their moments, or their selections, read the whole gradient
MEASURED = ("gift-sw", "grad", "snip")  # they read calibration
ROUTES = ("dense", "compact", "structured")

Hurt = Callable[["Run"], None]  # one optimizer step with a fault in it, up to `opt.step`


class Run:
    """A toy and its optimizer, some good steps on."""

    def __init__(self, row: str, dtype: str, route: str, **given: Any) -> None:
        self.model = Toy(DTYPES[dtype])
        settings = {"weight_decay": 0.1, "max_grad_norm": 0.5, "stop_after": 3, "gradients": route, **given}
        self.opt = build(row, self.model, **settings)
        self.ids = iter(batches(9))
        for _ in range(GOOD):
            self.step()

    def backward(self, spoil: float | None = None, at: tuple[int, ...] = ()) -> None:
        """Gradients of one batch; the loss of some of its micro-batches is multiplied by `spoil`."""
        self.model.train()
        for i, micro in enumerate(next(self.ids).chunk(MICRO)):
            loss = self.model(micro).loss / MICRO
            (loss * spoil if i in at and spoil is not None else loss).backward()

    def step(self) -> None:
        self.backward()
        self.opt.step()
        self.opt.zero_grad()

    def chosen(self, inside: bool) -> tuple[str, int]:
        """The first tensor with an entry that is chosen, or not chosen, and the last such entry."""
        for name, selection in self.opt.selections().items():
            found = (selection.mask().flatten() == inside).nonzero().flatten()
            if len(found) and selection.mask().any():
                return name, int(found[-1])
        raise LookupError

    def set(self, value: float, inside: bool = True, everywhere: bool = False) -> str:
        """A gradient by hand, on top of what there is, as `p.grad` is the door of every route."""
        name, at = self.chosen(inside)
        p = self.model.get_parameter(name)
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad.view(-1)[slice(None) if everywhere else at] = value
        return name

    def held(self) -> dict[str, Any]:
        """Weights, and all that the optimizer keeps but the count of bad steps."""
        state = self.opt.state_dict()["selective"]
        kept = {k: v for k, v in state.items() if k not in ("skipped", "extra")}
        return {**snapshot(self.model), **flat(kept), "noise": None}


def flat(state: Any, at: str = "/") -> dict[str, Any]:
    if isinstance(state, dict):
        return {
            k: v.clone() if isinstance(v, Tensor) else v
            for key, x in state.items()
            for k, v in flat(x, f"{at}{key}/").items()
        }
    return {at: state}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_one(x, b[key]) for key, x in a.items())


def _one(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.numel() == 0 == y.numel() or same(x.flatten(), y.flatten())
    return torch.equal(x, y) if isinstance(x, Tensor) else x == y


@dataclass(frozen=True)
class Fault:
    """What is done, to which rows, and what must come of it."""

    name: str
    hurt: Callable[[Run], str | None]  # gradients with a fault; the tensor that must be named, None for any
    outcome: str = "skipped"
    rows: tuple[str, ...] = tuple(ROWS)
    given: tuple[tuple[str, Any], ...] = ()


def _loss(spoil: float, at: tuple[int, ...] = tuple(range(MICRO))) -> Callable[[Run], None]:
    return lambda run: run.backward(spoil, at)


def _entry(value: float, inside: bool = True, everywhere: bool = False) -> Callable[[Run], str]:
    def hurt(run: Run) -> str:
        run.backward()
        return run.set(value, inside, everywhere)

    return hurt


WHOLE = ("hft", "spectrum", "lisa", "badam")  # they leave out whole tensors
SPARSE = tuple(row for row in ROWS if row not in (*DENSE, *WHOLE, "spiel"))  # spiel's windows read every gradient
UNCLIPPED = (("max_grad_norm", None),)
FAULTS = (
    Fault("loss NaN, all of a step", _loss(NAN)),
    Fault("loss +inf, all of a step", _loss(INF)),
    Fault("loss -inf, all of a step", _loss(-INF)),
    Fault("loss NaN, one micro-batch of four", _loss(NAN, (1,))),
    Fault("loss +inf, one micro-batch of four", _loss(INF, (3,))),
    Fault("gradient NaN, one chosen entry", _entry(NAN)),
    Fault("gradient +inf, one chosen entry", _entry(INF)),
    Fault("gradient -inf, one chosen entry", _entry(-INF)),
    Fault("gradient NaN, one whole tensor", _entry(NAN, everywhere=True)),
    Fault("gradient NaN, an entry that is not chosen, read all the same", _entry(NAN, False), "skipped", DENSE[1:]),
    Fault("gradient NaN, an entry that is not chosen", _entry(NAN, False), "not used", SPARSE),
    Fault("gradient 1e30, clipped", _entry(1e30), "clipped"),
    Fault("gradient 1e30, not clipped", _entry(1e30), "skipped", given=UNCLIPPED),
    Fault("gradients of 3e38 whose norm overflows, clipped", _entry(3e38, everywhere=True), "clipped"),
    Fault("gradients of 3e38 whose norm overflows, not clipped", _entry(3e38, everywhere=True), given=UNCLIPPED),
)


def outcome(fault: Fault, row: str, dtype: str, route: str) -> str:
    """What became of it, in one word; or what went wrong."""
    run = Run(row, dtype, route, **dict(fault.given))
    before, state = run.held(), run.opt.state_bytes()
    name = fault.hurt(run)
    try:
        run.opt.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    run.opt.zero_grad()
    if run.opt.skipped:
        return _skipped(fault, run, before, state, name, (row, dtype, route))
    if not all(torch.isfinite(x).all() for x in run.held().values() if isinstance(x, Tensor)):
        return "weights or moments are not finite"
    if equal(run.held(), _without(row, dtype, route, fault.given, 1)):
        return "not used"
    return "clipped" if not equal(snapshot(run.model), {n: before[n] for n in snapshot(run.model)}) else "nothing moved"


@cache
def _without(
    row: str, dtype: str, route: str, given: tuple[tuple[str, Any], ...], steps: int, skip: int = 0
) -> dict[str, Any]:
    """What a run is without the fault, some steps on; `skip` batches are left out."""
    run = Run(row, dtype, route, **dict(given))
    for _ in range(skip):
        next(run.ids)
    for _ in range(steps):
        run.step()
    return run.held()


def _skipped(fault: Fault, run: Run, before: dict[str, Any], state: int, name: str | None, where: Any) -> str:
    opt = run.opt
    if not equal(run.held(), before) or opt.state_bytes() != state:
        return "something was written"
    if (opt.skipped, opt.steps) != (1, GOOD):
        return f"counted {opt.skipped} skipped and {opt.steps} steps"
    run.step()
    if not equal(run.held(), _without(*where, fault.given, 1, skip=1)):
        return "the next good step is another one"
    before = run.held()
    for i in range(3):
        fault.hurt(run)
        try:
            opt.step()
        except NonFiniteError as error:
            named = name is None or repr(name) in str(error)
            good = i == 2 and named and opt.skipped == 4 and "'" in str(error) and equal(run.held(), before)
            return "skipped" if good else f"after {i + 1} in a row: {error}"
        opt.zero_grad()
    return "it did not stop after three in a row"


def short() -> Iterator[tuple[Fault, str, str, str]]:
    """Every fault and row once, with precision and route in turn."""
    for i, fault in enumerate(FAULTS):
        for j, row in enumerate(fault.rows):
            route = _routes(row, ROUTES)[(i + j) % len(_routes(row, ROUTES))]
            yield fault, row, list(DTYPES)[(i + j // 2) % 2], route


def _routes(row: str, routes: tuple[str, ...]) -> tuple[str, ...]:
    """Whole tensors have their gradient in `p.grad`; an embedding is no linear layer."""
    if row in (*DENSE, *WHOLE):
        return ("dense",)
    return tuple(route for route in routes if row != "rows" or route != "structured")


def cases(routes: tuple[str, ...] = ROUTES) -> Iterator[tuple[Fault, str, str, str]]:
    """Every fault, row, precision and route; dense rows have one route."""
    for fault in FAULTS:
        for row in fault.rows:
            for dtype in DTYPES:
                for route in _routes(row, routes):
                    yield fault, row, dtype, route


# -- faults that no step has: before training ----------------------------------------------------------------------


def base(row: str, value: float, trains: bool) -> str:
    """A weight that is no number, in a tensor that trains or in one that does not."""
    model = Toy()
    name = "model.layers.1.mlp.up_proj.weight" if trains else "model.embed_tokens.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = value
    return refused(lambda: build(row, model), f"the weight {name!r} has 1 entries that are not finite")


def calibration(row: str, value: float) -> str:
    """A batch of calibration whose loss and inputs are no numbers."""
    model = Toy()
    forward = model.forward

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.loss = out.loss * value
        return out

    if row == "gift-sw":
        for x, _ in model._tables.values():
            x[:] = 0
        for name, (x, r) in model._tables.items():
            model._tables[name] = (torch.full(x.shape, value), r)
    else:
        model.forward = spoilt  # type: ignore[method-assign]
    return refused(lambda: build(row, model), "What calibration measured there")


def score(row: str, value: float) -> str:
    """A score of one's own that is no number somewhere, at the third step: nothing of that step is written."""

    def bad(w: Any) -> Tensor:
        found = own_score(w)
        found.view(-1)[0] = value if w.step == GOOD else 0.0
        return found

    run = Run("own", "fp32", "auto", score=bad, when="every(1)", calibration=None)
    before = run.held()
    said = refused(run.step, "score 'bad' is negative or not finite in 'model.layers.0")
    return said if equal(run.held(), before) and run.opt.steps == GOOD else "something was written"


def refused(make: Callable[[], Any], message: str) -> str:
    with pytest.raises(ValueError, match="not finite") as raised:
        make()
    return "refused" if message in str(raised.value) else str(raised.value)


BEFORE = (
    *((f"base weight {v}, in what trains", lambda row, v=v: base(row, v, True), tuple(ROWS)) for v in (NAN, INF, -INF)),
    *((f"base weight {v}, in what does not", lambda row, v=v: base(row, v, False), tuple(ROWS)) for v in (NAN, INF)),
    *((f"calibration {v}", lambda row, v=v: calibration(row, v), MEASURED) for v in (NAN, INF)),
    *((f"score {v}", lambda row, v=v: score(row, v), ("own",)) for v in (NAN, INF, -INF)),
)
