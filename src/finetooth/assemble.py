"""From a method's name and a model to its optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from finetooth import shards
from finetooth.anatomy import Part, Targets, matching, survey
from finetooth.base import open_base
from finetooth.checks import check_choice, check_together
from finetooth.exclude import excluded
from finetooth.gradients import remove_gradients
from finetooth.method import Method
from finetooth.methods import METHODS
from finetooth.moves import Given
from finetooth.nearest import hint
from finetooth.noise import remove_noise
from finetooth.optim import SelectiveAdamW
from finetooth.probe import calibrate
from finetooth.rule import Rule, by_model, by_tensor
from finetooth.spelled import choice
from finetooth.units import WHOLE, Unit
from finetooth.weight import Score
from finetooth.when import once

_RULE = ("unit", "pool", "score", "threshold")
_OWN = (*_RULE, "keep", "exchange")  # what the options of a row may change of its rule
_ROW = ("when", "rest", "state", "mask")
_OPTIMIZER = ("betas", "eps", "decay_to", "stop_after", "kernels", "moments")
_PLAIN = ("lr", "weight_decay", "max_grad_norm", "seed", "rounding")  # the optimizer's own names for them


def build(
    method: str | Score | Method,
    model: nn.Module,
    *,
    lr: float = 1e-4,
    keep: float | int | Mapping[str, float | int] | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    seed: int = 0,
    targets: Targets | None = None,
    gradients: Literal["auto", "dense", "compact", "structured"] = "auto",
    rounding: Literal["auto", "stochastic", "nearest"] = "auto",
    calibration: Iterable[Mapping[str, Tensor] | Tensor] | None = None,
    base: Any = None,
    exclude: Given | Iterable[Given] | None = None,
    **overrides: Any,
) -> SelectiveAdamW:
    """Make the optimizer of a named method, or of your own score, for a model.

    Args:
        method: a name in `METHODS`, or a score function, which makes a static compact row at 1 % of each tensor.
        keep: the share (float) or count (int) of units that trains; None takes the row's.
        targets: "all", "blocks", "linear", patterns of parameter names, or a function name -> bool.
        max_grad_norm: clipping happens inside the step; switch the trainer's own off (`max_grad_norm=0`).
        gradients: how the gradients of compact rows are formed: "dense" (`p.grad`), "compact" (chosen entries alone are
            kept), "structured" (nothing else is computed), or "auto". The result is the same.
        calibration: batches of `input_ids` [batch, tokens] (and attention_mask, labels) for rows that measure first.
        base: folder, hub id or state dict of the pretrained values. Rows that train whole tensors read it when a delta
            is extracted, and check that it is what the model was at the start. Default: for those rows, the folder
            that transformers loaded the model from.
        exclude: deltas, or files of them, whose entries must not train: a unit that holds one is never chosen, at any
            step, so that the new delta can be merged with them without a conflict. Not for `full`.
        overrides: any field of the row (unit, pool, score, threshold, when, rest, state, mask), the row's own options
            (dst: relative, zero_moments; gift-sw: bits, gamma, tau, rho; lift: rank; badam: order; rows: rows), or betas, eps, decay_to, stop_after,
            kernels, moments. Choices may be given as words: when="every(5)", rest="noise(4)", unit="block(32)", pool="model",
            score="snip".

    Raises ValueError naming what was given and the choices. The model's `requires_grad` flags are set: what does
    not train is False.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> opt = build("magnitude", model, lr=1e-3, keep=0.25, targets=["*.weight"])
    >>> {name: len(s) for name, s in opt.selections().items()}
    {'0.weight': 4, '1.weight': 2}
    """
    return SelectiveAdamW(
        **arranged(
            method,
            model,
            lr=lr,
            keep=keep,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=seed,
            targets=targets,
            gradients=gradients,
            rounding=rounding,
            calibration=calibration,
            base=base,
            exclude=exclude,
            **overrides,
        )
    )


def arranged(
    method: str | Score | Method,
    model: nn.Module,
    *,
    keep: float | int | Mapping[str, float | int] | None = None,
    targets: Targets | None = None,
    gradients: str = "auto",
    calibration: Iterable[Mapping[str, Tensor] | Tensor] | None = None,
    base: Any = None,
    exclude: Given | Iterable[Given] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """The arguments of `SelectiveAdamW` that `build` makes of its own; calibration happens here.

    `given` is the rest of what `build` takes. A plan makes the same arguments of a model without values (`rehearsal.py`).
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which puts this before every name
    shards.reshard(model)
    row, plain = row_named(method), {name: value for name, value in given.items() if name in _PLAIN}
    overrides = {name: value for name, value in given.items() if name not in _PLAIN}
    _check_names(row, overrides, _OPTIMIZER, inspect.signature(build).parameters)
    check_choice("gradients", gradients)
    _check_exclude(row, exclude)
    row, rule = _configured(row, survey(model), keep, targets, overrides)
    if exclude is not None and rule is not None:
        rule = replace(rule, exclude=excluded(exclude, model))
    stats = None
    if row.calibration and (calibration is not None or row.calibration != ("grad",)):
        if calibration is None:
            raise ValueError(
                f"{row.name!r} measures before it chooses: give calibration=batches, dicts with input_ids [batch, tokens]."
            )
        remove_noise(model)  # an earlier optimizer lets go of the model
        remove_gradients(model)
        parts = survey(model)
        wanted = matching(rule.targets if rule else "all", parts)
        stats = calibrate(model, calibration, {name: parts[name] for name in wanted}, row.calibration)
        shards.reshard(model)
    again = rule is not None and rule.unit.kind in WHOLE and row.when is not once
    if base is None and (rule is None or row.state == "dense" or row.rest.kind == "quantized" or again):
        base = loaded_from(model)
    return {
        "named_parameters": model.named_parameters(),
        "rule": rule,
        "when": row.when,
        "rest": row.rest,
        "state": row.state,
        "mask": row.mask,
        "gradients": gradients,
        "model": model,
        "stats": stats,
        "base": base,
        **plain,
        **{name: overrides[name] for name in _OPTIMIZER if name in overrides},
    }


