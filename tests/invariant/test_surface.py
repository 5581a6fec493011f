"""The public surface, frozen: names of the package, commands and flags of the program.

A change here is a change for users. The snapshot of the commands is `cli.txt` beside this file; write it anew
with `FINETOOTH_UPDATE_SNAPSHOTS=1 pytest tests/invariant/test_surface.py`, read the difference, and say it in
CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import inspect
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetooth

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("cli.txt")
UPDATE = "FINETOOTH_UPDATE_SNAPSHOTS"
NAMES = {
    "METHODS", "Method", "build", "SelectiveAdamW", "Rule", "Selection", "Unit", "Weight", "select",
    "Delta", "DeltaError", "WrongBase", "FrozenMoved", "NonFiniteError", "NotWritten", "Reference", "SelectiveCallback",
    "last_good", "saving", "seal", "merge", "conflicts", "compose", "link", "trim", "DeltaSwitch", "__version__",
}  # fmt: skip
BUILD = [
    "method", "model", "lr", "keep", "weight_decay", "max_grad_norm", "seed", "targets", "gradients", "rounding",
    "calibration", "base", "exclude", "overrides",
]  # fmt: skip


def test_names() -> None:
    assert len(finetooth.__all__) == len(set(finetooth.__all__))
    assert set(finetooth.__all__) == NAMES
    missing = [name for name in NAMES if not hasattr(finetooth, name)]
    assert not missing


def test_public_names_are_explained() -> None:
    bare = [n for n in NAMES - {"METHODS", "__version__"} if not inspect.getdoc(getattr(finetooth, n))]
    assert not bare


def test_build_signature() -> None:
    assert list(inspect.signature(finetooth.build).parameters) == BUILD


def test_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert finetooth.__version__ == project["version"]


def test_typed_and_embedded_files_are_there() -> None:
    package = Path(finetooth.__file__).parent
    assert (package / "py.typed").is_file()
    assert sum(p.stat().st_size for p in (package / "embedded").rglob("*") if p.is_file()) < 4 * 2**20


def commands(command: Any, path: tuple[str, ...]) -> Iterator[str]:
    """One line for every command, then one for every argument and option, in sorted order."""
    yield " ".join(path)
    lines = []
    for param in command.params:
        if "--help" in param.opts:
            continue
        names = [*param.opts, *param.secondary_opts]
        shown = ", ".join(sorted(names)) if param.param_type_name == "option" else f"<{param.name}>"
        required = " required" if param.required else ""
        many = " repeated" if getattr(param, "multiple", False) or param.nargs == -1 else ""
        lines.append(f"    {shown}{required}{many}")
    yield from sorted(lines)
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from commands(child, (*path, name))


def test_commands() -> None:
    typer = importlib.import_module("typer")
    root = typer.main.get_command(importlib.import_module("finetooth.cli.main").app)
    found = "\n".join(commands(root, ("finetooth",))) + "\n"
    if os.environ.get(UPDATE):
        SNAPSHOT.write_text(found, encoding="utf-8")
    assert SNAPSHOT.is_file(), f"there is no snapshot yet: run with {UPDATE}=1 and commit {SNAPSHOT.name}"
    assert found == SNAPSHOT.read_text(encoding="utf-8"), (
        f"the commands changed: run with {UPDATE}=1, and read the diff"
    )
