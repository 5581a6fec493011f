"""`finetooth delta`: extract, apply, revert, verify and look at delta files, on checkpoint folders.

Nothing is written in place: every command that makes a model makes a new folder, and what it made is what the
fingerprints in the delta promise. torch is imported inside the functions, so that `--help` is instant.

Exit codes: 0 done, 1 the weights are not what the delta says (verify), 2 bad input.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetooth.cli import compose, show

if TYPE_CHECKING:
    from finetooth.delta import Delta

app = typer.Typer(
    name="delta",
    help="Take, apply, check, merge and take off what a fine-tune changed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_clean_errors = show.clean_errors
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The new folder to write; it must not exist.")]
DeltaFile = Annotated[
    str, typer.Argument(metavar="DELTA", help="A delta file, a run folder, or org/name[@revision] on the hub.")
]


Quick = Annotated[
    bool, typer.Option("--quick", help="Look at the values that are replaced only, not at the tensors around them.")
]
Steps = Annotated[
    bool, typer.Option("--code-values", help="Code new values against BASE's: smaller, and only BASE can read them.")
]


class Form(StrEnum):
    """What a delta can be exported as."""

    checkpoint = "checkpoint"
    shira = "shira"
    patches = "patches"


@app.command()
def info(delta: DeltaFile, as_json: Json = False) -> None:
    """Say what a delta file holds and what base it belongs to."""
    with _clean_errors():
        show.facts(_load(delta).info(), as_json, delta)


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="The pretrained checkpoint: a folder, a safetensors file or a hub id.")],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned checkpoint, with the same tensors, or a SHiRA adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta file to write.")],
    method: Annotated[str | None, typer.Option(help="The method to note in the file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
    code_values: Steps = False,
    as_json: Json = False,
) -> None:
    """Write what leads from BASE to TUNED, comparing the two tensor by tensor.

    TUNED may also be the folder of a PEFT SHiRA adapter; then the delta is what merging it into BASE gives.
    """
    with _clean_errors():
        if out.is_dir() or (out.exists() and not force):
            raise FileExistsError(f"{out} exists: give another name, or --force to write over a file.")
        delta = _extracted(base, tuned, method, out, code_values)
        if not delta.changes:
            raise ValueError(f"{tuned} and {base} are equal bit for bit: there is nothing to extract.")
        show.facts({"file": str(out), **delta.info()}, as_json, out.name)


@app.command()
def apply(
    base: Annotated[str, typer.Argument(help="The checkpoint that DELTA was made for: a folder or a hub id.")],
    delta: compose.Deltas,
    out: Out,
    inverse: Annotated[Path | None, typer.Option(help="Write the inverse delta here; applying it gives BASE.")] = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint folder that is BASE with DELTA applied.

    Several deltas are a chain: each must have been made on top of those before it, which is checked first. Deltas that were
    made on the same base are merged (`finetooth delta merge`).
    """
    with _clean_errors():
        from finetooth.chain import compose as composed
        from finetooth.checkpoint import refuse_existing
        from finetooth.delta import apply_folder

        refuse_existing(out)
        change = _load(delta[0]) if len(delta) == 1 else composed(delta, base)
        if inverse is not None and inverse.exists() and not _takes_off(inverse, change):
            raise FileExistsError(f"{inverse} exists: give another name for the inverse delta.")
        apply_folder(base, out, change, inverse=inverse, quick=quick)
        show.facts({"folder": str(out), "state": "applied", **_counts(change)}, as_json, "applied")


@app.command()
def revert(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned checkpoint folder.")],
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="The delta (with --base), or its inverse.")],
    out: Out,
    base: Annotated[str | None, typer.Option(help="Where the pretrained values are read from.")] = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint folder that is TUNED with DELTA taken off: the base, bit for bit.

    A delta file holds the new values, not the old ones. So either give the inverse that `apply --inverse` wrote,
    or say with --base where the old values of the changed weights can be read; everything else is taken from
    TUNED. The fingerprints of all changed tensors are checked against those of the base.
    """
    with _clean_errors():
        from finetooth.delta import apply_folder

        change = _load(delta)
        if base is not None:
            change = change if change.base.tuned else change.inverse(base, check=False)
        elif not change.base.tuned:
            raise ValueError(
                f"{delta} holds new values only, so it cannot be taken off by itself: give --base (it was made for "
                f"{change.base}), or the inverse delta that `finetooth delta apply --inverse` writes."
            )
        apply_folder(tuned, out, change, quick=quick)
        show.facts({"folder": str(out), "state": "base", **_counts(change)}, as_json, "reverted")


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="A checkpoint: a folder, a safetensors file or a hub id.")],
    delta: DeltaFile,
    expect: Annotated[str | None, typer.Option(help="Which of the two it must be: base or applied.")] = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Say whether the changed tensors of FOLDER are the base's or the tuned ones, bit for bit.

    Exit code 1 if they are neither, or not what --expect says.
    """
    with _clean_errors():
        if expect not in (None, "base", "applied"):
            raise ValueError(f"--expect {expect} is unknown: choose base or applied.")
        from finetooth.base import open_base
        from finetooth.delta import WrongBase

        change, held, reason = _load(delta), open_base(folder), None
        try:
            state: str = change.verify(held, quick=quick)
        except WrongBase as e:
            state, reason = "neither", str(e)
        failed = state == "neither" or (expect is not None and state != expect)
        show.facts({"state": state, "ok": not failed, "reason": reason, **_counts(change)}, as_json, "verify")
    if failed:
        raise typer.Exit(1)


