"""Under FSDP2 too, a reference that shares the policy's shards is a second sharded model, bit for bit; two gloo processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ["-m", "tests.trainers.sharded_worker", str(tmp_path)]
    subprocess.run([*command, *worker], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths})
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert set(found) == {"gmt", "dst", "grad", "gift-sw", "hft"}
        assert all(outcome == [True, True] for outcome in found.values()), found
