"""The injected-fault matrix as a table: `python -m tests.faults` (minutes), or with `--short` every fault and row once.

A cell is how many of the injections had the outcome of their line, of how many: precisions and routes of gradients together.
"""

from __future__ import annotations

import sys
from collections import defaultdict

import torch

from tests.faults.injected import BEFORE, FAULTS, cases, outcome, short
from tests.laws.toy import ROWS


def table(quick: bool) -> str:
    """Markdown: a line for every fault, a column for every row, and the sum of all."""
    found: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for fault, row, dtype, route in short() if quick else cases():
        found[fault.name, row].append(outcome(fault, row, dtype, route) == fault.outcome)
    for name, happens, rows in BEFORE:
        for row in rows:
            found[name, row].append(happens(row) == "refused")
    outcomes = [(fault.name, fault.outcome) for fault in FAULTS] + [(name, "refused") for name, _, _ in BEFORE]
    lines = [f"| fault | outcome | {' | '.join(f'`{row}`' for row in ROWS)} |", "|---" * (len(ROWS) + 2) + "|"]
    for name, expected in outcomes:
        cells = [f"{sum(done)}/{len(done)}" if (done := found.get((name, row))) else "–" for row in ROWS]
        lines.append(f"| {name} | {expected} | {' | '.join(cells)} |")
    done = [right for cell in found.values() for right in cell]
    return "\n".join([*lines, "", f"{sum(done)} of {len(done)} injections had the outcome of their line."])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(table("--short" in sys.argv) + "\n")
