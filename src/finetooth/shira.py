"""Deltas as PEFT SHiRA adapters, and SHiRA adapters as deltas.

A SHiRA adapter (arXiv 2406.13175, PEFT's `tuners/shira`) holds, for some linear layers, indices and float32
differences d, and computes with `w + d`. A delta holds new values w'. Going over to differences can lose the last
bit: in float32 `w + d` has no finer step than w has, so a w' much smaller than w may lie between two sums. The nearest
d is taken, and no other would do better, as rounding is monotone; the entries that it does not reproduce are counted. In
bfloat16 and float16 PEFT adds in float32 and rounds once: there, such entries are rare.
What PEFT's loading demands (0.21): one `r` for all layers of an adapter, and in every layer exactly `r * (in + out)`
entries, which must not be more than the layer has. So every layer is filled up to that number with differences of -0.0,
which change nothing (0.0 would turn a weight of -0.0 into 0.0). Only `nn.Linear` can be adapted.

The other way: the new values are what merging the adapter gives, by the same operation.

Not covered: PEFT does not check what base an adapter is put on; adapters of other kinds, which do not say which weights
they change; `modules_to_save`, whole layers that an adapter may carry.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import checkpoint
from finetooth.base import Base, bits, dtype_name, open_base
from finetooth.codec import DeltaError
from finetooth.delta import Delta
from finetooth.diff import scatter_

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_INSTEAD = "export it with --as checkpoint, which takes every delta."
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def write(delta: Delta, base: str | Path, dst: str | Path) -> dict[str, Any]:
    """Write `dst`, an adapter folder that `PeftModel.from_pretrained(model, dst)` loads; what it holds, in numbers.

    `base` is the checkpoint folder or hub id that `delta` belongs to. In the result, `inexact` counts the weights that
    base + difference does not reproduce, and `largest_error` is the largest distance of one.

    Raises DeltaError for a delta that is no SHiRA adapter, naming the first tensor; otherwise as `Delta.inverse`.
    """
    src, dst = checkpoint.resolve(base), Path(dst)
    checkpoint.refuse_target(src, dst)
    modules = _modules(delta, _linears(src))
    r = _rank(delta)
    delta.inverse(src)  # the right base, and the promised result
    facts: dict[str, Any] = {"modules": len(modules), "r": r, "changed": 0, "padding": 0}
    tensors, missed = dict[str, Tensor](), list[Tensor]()
    with open_base(src).opened() as held:
        for name, module in modules.items():
            old = held.tensor(name)
            new = old.clone()
            scatter_(delta.changes[name].selection, new, delta.changes[name].values)
            index, values, error = _layer(old, new, r)
            tensors[f"{PREFIX}{module}.shira_weight"], tensors[f"{PREFIX}{module}.shira_indices"] = values, index
            missed.append(error[error > 0])
            facts["changed"] += delta.changes[name].changed
            facts["padding"] += values.numel() - delta.changes[name].changed
    _save(dst, tensors, _config(delta, r, sorted(modules.values())))
    errors = torch.cat(missed)
    return {**facts, "inexact": errors.numel(), "largest_error": float(errors.max()) if errors.numel() else 0.0}


def _linears(src: Path) -> set[str]:
    """The names of the model's linear layers, from its configuration, without its weights."""
    if not (src / "config.json").is_file():
        raise DeltaError(f"{src} has no config.json, which says what layers there are: give the folder of the base.")
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(src)))
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


def _modules(delta: Delta, linears: set[str]) -> dict[str, str]:
    """The layer of every changed tensor; DeltaError if one is not the weight of a linear layer, and only of that."""
    shared = set(delta.tied.values())
    wrong = {n: "is not the weight of an nn.Linear" for n in delta.changes if n.removesuffix(".weight") not in linears}
    wrong |= {n: "is shared with another layer" for n in delta.changes if n in shared and n not in wrong}
    wrong |= {
        n: f"is {dtype_name(c.values.dtype)}, and differences are float32"
        for n, c in delta.changes.items()
        if c.values.dtype not in _FLOATS and n not in wrong
    }
    if wrong:
        name = next(n for n in delta.changes if n in wrong)
        more = f" (and {len(wrong) - 1} more tensors are none either)" if len(wrong) > 1 else ""
        raise DeltaError(f"'{name}' {wrong[name]}, so this delta cannot be a SHiRA adapter{more}: {_INSTEAD}")
    return {n: n.removesuffix(".weight") for n in delta.changes}


