"""Kill a training again and again, go on each time in a new process, and compare its end with that of one left alone.

python -m tests.resume.kills                                  # every row through every entry point; prints the log
python -m tests.resume.kills --rows gmt,gift-sw --entries accelerate --kills 2 --json

A process that has imported everything forks one child for every attempt, because importing takes longer than training here;
what a child knows of the run is what lies on the disk. The parent sends SIGKILL: in the middle of a step, when the child says
that it has updated some tensors and not others; in the middle of a checkpoint, when it says that half of a file is written, or
that a name is about to change; or at some moment. All of it is drawn from a seed. Exit code 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch

MOMENTS = ("step", "checkpoint", "time")
TIMING = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


class Pauses:
    """In a child: counts its way through steps and checkpoints, and waits for its end at one of these moments."""

    def __init__(self, moment: str, at: int, pipe: int) -> None:
        self.moment, self.at, self.pipe = moment, at, pipe
        self.seen = Counter[str]()

    def reach(self, moment: str, last: Callable[[], None] = lambda: None) -> None:
        self.seen[moment] += 1
        if moment == self.moment and self.seen[moment] == self.at:
            last()
            os.write(self.pipe, b"!")
            signal.pause()

    def before(self, owner: Any, name: str, moment: str) -> None:
        """Count before a function is called."""
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.reach(moment)
            return real(*args, **kwargs)

        setattr(owner, name, counted)

    def half(self, owner: Any, name: str) -> None:
        """Count after a file (the argument that is a path) is written, and leave half of it."""
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            out = real(*args, **kwargs)
            paths = [Path(a) for a in args if isinstance(a, str | Path)]
            self.reach("checkpoint", lambda: [os.truncate(p, p.stat().st_size // 2) for p in paths] and None)
            return out

        setattr(owner, name, counted)

    def install(self) -> None:
        import safetensors.torch
        import transformers.modeling_utils

        import finetooth.files
        import finetooth.saved
        from finetooth.slot import Slot

        for name in ("_update", "update_masked", "update_dense", "write"):
            self.before(Slot, name, "step")
        self.half(torch, "save")
        self.half(transformers.modeling_utils, "safe_save_file")
        self.half(safetensors.torch, "save_file")
        for module in (finetooth.files, finetooth.saved):
            self.before(module, "sync", "checkpoint")
        for name in ("rename", "replace"):
            self.before(Path, name, "checkpoint")


def child(entry: str, row: str, out: Path, moment: str, at: int, pipe: int) -> None:
    """Train to the end, or until killed; never returns."""
    from tests.resume.entries import flat

    code = 1
    try:
        pauses = Pauses(moment, at, pipe)
        pauses.install()
        ended = entries()[entry](row, out)
        weights = {name.removeprefix("module."): whole(p.detach()) for name, p in ended.model.named_parameters()}
        if int(os.environ.get("RANK", "0")):
            os._exit(0)  # the first says how it ended
        state = flat(ended.optimizer["selective"])
        metrics = [{k: v for k, v in line.items() if k not in TIMING} for line in ended.metrics]
        facts = {"weights": weights, "state": state, "metrics": json.dumps(metrics), "seen": dict(pauses.seen)}
        torch.serialization.save(facts, out / "end.pt")
        code = 0
    except BaseException:
        (out / "error.txt").write_text(traceback.format_exc())
        os.write(pipe, b"!")  # another rank would wait for this one
    finally:
        os._exit(code)


def entries() -> dict[str, Callable[[str, Path], Any]]:
    """Every entry point; those of two ranks are the same functions in two processes, and FSDP2."""
    from tests.resume.entries import ENTRIES
    from tests.resume.sharded import fsdp2

    two = {"Trainer DDP": ENTRIES["transformers.Trainer"], "accelerate DDP": ENTRIES["accelerate"], "FSDP2": fsdp2}
    return ENTRIES | two


TWO = ("Trainer DDP", "accelerate DDP", "FSDP2")


def attempt(
    entry: str, row: str, out: Path, moment: str = "", at: int = 0, after: float = 0.0, struck: int = 0
) -> bool:
    """One process, or two ranks of which `struck` is killed first and the other then, as torchrun does; whether it was killed.

    RuntimeError if it failed by itself.
    """
    hear, say = os.pipe()
    ranks = range(2 if entry in TWO else 1)
    port = str(free_port())
    pids = []
    for rank in ranks:
        pids.append(os.fork())
        if not pids[-1]:
            os.close(hear)
            quiet = os.open(out / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            if len(ranks) > 1:
                shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"})
            child(entry, row, out, moment if rank == struck else "", at, say)
    os.close(say)
    heard, _, _ = select.select([hear], [], [], after if moment == "time" else None)  # readable too when all have ended
    if not heard or os.read(hear, 1):
        for pid in (pids[struck], *pids):
            os.kill(pid, signal.SIGKILL)
    os.close(hear)
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    if (out / "error.txt").exists():
        raise RuntimeError(f"{entry}, {row}: {(out / 'error.txt').read_text()}")
    return any(os.WIFSIGNALED(status) for status in ends)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def whole(p: torch.Tensor) -> torch.Tensor:
    """Of a sharded parameter all of it, on every rank."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def different(one: Any, two: Any) -> int:
    """How many values of two ends are not the same, bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return max(one.numel(), two.numel(), 1)
        if not one.numel():
            return 0
        pair = [t.contiguous().reshape(-1).view(torch.uint8).view(t.numel(), -1) for t in (one, two)]
        return int((pair[0] != pair[1]).any(-1).sum())
    if isinstance(one, dict) and isinstance(two, dict):
        return sum(different(one.get(k), two.get(k)) for k in one.keys() | two.keys())
    return int(one != two)


def end(out: Path) -> dict[str, Any]:
    return torch.load(out / "end.pt", weights_only=True)  # noqa: TID251 - tensors and plain values


def trial(entry: str, row: str, kills: int, draw: random.Random, folder: Path) -> dict[str, Any]:
    """One row through one entry point: left alone, then killed `kills` times."""
    alone, killed = folder / "alone", folder / "killed"
    alone.mkdir()
    killed.mkdir()
    started = time.monotonic()
    attempt(entry, row, alone)
    seconds = time.monotonic() - started
    straight = end(alone)
    landed, torn = Counter[str](), 0
    for i in range(kills):
        moment = MOMENTS[i % len(MOMENTS)]
        share = straight["seen"].get(moment, 0) // kills  # so that there is something left for the next
        kill = (moment, draw.randint(1, max(1, share)), draw.uniform(0.2, 0.9) * seconds)
        if not attempt(entry, row, killed, *kill, struck=int(entry in TWO and moment == "step")):
            break  # it got to its end
        landed[moment] += 1
        torn += any(killed.rglob(".unfinished/*")) or _unsealed(killed)
    if not (killed / "end.pt").is_file():
        attempt(entry, row, killed)
    parts = {part: different(straight[part], end(killed)[part]) for part in ("weights", "state", "metrics")}
    counts = {"kills": landed.total(), "half": torn}
    return {"entry": entry, "row": row, **counts, "landed": dict(landed), "different": parts}


def _unsealed(out: Path) -> bool:
    from finetooth.saved import MANIFEST

    return any(not (p / MANIFEST).is_file() for p in out.glob("checkpoint-*"))


def warm(rows: list[str]) -> None:
    """Compile the kernels once, for all children: a short training of every row on a toy."""
    from tests.laws.toy import Toy, batches, build, train

    for row in rows:
        model = Toy()
        list(train(model, build(row, model), batches(2)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="all")
    parser.add_argument("--entries", default="all")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    from tests.laws.toy import ROWS

    rows = ROWS if given.rows == "all" else given.rows.split(",")
    chosen = list(entries()) if given.entries == "all" else given.entries.split(",")
    warm(rows)
    draw, found = random.Random(given.seed), []
    started = time.monotonic()
    for entry in chosen:
        for row in rows:
            if entry == "finetooth train" and row == "own":
                continue  # a recipe names its row
            with tempfile.TemporaryDirectory() as folder:
                found.append(trial(entry, row, given.kills, draw, Path(folder)))
            if not given.json:
                sys.stdout.write(_line(found[-1]) + "\n")
                sys.stdout.flush()
    bad = sum(sum(f["different"].values()) for f in found)
    kills = sum(f["kills"] for f in found)
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        where = sum((Counter(f["landed"]) for f in found), Counter[str]())
        sys.stdout.write(
            f"\n{len(found)} trainings killed {kills} times ({where['step']} in a step, {where['checkpoint']} in a checkpoint, "
            f"{where['time']} at some moment; {sum(f['half'] for f in found)} left a half-written checkpoint), resumed {kills} "
            f"times: {bad} differing values. {time.monotonic() - started:.0f} s, seed {given.seed}.\n"
        )
    return 1 if bad else 0


def _line(f: dict[str, Any]) -> str:
    where = ", ".join(f"{n} {moment}" for moment, n in f["landed"].items())
    wrong = ", ".join(f"{part} {n}" for part, n in f["different"].items())
    return f"{f['entry']:22} {f['row']:12} {f['kills']} kills ({where}), {f['half']} half-written; differing: {wrong}"


if __name__ == "__main__":
    sys.exit(main())
