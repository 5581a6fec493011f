"""Give the loader mutated files, and see that it loads a valid delta or says DeltaError: nothing else, ever.

python -m tests.format.fuzz                            # a million files, coverage-guided; needs pip install -e '.[fuzz]'
python -m tests.format.fuzz --files 20000 --plain      # the same mutations without guidance, atheris not needed
python -m tests.format.fuzz --compiled                 # read by the compiled loops, with numba's checks of every access

Every file is loaded; a delta that loads is described, and applied to the small model that its seed was made for. Allowed are
DeltaError, with the model as it was, and a model that is exactly what the delta promises, from which the inverse gives the
base. Counted as faults: another exception, a changed model, more time than LIMIT, more memory than twice the file and SPARE.

Seeds are what the writer makes today (every unit in every dtype, sparse and dense) and the golden files: a new coding is
fuzzed as soon as it has one. `mutate.py` has the mutations; libFuzzer, through atheris, adds its own, and keeps what reaches new
lines of the loader. One file in five thousand is a large one, whose memory is the tensors' and not the interpreter's.
Exit code 1 if there is a fault; the files that did it are kept in --keep.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.format.mutate import mutate
from tests.format.seeds import Seed, Weights, large, seeds

LIMIT = 1.0  # seconds of the processor for one file; a real hang is ended by libFuzzer, or by pytest
SPARE = 4 << 20  # bytes beyond twice the file: the interpreter's objects and what the allocator rounds up
LARGE_EVERY = 5000
READERS = (
    "archive", "base", "checkpoint", "codec", "coding", "delta", "fit", "made", "manifest", "twins", "units", "varint", "zigzag",
)  # fmt: skip
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


@dataclass
class Log:
    """What came of the files so far."""

    files: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    memory: float = 0.0  # of large files: peak over size
    spare: int = 0  # of small files: bytes of peak
    faults: dict[str, int] = field(default_factory=dict)  # what went wrong, and how often

    def add(self, other: dict[str, Any]) -> None:
        self.files += other["files"]
        self.outcomes.update(other["outcomes"])
        self.slowest = max(self.slowest, other["slowest"])
        self.memory, self.spare = max(self.memory, other["memory"]), max(self.spare, other["spare"])
        for what, n in other["faults"].items():
            self.faults[what] = self.faults.get(what, 0) + n

    def line(self) -> str:
        n = self.outcomes
        return (
            f"{self.files:,} files: {n['applied'] + n['loaded']:,} loaded ({n['applied']:,} of them applied), {n['refused']:,} "
            f"refused, {sum(self.faults.values())} other exceptions or faults, slowest {self.slowest:.2f} s, peak memory "
            f"{self.memory:.2f} x file (small files: {self.spare / 2**20:.1f} MiB)"
        )


# -- one file -----------------------------------------------------------------------------------------------


class Trial:
    """One mutated file after the other: what happens, and what that took."""

    def __init__(self, found: list[Seed], folder: Path, keep: Path | None = None) -> None:
        self.models = {name: seed.base for seed in found for name in seed.base}
        self.path, self.keep, self.log = folder / "file", keep, Log()
        self.peak = Peak()

    def run(self, blob: bytes, big: bool = False) -> str:
        """The outcome: refused, loaded (and no model takes it), applied, or fault."""
        self.path.write_bytes(blob)
        started = time.process_time()
        self.peak.reset()
        try:
            outcome = self._attempt(blob, big)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome = self._fault(blob, f"{type(error).__name__} in {last.name}: {str(error)[:200]}")
        seconds = time.process_time() - started
        if seconds > LIMIT:
            outcome = self._fault(blob, f"more than {LIMIT:.0f} s")
        self.log.slowest = max(self.log.slowest, seconds)
        self.log.files += 1
        self.log.outcomes[outcome] += 1
        return outcome

    def _attempt(self, blob: bytes, big: bool) -> str:
        from finetooth.delta import Delta, DeltaError

        try:
            delta = Delta.load(self.path)
        except DeltaError:
            return "refused"
        finally:
            self._weigh(blob, big)
        name = next(iter(delta.changes), None)
        base = self.models.get(name, {}) if name else {}
        model = {n: t.clone() for n, t in base.items()}
        try:
            delta.info()
            inverse = delta.apply(model)
        except DeltaError:
            assert same(model, base), "refused, and the model has changed"
            return "loaded"
        promised(delta.changes, base, model)
        inverse.apply(model)
        assert same(model, base), "taken off, and the model is not the base"
        return "applied"

    def _weigh(self, blob: bytes, big: bool) -> None:
        used = self.peak.read()
        if big:
            self.log.memory = max(self.log.memory, used / len(blob))
        else:
            self.log.spare = max(self.log.spare, used)
        if used > 2 * len(blob) + SPARE:
            raise MemoryError(f"{used:,} bytes for a file of {len(blob):,}")

    def _fault(self, blob: bytes, what: str) -> str:
        self.log.faults[what] = self.log.faults.get(what, 0) + 1
        if self.keep is not None and self.log.faults[what] == 1:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"fault-{os.getpid()}-{len(self.log.faults)}.safetensors").write_bytes(blob)
        return "fault"


class Peak:
    """The most memory that the process had since `reset`, from Linux; 0 elsewhere."""

    def __init__(self) -> None:
        self.there = Path("/proc/self/clear_refs").exists()
        self.start = 0

    def reset(self) -> None:
        if self.there:
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._high()

    def read(self) -> int:
        return max(0, self._high() - self.start) if self.there else 0

    def _high(self) -> int:
        text = Path("/proc/self/status").read_text()
        at = text.index("VmHWM:")
        return int(text[at + 6 : text.index("kB", at)]) << 10


def same(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(t.reshape(-1).view(torch.uint8), two[n].reshape(-1).view(torch.uint8)) for n, t in one.items()
    )


def promised(changes: Any, base: Weights, model: Weights) -> None:
    """What the delta says it does has been done, and nothing else."""
    from finetooth.base import bits, fingerprint

    for name, t in model.items():
        change = changes.get(name)
        moved = int((bits(t) != bits(base[name])).sum())
        if change is None:
            assert not moved, "a tensor changed that the delta does not list"
        else:
            assert fingerprint(t) == change.result, "applied, and the result is another one"
            assert moved == change.changed, "another number of weights changed"


# -- many files ---------------------------------------------------------------------------------------------


def plain(files: int, seed: int, trial: Trial, found: list[Seed], big: Seed, report: Any = lambda: None) -> None:
    """Mutations of seeds, one after the other."""
    draw, blobs = random.Random(seed), [s.blob for s in found]
    while trial.log.files < files:
        one(trial, mutate(draw.choice(blobs), draw, blobs), draw, blobs, big)
        if trial.log.files % 500 == 0:
            report()


def one(trial: Trial, blob: bytes, draw: random.Random, blobs: list[bytes], big: Seed) -> None:
    """A file, and now and then a large one."""
    trial.run(blob)
    if trial.log.files % LARGE_EVERY == 0:
        trial.run(mutate(big.blob, draw, blobs), big=True)


def guided(files: int, seed: int, trial: Trial, found: list[Seed], big: Seed, report: Any, folder: Path) -> None:
    """libFuzzer chooses what to mutate, by what reached new lines; never returns."""
    import atheris

    corpus = folder / "corpus"
    corpus.mkdir()
    for i, s in enumerate(found):
        (corpus / f"{i:03}").write_bytes(s.blob)
    draw, blobs = random.Random(seed), [s.blob for s in found]

    def test(data: bytes) -> None:
        one(trial, data, draw, blobs, big)
        if trial.log.files % 500 == 0 or trial.log.files >= files:
            report()
        if trial.log.files >= files:
            os._exit(0)

    def change(data: bytes, size: int, number: int) -> bytes:
        own = random.Random(number)
        if own.random() < 0.25:
            return bytes(atheris.Mutate(data, size))
        start = own.choice(blobs) if own.random() < 0.5 else data  # what it keeps is mostly broken in some way already
        return mutate(start, own, blobs)[:size]

    longest = 2 * max(len(b) for b in blobs)
    flags = ["-verbosity=0", "-print_final_stats=0", f"-max_len={longest}", "-timeout=60", "-rss_limit_mb=0"]
    flags.append(f"-artifact_prefix={folder}/")
    atheris.Setup([sys.argv[0], *flags, f"-seed={seed + 1}", "-runs=-1", str(corpus)], test, custom_mutator=change)
    atheris.Fuzz()


def worker(files: int, seed: int, wanted: str, compiled: bool, out: Path, keep: Path | None) -> None:
    """One process: its log is written to `out` as it goes."""
    if wanted == "guided":
        import atheris

        with atheris.instrument_imports(include=[f"finetooth.{name}" for name in READERS]):
            import finetooth.delta  # noqa: F401
    from finetooth import twins

    twins.PAYS = 0 if compiled else sys.maxsize
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY)))
        found, big = seeds(folder), large(folder)
        trial = Trial([*found, big], folder, keep)
        for s in 2 * [
            *found,
            big,
        ]:  # what is needed once, as compiling, is no file's; twice, as that may be taken for too much
            Trial([*found, big], folder).run(s.blob)
        for s in (*found, big):
            if trial.run(s.blob) != "applied":
                raise AssertionError(f"a seed does not apply: {trial.log}")
        trial.log = Log()

        def report() -> None:
            half = out.with_suffix(".half")
            half.write_text(json.dumps(vars(trial.log)))
            half.replace(out)

        if wanted == "guided":
            guided(files, seed, trial, found, big, report, folder)
        plain(files, seed, trial, found, big, report)
        report()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without atheris")
    parser.add_argument("--compiled", action="store_true", help="the codings' loops are numba's; needs the extra 'cpu'")
    parser.add_argument("--keep", type=Path, help="a folder for the files that made a fault")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    wanted = "plain" if given.plain else "guided"
    if given.worker:
        worker(given.files, given.seed, wanted, given.compiled, given.worker, given.keep)
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        log, failed = _all(given, wanted, Path(folder))
    sys.stdout.write(
        f"{log.line()}; {wanted}, seed {given.seed}, {time.monotonic() - started:.0f} s{', compiled loops' if given.compiled else ''}\n"
    )
    for what, n in log.faults.items():
        sys.stdout.write(f"{n:8} {what}\n")
    return 1 if log.faults or failed or log.files < given.files else 0


def _all(given: argparse.Namespace, wanted: str, folder: Path) -> tuple[Log, bool]:
    """Start the processes, say every minute how far they are, and add up."""
    share, running = -(-given.files // given.processes), []
    for i in range(given.processes):
        command = [
            sys.executable,
            "-m",
            "tests.format.fuzz",
            "--worker",
            str(folder / f"{i}.json"),
            "--files",
            str(share),
        ]
        command += ["--seed", str(given.seed + i)] + ["--plain"] * (wanted == "plain")
        command += ["--compiled"] * given.compiled
        command += ["--keep", str(given.keep)] * (given.keep is not None)
        # What is freed goes back at once, so that a peak is that of one file.
        env = {
            **os.environ,
            "TMPDIR": str(folder),
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "NUMBA_BOUNDSCHECK": "1",
        }
        running.append(
            subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=(folder / f"{i}.err").open("w"))
        )
    told = time.monotonic()
    while any(p.poll() is None for p in running):
        time.sleep(0.5)
        if time.monotonic() - told > 60:
            told = time.monotonic()
            sys.stdout.write(_sum(folder).line() + "\n")
            sys.stdout.flush()
    failed = False
    for i, p in enumerate(running):
        if p.returncode:
            failed = True
            sys.stdout.write(f"process {i} ended with {p.returncode}: {(folder / f'{i}.err').read_text()[-2000:]}\n")
    return _sum(folder), failed


def _sum(folder: Path) -> Log:
    log = Log()
    for path in folder.glob("*.json"):
        log.add(json.loads(path.read_text()))
    return log


if __name__ == "__main__":
    sys.exit(main())
