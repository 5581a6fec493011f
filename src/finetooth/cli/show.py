"""What a person sees: errors as one line, progress as a bar, results as a table.

stdout carries the result and nothing else, so that `--json` can be piped; progress and remarks go to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

FAILED, BAD_INPUT = 1, 2
_TITLES = {
    "task_loss": "task loss",
    "choice_accuracy_per_character": "choice accuracy, per character",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "general_loss": "loss on the general text",
}


@contextmanager
def clean_errors() -> Iterator[None]:
    """Bad input is exit code 2, a failed run 1; both as one readable message and no traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        _stop(str(error), BAD_INPUT)
    except (RuntimeError, OSError) as error:
        _stop(str(error), FAILED)


def _stop(message: str, code: int) -> None:
    typer.echo(f"error: {printable(message)}", err=True)
    raise typer.Exit(code)


def printable(text: str) -> str:
    """What a file says of itself, without what a terminal would obey: those characters as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def quiet() -> None:
    """Keep libraries' chatter off the terminal; call it before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    if os.environ.get("WANDB_MODE") == "offline":
        with redirect_stdout(sys.stderr):
            importlib.import_module("transformers.integrations.integration_utils")  # says so while it is imported


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int, float | None], None]]:
    """A progress bar on stderr: the function takes step, steps in all and the last loss. What libraries print goes there too."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with redirect_stdout(sys.stderr), Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(title, total=None, loss="loading and measuring the base")

        def report(step: int, steps: int, loss: float | None) -> None:
            progress.update(task, completed=step, total=steps, loss="" if loss is None else f"loss {loss:.3f}")

        yield report


def results(found: dict[str, Any], as_json: bool) -> None:
    """The end of a run, as a table or as JSON on stdout."""
    if as_json:
        dump(found)
        return
    console = Console(file=sys.stdout)
    took = "resumed" if found["seconds"] is None else f"{found['seconds']:.0f} s"
    _numbers(console, found, f"{found['base']} fine-tuned with {found['method']}, {took}")
    facts = Table(show_header=False, box=None)
    facts.add_row("weights changed", f"{found['changed']:,} of {found['weights']:,} ({found['share']:.1%})")
    facts.add_row("delta on disk", f"{found['delta_bytes']:,} bytes")
    facts.add_row("taken off again", "the base, bit for bit" if found["reverted"] else "NOT the base")
    if found["sample"]:
        said = {"asked": "prompt", "expected": "expected", "said before": "before", "says now": "after"}
        for title, key in said.items():  # as Text: square brackets in what a model says are not markup
            facts.add_row(title, Text(found["sample"][key] or "(nothing)"))
    facts.add_row("run folder", Text(folder(found["run"])))
    console.print(facts)
    if found["skipped_steps"]:
        note(f"{found['skipped_steps']} steps had a non-finite gradient and wrote nothing.")


def report(found: dict[str, Any], as_json: bool) -> None:
    """Where a report is, and what it could not show."""
    if as_json:
        dump(found)
        return
    typer.echo(f"{folder(found['report'])}: {printable(found['title'])}, {found['bytes']:,} bytes")
    for text in found["missing"]:
        note(printable(text))


def appraisal(found: dict[str, Any], as_json: bool) -> None:
    """What `finetooth eval` measured, as a table or as JSON on stdout."""
    if as_json:
        dump(found)
        return
    console = Console(file=sys.stdout)
    _numbers(console, found, found["base"] + (f" and {found['run']}" if found["run"] else ""))
    if found["run"]:
        console.print(Text(f"written to {folder(found['run'])}/eval.json"))


def _numbers(console: Console, found: dict[str, Any], title: str) -> None:
    """Print what was measured, if anything was, of the base and, where there is one, of the tuned model."""
    before, after = found["before"], found["after"]
    table = Table("")
    for name in ("base",) if after is None else ("before", "after"):
        table.add_column(name, justify="right")
    for name in before if after is None else after:
        values = (before.get(name),) if after is None else (before.get(name), after[name])
        table.add_row(Text(_title(name)), *map(figure, values))
    if found["forgetting"] is not None:
        table.add_row("forgetting (after − before)", "", f"{found['forgetting']:+.3f}")
    console.print(Text(title, "italic"))
    if table.rows:
        console.print(table)


def _title(name: str) -> str:
    return name if "/" in name else _TITLES.get(name, name.replace("_", " "))  # the harness's names are its own


def dump(found: Any) -> None:
    """JSON on stdout."""
    from finetooth.run import to_json

    typer.echo(to_json(found, indent=2))


def folder(path: str) -> str:
    """A folder as a person would type it from here."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def figure(value: float | None) -> str:
    """Three decimals, or a dash for what was not measured."""
    return "–" if value is None else f"{value:.3f}"


