"""A plan held against the machine: the real model, two steps of the longest batch through the real trainer, the peak measured.

On a GPU the peak is what torch's allocator gave out. On a CPU it is the resident set (`VmHWM`, which Linux sets back on
request) above that of a process in which all libraries, and the kernels that are compiled at first use, are warm: a small
model has taken two steps with the same method before. Freed blocks over 64 KB go back to the system at once, or the
peak would be that of the allocator's habits. Where the system does not tell, the trial is an error and the plan stands.

Not covered: evaluation and the delta, which a plan lists as phases of their own.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch

from finetooth import embedded
from finetooth.data import Prepared
from finetooth.jobs import Job, load, optimizer
from finetooth.longest import rows_of
from finetooth.recipe import Recipe
from finetooth.train import make_trainer

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD, THRESHOLD = -3, 65536  # glibc's mallopt: larger blocks are mapped, and unmapped when they are freed


def trial(recipe: Recipe) -> dict[str, int]:
    """Bytes at the peak of building the optimizer and of training, above an empty process; RuntimeError where unknown."""
    if not torch.cuda.is_available() and not (STATUS.is_file() and CLEAR.exists()):
        raise RuntimeError("this system does not tell the peak of a process (no /proc/self/clear_refs): no probe here.")
    _return_freed_blocks()
    with tempfile.TemporaryDirectory() as folder:
        _warm(recipe, Path(folder))
        base = _resident()
        found = _run(recipe, load(recipe, Path(folder)))
    return {name: peak - base for name, peak in found.items()}


def _run(recipe: Recipe, job: Job) -> dict[str, int]:
    steps, micro = 2, min(2, recipe.train.accumulate)
    rows = rows_of(job.train.examples, recipe, steps * micro)
    _start_peak()
    opt = optimizer(job)
    built = _peak()
    how = recipe.train.model_copy(update={"accumulate": micro, "max_steps": steps})
    job.recipe, job.train = recipe.model_copy(update={"train": how}), Prepared(rows)
    trainer = make_trainer(job, opt, None)
    trainer.args.save_strategy, trainer.args.train_sampling_strategy = "no", "sequential"
    _start_peak()
    trainer.train()
    return {"calibrate and choose": built, "training": _peak()}


def _warm(recipe: Recipe, folder: Path) -> None:
    """The same method, rows and dtype on a small model of random weights: kernels are compiled, libraries have started.

    Its matrices are large enough for the kernels that large ones use, which the embedded model's are not.
    """
    how = recipe.train.model_copy(
        update={"batch_size": min(8, recipe.train.batch_size), "max_length": min(256, recipe.train.max_length)}
    )
    data = recipe.data.model_copy(
        update={"train": str(embedded.path("embedded:banking77/train")), "eval": None, "limit": 64, "packing": False}
    )
    method = recipe.method.model_copy(update={"targets": None, "calibration_rows": 8})
    evaluate = recipe.evaluate.model_copy(update={"forgetting": None})
    source = str(embedded.path("embedded:stories260K"))
    small = recipe.model_copy(
        update={"model": source, "train": how, "data": data, "method": method, "evaluate": evaluate}
    )
    job = load(small, folder)
    held: Any = job.model
    wide = {**held.config.to_dict(), "hidden_size": 256, "intermediate_size": 704, "head_dim": 32}
    with torch.random.fork_rng():
        model = type(held)(type(held.config)(**wide))
    model.config._name_or_path = ""  # its weights are not in the folder
    job.model = model.to(next(job.model.parameters()))
    _run(small, job)


def _return_freed_blocks() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, THRESHOLD)


def _resident() -> int:
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _kilobytes("VmRSS")


def _start_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR.write_text("5")  # proc(5): sets VmHWM to the present resident set


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _kilobytes("VmHWM")


def _kilobytes(key: str) -> int:
    return int(STATUS.read_text().split(f"{key}:")[1].split()[0]) * 1024
