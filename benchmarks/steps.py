"""Time and memory of a whole training step: every row and every peer, each in a process of its own, in turns.

    python benchmarks/steps.py --sizes 107M --tokens 2x128 --measure memory
    python benchmarks/steps.py --sizes 1M,10M,35M,107M,300M --tokens 4x512 --measure time --rounds 3

A round runs every contender once, one after the other, so that a slow minute of the machine meets all of them, and a
ratio is taken within a round. Time is that of forward, backward and optimizer step, the median over the steps of a process.
Memory is the peak of the resident set above that of the loaded model (on a GPU, of allocated memory), in processes in
which freed memory goes back at once. Two things are measured apart: what it takes to build the contender (calibration,
selection, adapters), `build_s` and `build_mb`, and what its libraries and their compiled kernels take once in a process,
`library_mb`: the growth while a tiny model is trained before the model is loaded. Appends a line for every process to benchmarks/results/steps.csv, as soon as it
is done; `tables.py` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "steps.csv"


def once(job: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps, in this process."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peers import CONTENDERS, llama

    device = job["device"]
    torch.set_num_threads(job["threads"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    tiny = llama("tiny", dtype).to(device)
    before = memory(device, reset=True)
    train(job, *CONTENDERS[job["contender"]](tiny), steps=2)
    del tiny
    gc.collect()
    library = memory(device, reset=True) - before
    model = llama(job["size"], dtype).to(device)
    weights = sum(p.numel() for p in model.parameters())
    if job["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    base = memory(device, reset=True)
    began = clock(device)
    run, opt = CONTENDERS[job["contender"]](model)
    built = clock(device) - began
    build_peak = memory(device, reset=False)
    memory(device, reset=True)
    parts, loss = train(job, run, opt, job["steps"])
    peak = memory(device, reset=False)
    kept = parts[job["steps"] // 4 + 1 :]  # the first ones compile kernels and fill caches
    state = (
        opt.state_bytes()
        if hasattr(opt, "state_bytes")
        else sum(
            t.numel() * t.element_size() for s in opt.inner.state.values() for t in s.values() if torch.is_tensor(t)
        )
    )
    times = sorted(sum(p) for p in kept)
    seconds = {
        "build_s": built,
        "step_s": statistics.median(times),
        "step_s_min": times[0],
        "step_s_max": times[-1],
        "forward_s": statistics.median(p[0] for p in kept),
        "backward_s": statistics.median(p[1] for p in kept),
        "optimizer_s": statistics.median(p[2] for p in kept),
        "outside_share": statistics.median(p[2] / sum(p) for p in kept),
    }
    return {
        "weights": weights,
        "library_mb": round(library / 2**20, 1),
        "build_mb": round((build_peak - base) / 2**20, 1),
        "peak_mb": round((peak - base) / 2**20, 1),
        "state_mb": round(state / 2**20, 2),
        **{name: float(f"{value:.5g}") for name, value in seconds.items()},
        "loss": round(loss, 4),
    }


def train(job: dict[str, Any], run: Any, opt: Any, steps: int) -> tuple[list[list[float]], float]:
    """Seconds of forward, backward and optimizer of every step, and the last loss."""
    import torch

    run.train()
    device, (rows, length) = job["device"], job["tokens"]
    parts, loss, vocab = [], torch.zeros(()), run.config.vocab_size
    for step in range(steps):
        ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(step)).to(device)
        marks = [clock(device)]
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        marks.append(clock(device))
        loss.backward()
        marks.append(clock(device))
        opt.step()
        opt.zero_grad()
        marks.append(clock(device))
        parts.append([b - a for a, b in itertools.pairwise(marks)])
    return parts, float(loss.detach())


def clock(device: str) -> float:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device: str, reset: bool) -> int:
    """Peak bytes since the last reset; with a reset, the bytes in use now."""
    if device != "cpu":
        import torch

        if not reset:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    now, peak = (int(status.split(f"{key}:")[1].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    return now if reset else peak


def child(job: dict[str, Any]) -> dict[str, Any]:
    """The same in a new process, so that no contender meets another's leftovers."""
    # Large blocks go back to the system when they are freed: otherwise the peak is that of the allocator's habits.
    env = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if job["measure"] == "memory" else {})
    env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], check=False, env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{job}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def hardware(device: str) -> str:
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{found[0].split(':')[1].strip() if found else platform.machine()}, {os.cpu_count()} cores"


def installed(library: str) -> str:
    """Its version; nothing where it is missing, which only its own contenders mind."""
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that is measured, "-dirty" if files differ from it; nothing outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def rounds(args: argparse.Namespace, run: dict[str, Any], size: str, contenders: list[str]) -> None:
    settings = {
        "measure": args.measure,
        "size": size,
        "dtype": args.dtype,
        "tokens": args.tokens,
        "checkpointing": args.checkpointing,
        "steps": args.steps,
    }
    where = {"device": args.device, "threads": args.threads, "tokens": [int(n) for n in args.tokens.split("x")]}
    for number in range(args.rounds):
        for name in contenders:
            found = child({**settings, **where, "contender": name})
            write(args.results, {**run, **settings, "contender": name, "round": number, **found})
            sys.stderr.write(f"{size} {args.dtype} {name}: {found['step_s']:.3f} s, {found['peak_mb']} MB\n")


def write(results: Path, line: dict[str, Any]) -> None:
    new = not results.exists()
    if not new and results.open().readline().strip() != ",".join(line):
        sys.exit(f"{results} has other columns: move it away, or give --results.")
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peers import CONTENDERS, SIZES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="107M")
    parser.add_argument("--tokens", default="2x128", help="rows x length")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--measure", default="time", choices=["time", "memory"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        sys.stdout.write(json.dumps(once(json.loads(args.job))) + "\n")
        return
    contenders, sizes = args.contenders.split(","), args.sizes.split(",")
    for given, known in ((contenders, CONTENDERS), (sizes, SIZES)):
        if odd := [name for name in given if name not in known]:
            parser.error(f"{odd[0]!r} is unknown: there are {', '.join(known)}.")
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: the first quarter and one more are not counted, so give at least 3.")
    run = {
        "run": datetime.datetime.now().isoformat(timespec="seconds"),
        "hardware": hardware(args.device),
        "threads": args.threads,
        **{name: installed(name) for name in ("torch", "transformers", "peft")},
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/steps.py", *sys.argv[1:]]),
    }
    for size in sizes:
        rounds(args, run, size, contenders)


if __name__ == "__main__":
    main()
