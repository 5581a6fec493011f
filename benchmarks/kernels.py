"""Time of every fast kernel, of its reference, and of the shortest way with torch's own functions.

    python benchmarks/kernels.py                      # CPU, under four minutes on two cores
    python benchmarks/kernels.py --device cuda --results benchmarks/results/kernels-gpu.csv

All ways of an operation take turns, so that a slow moment of the machine meets all of them; the first call of each, which
compiles, is not counted. Weights are square matrices of about 1, 10 and 30 million entries, float32 and bfloat16; where something is
chosen, 0.1 %, 1 % and 20 % of the entries. What takes longer than `PATIENCE` in its first call is left out, and
sort, which does not look at the share, is timed once and not above ten million entries. Appends a line for every way to benchmarks/results/kernels.csv, with its time over the fast kernel's;
`tables.py` makes the tables of it.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels.csv"
SIDES = (1024, 3072, 5504)  # of the square matrices: 1.0, 9.4 and 30.3 million entries
KEEPS = (0.001, 0.01, 0.2)
TOKENS = 256  # of the sampled product
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATES: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
BUDGET = 0.6  # seconds for the repeats of one case, all ways together, beyond the three that there always are
PATIENCE = 2.0  # seconds a single call may take
FAST = {"cpu": "numba", "cuda": "triton"}
Ways = dict[str, Callable[[], Any]]


class Case:
    """One weight, its gradient and moments, and a choice among its entries, on a device."""

    def __init__(self, side: int, dtype: torch.dtype, keep: float, device: str) -> None:
        self.side, self.dtype, self.keep, self.device = side, dtype, keep, device
        self.n, self.k = side * side, max(1, round(keep * side * side))

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

    def matrix(self, seed: int = 0) -> Tensor:
        return self.draw(self.side, self.side, seed=seed)

    def index(self) -> Tensor:
        return torch.randperm(self.n, device=self.device)[: self.k].sort().values.int()

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)


# -- operations: the fast kernel and its reference are called alike, torch's ways are spelled out -------------


def both(op: Callable[[str], Any], call: Callable[[Any], Any]) -> Ways:
    return {name: partial(call, op(name)) for name in ("fast", "reference")}


def cut(op: Callable[[str], Any], c: Case) -> Ways:
    g = c.matrix()
    ways = both(op, lambda f: f([g], c.k))
    ways["topk"] = lambda: float(torch.topk(g.abs().flatten(), c.k).values[-1])
    ways["kthvalue"] = lambda: float(torch.kthvalue(g.abs().flatten(), c.n - c.k + 1).values)
    if c.n <= 10_000_000 and c.keep == 0.2:
        ways["sort"] = lambda: float(g.abs().flatten().sort().values[-c.k])
    return ways


def reaching(op: Callable[[str], Any], c: Case) -> Ways:
    x = c.matrix().abs().flatten()
    level = float(torch.kthvalue(x, c.n - c.k + 1).values)
    ways = both(op, lambda f: f(x, level))
    ways["topk and sort"] = lambda: torch.topk(x, c.k).indices.sort().values
    return ways


def masked(op: Callable[[str], Any], c: Case) -> Ways:
    """GMT's step, its threshold known. AdamW(fused) alone is what full fine-tuning pays; its bf16 moments are bf16."""
    p, g, m, v = c.matrix(1), c.matrix(2), c.zeros(c.side, c.side), c.zeros(c.side, c.side)
    level = float(torch.kthvalue(g.flatten()[: 1 << 20].abs(), round((1 << 20) * (1 - c.keep))).values)
    given = {"cut": level, "strict": False, "scale": 0.9, "key": 7 if c.dtype != torch.float32 else None, "age": 3}
    ways = both(op, lambda f: f(p, g, m, v, **given, **RATES))
    q = torch.nn.Parameter(c.matrix(1))
    q.grad = c.matrix(2)
    opt = torch.optim.AdamW([q], fused=True, **RATES)
    ways["AdamW(fused), no mask"] = opt.step

    def mask_and_step() -> None:
        assert q.grad is not None
        q.grad.mul_(q.grad.abs() >= level)
        opt.step()

    ways["mask, then AdamW(fused)"] = mask_and_step
    return ways


def chosen(op: Callable[[str], Any], c: Case) -> Ways:
    """The step of some entries. torch: an AdamW(fused) over their vector in float32, written back."""
    p, index, g, m, v = c.matrix(1).view(-1), c.index(), c.draw(c.k).float(), c.zeros(c.k), c.zeros(c.k)
    low = c.dtype != torch.float32
    master = p[index.long()].float() if low else None
    ways = both(op, lambda f: f(p, index, g, m, v, master, age=3, **RATES))
    values = torch.nn.Parameter(p[index.long()].float())
    values.grad = g.clone()
    opt = torch.optim.AdamW([values], fused=True, **RATES)

    def gathered() -> None:
        if not low:
            values.data.copy_(p.index_select(0, index))
        opt.step()
        p.index_copy_(0, index.long(), values.detach().to(c.dtype))

    ways["index_select, AdamW(fused), index_copy_"] = gathered
    return ways


