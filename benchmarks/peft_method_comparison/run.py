"""Run a row of Finetooth under PEFT's MetaMathQA protocol, by PEFT's own script.

    git clone https://github.com/huggingface/peft && pip install -e ./peft bitsandbytes scikit-learn
    python benchmarks/peft_method_comparison/run.py --peft peft --row gift-sw --lr 1e-4 --set keep=3
    python benchmarks/peft_method_comparison/run.py --peft peft --row gift-sw --dry-run      # minutes, a CPU, no network

Data, order of batches, steps, seeds, generation, the parsing of answers, the log of memory and the result file are those of
`method_comparison/MetaMathQA` in that checkout, run where it lies: nothing of it is repeated here. Two of its functions are replaced:
the one that makes optimizer and schedule (ours is made, with its schedule), and the one that says how large the result is (the
delta is saved, and its bytes are counted). Two are wrapped: tokenizer and prompt are remembered for calibration, and the count of trained
weights is ours, as a selective method knows better than `requires_grad` does. Clipping is in our step, so the script's own is set to 0: the norm is the same 1.0.
Row and options stand among the `optimizer_kwargs` of the result.

A row that measures first takes `--calibration-batches` batches from the beginning of the training data, as the script makes them; `ssu`, which
shields what matters elsewhere, takes as many of `--source`. A row that wants to know the steps of the run (`spiel`) is told.
The script writes a result with the status "canceled" where its loop raises an error; here that ends with exit code 1.

`--dry-run` runs all of that code with the embedded model, made-up sums for data, a few steps and a CPU, for which it stands
in for the accelerator's memory functions. The result is no result, and goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import finetooth
from finetooth.assemble import check_options
from finetooth.data import documents
from finetooth.nearest import hint

HERE = Path(__file__).resolve().parent
CLIP, WEIGHT_DECAY = 1.0, 0.1  # the protocol's
LONGEST = 768  # tokens of a text that is shielded, as of the protocol's rows
OURS = {
    "optimizer_kwargs": "--lr, --weight-decay and --set",
    "optimizer_type": "--row",
    "grad_norm_clip": "nothing: our step clips to 1.0",
}


class Row:
    """Stands in for functions of PEFT's script, and remembers what they have to know of each other."""

    def __init__(
        self,
        run: ModuleType,
        name: str,
        options: dict[str, Any],
        batches: int,
        model_id: str,
        out: Path,
        source: Path | None = None,
    ) -> None:
        self.run, self.name, self.options, self.batches = run, name, options, batches
        self.model_id, self.out, self.source = model_id, out, source
        self.tokenizer: Any = None
        self.error = ""
        self.optimizer: finetooth.SelectiveAdamW | None = None
        self._theirs = {name: getattr(run, name) for name in ("get_tokenizer", "train")}
        run.get_tokenizer = self.get_tokenizer  # type: ignore[attr-defined]
        run.get_optimizer_and_scheduler = self.get_optimizer_and_scheduler  # type: ignore[attr-defined]
        run.get_file_size = self.get_file_size  # type: ignore[attr-defined]
        run.train = self.train  # type: ignore[attr-defined]

    def get_tokenizer(self, **given: Any) -> Any:
        self.tokenizer = self._theirs["get_tokenizer"](**given)
        return self.tokenizer

    def train(self, **given: Any) -> Any:
        self.template, self.batch_size = given["query_template"], given["batch_size"]
        result = self._theirs["train"](**given)
        self.error = result.error_msg
        if self.optimizer is not None:
            result.num_trainable_params = trained(self.optimizer)
        return result

    def get_optimizer_and_scheduler(
        self, model: nn.Module, *, max_steps: int, optimizer_type: str, lr_scheduler_arg: str | None, **given: Any
    ) -> tuple[Any, Any]:
        from transformers import get_constant_schedule, get_cosine_schedule_with_warmup

        wanted = finetooth.METHODS[self.name]
        calibration = (self.shielded if wanted.source else self.calibration)(model) if wanted.calibrated else None
        steps = {"steps": max_steps} if "steps" in wanted.options else {}
        self.optimizer = finetooth.build(
            self.name,
            model,
            lr=given["lr"],
            weight_decay=given.get("weight_decay", 0.0),
            max_grad_norm=CLIP,
            calibration=calibration,
            base=self.model_id,
            **{**steps, **self.options},
        )
        if lr_scheduler_arg is None:
            return self.optimizer, get_constant_schedule(self.optimizer)
        warmup = int(importlib.import_module("utils").WARMUP_STEP_RATIO * max_steps)
        return self.optimizer, get_cosine_schedule_with_warmup(self.optimizer, warmup, max_steps)

    def calibration(self, model: nn.Module) -> list[dict[str, torch.Tensor]]:
        """The first batches that the script will train on, with labels for the answer and all of the prompt, as it has them."""
        run = self.run
        rows = run.get_train_valid_test_datasets(
            tokenizer=self.tokenizer, query_template=self.template, print_fn=run.print_verbose
        )[0]
        found = []
        for batch in run.BucketIterator(
            rows, batch_size=self.batch_size, bucket_factor=run.BUCKET_FACTOR, delete_cols=["response"]
        ):
            lengths = [len(ids) for ids in batch["input_ids"]]
            padded = self.tokenizer.pad(batch, return_tensors="pt").to(model.device)
            labels = padded["input_ids"].clone()
            for i, n in enumerate(lengths):
                labels[i, n + 1 :] = -100
            found.append({**padded, "labels": labels})
            if len(found) == self.batches:
                break
        return found

    def shielded(self, model: nn.Module) -> list[dict[str, torch.Tensor]]:
        """Batches of what must not be forgotten: the first texts of `source`, cut to `LONGEST` tokens."""
        assert self.source is not None, "main asks for it"
        texts = documents(self.source)[: self.batches * self.batch_size]
        found = []
        for at in range(0, len(texts), self.batch_size):
            rows = self.tokenizer(texts[at : at + self.batch_size], truncation=True, max_length=LONGEST)
            padded = self.tokenizer.pad(rows, return_tensors="pt").to(model.device)
            found.append({**padded, "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)})
        return found

    def get_file_size(self, model: nn.Module, *, print_fn: Any, **_: Any) -> int:
        """Bytes of the delta, which is kept; raises FrozenMoved if a weight moved that must not."""
        assert self.optimizer is not None, "the script makes an optimizer before it asks for the size"
        self.optimizer.verify_frozen()
        path = self.out / "delta.safetensors"
        recipe = {"protocol": "PEFT method_comparison/MetaMathQA", "method": self.name, **self.options}
        finetooth.Delta.extract_to(path, model, self.optimizer, recipe, self.name)
        print_fn(f"Saved the delta to {path}")
        return path.stat().st_size


def trained(opt: finetooth.SelectiveAdamW) -> int:
    """How many weights train at present: chosen entries, and whole tensors where a row trains those."""
    chosen = opt.selections()
    whole = (p.numel() for group in opt.param_groups for p in group["params"] if p.requires_grad)
    return sum(s.numel for s in chosen.values()) if chosen else sum(whole)


def experiment(folder: Path, name: str, params: dict[str, Any]) -> str:
    """Write the experiment's folder where the script looks for it; its path as the script wants it."""
    path = Path("experiments") / "finetooth" / name
    (folder / path).mkdir(parents=True, exist_ok=True)
    text = json.dumps(params, indent=2) + "\n"
    (folder / path / "training_params.json").write_text(text, encoding="utf-8")
    return str(path)


def play(run: ModuleType, path: str, row: Row) -> None:
    """The script's `main` on an experiment; ends with exit code 1 and the reason where its loop raised an error."""
    newer = {"bucket_name": None} if "bucket_name" in inspect.signature(run.main).parameters else {}  # no upload
    run.main(path_experiment=path, experiment_name=run.validate_experiment_path(path), clean=True, **newer)
    if row.error:
        sys.exit(f"The run did not end: {row.error}")


def opened(peft: Path) -> Path:
    """The protocol's folder in a checkout of PEFT; ends with what to do where there is none."""
    folder = peft.resolve() / "method_comparison" / "MetaMathQA"
    if not (folder / "run.py").is_file():
        sys.exit(
            f"{peft} has no method_comparison/MetaMathQA/run.py: give a checkout of PEFT, "
            "`git clone https://github.com/huggingface/peft`."
        )
    return folder


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peft", type=Path, required=True, help="a checkout of PEFT, installed with pip install -e")
    parser.add_argument("--row", required=True, help="a name that `finetooth methods` lists")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--weight-decay", type=float, default=WEIGHT_DECAY)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the row, such as keep=0.01"
    )
    parser.add_argument("--calibration-batches", type=int, default=16)
    parser.add_argument(
        "--source", type=Path, metavar="TEXT", help="texts that must not be forgotten, for a row that shields (ssu)"
    )
    parser.add_argument(
        "--params", default="{}", metavar="JSON", help="more for training_params.json, such as '{\"seed\": 1}'"
    )
    parser.add_argument("--name", help="of the experiment; default: row, options and lr")
    parser.add_argument("--out", type=Path, default=Path("runs/peft_method_comparison"), help="where the delta goes")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if not isinstance(_value(given.params), dict):
        parser.error(f"--params: {given.params!r} is no JSON object, such as '{{\"seed\": 1}}'.")
    for key in OURS.keys() & json.loads(given.params).keys():
        parser.error(f"--params: {key} is set by {OURS[key]}.")
    if given.row not in finetooth.METHODS:
        parser.error(f"there is no row {given.row!r}.{hint(given.row, finetooth.METHODS)}")
    if finetooth.METHODS[given.row].source != (given.source is not None):
        parser.error(
            f"--source is not read by {given.row}."
            if given.source
            else f"{given.row} shields what matters on other data than it trains on: give texts of that, --source TEXT."
        )
    if given.source is not None and not given.source.is_file():
        parser.error(f"--source: there is no file {given.source}.")
    return given


def main() -> None:
    given = arguments()
    options = {key: _value(value) for key, _, value in (each.partition("=") for each in given.set)}
    try:
        check_options(given.row, {k: v for k, v in options.items() if k != "keep"}, options.get("keep"))
    except ValueError as error:
        sys.exit(f"--set: {error}")
    name = given.name or "-".join([given.row, *(f"{k}_{v}" for k, v in options.items()), f"lr_{given.lr:g}"])
    out = (given.out / name).resolve()
    source = None if given.source is None else given.source.resolve()
    params = {
        "optimizer_kwargs": {
            "lr": given.lr,
            "weight_decay": given.weight_decay,
            "finetooth": {"row": given.row, **options},
        },
        "grad_norm_clip": 0,
        **json.loads(given.params),
    }
    folder = opened(given.peft)
    os.chdir(folder)  # its paths are relative
    sys.path[:0] = [str(folder), str(HERE)]
    if given.dry_run:
        import dry

        params |= dry.PARAMS
        out = Path(tempfile.mkdtemp()) / name
        run = dry.script(out)
    else:
        run = importlib.import_module("run")
    run.print_verbose = lambda *said, **_: sys.stderr.write(" ".join(map(str, said)) + "\n")  # type: ignore[attr-defined]
    path = experiment(folder, name, params)
    row = Row(run, given.row, options, given.calibration_batches, _model(folder, params), out, source)
    try:
        play(run, path, row)
    finally:
        if given.dry_run:  # PEFT's `make` would run what it finds there
            shutil.rmtree(folder / path)


def _model(folder: Path, params: dict[str, Any]) -> str:
    defaults = json.loads((folder / "default_training_params.json").read_text(encoding="utf-8"))
    return str({**defaults, **params}["model_id"])


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