def note(remark: str) -> None:
    """A remark on stderr."""
    typer.echo(f"note: {remark}", err=True)


def preview(found: dict[str, Any], as_json: bool) -> None:
    """Rows of data with what is learnt set off."""
    if as_json:
        dump(found)
        return
    console = Console(file=sys.stdout)
    for row in found["rows"]:
        table = Table(show_header=False, title=f"{row['tokens']} tokens", title_justify="left")
        table.add_row("context", Text(repr(row["context"])))
        table.add_row("learnt", Text(repr(row["learnt"])), style="bold")
        console.print(table)
        if not row["ends_with_eos"]:
            console.print("this row does not end with the end-of-sequence token: its end is not learnt")
    of, test = found["of"], found["eval"]
    console.print(
        f"{of['rows']} rows; {of['truncated']} cut, {of['without_target']} left with nothing to learn; "
        f"{found['tokens_learnt']} tokens bear loss; the longest row has {found['longest']} tokens."
    )
    if test is not None:
        console.print(
            f"{test['rows']} evaluation rows; {test['truncated']} cut, {test['without_target']} left with nothing to expect; "
            f"{test['in_training']} also asked in training."
        )
    for remark in found["remarks"]:
        console.print(Text(f"note: {remark}"))


def conflicts(found: dict[str, Any], as_json: bool, tensors: bool) -> None:
    """What several deltas change in common, by layer or by tensor; what is free of it is one line."""
    if as_json:
        dump(found)
        return
    table = Table(title="conflicts", title_justify="left")
    table.add_column("tensor" if tensors else "layer", overflow="fold")
    for name in (found["counted"], "by several", "share", "opposed"):
        table.add_column(name, justify="right")
    rows, free = found["tensors" if tensors else "layers"], 0
    for row in (*rows, {**found, "name": "all"}):
        if row["overlap"] or row["name"] == "all":
            opposed = "–" if row["opposed"] is None else f"{row['opposed']:,}"
            table.add_row(
                Text(row["name"]), f"{row['changed']:,}", f"{row['overlap']:,}", f"{row['share']:.2%}", opposed
            )
        else:
            free += 1
    console = Console(file=sys.stdout)
    console.print(table)
    if free:
        console.print(f"{free} more without any")


def contrast(found: dict[str, Any], as_json: bool) -> None:
    """Two deltas side by side, tensor by tensor."""
    if as_json:
        dump(found)
        return
    title = f"entries {found['counted']} by A only, by B only, or by both: to equal or to different bits"
    table = Table(title=title, title_justify="left")
    table.add_column("tensor", overflow="fold")
    for name in ("A only", "B only", "equal", "different", "cosine"):
        table.add_column(name, justify="right")
    for row in (*found["tensors"], {**found, "name": "all"}):
        counts = [f"{row[key]:,}" for key in ("first", "second", "same", "different")]
        table.add_row(Text(row["name"]), *counts, figure(row["cosine"]))
    Console(file=sys.stdout).print(table)


def survival(found: dict[str, Any], as_json: bool) -> None:
    """What quantization leaves of a delta: a row for every kind of module, and the losses of four models."""
    if as_json:
        dump(found)
        return
    console = Console(file=sys.stdout)
    table = Table(title=f"in {found['to']}", title_justify="left")
    for name in ("", "changed", "survived", "share", "moved"):
        table.add_column(name, justify="right" if name else "left")
    for name, g in (*found["groups"].items(), ("all", found)):
        share = f"{g['survived'] / g['changed']:.1%}" if g["changed"] else "–"
        wide = "" if g.get("quantized", True) else " (not quantized)"
        table.add_row(Text(name + wide), f"{g['changed']:,}", f"{g['survived']:,}", share, f"{g['moved']:,}")
    console.print(table)
    for key in ("text", "recipe"):
        if key in found:
            four = found[key]
            losses = Table("", *four, title=f"measured on the {key}", title_justify="left")
            for name in four["base"]:
                losses.add_row(Text(_title(name)), *(figure(numbers[name]) for numbers in four.values()))
            console.print(losses)


def facts(found: dict[str, Any], as_json: bool, title: str) -> None:
    """Names and values, as a table or as JSON on stdout."""
    if as_json:
        dump(found)
        return
    table = Table(title=Text(printable(title)), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in found.items():
        if value is not None:
            table.add_row(key.replace("_", " "), Text(printable(_said(key, value))))
    Console(file=sys.stdout).print(table)


def _said(key: str, value: Any) -> str:
    if key == "share":
        return f"{value:.4%}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        apart = "\n" if any(isinstance(v, dict) for v in value.values()) else ", "
        return apart.join(f"{k}: {_section(v)}" for k, v in value.items()) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _section(value: Any) -> str:
    return json.dumps({k: v for k, v in value.items() if v is not None}) if isinstance(value, dict) else str(value)