def loaded_from(model: nn.Module) -> str | None:
    """The folder that transformers loaded a model from, if all its parameters can be read there by name."""
    source = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    if source is None or not Path(source).is_dir():  # a hub id is not looked up behind the user's back
        return None
    try:
        known = set(open_base(source).names())
    except (ValueError, OSError):
        return None
    return source if all(name in known for name, _ in model.named_parameters()) else None


def check_options(
    method: str | Score | Method,
    options: Mapping[str, Any],
    keep: float | int | Mapping[str, float | int] | None = None,
    targets: Targets | None = None,
    exclude: Given | Iterable[Given] | None = None,
    named: Iterable[str] = (),
    place: str = "",
) -> None:
    """Raise ValueError for an unknown method, option or value, and for choices that contradict each other.

    It says before a model is loaded what `build` would say after. named: other keys beside `options`, and place: what stands
    before them, for the error.
    """
    row = row_named(method)
    _check_names(row, options, (), named, place)
    _check_exclude(row, exclude)
    row, rule = _configured(row, None, keep, targets, options)
    check_choice("state", row.state)
    check_choice("mask", row.mask)
    check_together(rule, row.when, row.rest, row.state, row.mask)


def row_named(method: str | Score | Method) -> Method:
    """A row, by its name or made of a score; ValueError with the nearest name for one that is not there."""
    if isinstance(method, Method):
        return method
    if callable(method):
        name = getattr(method, "__name__", "own")
        return Method(name, "A user's own score.", "", Rule(method))
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown.{hint(method, METHODS)} There are: {', '.join(METHODS)}.")
    return METHODS[method]


def _check_names(
    row: Method, overrides: Mapping[str, Any], more: Iterable[str], named: Iterable[str] = (), place: str = ""
) -> None:
    """named: what may also be given, by a door of its own."""
    known = [*_RULE, *_ROW, *more, *row.options]
    for name in overrides:
        if name not in known:
            near = hint(name, [*known, *named])
            raise ValueError(
                f"{place}{name}: this is not an option of {row.name!r}.{near} There are: {', '.join(known)}."
            )


def _check_exclude(row: Method, exclude: object) -> None:
    if exclude is not None and row.rule is None:
        raise ValueError(
            f"exclude= has no meaning for {row.name!r}, which trains every weight that takes part. To train all but what another "
            "delta changes, choose 'random' with keep=1.0 and targets='all'."
        )
    if exclude is not None and "rows" in row.required:  # another row would fill the budget
        raise ValueError(
            "exclude= has no meaning for rows that are named one by one: leave those that must not train out of rows=."
        )


def _configured(
    row: Method, parts: Mapping[str, Part] | None, keep: Any, targets: Targets | None, overrides: Mapping[str, Any]
) -> tuple[Method, Rule | None]:
    """The row and its rule with everything the caller asked for; pools that need the model's parts wait for them."""
    asked = {k: choice(k, v) for k, v in overrides.items() if k in (*_RULE, *_ROW)}
    if row.rule is None:
        for name, given in {"keep": keep, **asked}.items():
            if given not in (None, 1.0):
                raise ValueError(
                    f"{name}={given!r} has no meaning for {row.name!r}, which trains every weight that takes part."
                )
        return row, None if targets is None else Rule(_everything, Unit("matrix"), keep=1.0, targets=targets)
    changes = {**_own_options(row, overrides), **asked}
    rule = row.rule
    if row.pools is not None and parts is not None:
        rule = replace(rule, pool=row.pools(parts))
    fields = {k: v for k, v in changes.items() if k in _OWN}
    fields |= {k: v for k, v in (("keep", keep), ("targets", targets)) if v is not None}
    if "unit" in asked and asked["unit"].kind in WHOLE and rule.pool is by_tensor:
        fields = {"pool": by_model, **fields}  # a budget of whole tensors means nothing in a single one
    row = replace(row, **{k: v for k, v in changes.items() if k in (*_ROW, "calibration")})
    return row, replace(rule, **fields)


def _own_options(row: Method, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the row's own options change of it."""
    if missing := [name for name in row.required if overrides.get(name) is None]:
        raise ValueError(f"{row.name!r} needs {missing[0]}=: see `finetooth methods {row.name}`.")
    if row.configure is None:
        return {}
    own = {**row.options, **{k: v for k, v in overrides.items() if k in row.options}}
    for name, default in row.options.items():
        _check_like(name, own[name], default)
    try:
        return row.configure(**own)
    except TypeError as error:
        raise ValueError(f"the options of {row.name!r} are {own}: {error}.") from error


def _check_like(name: str, given: Any, default: Any) -> None:
    """ValueError unless an option is of the kind that its default is: true or false, a text, a whole number, or a number.

    One without a default is checked by the row.
    """
    if default is None:
        return
    if isinstance(default, str):
        good, kind = isinstance(given, str), "a text"
    elif isinstance(default, bool):
        good, kind = isinstance(given, bool), "true or false"
    else:
        number = (int,) if isinstance(default, int) else (int, float)
        good = isinstance(given, number) and not isinstance(given, bool)
        kind = "a whole number" if isinstance(default, int) else "a number"
    if not good:
        raise ValueError(f"{name}={given!r}: expected {kind}.")


def _everything(w: Any) -> Tensor:
    return w.value.new_ones(1)  # type: ignore[no-any-return]