@app.command()
def pack(
    delta: DeltaFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new file to write; it must not exist.")],
    base: Annotated[
        str | None, typer.Option(help="The base: code new values against it. Only it can read them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write DELTA again, as small as it can be: ids as gaps or bits, and with --base new values as steps from the base's."""
    with _clean_errors():
        _written_again(delta, out, base, plain=False, as_json=as_json)


@app.command()
def unpack(
    delta: DeltaFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new file to write; it must not exist.")],
    base: Annotated[str | None, typer.Option(help="The base, where values are coded against it.")] = None,
    as_json: Json = False,
) -> None:
    """Write DELTA again with plain ids and plain new values: a file of format version 1, which any reader reads."""
    with _clean_errors():
        _written_again(delta, out, base, plain=True, as_json=as_json)


def _written_again(delta: str, out: Path, base: str | None, plain: bool, as_json: bool) -> None:
    if out.exists():
        raise FileExistsError(f"{out} exists: give another name.")
    _load(delta).save(out, against=base, plain=plain)
    show.facts({"file": str(out), **_load(str(out)).info()}, as_json, out.name)


@app.command()
def export(
    delta: DeltaFile,
    to: Annotated[Path, typer.Option("--to", "--out", "-o", help="The new folder to write; it must not exist.")],
    base: Annotated[
        str | None,
        typer.Option(help="The checkpoint that DELTA was made for, a folder or a hub id. Patches do without."),
    ] = None,
    form: Annotated[
        Form, typer.Option("--as", help="A whole checkpoint, a PEFT adapter, or patches for a server.")
    ] = Form.checkpoint,
    as_json: Json = False,
) -> None:
    """Write BASE with DELTA as a checkpoint that from_pretrained loads, or DELTA as a PEFT SHiRA adapter, or as patches.

    A SHiRA adapter holds differences for linear layers: other tensors cannot be in it, and in float32 some weights may
    come out a rounding away. The command says how many. Patches are flat int32 indices and new values for each tensor, as
    vLLM's sparse weight updates take them; with --base it is checked first that DELTA belongs to it.
    """
    with _clean_errors():
        if base is None and form is not Form.patches:
            raise ValueError(f"--as {form} writes what BASE and DELTA make together: give --base.")
        change = _load(delta)
        found = _exported(change, form, base, to)
        show.facts({"folder": str(to), "form": str(form), **_counts(change), **found}, as_json, "exported")


def _exported(change: Delta, form: Form, base: str | None, to: Path) -> dict[str, Any]:
    """Write it; what there is to say of it."""
    from finetooth import checkpoint, serve, shira
    from finetooth.delta import apply_folder

    if form is Form.patches:
        return serve.write(change, to, None if base is None else checkpoint.resolve(base))
    assert base is not None
    if form is Form.shira:
        show.quiet()
        return shira.write(change, base, to)
    apply_folder(base, to, change)
    return {"inexact": 0}


for verb in (compose.merge, compose.conflicts, compose.diff, compose.trim, compose.compose, compose.link):
    app.command()(verb)


def _extracted(base: str, tuned: str, method: str | None, out: Path, steps: bool) -> Delta:
    from dataclasses import replace

    from finetooth import shira
    from finetooth.checkpoint import resolve
    from finetooth.delta import Delta

    folder = resolve(tuned)
    if shira.is_adapter(folder):
        found = shira.read(folder, base)
        found = replace(found, method=method) if method else found
        if found.changes:
            found.save(out, against=base if steps else None)
        return found
    return Delta.extract_to(out, folder, base, method=method, steps=steps)


def _load(source: str) -> Delta:
    from finetooth.delta import Delta

    return Delta.load(source)


def _counts(delta: Delta) -> dict[str, Any]:
    changed = sum(c.changed for c in delta.changes.values())
    return {"tensors": len(delta.changes), "changed": changed, "base": delta.base.id, "revision": delta.base.revision}


def _takes_off(file: Path, delta: Delta) -> bool:
    """Whether a file is the inverse of a delta, as a command that was killed leaves it."""
    from finetooth.delta import DeltaError

    try:
        found = _load(str(file))
    except (DeltaError, OSError):
        return False
    prints = {n: (c.fingerprint, c.result) for n, c in found.changes.items()}
    return found.base.tuned and prints == {n: (c.result, c.fingerprint) for n, c in delta.changes.items()}
