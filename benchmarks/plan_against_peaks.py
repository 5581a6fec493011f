"""What `finetooth plan` says against what a run takes: methods x sizes x checkpointing, each in a process of its own.

    python benchmarks/plan_against_peaks.py --sizes 10M,35M,107M --methods full,gmt,dst
    python benchmarks/plan_against_peaks.py --planned --sizes 107M --checkpointing off       # plans only, as a table

Models are of random weights (`peers.py`), saved once as checkpoints; a line is one `finetooth plan RECIPE --probe --json`.
Measured is the peak resident set of building the optimizer and of two steps, above that of a process in which everything
is imported and warm. The libraries' own workspaces and the allocator's pages are some megabytes whatever the model is: below
about 100 MB they are more than the tenth that is promised, so sizes from 10M are measured. Writes
benchmarks/results/plan_against_peaks.csv anew, or with --append adds to it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "plan_against_peaks.csv"
METHODS = ("full", "gmt", "gmt-strict", "dst", "gift-sw", "hft", "random", "grad", "snip", "magnitude", "nano", "fish")
METHODS += ("lift", "ssu", "spectrum", "rows", "spiel", "lisa", "badam")
TOKENS = {"1M": (8, 256), "10M": (8, 256), "35M": (4, 256), "107M": (2, 256), "300M": (2, 128)}


def checkpoint(size: str, folder: Path) -> Path:
    """A saved model with the embedded model's tokenizer."""
    import shutil

    import finetooth.embedded

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peers import llama

    target = folder / size
    llama(size).save_pretrained(target)
    source = finetooth.embedded.path("embedded:stories260K")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target)
    return target


def rows(folder: Path, length: int) -> Path:
    """Texts longer than any batch, so that rows are cut to the length wanted, and a short one."""
    file = folder / f"rows-{length}.jsonl"
    texts = ["once upon a time there was a little girl " * length] * 63 + ["the end"]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return file


def plan(args: argparse.Namespace, folder: Path, size: str, method: str, checkpointing: bool) -> dict[str, Any]:
    """What `finetooth plan` says, and what a probe measured unless only plans are wanted."""
    batch, length = TOKENS[size]
    data = str(rows(folder, length))
    needed: dict[str, dict[str, Any]] = {"ssu": {"calibration": data}, "rows": {"rows": "100-131"}}
    recipe = {
        "model": str(folder / size),
        "method": {"name": method, "calibration_rows": batch, **needed.get(method, {})},
        "data": {"train": data},
        "train": {
            "batch_size": batch,
            "max_length": length,
            "precision": args.dtype,
            "gradient_checkpointing": checkpointing,
        },
        "evaluate": {"task": "none"},
        "output": str(folder / "run"),
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(
        [sys.executable, "-m", "finetooth", "plan", str(file), *([] if args.planned else ["--probe"]), "--json"],
        check=False,
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{recipe}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def line(args: argparse.Namespace, folder: Path, size: str, method: str, checkpointing: bool) -> dict[str, Any]:
    found, (batch, length) = plan(args, folder, size, method, checkpointing), TOKENS[size]
    planned, measured = (found[key] / 2**20 for key in ("training_peak", "measured_peak"))
    phases, peaks = ({k: round(v / 2**20) for k, v in found[key].items()} for key in ("phases", "measured"))
    how = "checkpointing" if checkpointing else ""
    sys.stderr.write(f"{method} {size} {args.dtype} {how}: {planned:.0f} / {measured:.0f} = {planned / measured:.3f}")
    sys.stderr.write(f"  planned {phases}, measured {peaks}\n")
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "method": method,
        "size": size,
        "dtype": args.dtype,
        "checkpointing": checkpointing,
        "tokens": f"{batch}x{length}",
        "planned_mb": round(planned, 1),
        "measured_mb": round(measured, 1),
        "ratio": round(planned / measured, 3),
    }


def hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return f"{found[0].split(':')[1].strip() if found else 'CPU'}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10M,35M,107M")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--checkpointing", default="off,on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--planned", action="store_true", help="plan only: print a table, measure and write nothing")
    args = parser.parse_args()
    if not (args.append or args.dry or args.planned):
        RESULTS.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes.split(","):
            checkpoint(size, Path(folder))
            for method in args.methods.split(","):
                for how in args.checkpointing.split(","):
                    if args.planned:
                        show(plan(args, Path(folder), size, method, how == "on"), method)
                        continue
                    found = line(args, Path(folder), size, method, how == "on")
                    if not args.dry:
                        write(found)


def show(found: dict[str, Any], method: str) -> None:
    chosen = sum(kind["chosen"] for kind in found["kinds"].values())
    sizes = [found[key] / 2**20 for key in ("state", "gradients", "training_peak", "delta")]
    sys.stdout.write(f"| `{method}` | {chosen:,} | {' | '.join(f'{n:,.0f}' for n in sizes)} |\n")
    sys.stdout.flush()


def write(found: dict[str, Any]) -> None:
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(found))
        if new:
            writer.writeheader()
        writer.writerow(found)


if __name__ == "__main__":
    main()
