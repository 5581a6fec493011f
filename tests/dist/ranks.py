"""Start a worker on some gloo processes, and wait for all: by hand, or with accelerate's own launcher."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.laws.toy import DTYPES, ROWS

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 800  # seconds for every row on two ranks: a minute or two of two cores, more where these are shared


def in_turn(start: int) -> list[Any]:
    """Every row and precision; all but one precision of each row are `exhaustive`, and by `start` 0 and 1 not the same one."""
    return [
        pytest.param(row, dtype, marks=pytest.mark.exhaustive if (i + j + start) % len(DTYPES) else ())
        for i, row in enumerate(ROWS)
        for j, dtype in enumerate(DTYPES)
    ]


def asked(request: pytest.FixtureRequest, *names: str) -> list[str]:
    """`row.dtype` of the tests of this module that are to be run: the workers train no others."""
    given = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return list(dict.fromkeys(".".join(case[n] for n in names) for case in given if set(names) <= case.keys()))


def run(module: str, *arguments: str, ranks: int = 2) -> None:
    env = _environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
    env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", module, *arguments]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    until = time.monotonic() + PATIENCE
    try:
        while any(rank.poll() is None for rank in started) and not any(rank.poll() for rank in started):
            assert time.monotonic() < until, f"still running after {PATIENCE} s: {[rank.poll() for rank in started]}"
            time.sleep(0.1)
        assert [rank.poll() for rank in started] == [0] * ranks
    finally:
        for rank in started:  # one that has failed leaves the others waiting
            rank.kill()
            rank.wait()


def launch(*arguments: str, ranks: int = 2) -> None:
    """`accelerate launch` with arguments of a user's, on this machine's CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(ranks)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", _port()]
    subprocess.run([*command, *arguments], cwd=ROOT, env=_environment(), check=True, timeout=PATIENCE)


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])
