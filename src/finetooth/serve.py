"""A delta as patches for inference servers: for every tensor, flat indices and the values that belong there.

    flat(W)[indices] = values

That is what vLLM takes, in two places, read in its repository in two stored versions:

`SparseWeightPatch` (`vllm/distributed/weight_transfer/sparse_nccl_engine.py`): what a trainer sends. Since vllm#53751 name, indices, values,
full_shape, in the *checkpoint's* coordinates: one-dimensional, int32, equal lengths; the server makes the other one of it. Before (8f5ec677)
name, indices, values, in the parameter's dtype, written with `index_copy_` into a contiguous parameter, whose name is the *server's*.

`CheckpointWeightPatch` (`vllm/model_executor/model_loader/checkpoint_weight_patch.py` at 3db6ef6b): name, shape, dtype, values,
indices. Names and shapes are the *checkpoint's*; the model's own loader maps them, so joined weights (q, k and v; gate and up),
experts and tensor parallelism are the server's business. Indices are in range and not there twice, dtypes are floating, values not
NaN, which is how it marks an entry that stays.

A `Patch` meets all of these; its fields are in the second one's order. A delta's units become entries: a row of n weights is n indices. All
entries of a unit are sent, also those that did not change, as they are the tuned model's too. Values replace and are not added, so a
patch can be sent twice. Neither contract has a place for an offset, so a tensor of more than 2^31 entries cannot be split: it is refused.

Nothing on the server's side asks whether the base is the right one. Give `base` here, and it is checked before anything is written.

Not covered: sending (NCCL, IPC), and quantized servers, whose weights are not the checkpoint's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetooth import checkpoint
from finetooth.base import Base, open_base
from finetooth.codec import DeltaError
from finetooth.delta import Delta
from finetooth.diff import gather
from finetooth.fit import known
from finetooth.selection import Selection
from finetooth.units import WHOLE

FORMAT, VERSION, LIST = "finetooth-patches", 1, "patches.json"
MOST = 2**31  # entries of a tensor that int32 can number
_FILE_BYTES = 512 << 20  # of tensors in one file, unless one tensor's are more


class Patch(NamedTuple):
    """What one tensor gets. `CheckpointWeightPatch(*patch)` is vLLM's."""

    name: str  # in `base`, if one was given, else as the delta has it: the loaded model's, which may not be the checkpoint's
    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    values: Tensor  # [n] in the weight's dtype, contiguous
    indices: Tensor  # [n] int32, contiguous, increasing: positions in the flattened tensor


def patches(delta: Delta, base: Base | None = None) -> Iterator[Patch]:
    """The patches of a delta, one tensor at a time, in its order.

    `base` (see `open_base`) is needed for a file whose values are coded against it, and not looked at more closely. Raises DeltaError before the first one for a tensor that a patch cannot say: too large, or not of floating point.

    >>> d = Delta.extract({"w": torch.tensor([[0.0, 1.0], [0.0, 2.0]])}, {"w": torch.zeros(2, 2)})
    >>> [(p.name, p.indices.tolist(), p.values.tolist()) for p in patches(d)]
    [('w', [1, 3], [1.0, 2.0])]
    """
    for name, change in delta.changes.items():
        _refuse(name, change.selection.shape)
    for name, change in delta.changes.items():
        values = change.values if base is None else change.new(gather(change.selection, whole(delta, base, name)))
        if not values.dtype.is_floating_point:
            raise DeltaError(f"'{name}' is {values.dtype}: servers take patches of floating-point weights only.")
        ids, order = entries(change.selection).reshape(-1).sort()
        yield Patch(
            called(name, base),
            change.selection.shape,
            values.dtype,
            values.reshape(-1)[order],
            ids.to(torch.int32),
        )


def whole(delta: Delta, base: Base, name: str) -> Tensor:
    """The tensor that a delta calls `name`, on a CPU; `base` may know it by an alias only."""
    there, names = set(base.names()), (name, *(a for a, of in delta.tied.items() if of == name))
    place = next(found for n in names if (found := known(n, there, base)) is not None)
    return base.tensor(place).detach().cpu().contiguous()


def called(name: str, base: Base | None) -> str:
    """A tensor's name in the checkpoint, if that is at hand; where that has an alias alone, the delta's."""
    return name if base is None else known(name, set(base.names()), base) or name


