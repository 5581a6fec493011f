"""The data of the studies: rows to train on, to choose a learning rate by and to report, and a general text.

Rows that are long for their task are left out, of training and of the test; the others are shuffled with a fixed seed. Those that a
learning rate is chosen by are taken from the training data by their prompts, and no training row has a prompt of theirs or of a test row.
E2E's test is of another kind than its training data (restaurants that are not there, more attributes, a loss a nat higher), so that its rate
is chosen by two fifths of the test rows, which are not reported.
The general text is the held-out part of what the base was pretrained on: the same number of tokens of each domain, in documents of at
most `LONGEST` tokens, as long as the base has seen; documents that are mostly not in Latin letters are left out, as their tokens are
bytes and would weigh most.

`manifest.json` is written last: a folder without it is made anew, one that was made with other settings or another tokenizer is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from transformers import AutoTokenizer

from finetooth.data import documents
from finetooth.files import whole

# Where each is, and of how many tokens a row is at most: a batch is as long as its longest row.
TASKS = {
    "banking77": ("tasks/banking77", 32),
    "tatoeba": ("tasks/tatoeba_en_es", 32),
    "e2e": ("tasks/e2e_nlg", 80),
    "mawps": ("tasks/mawps", 72),
    "gsm8k": ("tasks/gsm8k", 256),
    "preferences": ("preferences/gsm8k_solutions", 256),
}
SHIFTED = ("e2e",)
DOMAINS = ("novels", "novels_eltec", "peps", "rust_rfcs", "factbook", "tinystories")
LONGEST = 500  # tokens of a document: the base was pretrained on windows of 512
EACH = 8  # documents at most that are cut from one


def rows(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def prepare(data: Path, out: Path, select: int, general: int, base: str) -> None:
    """Write the files of every task and the general text, unless they are there."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.model_max_length = 10**9  # rows and documents are cut here
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    longest = {name: most for name, (_, most) in TASKS.items()}
    told = {
        "select": select,
        "general": general,
        "longest": longest,
        "vocabulary": vocabulary,
        "shifted": list(SHIFTED),
    }
    if (file := out / "manifest.json").is_file():
        if (known := json.loads(file.read_text(encoding="utf-8"))) != told:
            raise typer.BadParameter(f"{out} was made with {known}, and now it is {told}: give another --out.")
        return
    counts: dict[str, dict[str, int]] = {}
    for name, (folder, most) in TASKS.items():
        learn, test = (short(rows(data / folder / f"{part}.jsonl.gz"), tokenizer, most) for part in ("train", "test"))
        parts = split(learn, test, select)
        if name in SHIFTED:
            at = len(parts["test"]) * 3 // 5
            parts |= {"select": parts["test"][at:][:select], "test": parts["test"][:at]}
        counts[name] = {part: len(found) for part, found in parts.items()}
        if len(parts["train"]) < select or len(parts["test"]) < select // 2:
            raise typer.BadParameter(
                f"{name} has too few rows of at most {most} tokens: {counts[name]}, and {select} to choose by."
            )
        (out / name).mkdir(parents=True, exist_ok=True)
        for part, found in parts.items():
            lines = (json.dumps(r, ensure_ascii=False) for r in found)
            write(out / name / f"{part}.jsonl", "".join(f"{line}\n" for line in lines))
    typer.echo(json.dumps(counts), err=True)
    texts = [text for name in DOMAINS for text in pieces(data / "lm" / f"{name}.valid.txt.xz", tokenizer, general)]
    write(out / "general.txt", "\n<|endoftext|>\n".join(texts))
    write(file, json.dumps(told, indent=1) + "\n")


def short(found: list[dict[str, Any]], tokenizer: Any, longest: int) -> list[dict[str, Any]]:
    """Rows as recipes read them, of at most `longest` tokens with each of their completions and the end."""
    found = [pair(row) if "chosen" in row else row for row in found]
    texts = [f"{row['prompt']}\n{row[key]}" for row in found for key in ("completion", "rejected") if key in row]
    lengths = iter([len(ids) + 1 for ids in tokenizer(texts)["input_ids"]])
    most = [max(next(lengths) for key in ("completion", "rejected") if key in row) for row in found]
    return [row for row, length in zip(found, most, strict=True) if length <= longest]


def split(learn: list[dict[str, Any]], test: list[dict[str, Any]], select: int) -> dict[str, list[dict[str, Any]]]:
    """Rows for training, for the choice of a rate and for the test, no two of which share a prompt.

    >>> learn = [{"prompt": p, "completion": c} for p in "abcd" for c in "xy"]
    >>> {part: len(found) for part, found in split(learn, [{"prompt": "a"}], 3).items()}
    {'select': 3, 'train': 2, 'test': 1}
    """
    known = {row["prompt"] for row in test}
    learn = [row for row in learn if row["prompt"] not in known]
    random.Random(0).shuffle(learn)
    random.Random(1).shuffle(test)  # `data.eval_limit` takes the first
    counts, chosen = Counter(row["prompt"] for row in learn), set[str]()
    for prompt in counts:  # in the order of the rows; with all rows of theirs, so that few prompts are lost to training
        if sum(counts[p] for p in chosen) >= select:
            break
        chosen.add(prompt)
    apart = [row for row in learn if row["prompt"] in chosen]
    return {"select": apart[:select], "train": [row for row in learn if row["prompt"] not in chosen], "test": test}


def pieces(file: Path, tokenizer: Any, tokens: int) -> Iterator[str]:
    """Texts of a domain of `tokens` tokens together, the last of them cut."""
    found = [text for text in documents(file) if latin(text)]
    random.Random(2).shuffle(found)
    for text in found:
        ends = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][: EACH * LONGEST]
        for at in range(0, len(ends), LONGEST):
            part = ends[at : min(at + LONGEST, at + tokens)]
            if not tokens or len(part) < 2:
                break
            tokens -= len(part)
            yield text[part[0][0] : part[-1][1]]


def latin(text: str) -> bool:
    """Whether nine of ten letters are.

    >>> latin("naïve"), latin("안녕, world")
    (True, False)
    """
    letters = [c for c in text if c.isalpha()]
    return 10 * sum(ord(c) < 0x250 for c in letters) >= 9 * len(letters) > 0


def pair(row: dict[str, Any]) -> dict[str, str]:
    """What was chosen is the completion, so that a recipe can read it."""
    return {"prompt": row["prompt"], "completion": row["chosen"], "rejected": row["rejected"]}


def write(file: Path, text: str) -> None:
    with whole(file) as temp:
        temp.write_text(text, encoding="utf-8")
