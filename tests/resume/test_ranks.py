"""Two ranks write one checkpoint: it is complete when both have written their part."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from finetooth.saved import _listed

ROOT = Path(__file__).resolve().parents[2]


def test_a_checkpoint_has_the_part_of_every_rank(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    shared = {"PYTHONPATH": paths, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.resume.ranks", str(tmp_path)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **shared, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=200)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert {p.name for p in tmp_path.iterdir()} == {"step-2", "step-3"}
    assert set(_listed(tmp_path / "step-3")) == {"random_state_0.pth", "random_state_1.pth"}
