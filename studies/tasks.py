"""The data of the studies: rows to train on, to choose a learning rate by and to report, and a general text.

Rows are shuffled with a fixed seed. Those that a learning rate is chosen by are taken from the training data; training rows whose prompt is
also in the test are dropped. The general text is the held-out part of what the base was pretrained on, the same number of characters of each
domain.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TASKS = {
    "banking77": "tasks/banking77",
    "e2e": "tasks/e2e_nlg",
    "tatoeba": "tasks/tatoeba_en_es",
    "boolq": "tasks/boolq",
    "mawps": "tasks/mawps",
    "gsm8k": "tasks/gsm8k",
    "preferences": "preferences/gsm8k_solutions",
}
DOMAINS = ("novels", "novels_eltec", "peps", "rust_rfcs", "factbook", "tinystories")


def rows(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def prepare(data: Path, out: Path, select: int, general: int) -> None:
    """Write the files of every task, unless they are there."""
    for name, folder in TASKS.items():
        if (out / name / "test.jsonl").is_file():
            continue
        test = rows(data / folder / "test.jsonl.gz")
        known = {row["prompt"] for row in test}
        learn = [row for row in rows(data / folder / "train.jsonl.gz") if row["prompt"] not in known]
        random.Random(0).shuffle(learn)
        random.Random(1).shuffle(test)  # `data.eval_limit` takes the first
        (out / name).mkdir(parents=True, exist_ok=True)
        for part, found in (("select", learn[:select]), ("train", learn[select:]), ("test", test)):
            write(out / name / f"{part}.jsonl", map(pair if name == "preferences" else dict, found))
    texts = [beginning(data / "lm" / f"{name}.valid.txt.xz", general) for name in DOMAINS]
    (out / "general.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")


def beginning(file: Path, characters: int) -> str:
    with lzma.open(file, "rt", encoding="utf-8") as text:
        return text.read(characters)


def pair(row: dict[str, Any]) -> dict[str, str]:
    """What was chosen is the completion, so that a recipe can read it."""
    return {"prompt": row["prompt"], "completion": row["chosen"], "rejected": row["rejected"]}


def write(file: Path, found: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
