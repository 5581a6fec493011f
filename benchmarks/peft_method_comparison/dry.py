"""PEFT's MetaMathQA script on a CPU with a tiny model and made-up sums, without the network: does our side of it work?

The script refuses a CPU and asks the accelerator for its memory, so this stands in for the device, for its memory functions (they
say 0), for the data sets and for the hub. All else that runs is the script's.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from finetooth import embedded

ROWS = 64
TEXT = (
    "Once upon a time, there was a comb. It had fine teeth."  # the script wants a loss between 1 and 2 before training
)
PARAMS: dict[str, Any] = {
    "model_id": str(embedded.path("stories260K")),
    "dtype": "float32",
    "max_seq_length": 128,
    "batch_size_eval": 8,
    "max_steps": 6,
    "eval_steps": 3,
    "generation_kwargs": {"max_new_tokens": 4},
}
_ZERO = ("memory_allocated", "memory_reserved", "max_memory_reserved")
_NOTHING = ("reset_peak_memory_stats", "empty_cache", "manual_seed_all")


def script(out: Path) -> ModuleType:
    """PEFT's `run` with all of that in place."""
    import peft.utils

    for name in _ZERO:
        setattr(torch.cpu, name, lambda *_: 0)
    for name in _NOTHING:
        setattr(torch.cpu, name, lambda *_: None)
    torch.cpu.get_device_name = lambda *_: "a CPU: dry run"  # type: ignore[attr-defined]
    peft.utils.infer_device = lambda: "cuda"  # the script looks once, when it is imported
    utils = importlib.import_module("utils")
    run = importlib.import_module("run")
    utils.device = "cpu"  # type: ignore[attr-defined]
    utils.infer_device = run.infer_device = lambda: "cpu"  # type: ignore[attr-defined]
    utils.get_peft_branch = run.get_peft_branch = lambda: "dry-run"  # type: ignore[attr-defined]
    utils.get_peft_worktree_is_dirty = lambda: False  # type: ignore[attr-defined]
    utils.RESULT_PATH_TEST = utils.RESULT_PATH_CANCELLED = str(out)  # type: ignore[attr-defined]
    out.mkdir(parents=True)
    run.get_base_model_info = run.get_dataset_info = lambda _: None  # type: ignore[attr-defined]
    run.get_wiki_small = lambda: [TEXT] * 8  # type: ignore[attr-defined]
    importlib.import_module("data").load_dataset = load_dataset  # type: ignore[attr-defined]
    return run


def load_dataset(name: str, *_: str) -> Any:
    """Sums, in the columns of the two data sets."""
    from datasets import Dataset, DatasetDict

    asked = [f"What is {i} plus {i % 7}?" for i in range(ROWS)]
    if "MetaMath" in name:
        said = [f"It is {i + i % 7}. The answer is: {i + i % 7}" for i in range(ROWS)]
        columns = {"type": ["sum"] * ROWS, "query": asked, "original_question": asked, "response": said}
        return DatasetDict(train=Dataset.from_dict(columns))
    rows = Dataset.from_dict({"question": asked, "answer": [f"#### {i + i % 7}" for i in range(ROWS)]})
    return DatasetDict(train=rows, test=rows.select(range(8)))
