"""Peak memory of applying, reverting and verifying a checkpoint in a folder, each in a process of its own: rows of `delta_files.py`.

Measured over what the process held before, with its code loaded by a small job and the delta open. On Linux, through /proc.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def measured(side: int, tensors: int) -> Iterator[dict[str, Any]]:
    """Peaks of every job on a checkpoint of bf16 matrices [side, side], 1 % of their entries changed."""
    from safetensors.torch import save_file

    from finetooth.delta import Delta

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "base").mkdir()
        g = torch.Generator().manual_seed(0)
        base = {f"layer.{i}.weight": torch.randn(side, side, generator=g).bfloat16() for i in range(tensors)}
        save_file(base, root / "base" / "model.safetensors")
        moved = {n: torch.where(torch.rand(t.shape, generator=g) < 0.01, t * 1.5, t) for n, t in base.items()}
        Delta.extract(moved, base, keep_base=False).save(root / "delta", against=base)
        del base, moved
        largest, changed = 2 * side**2, 0.01 * side**2
        for job in ("apply", "apply --inverse", "verify", "verify --quick", "revert", "revert --base"):
            done = subprocess.run([sys.executable, __file__, job, name], check=True, capture_output=True, text=True)
            yield {
                "dtype": "bf16",
                "unit": "element",
                "share": 0.01,
                "way": job,
                "changed": round(changed),
                "largest_mb": largest / 2**20,
                "peak_mb": int(done.stdout) / 2**20,
                "whole_mb": tensors * largest / 2**20,
            }


def small(root: Path) -> None:
    """Apply, verify and revert sixteen weights."""
    from safetensors.torch import save_file

    from finetooth.delta import Delta, apply_folder

    base = {"weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    (root / "base").mkdir()
    save_file(base, root / "base" / "model.safetensors")
    Delta.extract({"weight": 2 * base["weight"]}, base, keep_base=False).save(root / "delta", against=base)
    delta = Delta.load(root / "delta")
    apply_folder(root / "base", root / "applied", delta, inverse=root / "inverse")
    delta.verify(root / "applied", quick=False)
    apply_folder(root / "applied", root / "reverted", Delta.load(root / "inverse"))


def child(job: str, root: Path) -> int:
    """Bytes that a job holds at its peak over what the process held before it: its code, loaded by a small job, and the open delta."""
    from finetooth.delta import Delta, apply_folder

    with tempfile.TemporaryDirectory() as name:
        small(Path(name))
    delta = Delta.load(root / "delta")
    (Path("/proc/self") / "clear_refs").write_text("5")
    before = status("VmHWM")
    out = root / job.replace(" ", "")
    if job.startswith("apply"):
        apply_folder(root / "base", out, delta, inverse=root / "inverse" if "inverse" in job else None)
    elif job.startswith("verify"):
        delta.verify(root / "apply", quick="quick" in job)
    elif job == "revert":
        apply_folder(root / "apply", out, Delta.load(root / "inverse"))
    else:
        apply_folder(root / "apply", out, delta.inverse(root / "base", check=False))
    return status("VmHWM") - before


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(f"{child(sys.argv[1], Path(sys.argv[2]))}\n")
