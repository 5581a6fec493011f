"""Time and memory of a whole training step: every row and every peer, each in a process of its own, in turns.

    python benchmarks/steps.py --sizes 107M --tokens 2x128 --measure memory
    python benchmarks/steps.py --sizes 1M,10M,35M,107M,300M --tokens 4x512 --measure time --rounds 3

A round runs every contender once, one after the other, so that a slow minute of the machine meets all of them. Time is that of
forward, backward and optimizer step, the median over the steps of a process, and then over rounds. Memory is the
peak of the resident set above that of the loaded model (on a GPU, of allocated memory), in processes of their own in
which freed memory goes back at once. Appends to benchmarks/results/steps.csv; `tables.py` makes the tables of it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "steps.csv"


def once(job: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps, in this process."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peers import CONTENDERS, SIZES, llama

    device = job["device"]
    torch.set_num_threads(job["threads"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    model = llama(job["size"], dtype).to(device)
    weights = sum(p.numel() for p in model.parameters())
    if job["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    base = memory(device, reset=True)
    run, opt = CONTENDERS[job["contender"]](model)
    run.train()
    memory(device, reset=True)
    rows, length = job["tokens"]
    parts, vocab = [], SIZES[job["size"]][-1]
    for step in range(job["steps"]):
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
    peak = memory(device, reset=False)
    kept = parts[job["steps"] // 4 + 1 :]  # the first ones compile kernels and fill caches
    state = (
        opt.state_bytes()
        if hasattr(opt, "state_bytes")
        else sum(
            t.numel() * t.element_size() for s in opt.inner.state.values() for t in s.values() if torch.is_tensor(t)
        )
    )
    return {
        "weights": weights,
        "peak_mb": round((peak - base) / 2**20, 1),
        "state_mb": round(state / 2**20, 2),
        "step_s": statistics.median(sum(p) for p in kept),
        "forward_s": statistics.median(p[0] for p in kept),
        "backward_s": statistics.median(p[1] for p in kept),
        "optimizer_s": statistics.median(p[2] for p in kept),
        "loss": float(loss),
    }


def clock(device: str) -> float:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device: str, reset: bool) -> int:
    """Peak bytes since the last reset."""
    if device != "cpu":
        import torch

        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak
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


def rounds(args: argparse.Namespace, size: str, contenders: list[str]) -> None:
    job = {
        "size": size,
        "tokens": [int(n) for n in args.tokens.split("x")],
        "dtype": args.dtype,
        "checkpointing": args.checkpointing,
        "device": args.device,
        "threads": args.threads,
        "steps": args.steps,
        "measure": args.measure,
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name in contenders:
            found[name].append(child({**job, "contender": name}))
            last = found[name][-1]
            sys.stderr.write(f"{size} {args.dtype} {name}: {last['step_s']:.3f} s, {last['peak_mb']} MB\n")
    import torch

    for name, runs in found.items():
        times = sorted(r["step_s"] for r in runs)
        middle = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        write(
            {
                "date": datetime.date.today().isoformat(),
                "hardware": hardware(args.device),
                "threads": args.threads,
                "torch": torch.__version__,
                "measure": args.measure,
                "contender": name,
                "size": size,
                "weights": runs[0]["weights"],
                "dtype": args.dtype,
                "tokens": args.tokens,
                "checkpointing": args.checkpointing,
                "rounds": args.rounds,
                "step_s": round(middle["step_s"], 4),
                "step_s_min": round(times[0], 4),
                "step_s_max": round(times[-1], 4),
                "forward_s": round(middle["forward_s"], 4),
                "backward_s": round(middle["backward_s"], 4),
                "optimizer_s": round(middle["optimizer_s"], 4),
                "outside_share": round(middle["optimizer_s"] / middle["step_s"], 4),
                "peak_mb": middle["peak_mb"],
                "state_mb": middle["state_mb"],
            }
        )


def write(line: dict[str, Any]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(line))
        if new:
            writer.writeheader()
        writer.writerow(line)


def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peers import CONTENDERS

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
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        sys.stdout.write(json.dumps(once(json.loads(args.job))) + "\n")
        return
    for size in args.sizes.split(","):
        rounds(args, size, args.contenders.split(","))


if __name__ == "__main__":
    main()
