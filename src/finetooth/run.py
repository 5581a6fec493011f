"""The run folder: what is written, and that nothing in it is overwritten by accident.

recipe.yaml  environment.json  metrics.jsonl  checkpoints/  delta.safetensors  results.json  README.md
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetooth.recipe import Recipe, RecipeError

LIBRARIES = ("finetooth", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "safetensors")


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
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def card(recipe: Recipe, results: dict[str, Any], paper: str) -> str:
    """The run's README: what this is, how it was made, what came out, how to use it."""
    before, after = results["before"], results["after"]
    lines = "\n".join(
        f"| {name.replace('_', ' ')} | {_figure(before.get(name))} | {_figure(after[name])} |" for name in after
    )
    base, name = results["base"], recipe.method.name
    return f"""---
base_model: {base}
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
import finetooth, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.{"float32" if recipe.train.precision == "fp32" else "bfloat16"})
inverse = finetooth.Delta.load("delta.safetensors").apply(model)
```

The weights keep the licence of the base model and of the training data.

## Recipe

```yaml
{recipe.to_yaml()}```
"""
