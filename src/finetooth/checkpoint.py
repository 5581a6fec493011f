"""Checkpoint folders as transformers writes them: where each tensor lies, and a copy with some tensors changed.

A changed copy is made by copying a shard and writing the new bytes over the old ones at the offsets that its
header gives: one tensor in memory at a time, and everything else in the file stays what it was. Loading the
model and saving it again would need the memory of the model and would rewrite names, metadata and shards.

A folder appears whole or not at all: it is written beside its place, put on the disk, then renamed. What a killed process left
beside it is known by a lock that nobody holds, and is removed by the next call for the same folder.

Not covered: pickle checkpoints, and weights in other formats lying beside (they would be stale, so they are
not copied).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from finetooth import files

DELTA = "delta.safetensors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
# Weights and optimizer states that a changed copy must not carry along, and folders that are no part of a model.
_STALE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot")


def resolve(source: str | Path) -> Path:
    """The path of a folder, a file or a hub id; a hub id is downloaded if it is not in the local cache."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"no file or folder at {source}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=_HUB_FILES))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as e:
        raise FileNotFoundError(f"{source} is neither a path nor a model on the hub that can be reached: {e}") from e


def delta_file(source: str | Path) -> Path:
    """The delta that `source` names: a file, a folder that holds delta.safetensors, or a repository on the hub.

    `org/name` or `org/name@revision`; the file is downloaded if it is not in the local cache.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path / DELTA
    name, _, revision = str(source).partition("@")
    if path.exists() or not HUB_ID.fullmatch(name) or name.endswith(".safetensors"):
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, DELTA, revision=revision or None))
    except (OSError, ValueError) as e:  # the hub's errors are OSErrors
        reason = " ".join(str(e).split())
        raise FileNotFoundError(
            f"{source} is neither a path nor a repository on the hub that holds {DELTA} and can be reached: {reason}"
        ) from e


def shards(folder: Path) -> dict[str, Path]:
    """Where each tensor of a checkpoint folder lies. As in transformers, a single file goes before an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.exists() and not index.exists():
        others = sorted(folder.glob("*.safetensors"))
        if len(others) != 1:
            hint = " (pickle checkpoints are not read: save again as safetensors)" if [*folder.glob("*.bin")] else ""
            raise FileNotFoundError(
                f"{folder} holds no model.safetensors, no model.safetensors.index.json and {len(others)} other "
                f"safetensors files: expected a checkpoint folder{hint}."
            )
        single = others[0]
    return names_in(single) if single.exists() else _indexed(index)


