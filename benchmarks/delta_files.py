"""Size and speed of delta files: our codings beside zstd over the plain file, and beside what a SHiRA adapter stores.

    python benchmarks/delta_files.py            # codings, real fine-tunes, peak memory: about ten minutes on two cores
    python benchmarks/delta_files.py --small    # a try of all of it

Three measures, one line each in benchmarks/results/delta_files.csv for every case and way:

* `coding`: a matrix of which a share of entries, rows or columns moved (entries also in clusters, with rows and columns of unequal
  luck) as AdamW moves them (by up to a few parts in a
  hundred of the weights' spread). Bytes per changed weight; GB/s of encoding and decoding, of the plain stream (int32 ids, and
  values): copying it is the yardstick. The ways take turns. "compiled" are
  the loops of `twins.py`, after they have been compiled.
* `trained`: the embedded model, and a generated one, fine-tuned in bf16 with rows that train 1 %. `file_bytes` counts the
  header (two to four fingerprints for every tensor), `stream_bytes` does not: of a model of 260,000 weights the header
  is most of the file.
* `peak`: memory over what the process held before, of applying, reverting and verifying a generated checkpoint, in
  a process of its own, beside its largest tensor.

SHiRA: PEFT 0.21 holds int32 indices [2, n] and float32 differences [n], 12 bytes (`tuners/shira/layer.py`). Decoding is ravelling
the indices and adding, encoding the reverse. zstd needs `pip install zstandard`, and is left out without it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
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
RESULTS = ROOT / "benchmarks" / "results" / "delta_files.csv"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RATES = {"stories260K": (2e-3, 2e-4), "generated": (2e-4, 2e-5)}  # smaller weights take larger steps
SHARES, UNITS = (0.001, 0.01, 0.1), ("element", "clustered element", "row", "column")
Ways = dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], int]]]  # encode, decode, bytes


# -- codings ---------------------------------------------------------------------------------------


class Case:
    """A matrix, and the same with a share of its units moved."""

    def __init__(self, side: int, dtype: str, unit: str, share: float) -> None:
        from finetooth.codec import patterns
        from finetooth.diff import gather
        from finetooth.selection import Selection
        from finetooth.units import Unit

        g = torch.Generator().manual_seed(0)
        old = (torch.randn(side, side, generator=g) * 0.02).to(DTYPES[dtype])
        clustered, unit = unit.startswith("clustered"), unit.rpartition(" ")[2]
        self.units = Unit(unit).count(tuple(old.shape))
        k = max(1, round(share * self.units))
        luck = torch.rand(self.units, generator=g)
        if clustered:  # rows and columns differ, as in what a score of gradients chooses
            size = torch.randn(2, side, generator=g).exp()
            luck = (luck.view(side, side) / size[0] / size[1, :, None]).view(-1)
        index = luck.topk(k, largest=False).indices.sort().values.int()
        self.where = Selection(index, Unit(unit), tuple(old.shape))
        before = gather(self.where, old)
        step = torch.randn(before.shape, generator=g).mul_(5e-4)
        new = (before.float() + step).to(old.dtype)
        self.index, self.floating = index.numpy(), True
        self.old, self.new = patterns(before), patterns(new)
        self.changed, self.side = self.new.size, side
        self.flat = torch.arange(side * side).view(side, side) if unit != "element" else None
        self.before, self.after = before, new
        self.plain = self.index.nbytes + self.new.nbytes

    def ways(self) -> Ways:
        found: Ways = {"copy": (self.copied, self.copy_back, lambda made: sum(x.nbytes for x in made))}
        found["portable"] = (self.portable, self.from_portable, lambda made: made[1].nbytes + made[2].nbytes)
        found["against the base"] = (self.against, self.from_against, lambda made: made[1].nbytes + made[2][1].nbytes)
        if importlib.util.find_spec("numba"):
            for way in ("portable", "against the base"):
                encode, decode, size = found[way]
                found[f"{way}, compiled"] = compiled(encode), compiled(decode), size
        found["SHiRA"] = (self.shira, self.from_shira, lambda made: made[0].nbytes + made[1].nbytes)
        if importlib.util.find_spec("zstandard"):
            import zstandard

            for level in (1, 3):
                pack, unpack = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()

                def encode(pack: Any = pack) -> bytes:
                    return bytes(pack.compress(self.index.tobytes() + self.new.tobytes()))

                found[f"zstd -{level} of plain"] = encode, unpack.decompress, len
        return found

    def copied(self) -> tuple[Any, Any]:
        return self.index.copy(), self.new.copy()

    def copy_back(self, made: tuple[Any, Any]) -> Any:
        return made[0].copy(), made[1].copy()

    def portable(self) -> Any:
        from finetooth import coding

        return *coding.encode_index(self.index, self.units), self.new.copy()

    def from_portable(self, made: Any) -> Any:
        from finetooth import coding

        return coding.decode_index(made[0], made[1], self.index.size, self.units), made[2].copy()

    def against(self) -> Any:
        from finetooth import coding, zigzag

        z = zigzag.steps(self.old, self.new, self.floating)
        return *coding.encode_index(self.index, self.units), zigzag.encode(z) or ("plain", self.new)

    def from_against(self, made: Any) -> Any:
        from finetooth import coding, zigzag

        ids = coding.decode_index(made[0], made[1], self.index.size, self.units)
        how, stream = made[2]
        if how == "plain":
            return ids, stream.copy()
        return ids, zigzag.moved(self.old, zigzag.decode(how, stream, self.new.size, self.new.dtype), True)

    def shira(self) -> tuple[Any, Any]:
        flat = self.index if self.flat is None else self.entries()
        at = np.stack(np.divmod(flat, self.side)).astype(np.int32)
        return at, (self.after.float() - self.before.float()).numpy()

    def entries(self) -> Any:
        assert self.flat is not None
        return self.where.gather(self.flat).flatten().numpy()

    def from_shira(self, made: Any) -> Any:
        at = made[0][0] * self.side + made[0][1]
        return at, (self.before.float() + torch.from_numpy(made[1])).to(self.before.dtype)


def compiled(do: Callable[..., Any]) -> Callable[..., Any]:
    """The same with the loops that a process takes which has coded much; numpy's are taken elsewhere, see `codings`."""
    from finetooth import twins

    def run(*given: Any) -> Any:
        usual, twins.PAYS = twins.PAYS, 0
        try:
            return do(*given)
        finally:
            twins.PAYS = usual

    return run