def _rank(delta: Delta) -> int:
    """The smallest r whose r * (in + out) holds the changed entries of every layer, if all layers have so many."""
    needed = {n: math.ceil(c.changed / sum(c.selection.shape)) for n, c in delta.changes.items()}
    room = {n: math.prod(c.selection.shape) // sum(c.selection.shape) for n, c in delta.changes.items()}
    most, least = max(needed, key=lambda n: needed[n]), min(room, key=lambda n: room[n])
    if needed[most] > room[least]:
        c, shape = delta.changes[most], list(delta.changes[least].selection.shape)
        raise DeltaError(
            f"'{most}' has {c.changed} changed entries, which takes r={needed[most]}; '{least}' {shape} has room for "
            f"r={room[least]}. A SHiRA adapter has one r, and r * (in + out) entries in every layer: {_INSTEAD}"
        )
    return needed[most]


def _layer(old: Tensor, new: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [2, n] int32, differences [n] float32, and how far base + difference is from the new value [k]."""
    flat = (bits(old) != bits(new)).reshape(-1)
    changed = flat.nonzero().squeeze(1)
    d, error = differences(old.reshape(-1)[changed], new.reshape(-1)[changed])
    spare = (~flat).nonzero().squeeze(1)[: r * sum(old.shape) - changed.numel()]
    index, order = torch.cat([changed, spare]).sort()
    values = torch.cat([d, torch.full((spare.numel(),), -0.0)])[order]
    return torch.stack(torch.unravel_index(index, old.shape)).to(torch.int32), values, error


def differences(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """d [k] float32, nearest to new - old, and how far old + d is from new once it is rounded to the weights' dtype.

    >>> differences(torch.tensor([1.0, 1.0]), torch.tensor([1.5, 1e-9]))
    (tensor([ 0.5000, -1.0000]), tensor([0.0000e+00, 1.0000e-09]))
    """
    a, b = old.float(), new.float()
    d = b - a
    return d, ((a + d).to(new.dtype).float() - b).abs()


def _config(delta: Delta, r: int, modules: list[str]) -> dict[str, Any]:
    """What PEFT reads. `random` is the only mask that it can make anew, and it is replaced by the stored indices."""
    return {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": delta.base.id,
        "revision": delta.base.revision,
        "inference_mode": True,
        "r": r,
        "mask_type": "random",
        "random_seed": None,
        "target_modules": modules,
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }


def _save(dst: Path, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    with checkpoint.new_folder(dst) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(source: str | Path, base: Any) -> Delta:
    """The delta that merging the SHiRA adapter in the folder `source` into `base` would make.

    Raises DeltaError for other adapters, and for one that does not fit the base.
    """
    folder = checkpoint.resolve(source)
    kind = _kind(folder)
    if kind != "SHIRA":
        raise DeltaError(
            f"{folder.name} is a {kind} adapter, and of adapters only SHiRA's say which weights change: merge it first, "
            "with PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tuned), then "
            "`finetooth delta extract BASE tuned --out delta.safetensors`."
        )
    if not (folder / WEIGHTS).is_file():
        raise DeltaError(f"{folder} has no {WEIGHTS}: pickled adapters are not read, save it as safetensors.")
    held = open_base(base)
    return Delta.extract(Merged(held, _patches(folder / WEIGHTS, held)), held, method="shira", keep_base=False)


def is_adapter(source: str | Path) -> bool:
    """Whether a folder is a PEFT adapter rather than a checkpoint."""
    return (Path(source).expanduser() / CONFIG).is_file()


def _kind(folder: Path) -> str:
    try:
        return str(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DeltaError(f"{folder / CONFIG} is not the configuration of an adapter: expected a peft_type.") from e


def _patches(file: Path, held: Base) -> dict[str, Tensor]:
    """What the adapter adds, by the name of the tensor: a sparse matrix of the weight's shape."""
    found, keys = checkpoint.open_file(file), set(checkpoint.names_in(file))
    layers = {key.rpartition(".")[0] for key in keys}
    expected = {f"{layer}.{part}" for layer in layers for part in ("shira_weight", "shira_indices")}
    odd = sorted(expected ^ keys)
    if odd:
        raise DeltaError(f"'{odd[0]}' is not in its place in {file.name}: a layer has shira_weight and shira_indices.")
    names, out = set(held.names()), dict[str, Tensor]()
    for layer in sorted(layers):
        name = layer.removeprefix(PREFIX) + ".weight"
        if name not in names:
            raise DeltaError(
                f"the adapter changes '{name}', which {held} does not have: give the base it was made for."
            )
        index, values = (found.get_tensor(f"{layer}.{part}") for part in ("shira_indices", "shira_weight"))
        out[name] = _sparse(name, index.long(), values, held.shape_dtype(name)[0])
    return out


def _sparse(name: str, index: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    fits = len(shape) == 2 and values.ndim == 1 and tuple(index.shape) == (2, values.numel()) and values.numel()
    if not fits or bool((index < 0).any()) or bool((index >= torch.tensor(shape)[:, None]).any()):
        raise DeltaError(
            f"the adapter's indices for '{name}' {list(shape)} are {list(index.shape)} and its values "
            f"{list(values.shape)}: expected places in that matrix, one for each value."
        )
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=True)


class Merged(Base):
    """A base with an adapter added, tensor by tensor: PEFT's `weight += sparse`, rounded as that rounds."""

    def __init__(self, held: Base, patches: Mapping[str, Tensor]):
        self.held, self.patches = held, patches
        self.tied = held.tied

    def names(self) -> list[str]:
        return self.held.names()

    def tensor(self, name: str) -> Tensor:
        t = self.held.tensor(name)
        if name not in self.patches:
            return t
        out = t.detach().clone()
        out += self.patches[name]
        return out

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self.held.shape_dtype(name)

    @contextmanager
    def opened(self) -> Iterator[Base]:
        with self.held.opened():
            yield self
