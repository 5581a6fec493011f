"""What each parameter of a model is: the kind of layer it feeds, the block it lies in, how it is stored.

Rows choose by these facts ("the linear weights of the blocks", "2 of 4 attention matrices"), so they are read
once, here, from the module tree: the class of the module that owns a parameter, and the number in its name.
A linear layer outside the blocks is a head, whatever it is called. Where only named parameters are at hand
(`guess`), a matrix in a block counts as linear and the rest as `other`: no class is known then.

Not covered: encoder-decoder models (both stacks count as blocks) and adapters of other libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from finetooth.rule import layer

# Classes of 3-D experts that do not say themselves whether they are stored [expert, in, out].
EXPERTS = {"Llama4TextExperts": True, "JetMoeParallelExperts": False, "DbrxExpertGLU": None}


@dataclass(frozen=True)
class Part:
    """One parameter: kind is linear, expert, embedding, head, norm, bias or other; place is the sub-block."""

    name: str
    kind: str
    layer: str  # "model.layers.3", or "" outside the blocks
    place: str  # attention, ffn, norm, or "" outside the blocks
    transposed: bool | None = False  # stored [in, out]; None where that cannot be told
    token_rows: bool = False  # an embedding or head with a row for every token: positions have others


def survey(model: nn.Module) -> dict[str, Part]:
    """Describe every parameter of a model, by its name; a tied weight appears once."""
    owners = {
        f"{path}.{name}" if path else name: module
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    classes = {path: _class_name(module) for path, module in model.named_modules()}
    parts = {name: _part(name, p, owners[name], classes) for name, p in model.named_parameters()}
    vocabulary = _vocabulary(model)
    sizes = {name: p.shape[0] for name, p in model.named_parameters() if parts[name].kind in ("embedding", "head")}
    return parts | {n: replace(parts[n], token_rows=rows == (vocabulary or rows)) for n, rows in sizes.items()}


def _vocabulary(model: nn.Module) -> int | None:
    """How many rows its input embedding has, where transformers knows which that is."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(found, "weight", None)
    return None if weight is None else len(weight)


def tied(model: nn.Module | None) -> dict[str, str]:
    """Second names of tied weights: {alias: the name in `named_parameters()`}."""
    if model is None:
        return {}
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = ((alias, names[id(p)]) for alias, p in model.named_parameters(remove_duplicate=False))
    return {alias: name for alias, name in pairs if alias != name}


def guess(names: Iterable[tuple[str, Tensor]]) -> dict[str, Part]:
    """Describe parameters without their model, from names and shapes alone."""
    out = {}
    for name, p in names:
        kind = "bias" if name.endswith("bias") else "linear" if p.ndim >= 2 and layer(name) else "other"
        out[name] = Part(name, kind, layer(name), _place(name, "", {}))
    return out


def _part(name: str, p: Tensor, owner: nn.Module, classes: Mapping[str, str]) -> Part:
    block, kind = layer(name), "other"
    class_name = _class_name(owner)
    if name.endswith("bias"):
        kind = "bias"
    elif "Norm" in class_name:
        kind = "norm"
    elif isinstance(owner, nn.Embedding):
        kind = "embedding"
    elif (isinstance(owner, nn.Linear) and not _routes(owner)) or class_name == "Conv1D":
        kind = "linear" if block else "head"
    elif block and _is_expert(p, owner, class_name):
        kind = "expert"
    transposed: bool | None = class_name == "Conv1D" and p.ndim >= 2
    if kind == "expert":  # transformers notes it on most of its expert classes
        transposed = getattr(owner, "is_transposed", EXPERTS.get(class_name))
    return Part(name, kind, block, _place(name, class_name, classes), transposed)


def _routes(owner: nn.Linear) -> bool:
    """Llama 4's router is a Linear that does more than multiply; those of other models are none."""
    return "Router" in _class_name(owner) and not multiplies(owner)


def multiplies(owner: nn.Linear) -> bool:
    """Whether its forward is x W^T + b: that of `nn.Linear`, or one that is known to do the same."""
    return type(owner).forward is nn.Linear.forward or _class_name(owner) in ("SelectiveLinear", "FalconLinear")


def _is_expert(p: Tensor, owner: nn.Module, class_name: str) -> bool:
    """A stack of matrices, or what is known to be one; RWKV's [1, 1, n] are vectors, and convolutions none."""
    stacked = p.ndim == 3 and sum(n > 1 for n in p.shape) > 1 and not isinstance(owner, nn.modules.conv._ConvNd)
    return stacked or (class_name in EXPERTS and p.ndim > 1)


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")  # which `fully_shard` puts before the class of what it shards


def _place(name: str, owner: str, classes: Mapping[str, str]) -> str:
    """attention, ffn or norm: by the class of the block's child that holds the parameter, then by its name."""
    block = layer(name)
    if not block:
        return ""
    child = name[len(block) + 1 :].split(".")[0]
    if "Norm" in owner or "norm" in name.split(".")[-2] or child.startswith("ln"):
        return "norm"
    return "attention" if "attention" in classes.get(f"{block}.{child}", child).lower() or "attn" in child else "ffn"


Targets = str | Iterable[str] | Callable[[str], bool]
TARGETS: dict[str, Callable[[Part], bool]] = {
    "all": lambda part: True,
    "blocks": lambda part: bool(part.layer),
    "linear": lambda part: bool(part.layer) and part.kind in ("linear", "expert"),
    "ends": lambda part: part.kind in ("embedding", "head"),
    "token-rows": lambda part: part.token_rows,
    "matrices": lambda part: part.kind in ("linear", "expert", "embedding", "head"),
    "dense-linear": lambda part: bool(part.layer) and part.kind == "linear",
}


def matching(targets: Targets, parts: Mapping[str, Part], aliases: Mapping[str, str] | None = None) -> list[str]:
    """The names of the parameters that take part; ValueError if a name or pattern meets none."""
    if callable(targets):
        found = [name for name in parts if targets(name)]
    elif isinstance(targets, str) and targets in TARGETS:
        found = [name for name, part in parts.items() if TARGETS[targets](part)]
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in parts):
                for alias, name in (aliases or {}).items():
                    if fnmatchcase(alias, pattern):
                        raise ValueError(
                            f"targets: {alias!r} is tied to {name!r}, one weight with two names: give {name!r}."
                        )
                raise ValueError(
                    f"targets: no parameter matches {pattern!r}. Give {', '.join(TARGETS)} or patterns such as "
                    f"'*.mlp.*'. There are {', '.join(list(parts)[:3])} …"
                )
        found = [name for name in parts if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not found:
        raise ValueError(f"targets={targets!r} meets none of the {len(parts)} parameters: nothing would train.")
    return found