def _indexed(index: Path) -> dict[str, Path]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        where = {str(name): str(file) for name, file in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{index} is not an index of shards: expected JSON with a weight_map.") from e
    held: dict[str, dict[str, Path]] = {}
    for file in dict.fromkeys(where.values()):
        if Path(file).name != file:
            raise ValueError(f"{index} names the shard {file!r}: a shard is a file in the same folder.")
        held[file] = names_in(index.parent / file)
    for name, file in where.items():
        if name not in held[file]:
            raise ValueError(f"{index} says that '{name}' is in {file}, which does not hold it.")
    return {name: index.parent / file for name, file in where.items()}


def names_in(file: Path) -> dict[str, Path]:
    """The tensors of one file, as `shards` gives them."""
    return dict.fromkeys(open_file(file).keys(), file)


def open_file(file: Path) -> Any:
    """safetensors' handle of a file; its header is checked, its tensors are read when asked for."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"the weights file {file} is missing.")
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} is not a whole safetensors file: {e}") from e


class Span(NamedTuple):
    """Where one tensor lies in a file of safetensors."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def layout(file: Path, f: BinaryIO) -> tuple[dict[str, Span], dict[str, str]]:
    """Where the tensors lie in `file`, and its metadata; `f` is the open file. ValueError if it is not whole.

    safetensors checks the header; its handle maps the file, so that pages that were read count as the reader's memory,
    and a file that is cut short meanwhile ends the process. Hence tensors are read at these places with `fill`.
    """
    open_file(file)
    end = f.seek(0, os.SEEK_END)
    f.seek(0)
    try:
        (size,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(size) if size <= end else b"", object_pairs_hook=no_doubles)
        metadata, spans = header.pop("__metadata__", None) or {}, dict[str, Span]()
        for name, said in header.items():
            (begin, stop), shape = said["data_offsets"], tuple(said["shape"])
            spans[name] = Span(said["dtype"], shape, 8 + size + begin, stop - begin)
            if not 0 <= begin <= stop <= end - 8 - size:
                raise ValueError(f"'{name}' lies outside of it")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as e:
        raise ValueError(f"{file} is not a whole safetensors file: {e}") from e
    return spans, metadata


def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if a key is there twice, of which readers take one or the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def fill(f: BinaryIO, buffer: Any) -> bool:
    """Read from `f` until the buffer (anything with bytes) is full; False if the file ends before."""
    view = memoryview(buffer).cast("B") if len(buffer) else memoryview(b"")
    while view.nbytes:
        n = f.readinto(view)  # type: ignore[attr-defined]  # of a raw file
        if not n:
            return False
        view = view[n:]
    return True


def copy_changed(
    src: Path,
    dst: Path,
    names: Iterable[str],
    bytes_of: Callable[[str], memoryview],
    done: Callable[[], None] = lambda: None,
) -> None:
    """Write `dst`, a copy of the checkpoint folder `src` in which the tensors `names` have the bytes `bytes_of(name)`.

    `done` is called when everything is written, before the folder gets its name: nothing appears at `dst` before that. Raises
    FileExistsError if it is there already.
    """
    where, changed = shards(src), set(names)
    refuse_target(src, dst)
    with new_folder(dst, _size(src, set(where.values()))) as temp:
        shutil.copytree(src, temp, ignore=_ignored, copy_function=shutil.copyfile, dirs_exist_ok=True)
        for file in dict.fromkeys(where.values()):
            shutil.copyfile(file, temp / file.name)
            _overwrite(temp / file.name, [n for n in where if n in changed and where[n] == file], bytes_of)
        done()


@contextmanager
def new_folder(dst: Path, needed: int = 0) -> Iterator[Path]:
    """An empty folder beside `dst` that gets its name when the block is done, and is removed if the block fails.

    `needed` is how many bytes will be written, if that is known. NotWritten if there is less room, before the block; or if the
    disk fills up in it.
    """
    files.require_room(dst, needed)
    with files.room(dst, needed), files.aside(dst) as temp:
        yield temp
        for path in (*temp.rglob("*"), temp):
            files.sync(path)
        refuse_existing(dst)  # a rename would take the place of an empty folder
        temp.rename(dst)
        files.sync(dst.parent)


def refuse_target(src: Path, dst: Path) -> None:
    """Raise unless `dst` is a new folder outside `src`."""
    refuse_existing(dst)
    if src.resolve() in dst.resolve().parents:
        raise ValueError(f"{dst} lies inside {src}, which is being copied: give a folder outside of it.")


def refuse_existing(dst: Path) -> None:
    """Raise if there is anything at `dst`."""
    if dst.exists() or dst.is_symlink():
        raise FileExistsError(f"{dst} exists: give the name of a new folder.")


def _size(src: Path, weights: set[Path]) -> int:
    """How many bytes a copy takes: the weights, and what is copied beside them."""
    total = sum(file.stat().st_size for file in weights)
    for folder, inner, names in os.walk(src, followlinks=True):
        skipped = _ignored(folder, [*inner, *names])
        inner[:] = [n for n in inner if n not in skipped]
        total += sum((Path(folder) / n).stat().st_size for n in names if n not in skipped)
    return total


def _overwrite(file: Path, names: list[str], bytes_of: Callable[[str], memoryview]) -> None:
    with file.open("r+b") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(size))
        for name in names:
            begin, end = header[name]["data_offsets"]
            new = bytes_of(name)
            if new.nbytes != end - begin:
                raise ValueError(f"'{name}' has {end - begin} bytes in {file.name}, not {new.nbytes}.")
            f.seek(8 + size + begin)
            f.write(new)
            del new  # one tensor in memory, not two


def _ignored(folder: str, names: list[str]) -> set[str]:
    return {n for n in names if n.endswith(_STALE) or n.startswith((".", "checkpoint-"))}