def sampled(op: Callable[[str], Any], c: Case) -> Ways:
    dy, x, index = c.draw(TOKENS, c.side, seed=1), c.draw(TOKENS, c.side, seed=2), c.index()
    rows, columns, acc = index // c.side, index % c.side, c.zeros(c.k)
    ways = both(op, lambda f: f(acc, dy, x, rows, columns))
    ways["dense product, index_select"] = lambda: acc.add_((dy.t() @ x).view(-1).index_select(0, index))
    return ways


def noisy(op: Callable[[str], Any], c: Case) -> Ways:
    w, half, out = c.matrix(), c.draw(c.side, 1, seed=1).abs().float(), c.matrix()
    kept = torch.arange(c.side, device=c.device) % 32 == 0
    ways = both(op, lambda f: f(w, half, kept, 7, 0, out))
    ways["randn_like, add"] = lambda: w + (torch.randn_like(w) * half.to(c.dtype)).masked_fill_(kept, 0)
    return ways


def rounded(op: Callable[[str], Any], c: Case) -> Ways:
    x, out = c.matrix().float(), torch.empty(c.side, c.side, dtype=c.dtype, device=c.device)
    ways = both(op, lambda f: f(x, c.dtype, 7, out))

    def by_randint() -> None:
        noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=c.device)
        out.copy_(((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32))

    ways["randint, add, cut off"] = by_randint
    return ways


def uniform(op: Callable[[str], Any], c: Case) -> Ways:
    ways = both(op, lambda f: f(c.n, 7, c.device))
    ways["rand"] = lambda: torch.rand(c.n, device=c.device)
    return ways


BOTH, ONLY32, ONLY16 = ("fp32", "bf16"), ("fp32",), ("bf16",)
# kernel: how it is called, the dtypes and the shares for which that makes a difference
OPERATIONS: dict[str, tuple[Callable[[Callable[[str], Any], Case], Ways], tuple[str, ...], tuple[float, ...]]] = {
    "magnitude_cut": (cut, BOTH, KEEPS),
    "reaching": (reaching, ONLY32, KEEPS),
    "masked_adamw_": (masked, BOTH, (0.2,)),
    "adamw_at_": (chosen, BOTH, KEEPS),
    "sampled_product_": (sampled, BOTH, KEEPS),
    "noisy": (noisy, BOTH, ()),
    "round_stochastic": (rounded, ONLY16, ()),
    "uniform": (uniform, ONLY32, ()),
}


def timed(way: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    way()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(ways: Ways, device: str) -> dict[str, list[float]]:
    """Seconds of every call of every way, in turns; ways that take too long at their first call have none."""
    timed(ways["fast"], device)  # compiles
    first = {name: timed(way, device) for name, way in ways.items()}
    ways = {name: way for name, way in ways.items() if first[name] <= PATIENCE}
    repeats = max(3, min(30, int(BUDGET / sum(first[name] for name in ways))))
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(timed(way, device))
    return found


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, float | None, Case]]:
    for op in args.ops.split(","):
        _, dtypes, keeps = OPERATIONS[op]
        for side in args.sides:
            for dtype in dtypes:
                for keep in keeps or (None,):
                    yield op, dtype, keep, Case(side, DTYPES[dtype], keep or 0.2, args.device)


@torch.no_grad()
def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from steps import commit, hardware, write

    from finetooth.kernels import pick

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(OPERATIONS))
    parser.add_argument("--sides", type=lambda text: [int(n) for n in text.split(",")], default=list(SIDES))
    parser.add_argument("--device", default="cpu", choices=list(FAST))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if odd := [op for op in args.ops.split(",") if op not in OPERATIONS]:
        parser.error(f"{odd[0]!r} is unknown: there are {', '.join(OPERATIONS)}.")
    torch.set_num_threads(args.threads)
    run = {
        "run": datetime.datetime.now().isoformat(timespec="seconds"),
        "hardware": hardware(args.device),
        "device": args.device,
        "threads": args.threads,
        "torch": torch.__version__,
        "backend": FAST[args.device],
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
    }
    for op, dtype, keep, case in cases(args):

        def kernel(name: str, op: str = op) -> Any:
            return pick(op, args.device, FAST[args.device] if name == "fast" else name)

        found = measure(OPERATIONS[op][0](kernel, case), args.device)
        fast = statistics.median(found["fast"])
        for way, seconds in found.items():
            which = {"entries": case.n, "dtype": dtype, "keep": "" if keep is None else f"{100 * keep:g} %"}
            at = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
            ms = {f"{name}_ms": float(f"{1000 * value:.4g}") for name, value in at.items()}
            ratio = float(f"{at['median'] / fast:.4g}")
            write(args.results, {**run, "op": op, "way": way, **which, "repeats": len(seconds), **ms, "ratio": ratio})
            sys.stderr.write(f"{op} {which} {way}: {ms['median_ms']} ms, x {ratio}\n")


if __name__ == "__main__":
    main()
