"""A run as data: a strict schema that reads from YAML, takes dotted overrides, and writes back to YAML.

Unknown keys are errors that name the nearest right one. `${NAME}` in a string is an environment variable; a
relative path of a model or data is relative to the recipe's file, that of `output` to the current folder;
`embedded:NAME` is a part of this package. All of it, and that the files exist, is checked before anything is loaded.
A located recipe has whole paths, so that a run resumes from any folder; what is published has their last parts only.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from finetooth import embedded
from finetooth.schema import sentences, takes


class RecipeError(ValueError):
    """A recipe that cannot be run: what was given, where, and the choices."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """true and false are numbers to Python."""
        field = cls.model_fields.get(str(info.field_name))
        if isinstance(value, bool) and field is not None and field.annotation is not bool:
            raise ValueError(f"expected {takes(field)}")
        return value


class MethodPart(_Part):
    """A row of METHODS and what is changed of it."""

    model_config = ConfigDict(extra="allow")
    name: str = "gmt"
    keep: float | int | dict[str, float | int] | None = None
    targets: str | list[str] | None = None  # all, blocks, linear, dense-linear, or patterns of parameter names
    exclude: str | list[str] | None = None  # deltas whose entries must not train: files, run folders, hub ids
    calibration: str | None = None  # a file like data.train to measure on instead
    calibration_rows: int = Field(256, ge=1)  # rows of the training data that a calibrated row may look at

    @model_validator(mode="before")
    @classmethod
    def _infinite(cls, given: Any) -> Any:
        """`inf` is a number in the fields that a row brings with it, as it is in the typed ones."""
        words = {"inf": math.inf, "-inf": -math.inf}
        if not isinstance(given, Mapping):
            return given
        return {k: words.get(v, v) if isinstance(v, str) else v for k, v in given.items()}


class OptimizerPart(_Part):
    lr: float = Field(1e-4, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, ge=0, allow_inf_nan=True)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    rounding: Literal["auto", "stochastic", "nearest"] = "auto"  # of weights below float32
    moments: Literal["fp32", "8bit"] = "fp32"  # how Adam's are kept between steps
    decay_to: Literal["zero", "base"] = "zero"

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("expected two numbers in [0, 1)")
        return value


class DataPart(_Part):
    train: str
    eval: str | None = None
    template: str = "{prompt}"  # what becomes of a prompt; other fields of the row may be named too
    separator: str = "\n"  # between prompt and completion, unless one of them brings white space
    packing: bool = False
    limit: int | None = Field(None, ge=1)
    eval_limit: int | None = Field(None, ge=1)


class TrainPart(_Part):
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    accumulate: int = Field(1, ge=1)
    max_length: int = Field(1024, ge=2)
    seed: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"  # the dtype the weights are held in
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = Field(None, ge=1)  # optimizer steps
    stop_after_nonfinite: int = Field(5, ge=1)
    report_to: tuple[str, ...] = ()  # names of transformers' reporters, such as tensorboard or wandb


class EvaluatePart(_Part):
    task: Literal["exact_match", "choice", "bleu", "rouge", "loss", "none"] = "loss"
    choices: list[str] | None = None  # task: choice, for rows that bring none of their own
    extract: str | None = None  # a regular expression whose first group is the answer in a generation
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(64, ge=1)
    forgetting: str | None = None  # a general text: .txt, .gz or .xz
    quantized_bits: int | None = Field(None, ge=2, le=8)  # gift-sw: also with the other columns in so many bits

    @field_validator("extract")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression, {error}") from error
        return value


class Recipe(_Part):
    """One run; `output` is the folder it writes."""

    model: str = Field(min_length=1)
    method: MethodPart = MethodPart()
    optimizer: OptimizerPart = OptimizerPart()
    data: DataPart
    train: TrainPart = TrainPart()
    evaluate: EvaluatePart = EvaluatePart()
    output: str = Field(min_length=1)
    merged: bool = False  # also write the whole tuned model

    def to_yaml(self) -> str:
        """The recipe with every default written out; it reads back as an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def to_json(self) -> Any:
        """The recipe as JSON, which has no infinities: they are the words that `parse` reads as such."""
        return _spelled(self.model_dump(mode="json"))

    def public(self) -> Recipe:
        """The recipe for others to read: of a whole path the last part, as the rest tells about this machine only."""
        data, evaluate = self.data, self.evaluate
        exclude = self.method.exclude
        named = [_shown(path) for path in exclude] if isinstance(exclude, list) else _shown(exclude)
        shown = {
            "model": _shown(self.model),
            "method": self.method.model_copy(update={"exclude": named, "calibration": _shown(self.method.calibration)}),
            "data": data.model_copy(update={"train": _shown(data.train), "eval": _shown(data.eval)}),
            "evaluate": evaluate.model_copy(update={"forgetting": _shown(evaluate.forgetting)}),
            "output": _shown(self.output),
        }
        return self.model_copy(update=shown)


