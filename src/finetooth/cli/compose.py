"""`finetooth delta merge|conflicts|diff|trim|compose|link`: what is done with several deltas, or with a part of one.

What is written is a delta file, never a model, and all of them are exact: `delta apply` and `delta revert` take them as any
other. These verbs belong to the same group as those of `cli/delta.py`, which adds them.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetooth.cli import show

if TYPE_CHECKING:
    from finetooth.delta import Delta

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The delta file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Write over an existing file.")]
Deltas = Annotated[
    list[str], typer.Argument(metavar="DELTA", help="Delta files, run folders, or org/name[@revision] on the hub.")
]
Base = Annotated[
    str, typer.Option("--base", help="The checkpoint that the deltas were made for: a folder or a hub id.")
]
PerhapsBase = Annotated[str | None, typer.Option("--base", help="The same; without it listed entries are counted.")]


class How(StrEnum):
    """How deltas are merged."""

    sum = "sum"
    average = "average"
    ties = "ties"
    dare = "dare"


class By(StrEnum):
    """What shares a budget."""

    file = "file"
    tensor = "tensor"


def merge(
    deltas: Deltas,
    base: Base,
    out: Out,
    how: Annotated[How, typer.Option(help="Add, average, elect signs, or drop at random and add.")] = How.sum,
    weights: Annotated[str | None, typer.Option(help="One for each delta, such as 1,0.5; 1 without.")] = None,
    density: Annotated[float | None, typer.Option(help="ties, dare: the share of each delta that stays.")] = None,
    seed: Annotated[int | None, typer.Option(help="dare: of what is dropped; 0 without.")] = None,
    scale: Annotated[float, typer.Option(help="A factor of the whole.")] = 1.0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write one delta of several that were made on the same base, and say where they were in conflict."""
    with show.clean_errors():
        _refuse(out, force)
        factors = None if weights is None else _numbers(weights)
        from finetooth.conflicting import conflicts as found_of
        from finetooth.merging import merge as merged_of

        merged = merged_of(deltas, base, how.value, weights=factors, density=density, seed=seed, scale=scale)
        found = found_of(deltas, base).facts()
        facts = _saved(merged, out)
        if as_json:
            show.facts({**facts, "conflicts": found}, True, out.name)
            return
        show.conflicts(found, False, tensors=False)
        show.facts(facts, False, out.name)


def conflicts(
    deltas: Deltas,
    base: PerhapsBase = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="A line for every tensor, not for every layer.")] = False,
    as_json: Json = False,
) -> None:
    """Count the entries that several deltas change, and those that they move in opposite directions."""
    with show.clean_errors():
        from finetooth.conflicting import conflicts as found_of

        show.conflicts(found_of(deltas, base).facts(), as_json, tensors)


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A delta file, a run folder, or a hub id.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another delta of the same base.")],
    base: PerhapsBase = None,
    as_json: Json = False,
) -> None:
    """Say what two deltas of the same base have in common, and where they differ."""
    with show.clean_errors():
        from finetooth.contrast import contrast, together

        found = contrast(first, second, base)
        whole = {"counted": "listed" if base is None else "changed", **together(found).facts()}
        show.contrast({**whole, "tensors": [x.facts() for x in found]}, as_json)


def trim(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="A delta file, a run folder, or a hub id.")],
    keep: Annotated[str, typer.Option(help="The share of its changes that stays (0.5), or how many (5000).")],
    base: Base,
    out: Out,
    by: Annotated[By, typer.Option(help="The largest of all tensors together, or of each.")] = By.file,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write DELTA with its largest changes only; the other weights go back to the base."""
    with show.clean_errors():
        _refuse(out, force)
        (share,) = _numbers(keep)
        from finetooth.contrast import trim as trimmed

        amount: float | int = int(share) if keep.strip().isdigit() else share
        show.facts(_saved(trimmed(delta, base, amount, by.value), out), as_json, out.name)


def compose(deltas: Deltas, base: Base, out: Out, force: Force = False, as_json: Json = False) -> None:
    """Write a chain of deltas, each made on top of those before it, as one delta on BASE."""
    with show.clean_errors():
        _refuse(out, force)
        from finetooth.chain import compose as composed

        show.facts(_saved(composed(deltas, base), out), as_json, out.name)


def link(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="The delta that was made on top of others.")],
    after: Annotated[list[str], typer.Option("--after", help="What it was made on top of, in order; repeat it.")],
    base: Annotated[str, typer.Option("--base", help="The checkpoint DELTA was made from: with those deltas applied.")],
    out: Out,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write DELTA with a note of the deltas it was made on top of, so that it is applied after them only."""
    with show.clean_errors():
        _refuse(out, force)
        from finetooth.chain import link as linked

        found = linked(delta, after, base)
        show.facts({**_saved(found, out), "after": len(found.base.after)}, as_json, out.name)


def _refuse(out: Path, force: bool) -> None:
    if out.is_dir() or (out.exists() and not force):
        raise FileExistsError(f"{out} exists: give another name, or --force to write over a file.")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is not a number, or numbers with commas between them.") from None


def _saved(delta: Delta, out: Path) -> dict[str, Any]:
    if not delta.changes:
        raise ValueError("nothing is left: the result is the base, bit for bit, and there is no delta to write.")
    delta.save(out)
    info = delta.info()
    return {
        "file": str(out),
        **{k: info[k] for k in ("tensors", "changed", "share", "bytes", "units", "base", "method")},
    }
