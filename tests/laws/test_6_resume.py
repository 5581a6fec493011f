"""Law 6: N steps = k steps, save, load in a new process, N - k steps; bit for bit, state included.

One other process resumes all rows, because starting one costs seconds. The noise of gift-sw does not change
the toy's gradients, so its counter is checked through the state, and its effect on a Llama in test_gift_sw.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetooth import NonFiniteError

from .toy import DTYPES, ROWS, Toy, batches, build, same, snapshot, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    for row in ROWS:
        for dtype in DTYPES:
            model = Toy(DTYPES[dtype])
            opt = build(row, model, weight_decay=0.1)
            list(train(model, opt, batches(6)[:3]))
            torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, folder / f"{row}.{dtype}.half.pt")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.laws.resume_worker", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths})
    return folder


def flat(state: Any, at: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{at}/{key}").items()}
    return {at: state}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_resume(row: str, dtype: str, folder: Path) -> None:
    model = Toy(DTYPES[dtype])
    opt = build(row, model, weight_decay=0.1)
    list(train(model, opt, batches(6)))
    end = torch.load(folder / f"{row}.{dtype}.end.pt", weights_only=True)  # noqa: TID251 - tensors only
    assert all(same(p, end["model"][n]) for n, p in snapshot(model).items())
    ours, theirs = flat(opt.state_dict()["selective"]), flat(end["selective"])
    assert ours.keys() == theirs.keys()
    for at, value in ours.items():
        assert torch.equal(value, theirs[at]) if isinstance(value, torch.Tensor) else value == theirs[at], at
    opt.verify_frozen()


def test_bad_steps_in_a_row_are_counted_on() -> None:
    """A run that is killed and resumed again and again still stops at the fifth bad gradient."""
    first, ids = Toy(), batches(1)[0]
    opt = build("grad", first, gradients="dense")

    def bad_step(model: Toy, opt: Any) -> None:
        model(ids).loss.backward()
        model.get_parameter("model.layers.0.self_attn.q_proj.weight").grad.fill_(float("nan"))
        opt.step()
        opt.zero_grad()

    for _ in range(3):
        bad_step(first, opt)
    second = Toy()
    later = build("grad", second, gradients="dense")
    later.load_state_dict(opt.state_dict())
    bad_step(second, later)
    assert later.skipped == 4
    with pytest.raises(NonFiniteError, match="5 gradients in a row"):
        bad_step(second, later)


def test_a_state_of_other_parameters_is_refused() -> None:
    state = build("grad", Toy()).state_dict()
    with pytest.raises(ValueError, match="lm_head"):
        build("grad", Toy(), targets=["*.q_proj.weight", "lm_head.weight"]).load_state_dict(state)
    with pytest.raises(ValueError, match="not saved by a Finetooth optimizer"):
        build("grad", Toy()).load_state_dict(torch.optim.AdamW(Toy().parameters()).state_dict())
