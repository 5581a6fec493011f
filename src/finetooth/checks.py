"""What an optimizer refuses before it touches a weight: values out of range, and choices that contradict each other.

Every function raises ValueError with what was given and what would be right. A choice that would be ignored is an
error here, because nobody notices an ignored option until the results are in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from finetooth import shards
from finetooth.anatomy import Part
from finetooth.gradients import ROUTES
from finetooth.nearest import hint
from finetooth.rest import Rest
from finetooth.rule import Rule, by_tensor, layer, stem
from finetooth.when import When, once

CHOICES = {
    "state": ("compact", "dense"),
    "mask": ("gradient", "update"),
    "rounding": ("auto", "stochastic", "nearest"),
    "moments": ("fp32", "8bit"),
    "decay_to": ("zero", "base"),
    "gradients": ROUTES,
}

# Pools that hold one whole unit each, where a fraction of a budget would silently be everything.
ONE_UNIT = {"matrix": (by_tensor, stem), "layer": (by_tensor, stem, layer)}


def check_named(named_parameters: Iterable[Any]) -> dict[str, Tensor]:
    """The (name, parameter) pairs as a dict."""
    found: dict[str, Tensor] = {}
    for pair in named_parameters:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(
                f"named_parameters holds a {type(pair).__name__}: give (name, parameter) pairs, as "
                "model.named_parameters() does. Parameter groups are not supported: what trains is the rule's choice."
            )
        found[pair[0]] = pair[1]
    return found


def check_rates(**given: Any) -> None:
    """Learning rate, betas, eps, decay and norm."""
    lr, betas, norm = given["lr"], given["betas"], given["max_grad_norm"]
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr={lr} is out of range: give a finite number >= 0.")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} are out of range: give two numbers in [0, 1).")
    for name in ("eps", "weight_decay"):
        if not 0 <= given[name] < math.inf:
            raise ValueError(f"{name}={given[name]} is out of range: give a finite number >= 0.")
    if norm is not None and not norm >= 0:
        raise ValueError(f"max_grad_norm={norm} is out of range: give a number > 0, or None for no clipping.")


def check_live_rates(groups: Iterable[Mapping[str, Any]]) -> None:
    """The learning rates of this step, which a schedule may have set."""
    for group in groups:
        if not 0 <= float(group["lr"]) < math.inf:
            raise ValueError(f"lr={float(group['lr'])} at this step: a schedule has set it, and nothing was written.")


def check_finite(weights: Mapping[str, Tensor], sharded: bool = False) -> None:
    """Weights that are no numbers, on any rank: what they make of the loss would be blamed on the data."""
    held = {n: shards.local(p) for n, p in weights.items()}
    floats = {n: p for n, p in held.items() if p.is_floating_point() and p.element_size() > 1 and not p.is_meta}
    bad = [int((~torch.isfinite(p)).count_nonzero()) for p in floats.values()]
    if sharded and bad:
        bad = shards.counts(bad, next(iter(floats.values())).device).sum(0).tolist()
    for name, n in zip(floats, bad, strict=True):
        if n:
            raise ValueError(
                f"the weight {name!r} has {n} entries that are not finite before any training: the base is damaged, or its "
                "numbers do not fit its precision. Load it again, or in float32 or bfloat16."
            )


def check_choice(name: str, given: str) -> None:
    """One word of `CHOICES`."""
    if given not in CHOICES[name]:
        near = hint(given, CHOICES[name])
        raise ValueError(f"{name}={given!r} is unknown: choose one of {', '.join(CHOICES[name])}.{near}")


def check_together(rule: Rule | None, when: When, rest: Rest, state: str, mask: str) -> None:
    """Choices that cannot work together."""
    compact, kind = state == "compact" and rule is not None, rest.kind
    if kind == "reset" and not compact and (mask == "gradient" or rule is None):
        raise ValueError('rest=reset() needs mask="update" with dense state: a masked gradient moves every entry.')
    if kind in ("noise", "quantized") and (not compact or when is not once):
        raise ValueError(f"rest={kind}(...) needs a selection made once, with compact state.")
    if rule is None:
        return
    if rule.exclude and kind == "quantized":
        raise ValueError(
            "rest=quantized(...) rewrites what does not train, and so what exclude= is to leave alone: choose frozen."
        )
    if rule.keep == 0:
        raise ValueError("keep=0 selects nothing: nothing would train.")
    if isinstance(rule.keep, float) and rule.keep < 1 and rule.pool in ONE_UNIT.get(rule.unit.kind, ()):
        raise ValueError(
            f"keep={rule.keep} of pools of one {rule.unit} each is all of them: choose pool='model', or a keep for every pool."
        )
    if compact and not when(0):
        raise ValueError(
            'compact state holds what is selected, so the first selection is at step 0, and when(0) is false: choose state="dense".'
        )
    if not compact and mask == "gradient" and when is once and rule.keep != 1.0:
        raise ValueError(
            "a gradient masked once, with dense state, still moves what is not chosen, by weight decay: "
            'choose state="compact", or mask="update".'
        )
    if rule.exchange is not None and (not compact or when is once or rule.unit.kind in ONE_UNIT):
        raise ValueError(
            "a rule that exchanges needs compact state, a when that comes again, and units smaller than a matrix: it is "
            f"state={state!r}, when={getattr(when, '__name__', 'your own')}, unit {rule.unit}."
        )
    if kind in ("noise", "quantized") and rule.unit.kind != "column":
        raise ValueError(f"rest={kind}(...) acts on the other columns of a matrix: the unit is {rule.unit}.")


def check_parts(rule: Rule | None, rest: Rest, parts: Iterable[Part], classes_known: bool) -> None:
    """Whether every tensor that takes part can be cut into the rule's units, and can have its rest."""
    if rule is None or rule.unit.kind not in ("row", "column"):
        return
    if not classes_known:
        raise ValueError(
            f"unit {rule.unit} needs model=: a row of a Linear is a column of a Conv1D, and names do not tell which it is."
        )
    for part in parts:
        if part.transposed is None:
            raise ValueError(
                f"{part.name!r} is stored either way round, and its class does not say which: choose another unit, "
                "or leave it out of targets."
            )
        if rest.kind in ("noise", "quantized") and part.kind not in ("linear", "head"):
            raise ValueError(
                f"rest={rest.kind}(...) acts on linear layers, and {part.name!r} is of kind {part.kind}: "
                "choose targets='dense-linear'."
            )


