"""The run folder: what is written, and that nothing in it is overwritten by accident.

recipe.yaml  environment.json  metrics.jsonl  checkpoints/  delta.safetensors  results.json  README.md

`recipe.yaml` and the checkpoints hold whole paths, which resuming needs. The delta, the results and the README, which are
for others to read, do not.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetooth import embedded
from finetooth.recipe import Recipe, RecipeError

LIBRARIES = (
    *("finetooth", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("lm_eval", "sacrebleu", "rouge-score"),  # what measures
)


def check(recipe: Recipe, resume: bool) -> None:
    """Raise RecipeError if the output folder is in use, or holds nothing that could be resumed."""
    folder = Path(recipe.output)
    used = folder.is_dir() and any(folder.iterdir())
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output={folder} is a file: give a folder.")
    if used and not resume:
        raise RecipeError(f"output={folder} is not empty: give another folder, or --resume to continue the run in it.")
    if resume:
        _same(recipe, folder)


def start(recipe: Recipe) -> Path:
    """Make the folder and say in it what is about to be run."""
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    write_json(folder / "environment.json", environment())
    return folder


def _same(recipe: Recipe, folder: Path) -> None:
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        raise RecipeError(f"there is no run to resume in {folder}: recipe.yaml is missing.")
    if last_checkpoint(folder) is None:
        raise RecipeError(f"there is no complete checkpoint in {folder / 'checkpoints'}: start again without --resume.")
    if saved.read_text(encoding="utf-8") != recipe.to_yaml():
        raise RecipeError(f"the recipe is not the one that {folder} was started with: compare it with {saved}.")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that the trainer finished writing."""
    found = [p for p in folder.glob("checkpoints/checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def environment() -> dict[str, Any]:
    """Versions of all that has a part in the numbers."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    libraries = {name: _version(name) for name in LIBRARIES}
    return {
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        **libraries,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read."""
    path.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; NaN and infinities, which JSON does not have, are null.

    >>> to_json({"loss": float("nan"), "step": 3})
    '{"loss": null, "step": 3}'
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def card(recipe: Recipe, results: dict[str, Any], paper: str) -> str:
    """The run's README: what this is, how it was made, what came out, how to use it. It has no paths of this machine."""
    before, after = results["before"], results["after"]
    lines = "\n".join(
        f"| {name.replace('_', ' ')} | {_figure(before.get(name))} | {_figure(after[name])} |" for name in after
    )
    base, name = results["base"], recipe.method.name
    return f"""---
{_front(recipe, base)}
library_name: finetooth
tags: [finetooth, {name}]
---

# {base}, fine-tuned with {name}

`delta.safetensors` holds the {results["changed"]:,} weights of {results["weights"]:,} ({results["share"]:.2%}) that
fine-tuning changed: {results["delta_bytes"]:,} bytes. Method: {name} ({paper}).

| | before | after |
|---|---|---|
{lines}

Losses are mean token cross-entropies in nats; "general loss" is on the text that should not be forgotten. Taking the
delta off gave the base back bit for bit: {"yes" if results["reverted"] else "NO"}.

## Use

```python
{_use(recipe, base)}```

The weights keep the licence of the base model and of the training data.

## Recipe

Of local paths only the last part is shown.

```yaml
{recipe.public().to_yaml()}```
"""


def _is_local(recipe: Recipe) -> bool:
    return Path(recipe.model).is_dir()


def _is_embedded(recipe: Recipe) -> bool:
    return recipe.public().model.startswith(embedded.PREFIX)


def _front(recipe: Recipe, base: str) -> str:
    """`base_model` is a hub id and nothing else; a folder's name would be a link to nowhere."""
    if not _is_local(recipe):
        return f"base_model: {base}"
    if _is_embedded(recipe):
        return f"# no base_model: {base} is a part of the package finetooth"
    return f"# base_model: the hub id of {json.dumps(base, ensure_ascii=False)}, a local folder, if it has one"


def _use(recipe: Recipe, base: str) -> str:
    """Python that loads the base, wherever it is, and applies the delta."""
    first, where = "import finetooth, torch", f"base = {base!r}"
    if _is_embedded(recipe):
        first, where = "import finetooth, finetooth.embedded, torch", f"base = finetooth.embedded.path({base!r})"
    elif _is_local(recipe):
        where = f"base = {'path/to/' + base!r}  # the base was a local folder of this name: put its path, or its hub id"
    dtype = "float32" if recipe.train.precision == "fp32" else "bfloat16"
    return f"""{first}
from transformers import AutoModelForCausalLM

{where}
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})
inverse = finetooth.Delta.load("delta.safetensors").apply(model)  # refuses a base with other weights
"""
