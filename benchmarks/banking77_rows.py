"""What each row reaches on BANKING77: one run each, one seed, learning rates not swept.

    FINETOOTH_DATA=... python benchmarks/banking77_rows.py [ROW ...]

Runs examples/banking77.yaml with each method through the command line and appends a line for each to
benchmarks/results/banking77_rows.csv. It is a check that every row learns something, not a comparison: for that each
method needs its own learning rate and several seeds.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "banking77_rows.csv"
SPARSE = ["optimizer.lr=1.0e-2"]  # 1 % of the weights need larger steps than all of them
SETTINGS: dict[str, list[str]] = {
    "full": [],
    "gmt": ["method.keep=0.2"],
    "gmt-strict": ["method.keep=0.2"],
    "dst": ["method.keep=0.1"],
    "gift-sw": ["method.keep=8"],
    "hft": [],
    "random": SPARSE,
    "grad": SPARSE,
    "snip": SPARSE,
    "magnitude": SPARSE,
}


def run(row: str) -> dict[str, object]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"method.name={row}", *SETTINGS[row], "data.eval_limit=1000", f"output={folder}/run"]
        command = [
            sys.executable,
            "-m",
            "finetooth",
            "train",
            str(ROOT / "examples/banking77.yaml"),
            *changes,
            "--json",
        ]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        versions = json.loads(Path(folder, "run", "environment.json").read_text())
    before, after = found["before"], found["after"]
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{versions['device']}, {os.cpu_count()} cores, {versions['threads']} threads",
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "trl": versions["trl"],
        "row": row,
        "settings": " ".join(changes[1:-1]),
        "exact_match": round(after["exact_match"], 4),
        "task_loss_before": round(before["task_loss"], 4),
        "task_loss": round(after["task_loss"], 4),
        "general_loss_before": round(before["general_loss"], 4),
        "general_loss": round(after["general_loss"], 4),
        "changed": found["changed"],
        "delta_bytes": found["delta_bytes"],
        "state_bytes": found["state_bytes"],
        "seconds": found["seconds"],
    }


def main() -> None:
    for row in sys.argv[1:] or SETTINGS:
        line = run(row)
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(line))
            if new:
                writer.writeheader()
            writer.writerow(line)
        sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main()
