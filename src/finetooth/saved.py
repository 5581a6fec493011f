"""Checkpoints that are complete or absent: written elsewhere, hashed, put on the disk, then renamed; verified when they are read.

    write into .unfinished/ -> sha256 and fsync of every file -> finetooth.json, last -> rename -> fsync of the folder

`finetooth.json` lists every file with its size and sha256, and is itself written last: a folder without it is not
complete, whoever wrote it. `saving` does all of this for whatever is written inside its block. A trainer that writes at the final
name by itself (an unmodified `transformers.Trainer`) gets the same promise from `seal`, which `SelectiveCallback` calls when the
trainer has finished: until then the folder has no list, or one that its files do not match. That the folder can be *seen* half
written is the difference; `last_good` does not take it.

Reading is a separate act: `last_good` verifies the newest checkpoint, falls back to the next one, and says so. Loading is
left to whoever saved. The alternative, one file with a checksum, would need a format of our own around those of torch,
transformers and accelerate.

Hashing costs about a second for 1 to 2 GB, at each save and at each resume. Files that the list does not name are ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetooth import shards
from finetooth.files import refusal, sync, whole

MANIFEST, FORMAT, VERSION = "finetooth.json", "finetooth-checkpoint", 1
UNFINISHED = ".unfinished"
_STEP = re.compile(r"(.*[-_])(\d+)")
_WRITTEN_LAST = ("trainer_state.json", "random_states_0.pkl")  # by transformers and by accelerate


@contextmanager
def saving(folder: str | Path, keep: int | None = None) -> Iterator[Path]:
    """A folder to write a checkpoint into, which becomes `folder` when the block ends: complete, or not there.

    folder: its name ends in the step, as in `out/step-40`: `last_good("out")` takes the largest.
    keep: how many checkpoints of this name to leave, the new one included; the older ones go once it is complete. None: all.

    Under `torchrun` every rank enters the block, and writes what it has to.

    Raises ValueError for a name without a step, NotWritten if the block or the disk fails: nothing of `folder` is left then,
    and the checkpoints before it are as they were.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp())
    >>> for step in (10, 20, 30):
    ...     with saving(out / f"step-{step}", keep=2) as folder:
    ...         _ = (folder / "state.txt").write_text(str(step))
    >>> sorted(p.name for p in out.iterdir()), last_good(out).name
    (['step-20', 'step-30'], 'step-30')
    """
    target = Path(folder)
    if _number(target) is None:
        raise ValueError(
            f"{target.name!r} does not end in a step: name it like 'step-40', so that the newest is known."
        )
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep} would leave no checkpoint: give 1 or more, or None for all.")
    aside, first = target.parent / UNFINISHED, shards.rank() == 0
    try:
        if first:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
            (aside / target.name).mkdir(parents=True)
        shards.wait()
        yield aside / target.name
        shards.wait()
        if first:
            seal(aside / target.name)
            _publish(aside / target.name, target)
            _prune(target, keep)
    except Exception as error:
        if not _is_about_writing(error):
            raise
        raise refusal(target, error) from error
    finally:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
    shards.wait()


def seal(folder: str | Path) -> Path:
    """Declare a checkpoint folder complete: hash every file, put all on the disk, write the list last. Returns the list's path.

    For a folder that something else has written, once it has; `saving` and `SelectiveCallback` do it themselves.
    """
    folder = Path(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listed = {p.relative_to(folder).as_posix(): _facts(p) for p in files}
    for path in (*files, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(path)
    with whole(folder / MANIFEST) as temp:
        facts = {"format": FORMAT, "version": VERSION, "files": listed}
        temp.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return folder / MANIFEST


def promise(folder: Path) -> None:
    """Note in a folder of checkpoints that all of them are sealed when they are complete: one that is not, was being written.

    Without the note a finished checkpoint that nobody sealed looks like one that was killed in the last moment. Nothing is
    noted where there is such a checkpoint already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if all((path / MANIFEST).is_file() for path in _checkpoints(folder)):
        with whole(folder / MANIFEST) as temp:
            temp.write_text(json.dumps({"format": FORMAT, "version": VERSION, "sealed": True}) + "\n", encoding="utf-8")


