"""Time to go from one fine-tune of a base to another, in memory: DeltaSwitch beside reloading and beside PEFT's adapters.

    python benchmarks/switch.py                                # 35M and 107M, float32 and bfloat16, 1 % of the linear weights
    python benchmarks/switch.py --small --results try.csv      # seconds: does it run?

Ways: `DeltaSwitch.to`, which exchanges k values; `Delta.apply` of the inverse and then of the other delta, which also checks every
fingerprint; `from_pretrained` of the other fine-tune's checkpoint, which the page cache holds; `set_adapter` of PEFT, between two LoRA
(r 16) and between two SHiRA adapters of as many weights. An adapter is switched by a flag and pays in every forward instead,
so a forward of a few tokens is timed too. All ways of a setting take turns; the first switch of each is not counted. `held_mb` is what a
way holds beside one model for two fine-tunes. Appends a line for every way to benchmarks/results/switch.csv.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import itertools
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "switch.csv"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPEATS, TOKENS = 20, 16
# Puts the next fine-tune on and returns the model to call; then the bytes that are held beside one model.
Way = tuple[Callable[[], nn.Module], int]


@torch.no_grad()
def tuned(model: nn.Module, keep: float, seed: int, linears: list[str]) -> Any:
    """A delta of a share of the linear weights, chosen at random; the model is as it was."""
    from finetooth import Delta

    other, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, p in other.named_parameters():
        if name.split(".")[-2] in linears:
            at = torch.randperm(p.numel(), generator=g)[: max(1, round(keep * p.numel()))].to(p.device)
            p.view(-1)[at] += 0.01
    return Delta.extract(other, model, keep_base=False)


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def by_switch(model: nn.Module, deltas: list[Any]) -> Way:
    from finetooth import DeltaSwitch

    on = DeltaSwitch(model, {"a": deltas[0], "b": deltas[1]})
    names = itertools.cycle("ab")

    def go() -> nn.Module:
        on.to(next(names))
        return model

    return go, on.nbytes()


def by_apply(model: nn.Module, deltas: list[Any]) -> Way:
    turn, state = itertools.cycle(deltas), {"back": deltas[0].apply(model)}

    def go() -> nn.Module:
        state["back"].apply(model)
        state["back"] = next(turn).apply(model)
        return model

    held = [t for d in deltas for c in d.changes.values() for t in (c.selection.index, c.values, c.values)]
    return go, size(held)


def by_reload(model: nn.Module, deltas: list[Any], folder: Path) -> Way:
    from transformers import AutoModelForCausalLM

    device = next(model.parameters()).device
    for name, d in zip("ab", deltas, strict=True):
        back = d.apply(model)
        model.save_pretrained(folder / name)
        back.apply(model)
    names = itertools.cycle("ab")

    def go() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / next(names), dtype=next(model.parameters()).dtype).to(
            device
        )

    return go, 0


def by_peft(model: nn.Module, config: Any) -> Way:
    from peft import get_peft_model

    base = size(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = get_peft_model(model, config, adapter_name="a")
        both.add_adapter("b", config)
    names = itertools.cycle("ab")

    def go() -> nn.Module:
        both.set_adapter(next(names))
        return both

    chosen = (t for m in both.modules() for t in getattr(m, "shira_indices", {}).values())  # which no state dict has
    return go, size(both.parameters()) - base + size(chosen)


def ways(model: nn.Module, keep: float, folder: Path) -> dict[str, Way]:
    from peers import LINEARS
    from peft import LoraConfig, ShiraConfig

    deltas = [tuned(model, keep, seed, LINEARS) for seed in (1, 2)]
    shapes = [m.weight.shape for n, m in model.named_modules() if n.split(".")[-1] in LINEARS]
    rank = max(1, round(keep * sum(o * i for o, i in shapes) / sum(o + i for o, i in shapes)))
    lora = LoraConfig(r=16, target_modules=LINEARS, task_type="CAUSAL_LM")
    shira = ShiraConfig(r=rank, mask_type="random", random_seed=0, target_modules=LINEARS)
    return {
        "DeltaSwitch": by_switch(copy.deepcopy(model), deltas),
        "Delta.apply, checked": by_apply(copy.deepcopy(model), deltas),
        "from_pretrained": by_reload(model, deltas, folder),
        "PEFT LoRA r16": by_peft(copy.deepcopy(model), lora),
        "PEFT SHiRA": by_peft(copy.deepcopy(model), shira),
    }


def measure(found: dict[str, Way], repeats: int, device: str) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of every switch and of a forward after it, of every way, in turns."""
    ids = torch.arange(TOKENS, device=device)[None]
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in found}
    for i in range(repeats + 1):
        for name, (go, _) in found.items():
            marks = [clock(device)]
            model = go()
            marks.append(clock(device))
            model.eval()(input_ids=ids, use_cache=False)
            marks.append(clock(device))
            del model
            gc.collect()
            if i:  # the first compiles, allocates and reads from disk
                for kept, pair in zip(times[name], itertools.pairwise(marks), strict=True):
                    kept.append(pair[1] - pair[0])
    return times


def clock(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peers import SIZES, llama
    from steps import commit, hardware, installed, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="35M,107M", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--keep", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="a model of a million weights, three repeats")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.small:
        args.sizes, args.repeats = "1M", 3
    torch.set_num_threads(args.threads)
    run = {
        "run": datetime.datetime.now().isoformat(timespec="seconds"),
        "hardware": hardware(args.device),
        "device": args.device,
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": installed("transformers"),
        "peft": installed("peft"),
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/switch.py", *sys.argv[1:]]),
    }
    for weights, dtype in itertools.product(args.sizes.split(","), args.dtypes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            model = llama(weights, DTYPES[dtype]).to(args.device)
            found = ways(model, args.keep, Path(folder))
            for name, (switch, forward) in measure(found, args.repeats, args.device).items():
                which = {"way": name, "size": weights, "dtype": dtype, "keep": args.keep, "repeats": len(switch)}
                at = {"median": statistics.median(switch), "min": min(switch), "max": max(switch)}
                ms = {f"{key}_ms": float(f"{1000 * value:.4g}") for key, value in at.items()}
                ms["forward_ms"] = float(f"{1000 * statistics.median(forward):.4g}")
                write(args.results, {**run, **which, **ms, "held_mb": round(found[name][1] / 2**20, 2)})


if __name__ == "__main__":
    main()
