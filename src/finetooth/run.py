"""The run folder: what is written, and that nothing in it is overwritten by accident.

recipe.yaml  environment.json  metrics.jsonl  checkpoints/  delta.safetensors  results.json  README.md

Every file is there whole or not at all, so that a run can be resumed whenever it is killed; only lines are appended to the metrics.

`recipe.yaml` and the checkpoints hold whole paths, which resuming needs. The delta, the results and the README, which are
for others to read, do not.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetooth import saved
from finetooth.files import NotWritten, whole
from finetooth.guard import NonFiniteError
from finetooth.recipe import Recipe, RecipeError

CHECKPOINTS = "checkpoints"
LIBRARIES = (
    *("finetooth", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("lm_eval", "sacrebleu", "rouge-score"),  # what measures
)


def check(recipe: Recipe, resume: bool) -> None:
    """Raise RecipeError if the output folder is in use, or holds no run that could be resumed."""
    folder = Path(recipe.output)
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        raise RecipeError(f"output={folder}: {there} is a file: give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"output={folder}: {there} may not be written to: give another folder.")
    used = folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir())
    if used and not resume:
        raise RecipeError(f"output={folder} is not empty: give another folder, or --resume to continue the run in it.")
    if resume:
        _same(recipe, folder)


def start(recipe: Recipe) -> Path:
    """Make the folder and say in it what is about to be run."""
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / CHECKPOINTS / saved.UNFINISHED, ignore_errors=True)  # of a run that was killed
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_json(folder / "environment.json", environment())
    return folder


def resumed(folder: Path, say: Callable[[str], None] | None) -> Path | None:
    """The checkpoint to go on from, verified by hash; None to start at the beginning."""
    found = saved.last_good(folder / CHECKPOINTS, say)
    if say is not None:
        say(
            "there is no checkpoint yet: starting at the beginning."
            if found is None
            else f"going on from {found.name}."
        )
        if found is not None and (other := _other_environment(folder)):
            say(f"equal bits are not promised, because this is another environment: {', '.join(other)}.")
    return found


def _other_environment(folder: Path) -> list[str]:
    """What has changed since the run was started."""
    try:
        before = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [f"{k} {before.get(k)} (now {v})" for k, v in environment().items() if before.get(k) != v]


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """A full disk, or gradients that are not finite, end a run with what is left of it, and how to go on."""
    try:
        yield
    except NotWritten as error:
        raise NotWritten(f"{error} {_left(folder)} Make room and run the same command with --resume.") from error
    except NonFiniteError as error:
        more = "Go on from it with --resume once the data is mended; for another learning rate start a new run."
        raise NonFiniteError(f"{error} {_left(folder)} {more}") from error


def _left(folder: Path) -> str:
    last = saved.newest(folder / CHECKPOINTS)
    return "There is no checkpoint yet." if last is None else f"The last complete checkpoint is {last}."


def _same(recipe: Recipe, folder: Path) -> None:
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        raise RecipeError(f"there is no run to resume in {folder}: recipe.yaml is missing.")
    if saved.read_text(encoding="utf-8") != recipe.to_yaml():
        raise RecipeError(f"the recipe is not the one that {folder} was started with: compare it with {saved}.")


def environment() -> dict[str, Any]:
    """Versions of all that has a part in the numbers."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    libraries = {name: _version(name) for name in LIBRARIES}
    return {
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        **libraries,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with whole(path) as temp:
        temp.write_text(text, encoding="utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; NaN and infinities, which JSON does not have, are null.

    >>> to_json({"loss": float("nan"), "step": 3})
    '{"loss": null, "step": 3}'
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