def fault(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint, every file hashed; None if it is as it was when it was sealed."""
    folder = Path(folder)
    try:
        listed = _listed(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: writing it was not finished, or it was not sealed"
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{name} has {size:,} bytes and had {expected['bytes']:,}"
        try:
            if _facts(path) != expected:
                return f"{name} has another sha256 than when it was saved"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    if (folder / "trainer_state.json").is_file() and not any(folder.glob("optimizer*")):
        return "it holds no optimizer (save_only_model), so training cannot go on from it"
    return None


def last_good(folder: str | Path, say: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint in `folder` that is as it was saved; None if there is none yet, so training starts at the beginning.

    trainer.train(resume_from_checkpoint=finetooth.last_good("out"))

    say: is told of every checkpoint that is passed over, and why; a warning without it.

    Raises ValueError, with what is wrong with each, if there are checkpoints and none is good: starting over is then
    for a person to decide.
    """
    wrong = []
    for path in _checkpoints(Path(folder)):
        if (problem := fault(path)) is None:
            return path
        wrong.append((path, problem))
        _tell(f"{path} is not used: {problem}.", say)
    lost = [f"{path.name}: {problem}" for path, problem in wrong if not _half_written(path)]
    if lost:
        raise ValueError(
            f"no checkpoint in {folder} is good ({'; '.join(lost)}). Put one back, or remove them to start at the "
            "beginning. A folder that you know is whole can be declared so: finetooth.seal(folder)."
        )
    return None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that says it is complete; nothing is hashed."""
    return next((p for p in _checkpoints(folder) if (p / MANIFEST).is_file()), None)


def _tell(message: str, say: Callable[[str], None] | None) -> None:
    if say is not None:
        say(message)
    else:
        warnings.warn(message, stacklevel=3)


def _half_written(folder: Path) -> bool:
    """Nothing is lost with it: not sealed where all are, or not even finished by the library that wrote it."""
    if (folder / MANIFEST).exists():
        return False
    return (folder.parent / MANIFEST).exists() or not any((folder / name).exists() for name in _WRITTEN_LAST)


def _number(path: Path) -> int | None:
    found = _STEP.fullmatch(path.name)
    return int(found[2]) if found and not path.name.startswith(".") else None


def _checkpoints(folder: Path) -> list[Path]:
    """Folders whose names end in a step, the newest first."""
    found = [p for p in folder.iterdir() if p.is_dir() and _number(p) is not None] if folder.is_dir() else []
    return sorted(found, key=lambda p: (_number(p), p.name), reverse=True)


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if (facts["format"], facts["version"]) != (FORMAT, VERSION):
        raise ValueError(f"{facts['format']} {facts['version']}")
    return {str(name): {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in facts["files"].items()}


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _publish(written: Path, target: Path) -> None:
    """Rename; a checkpoint of the same step, which a resumed run writes again, makes way first."""
    old = written.parent / f"{written.name}.old"
    if target.exists():
        target.rename(old)
    try:
        written.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)


def _prune(newest: Path, keep: int | None) -> None:
    """Leave `keep` checkpoints up to this step. One that goes is moved aside first: it too is complete or absent."""
    mine, step = _STEP.fullmatch(newest.name), _number(newest) or 0
    older = [p for p in _checkpoints(newest.parent) if (_number(p) or 0) < step and _same_stem(p, mine)]
    for path in older[keep - 1 :] if keep is not None else ():
        path.rename(newest.parent / UNFINISHED / path.name)


def _same_stem(path: Path, other: re.Match[str] | None) -> bool:
    found = _STEP.fullmatch(path.name)
    return found is not None and other is not None and found[1] == other[1]


def _is_about_writing(error: Exception) -> bool:
    return isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"