def _shown(path: str | None) -> str | None:
    if path is None or not Path(path).is_absolute():
        return path
    ours = [embedded.PREFIX + name for name in embedded.FILES if embedded.path(name) == Path(path)]
    return ours[0] if ours else Path(path).name


def _spelled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _spelled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_spelled(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, apply `a.b=c` overrides, resolve its paths and check that they exist."""
    file = Path(path)
    if not file.is_file():
        hint = ", which is a folder: give the YAML file in it" if file.is_dir() else ""
        raise RecipeError(f"there is no recipe {file}{hint}.")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8-sig"), _Once)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{file} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{file} holds {type(raw).__name__}: a recipe is a mapping with model, data and output.")
    override(raw, overrides)
    recipe = parse(raw)
    return located(recipe, file.parent)


class _Once(yaml.SafeLoader):
    """YAML in which a key may stand once: of two values the first would silently be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping; RecipeError for a key that stands twice."""
        seen = set[str]()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise RecipeError(f"{key.value}: this key stands twice, again in line {key.start_mark.line + 1}.")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def parse(raw: Mapping[str, Any]) -> Recipe:
    """Validate a mapping; RecipeError names every key that is wrong and the nearest right one."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(sentences(Recipe, raw, error.errors()))) from error


def override(raw: dict[str, Any], overrides: Iterable[str]) -> None:
    """Apply `a.b=c` to a raw recipe; values are YAML, so `2e-4` needs its point: 2.0e-4."""
    for given in overrides:
        key, sign, value = given.partition("=")
        if not sign or not key:
            raise RecipeError(f"{given!r} is not an override: write a.b=value, such as optimizer.lr=2.0e-4.")
        *path, last = key.split(".")
        at: Any = raw
        for part in path:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise RecipeError(f"{given!r}: {part!r} is a value, not a section.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"{given!r}: the value is not YAML: {error}") from error
        at[last] = _number(parsed) if isinstance(parsed, str) else parsed


def _number(text: str) -> Any:
    """YAML reads 2e-4 as text; everyone means the number."""
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else text


def located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with absolute paths, `output` below the current folder; RecipeError for a file that is not there."""
    data, evaluate, method = recipe.data, recipe.evaluate, recipe.method
    found = {
        "model": _model(recipe.model, folder),
        "method": method.model_copy(
            update={
                "exclude": _deltas(method.exclude, folder),
                "calibration": _file("method.calibration", method.calibration, folder),
            }
        ),
        "data": data.model_copy(
            update={"train": _file("data.train", data.train, folder), "eval": _file("data.eval", data.eval, folder)}
        ),
        "evaluate": evaluate.model_copy(
            update={"forgetting": _file("evaluate.forgetting", evaluate.forgetting, folder)}
        ),
        "output": str(_whole(Path(_expanded("output", recipe.output)))),
    }
    return recipe.model_copy(update=found)


def _whole(path: Path) -> Path:
    """Absolute and without `..`. A link keeps its own name: what it points to may have lost the ending."""
    path = path.expanduser()
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _expanded(key: str, text: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise RecipeError(f"{key}={text!r}: the environment variable {name} is not set.")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _file(key: str, given: str | None, folder: Path) -> str | None:
    if given is None:
        return None
    if given.startswith(embedded.PREFIX):
        return str(embedded.path(given))
    file = _whole(folder / Path(_expanded(key, given)).expanduser())
    if not file.is_file():
        raise RecipeError(f"{key}: there is no file {file}.")
    return str(file)


def _deltas(given: str | list[str] | None, folder: Path) -> str | list[str] | None:
    if given is None:
        return None
    if isinstance(given, list):
        return [str(_deltas(one, folder)) for one in given]
    text = _expanded("method.exclude", given)
    local = _whole(folder / Path(text).expanduser())
    if local.exists():
        return str(local)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text):
        return text  # a hub id
    raise RecipeError(f"method.exclude: {given!r} is neither a delta file or run folder ({local}) nor a hub id.")


def _model(given: str, folder: Path) -> str:
    if given.startswith(embedded.PREFIX):
        return str(embedded.path(given))
    text = _expanded("model", given)
    local = _whole(folder / Path(text).expanduser())
    if local.is_dir():
        return str(local)
    if re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", text) and not local.exists():
        return text  # a hub id: the user named it
    raise RecipeError(f"model={given!r} is neither a folder ({local}) nor a hub id such as org/name.")
