"""Files that are there whole or not at all, and a full disk that is named.

    write beside -> fsync -> rename -> fsync of the folder

A rename inside one file system is atomic: a reader finds what was there before, or all of the new. Without the fsync a
crash of the machine may keep the name and lose the bytes. The alternative, writing in place and checking afterwards,
loses the old file to the first failure.

Not covered: file systems on which fsync or rename do not do what POSIX says.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Rust (safetensors) says "os error 28"; torch's zip writer says nothing but that it failed, so the disk is asked.
_FULL = re.compile(r"No space left|quota exceeded|os error (28|122)\b", re.IGNORECASE)
_NOTHING = 1 << 20  # a writer of blocks gives up before the last byte is taken


class NotWritten(OSError):
    """A file or folder could not be written, as a rule because the disk is full. What was there before is unharmed."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file takes the place of `path` when the block ends. NotWritten if the disk is full.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "facts.json"
    >>> with whole(file) as temp:
    ...     _ = temp.write_text("{}")
    >>> file.read_text(), len(list(file.parent.iterdir()))
    ('{}', 1)
    """
    with room(path), aside(path) as folder:
        temp = folder / path.name
        yield temp
        sync(temp)
        temp.replace(path)
        sync(path.parent)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked by this process for the length of the block, and removed then if it is still there.

    Those that nobody locks any more are of killed processes, and are removed first.
    """
    for old in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        _remove_abandoned(old)
    temp, handle = _locked(path)
    try:
        yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        os.close(handle)


def _locked(path: Path) -> tuple[Path, int]:
    while True:
        temp = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
        temp.mkdir(parents=True)
        with suppress(FileNotFoundError):  # taken for abandoned in the moment before it had its lock: another one then
            handle = os.open(temp, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: what a killed process leaves there, stays
                fcntl.flock(handle, fcntl.LOCK_EX)
            if temp.is_dir():
                return temp, handle
            os.close(handle)


def _remove_abandoned(temp: Path) -> None:
    """A lock ends with its process, however that ends."""
    try:
        handle = os.open(temp, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(temp, ignore_errors=True)
    except OSError:
        pass  # somebody is writing it
    finally:
        os.close(handle)


def require_room(path: Path, needed: int) -> None:
    """NotWritten if fewer than `needed` bytes are free where `path` will be."""
    where = _there(path.parent)
    if _free(where) < needed:
        raise NotWritten(
            f"{path} could not be written: it takes {needed:,} bytes, and {_free(where):,} are free in {where}."
        )


@contextmanager
def room(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn the many ways in which libraries say that a disk is full into one NotWritten that names `path`."""
    try:
        yield
    except NotWritten:
        raise
    except Exception as error:
        if is_full(error, path.parent):
            raise refusal(path, error, needed) from error
        raise


def refusal(path: Path, error: Exception, needed: int = 0) -> NotWritten:
    """What to say when `path` could not be written: why, how much room there is, and how much it takes if that is known."""
    where = _there(path.parent)
    if isinstance(error, NotWritten) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of a file inside `path`
    first = (str(error) or type(error).__name__).splitlines()[0]
    reason = "the disk is full" if is_full(error, where) else first
    takes = f", {needed:,} needed in all" if needed else ""
    return NotWritten(f"{path} could not be written: {reason} ({_free(where):,} bytes free in {where}{takes}).")


def is_full(error: Exception, folder: Path) -> bool:
    """Whether an error of writing into `folder` is for want of room."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return bool(_FULL.search(str(error))) or (isinstance(error, RuntimeError) and _free(_there(folder)) < _NOTHING)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
