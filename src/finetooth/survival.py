"""What is left of a delta when the model it is applied to is quantized: changed entries that still differ, and the loss.

    survived   changed entries at which Q(tuned) is not Q(base)
    moved      entries that the delta does not change at which it is not either: the scale they share has moved
    Q          quantized and read back in the weight's own dtype, which is what a layer computes with

`int8` is a scale for every output row, `nf4` one for every 64 entries (`quantize.py`). The linear weights of the blocks are
quantized, as bitsandbytes and torchao do; embeddings, head, norms and biases keep their dtype, so what changed there survives.

A small step in one weight is lost when it stays inside its level, and whole rows shift when their largest weight changes: counts say
which happens. They do not say what it costs, so the loss is measured of four models: base and tuned, each as it is and quantized.

One tensor is in memory for the counts; the loss needs the model once, and takes the base's values from its file again.

Not covered: activations (LLM.int8() rounds those too, and keeps outlier columns apart), calibrated methods (GPTQ, AWQ), and
checkpoints that are quantized already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import anatomy, checkpoint, evaluate, pretrained, quantize
from finetooth.base import Base, Files, bits, fingerprint, open_base
from finetooth.codec import Change
from finetooth.data import documents
from finetooth.delta import Delta, WrongBase
from finetooth.diff import gather, scatter_
from finetooth.jobs import load
from finetooth.measure import measure
from finetooth.recipe import Recipe
from finetooth.serve import whole

FORMS: Mapping[str, Callable[[Tensor], Tensor]] = {"int8": quantize.int8, "nf4": quantize.nf4}
Numbers = Callable[[], dict[str, float]]


def survival(delta: Delta, base: Any, to: str = "int8") -> dict[str, Any]:
    """How many of a delta's entries outlive quantization, in all and for every kind of module.

    base: what `delta` was made for: a folder, a hub id, a state dict.
    to: a key of FORMS.

    Returns `changed`, `survived`, `moved`, `share` (survived of changed), and `groups` with the first three and `quantized` for each.
    Raises WrongBase for another base, DeltaError if the delta does not fit, ValueError for an unknown form.
    """
    form = _form(to)
    held = open_base(checkpoint.resolve(base) if isinstance(base, str | Path) else base)
    parts, groups = _parts(held, base), dict[str, dict[str, Any]]()
    with held.opened():
        _require_base(delta, held)
        for name, change in delta.changes.items():
            part = parts.get(name)
            wide = part is None or part.kind != "linear" or len(change.selection.shape) != 2
            found = _counted(change, whole(delta, held, name), (lambda w: w) if wide else _oriented(form, part))
            group = groups.setdefault(_group(name), {"quantized": not wide, "changed": 0, "survived": 0, "moved": 0})
            group["quantized"] = group["quantized"] or not wide
            for key, n in found.items():
                group[key] += n
    total = {key: sum(g[key] for g in groups.values()) for key in ("changed", "survived", "moved")}
    share = total["survived"] / total["changed"] if total["changed"] else None
    return {"to": to, **total, "share": share, "groups": groups}


def losses(delta: Delta, base: str | Path, to: str, text: str | Path) -> dict[str, dict[str, float]]:
    """The mean token loss on a text, in nats, of `base`, `tuned`, `quantized base` and `quantized tuned`.

    base: a checkpoint folder or hub id that `from_pretrained` loads. text: documents separated by lines `<|endoftext|>`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, read = str(checkpoint.resolve(base)), documents(text)
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    context = min(pretrained.context(model.config) or 1024, 1024)
    return _four(
        model, delta, source, to, lambda: {"general_loss": evaluate.general_loss(model, tokenizer, read, context)}
    )


def recipe_losses(delta: Delta, recipe: Recipe, to: str) -> dict[str, dict[str, float]]:
    """The same four models, measured as a recipe's `evaluate` says, on its data."""
    job = load(recipe, Path(recipe.output), training=False)
    return _four(job.model, delta, recipe.model, to, lambda: measure(job, samples=0)[0])


def _four(model: nn.Module, delta: Delta, base: str, to: str, numbers: Numbers) -> dict[str, dict[str, float]]:
    form, held = _form(to), open_base(checkpoint.resolve(base))
    out = {"base": numbers()}
    quantize_(model, form)
    out["quantized base"] = numbers()
    _restore(model, held)
    delta.apply(model)
    out["tuned"] = numbers()
    quantize_(model, form)
    out["quantized tuned"] = numbers()
    return {key: out[key] for key in ("base", "tuned", "quantized base", "quantized tuned")}


@torch.no_grad()
def quantize_(model: nn.Module, form: Callable[[Tensor], Tensor]) -> None:
    """Round the linear weights of the blocks, in place, one at a time."""
    live = dict(model.named_parameters())
    for name, part in anatomy.survey(model).items():
        if part.kind == "linear" and live[name].ndim == 2:
            live[name].copy_(_oriented(form, part)(live[name]))


@torch.no_grad()
def _restore(model: nn.Module, held: Base) -> None:
    with held.opened():
        there = set(held.names())
        for name, part in anatomy.survey(model).items():
            p = model.get_parameter(name)
            if part.kind != "linear" or p.ndim != 2:
                continue
            if name not in there:
                raise ValueError(
                    f"'{name}' is joined from others in the base: its loss after quantizing is not covered."
                )
            p.copy_(held.tensor(name))


def _form(to: str) -> Callable[[Tensor], Tensor]:
    if to not in FORMS:
        raise ValueError(f"--to {to} is unknown: choose {' or '.join(FORMS)}.")
    return FORMS[to]


def _oriented(form: Callable[[Tensor], Tensor], part: anatomy.Part | None) -> Callable[[Tensor], Tensor]:
    """Output rows are stored columns where a layer stores its weight as [in, out]."""
    if part is not None and part.transposed:
        return lambda w: form(w.t().contiguous()).t().contiguous()
    return form


def _require_base(delta: Delta, held: Base) -> None:
    if delta.verify(held) == "applied":
        raise WrongBase(f"the delta is applied here already: give its base ({delta.base}).")


def _counted(change: Change, old: Tensor, q: Callable[[Tensor], Tensor]) -> dict[str, int]:
    new = old.clone()
    scatter_(change.selection, new, change.new(gather(change.selection, old)))
    if fingerprint(new) != change.result:
        raise WrongBase(f"the new values do not give the tensor that the delta promises ({change.result}).")
    changed, after = bits(old) != bits(new), q(old) != q(new)
    kept = int((changed & after).count_nonzero())
    return {"changed": int(changed.count_nonzero()), "survived": kept, "moved": int(after.count_nonzero()) - kept}


def _parts(held: Base, base: Any) -> Mapping[str, anatomy.Part]:
    """What each tensor is: by the model's class where a configuration says it, else by name and shape."""
    folder = next(iter(held.where.values())).parent if isinstance(held, Files) and held.where else None
    if isinstance(base, nn.Module):
        return anatomy.survey(base)
    if folder is None or not (folder / "config.json").is_file():
        return anatomy.guess((n, torch.empty(held.shape_dtype(n)[0], device="meta")) for n in held.names())
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return anatomy.survey(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder))))


def _group(name: str) -> str:
    """The module's own name: q_proj, down_proj, embed_tokens."""
    return next((p for p in reversed(name.split(".")[:-1]) if not p.isdigit()), name)