def codings(args: argparse.Namespace, run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from finetooth import twins

    twins.PAYS = sys.maxsize
    for dtype in DTYPES:
        for unit in UNITS:
            for share in SHARES:
                case = Case(args.side, dtype, unit, share)
                ways = case.ways()
                took: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
                sizes = {}
                for turn in range(args.repeats + 1):
                    for name, (encode, decode, size) in ways.items():
                        began = time.perf_counter()
                        made = encode()
                        middle = time.perf_counter()
                        decode(made)
                        ended = time.perf_counter()
                        sizes[name] = size(made)
                        if turn:  # the first of each is not counted
                            took[name][0].append(middle - began)
                            took[name][1].append(ended - middle)
                for name, (writing, reading) in took.items():
                    yield row(
                        run, "coding", dtype=dtype, unit=unit, share=share, changed=case.changed, way=name,
                        repeats=args.repeats, stream_bytes=sizes[name],
                        stream_bytes_per_weight=sizes[name] / case.changed,
                        encode_gb_s=case.plain / statistics.median(writing) / 1e9,
                        decode_gb_s=case.plain / statistics.median(reading) / 1e9,
                    )  # fmt: skip


# -- real fine-tunes -------------------------------------------------------------------------------


def trained(args: argparse.Namespace, run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from finetooth.delta import Delta

    for model_name in args.models.split(","):
        for method in args.methods.split(","):
            for lr in RATES[model_name]:
                base, model, opt = tuned(model_name, method, lr, args)
                delta = Delta.extract(model, opt)
                if not delta.changes:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    for way, how in (
                        ("plain", {"plain": True}), ("portable", {}), ("against the base", {"against": base})
                    ):  # fmt: skip
                        path = Path(folder) / "d"
                        delta.save(path, **how)  # type: ignore[arg-type]
                        loaded = Delta.load(path)
                        spans = loaded.changes.spans.values()  # type: ignore[attr-defined]
                        streams, changed = sum(span.nbytes for span in spans), loaded.info()["changed"]
                        yield row(
                            run, "trained", model=model_name, method=method, lr=lr, dtype="bf16", share=0.01,
                            changed=changed, way=way, file_bytes=path.stat().st_size, stream_bytes=streams,
                            bytes_per_weight=path.stat().st_size / changed, stream_bytes_per_weight=streams / changed,
                        )  # fmt: skip
                        del loaded


def tuned(name: str, method: str, lr: float, args: argparse.Namespace) -> tuple[dict[str, Any], Any, Any]:
    """The base's state dict, the model, and the optimizer that trained 1 % of it in bf16 on BANKING77."""
    import gzip

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import finetooth
    from finetooth import embedded

    source = str(embedded.path("stories260K"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    if name == "generated":
        hidden = args.hidden
        config = LlamaConfig(vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4,
                             num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).to(torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    with gzip.open(embedded.path("banking77/train"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [tokenizer(f"{r['prompt']}\n{r['completion']}")["input_ids"][:64] for r in rows]
    texts = [torch.tensor(text) for text in texts if len(text) == 64] or [torch.tensor(t[:16]) for t in texts]
    batches = [torch.stack([texts[(8 * i + j) % len(texts)] for j in range(8)]) for i in range(args.steps)]
    calibration = [{"input_ids": b, "labels": b} for b in batches[:4]]
    opt = finetooth.build(method, model, lr=lr, keep=0.01, calibration=None if method == "random" else calibration)
    model.train()
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        opt.step()
        opt.zero_grad()
    return base, model, opt


def peaks(args: argparse.Namespace, run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of `delta_peaks.py`, as rows."""
    from delta_peaks import measured

    for said in measured(args.side, args.tensors):
        yield row(run, "peak", **said)


# -- rows ------------------------------------------------------------------------------------------

FIELDS = ("measure", "model", "method", "lr", "dtype", "unit", "share", "changed", "way", "repeats", "file_bytes",
          "stream_bytes", "bytes_per_weight", "stream_bytes_per_weight", "encode_gb_s", "decode_gb_s", "largest_mb",
          "whole_mb", "peak_mb")  # fmt: skip


def row(run: dict[str, Any], measure: str, **said: Any) -> dict[str, Any]:
    short = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in said.items()}
    return {**run, **dict.fromkeys(FIELDS, ""), "measure": measure, **short}


def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from steps import commit, hardware, installed, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", default="coding,trained,peak")
    parser.add_argument("--side", type=int, default=8192, help="of the square matrices")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60, help="of a fine-tune")
    parser.add_argument("--models", default=",".join(RATES))
    parser.add_argument("--methods", default="random,grad,snip,magnitude")
    parser.add_argument("--hidden", type=int, default=1024, help="of the generated model")
    parser.add_argument("--tensors", type=int, default=8, help="of the generated checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a try: smaller, fewer")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.small:
        args.side, args.repeats, args.steps, args.hidden, args.tensors = 1024, 3, 10, 128, 4
    torch.set_num_threads(args.threads)
    run = {
        "run": datetime.datetime.now().isoformat(timespec="seconds"), "hardware": hardware("cpu"),
        "threads": args.threads, "torch": torch.__version__, "numpy": np.__version__,
        "zstandard": installed("zstandard"), "commit": commit(),
        "command": shlex.join(["python", "benchmarks/delta_files.py", *sys.argv[1:]]),
    }  # fmt: skip
    of = {"coding": codings, "trained": trained, "peak": peaks}
    for measure in args.measures.split(","):
        for line in of[measure](args, run):
            write(args.results, line)
            known = {key: line[key] for key in FIELDS if line[key] != ""}
            sys.stderr.write(f"{known}\n")


if __name__ == "__main__":
    main()
