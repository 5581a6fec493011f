"""What is done with a block of code on a page, by its language. Sybil finds the blocks and says where one failed.

`python`  runs, all blocks of a page in one namespace, which has what a reader would have (`reader`). What a page needs besides
          stands in a comment of its own: `<!--- invisible-code-block: python`.
`yaml`    is a recipe, or a part of one, that can be run. If its first line is a comment with a file's name, it is saved there.
`sh`      `finetooth …` runs, in this process. What sets up an environment is only checked, `.ci/run` carries it out; so are
          scripts, which take minutes: they exist and know their options.
`json`    is JSON; lines of it are rows of data.
`text`    is what a program said, and is not checked.

A comment `<!-- runs: no, WHY -->` right above a block keeps it from running. It is then checked as far as that goes: Python compiles,
a command has these options and its files are there.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch
import typer
import yaml
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from finetooth import data, embedded
from finetooth.cli.main import app
from finetooth.jobs import check_method
from finetooth.recipe import parse

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
LEAST = {"model": "embedded:stories260K", "data": {"train": "embedded:banking77/train"}, "output": "run"}
NOT_RUN = re.compile(r"<!-- runs: no, [^<>]+ -->\s*\Z")
SET_UP = ("pip", "uv", "ruff", "mypy", "pytest", "mkdocs")  # .ci/run calls them
LAUNCHERS = ("python", "python3", "torchrun", "accelerate")

Found = str | None  # what is wrong, if anything is


def reader() -> dict[str, Any]:
    """What the pages take for granted: a model, a copy of it, its tokenizer, batches."""
    base = str(embedded.path("stories260K"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer("Once upon a time there was a comb with very fine teeth.")["input_ids"]] * 2)
    model, copy = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    batches = [{"input_ids": ids, "labels": ids}] * 2
    return {"model": model, "base_model": copy, "tokenizer": tokenizer, "batches": batches}


def document(page: Path) -> Document:
    """The page with all of its blocks."""
    return Document.parse(str(page), *(CodeBlockParser(language, check) for language, check in CHECKS.items()))


def languages(page: Path) -> set[str]:
    """The languages of all blocks, also of those that no check is for."""
    found = FencedCodeBlockLexer(language=".*")(Document(page.read_text(encoding="utf-8"), str(page)))
    return {region.lexemes["language"] for region in found}


def runs(example: Example) -> bool:
    """Whether nothing above the block says that it does not."""
    return NOT_RUN.search(example.document.text[: example.start]) is None


def python(example: Example) -> Found:
    """Run it."""
    if runs(example):
        PythonEvaluator()(example)
    else:
        compile(dedent(example.parsed), example.path, "exec", dont_inherit=True)
    return None


def recipe(example: Example) -> Found:
    """Read it as `finetooth train` does."""
    raw = yaml.safe_load(example.parsed)
    if file := re.match(r"# (\S+\.yaml)\n", example.parsed):
        Path(file[1]).write_text(example.parsed, encoding="utf-8")
    if runs(example):
        check_method(parse({**LEAST, **raw}).method)
    return None


def rows(example: Example) -> Found:
    """Read it as JSON, or, a row on each line, as data."""
    if "}\n{" not in example.parsed:
        json.loads(example.parsed)
        return None
    Path("rows.jsonl").write_text(example.parsed, encoding="utf-8")
    return None if list(data.rows("rows.jsonl")) else "no rows"


def shell(example: Example) -> Found:
    """Run the commands, or check them."""
    run = runs(example)
    for line in example.parsed.replace("\\\n", " ").splitlines():
        for words in commands(line):
            run = run and Path(words[0]).name not in SET_UP  # what follows a set-up is in that environment
            if wrong := checked(words, run):
                return f"{shlex.join(words)}: {wrong}"
    return None


def commands(line: str) -> Iterator[list[str]]:
    """The commands of a line, without the variables that are set for them."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word != "&&":
            if words or not re.match(r"\w+=", word):
                words.append(word)
        elif words:
            yield words
            words = []


def checked(words: list[str], run: bool) -> Found:
    """One command."""
    program, *rest = Path(words[0]).name, *words[1:]
    if program == "finetooth":
        return finetooth(rest, run)
    if program in SET_UP or words[1:3] == ["-m", "venv"]:
        named = {name for word in rest for found in re.findall(r"\[([\w,]+)\]", word) for name in found.split(",")}
        return f"there is no extra {sorted(named - set(EXTRAS))}" if named - set(EXTRAS) else None
    if program in LAUNCHERS:
        return script(rest)
    if program == "export" or (ROOT / words[0]).is_file():
        return None
    return "tests/docs/blocks.py does not know how to check this command"


def finetooth(words: list[str], run: bool) -> Found:
    """The command exists and has these options, and its recipe is there; if it is to run, it ends with 0."""
    command, left = typer.main.get_command(app), list(words)
    while named := getattr(command, "commands", None):
        if not left or left[0] not in named:
            return f"there is no such command: {', '.join(named)}"
        command = named[left.pop(0)]
    known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    options = [word.strip("[]").partition("=")[0] for word in left if word.strip("[]").startswith("-")]
    if unknown := [option for option in options if option not in known]:
        return f"there is no option {unknown[0]}: {', '.join(sorted(known))}"
    files = [Path(word) for word in left if word.endswith(".yaml") and not Path(word).stem.isupper()]
    if lost := [file for file in files if not file.is_file()]:
        return f"there is no {lost[0]}"
    if not run:
        return None
    result = CliRunner().invoke(app, words)
    return None if result.exit_code == 0 else f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"


def script(words: list[str]) -> Found:
    """The script, or module, is in the repository, and knows the options that follow it."""
    if "-m" in words[:-1]:
        at = words.index("-m") + 1
        words = [*words[:at], words[at].replace(".", "/") + ".py", *words[at + 1 :]]
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None or not (ROOT / words[at]).is_file():
        return "there is no such script in the repository"
    text = (ROOT / words[at]).read_text(encoding="utf-8")
    unknown = [word for word in words[at:] if word.startswith("--") and f'"{word.partition("=")[0]}"' not in text]
    return f"{words[at]} does not name {unknown[0]}" if unknown else None


def output(example: Example) -> Found:
    """What a program said."""
    return None


CHECKS: dict[str, Callable[[Example], Found]] = {
    "python": python,
    "yaml": recipe,
    "sh": shell,
    "bash": shell,
    "json": rows,
    "text": output,
}
