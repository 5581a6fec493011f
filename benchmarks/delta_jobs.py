"""How long it takes to save, load, apply and revert a delta, and how much of that is reading and writing its codings.

    python benchmarks/delta_jobs.py            # a minute
    python benchmarks/delta_jobs.py --small    # a try of it

A checkpoint of bf16 matrices in memory, in a folder too, of which 1 % of the entries moved; ids as gaps, values plain and against
the base. Coding is what happens inside the functions of `coding.py` and `zigzag.py`; nearly all of the rest is fingerprints, which read
every weight of a touched tensor (`apply, quick`: only what is replaced). One line in benchmarks/results/delta_jobs.csv for every job.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "delta_jobs.csv"


class Clock:
    """Seconds inside the functions of the two modules."""

    def __init__(self) -> None:
        from finetooth import coding, zigzag

        self.spent = 0.0
        for module, names in {
            coding: ("encode_index", "decode_index", "check_index"),
            zigzag: ("steps", "moved", "encode", "decode", "check"),
        }.items():
            for name in names:
                setattr(module, name, self.timed(getattr(module, name)))

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given)
            finally:
                self.spent += time.perf_counter() - start

        return timed


def jobs(args: argparse.Namespace, root: Path) -> Iterator[tuple[str, str, float, float]]:
    """What was done, how values are coded, seconds, and seconds of coding; every job `--repeats` times."""
    from safetensors.torch import save_file

    from finetooth.delta import Delta, apply_folder

    g, clock = torch.Generator().manual_seed(0), Clock()
    shape = (args.side, args.side)
    base = {f"layer.{i}.weight": (torch.randn(shape, generator=g) * 0.02).bfloat16() for i in range(args.tensors)}
    tuned = {}
    for name, w in base.items():
        moves = torch.rand(shape, generator=g) < 0.01
        tuned[name] = torch.where(moves, (w.float() + torch.randn(shape, generator=g) * 5e-4).bfloat16(), w)
    (root / "base").mkdir()
    save_file(base, root / "base" / "model.safetensors")
    delta = Delta.extract(tuned, base, keep_base=False)
    del tuned
    path = root / "delta"

    def took(work: Callable[[], Any]) -> tuple[float, float, Any]:
        clock.spent, start = 0.0, time.perf_counter()
        done = work()
        return time.perf_counter() - start, clock.spent, done

    for values, against in (("plain", None), ("against the base", base)):
        for i in range(args.repeats):
            *times, _ = took(lambda against=against: delta.save(path, against=against))  # type: ignore[misc]
            yield "save", values, *times
            *times, loaded = took(lambda: Delta.load(path))
            yield "load", values, *times
            *times, inverse = took(lambda loaded=loaded: loaded.apply(base))  # type: ignore[misc]
            yield "apply", values, *times
            *times, _ = took(lambda inverse=inverse: inverse.apply(base))  # type: ignore[misc]
            yield "revert", values, *times
            loaded = Delta.load(path)
            *times, inverse = took(lambda loaded=loaded: loaded.apply(base, quick=True))  # type: ignore[misc]
            yield "apply, quick", values, *times
            inverse.apply(base)
            out, loaded = root / f"{values}{i}", Delta.load(path)
            *times, _ = took(lambda out=out, loaded=loaded: apply_folder(root / "base", out, loaded))  # type: ignore[misc]
            yield "apply to a folder", values, *times
            for file in out.iterdir():
                file.unlink()


def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from steps import commit, hardware, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8192, help="of the square matrices")
    parser.add_argument("--tensors", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a try: smaller, fewer")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.small:
        args.side, args.tensors, args.repeats = 512, 2, 1
    torch.set_num_threads(args.threads)
    run = {
        "run": datetime.datetime.now().isoformat(timespec="seconds"), "hardware": hardware("cpu"),
        "threads": args.threads, "torch": torch.__version__, "numpy": np.__version__, "zstandard": "", "commit": commit(),
        "command": shlex.join(["python", "benchmarks/delta_jobs.py", *sys.argv[1:]]),
    }  # fmt: skip
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for job, values, whole, inside in jobs(args, Path(folder)):
            found.setdefault((job, values), []).append((whole, inside))
    weights = args.tensors * args.side**2
    for (job, values), times in found.items():
        whole, inside = (statistics.median(part) for part in zip(*times, strict=True))
        line = {"job": job, "values": values, "weights": weights, "changed": round(0.01 * weights), "repeats": len(times),
                "ms": float(f"{1e3 * whole:.4g}"), "coding_ms": float(f"{1e3 * inside:.4g}")}  # fmt: skip
        write(args.results, {**run, **line})
        sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main()