def check_excluded(rule: Rule | None, known: Mapping[str, Tensor]) -> None:
    """Excluded entries of tensors that are not there, or that do not have them."""
    for name, entries in rule.exclude.items() if rule is not None else ():
        n = known[name].numel() if name in known else 0
        if name not in known or (entries.numel() and not 0 <= int(entries.min()) <= int(entries.max()) < n):
            raise ValueError(f"exclude names entries of {name!r} that this model does not have: {n} are there.")


def check_shards(trained: Mapping[str, Tensor], moments: str) -> None:
    """Sharded parameters among others, or with state that cannot be cut."""
    whole = [name for name, p in trained.items() if shards.cut(name, p) is None]
    if len(whole) == len(trained):
        return
    if whole:
        raise ValueError(
            f"{whole[0]!r} is not sharded, and other parameters are: shard the whole model (fully_shard(model) last), or leave it out "
            "of targets."
        )
    if moments != "fp32":
        raise ValueError(f"moments={moments!r} of sharded parameters are not supported: choose moments='fp32'.")


def check_parameter(name: str, p: Tensor) -> None:
    """A parameter that cannot be trained selectively."""
    p = shards.local(p)
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name!r} is {p.dtype}: weights that train are float32, bfloat16 or float16.")
    if not p.is_contiguous():
        raise ValueError(
            f"{name!r} is not contiguous: its entries are selected in storage order. Call .contiguous() on it."
        )