def entries(selection: Selection) -> Tensor:
    """Where the entries of the chosen units are in the flattened tensor: `[k, unit_numel]` int64.

    >>> from finetooth.units import Unit
    >>> entries(Selection(torch.tensor([1]), Unit("column"), (2, 3))).tolist()
    [[1, 4]]
    """
    unit, shape, index = selection.unit, selection.shape, selection.index.long()[:, None]
    step = torch.arange(unit.numel(shape))[None]
    if unit.kind in WHOLE:
        return step
    if unit.kind == "column":
        rows, columns = shape[-2:]
        return index // columns * (rows * columns) + index % columns + step * columns
    return index * unit.numel(shape) + step


def write(delta: Delta, dst: str | Path, base: Any = None) -> dict[str, Any]:
    """Write `dst`, a folder of patches: `patches.json` and safetensors files; what it holds, in numbers.

    With `base` (a folder, a hub id, a state dict) it is checked that the delta belongs to it. Raises DeltaError for a delta that
    does not, or that patches cannot say, FileExistsError if `dst` is there, NotWritten if there is no room.
    """
    from safetensors.torch import save_file

    dst = Path(dst)
    checkpoint.refuse_existing(dst)
    held = None if base is None else open_base(base)
    if held is not None:
        delta.inverse(held)
    own = {called(name, held): name for name in delta.changes}
    listed, files, sizes = list[dict[str, Any]](), 0, 0
    with checkpoint.new_folder(dst, _needed(delta)) as folder:
        for group in _groups(delta, held):
            files += 1
            file = f"patches-{files:05}.safetensors"  # a name inside the delta never becomes one of a file
            tensors = {f"{kind}:{p.name}": getattr(p, kind) for p in group for kind in ("indices", "values")}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            sizes += sum(t.nbytes for t in tensors.values())
            listed += [{**_facts(p), "file": file, "result": delta.changes[own[p.name]].result} for p in group]
        about = {"format": FORMAT, "version": VERSION, "base": asdict(delta.base), "tied": dict(delta.tied)}
        text = json.dumps({**about, "patches": listed}, indent=1, ensure_ascii=False)
        (folder / LIST).write_text(text + "\n", encoding="utf-8")
    return {"patches": len(listed), "entries": sum(p["count"] for p in listed), "files": files, "bytes": sizes}


def read(folder: str | Path) -> Iterator[Patch]:
    """The patches that `write` wrote, one at a time; ValueError for a folder that is none."""
    from safetensors import safe_open

    folder = Path(folder)
    try:
        found = json.loads((folder / LIST).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{folder / LIST} is not JSON: {e}") from e
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
        raise ValueError(f"{folder / LIST} is not a list of patches: expected format {FORMAT!r}, version {VERSION}.")
    for entry in found["patches"]:
        if Path(entry["file"]).name != entry["file"]:
            raise ValueError(f"{folder / LIST} names the file {entry['file']!r}: patches are files in the same folder.")
        with safe_open(str(folder / entry["file"]), framework="pt") as f:
            indices, values = (f.get_tensor(f"{kind}:{entry['name']}").clone() for kind in ("indices", "values"))
        yield Patch(entry["name"], tuple(entry["shape"]), values.dtype, values, indices)


def _refuse(name: str, shape: tuple[int, ...]) -> None:
    if math.prod(shape) > MOST:
        raise DeltaError(
            f"'{name}' {list(shape)} has more than 2^31 entries, which int32 cannot number, and a patch has no offset: export "
            "it with --as checkpoint, which takes every delta."
        )


def _facts(p: Patch) -> dict[str, Any]:
    """As vLLM's update messages say it: the dtype by torch's name."""
    return {
        "name": p.name,
        "shape": list(p.shape),
        "dtype": str(p.dtype).removeprefix("torch."),
        "count": p.indices.numel(),
    }


def _needed(delta: Delta) -> int:
    return sum(c.selection.numel * 4 for c in delta.changes.values())  # the indices; values take 1 to 8 bytes more each


def _groups(delta: Delta, base: Base | None) -> Iterator[list[Patch]]:
    """Patches that go into one file."""
    group, size = list[Patch](), 0
    for patch in patches(delta, base):
        more = patch.indices.nbytes + patch.values.nbytes
        if group and size + more > _FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(patch)
        size += more
    if group:
        yield group
