"""The run's README, which is also its model card on the hub: what this is, how it was made, what came out, how to use it.

It is for others to read, so it holds no path of the machine that made it: of local files it shows the last part. The
front matter goes through huggingface_hub, which knows the hub's field names; the text is ours. A delta needs its base,
so its relation to it is `adapter` in the hub's words. `base_model` is left out where the base was a local folder: a
folder's name would be a link to nowhere.

Not covered: a licence in the front matter. The weights keep the base's and the data's, which a program cannot know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetooth import embedded
from finetooth.recipe import Recipe


def card(recipe: Recipe, results: Mapping[str, Any], paper: str, environment: Mapping[str, Any]) -> str:
    """The card of a run that is done: its recipe, `results.json`, the paper of its method, and `environment.json`."""
    base, name, version = results["base"], recipe.method.name, environment["finetooth"]
    return f"""---
{_front(recipe, base)}
---

# {base}, fine-tuned with {name}

`delta.safetensors` holds the {results["changed"]:,} weights of {results["weights"]:,} ({results["share"]:.2%}) that
fine-tuning changed: {results["delta_bytes"]:,} bytes. Method: {name} ({paper}).
Base: {base}{_at(results.get("revision"))}; the file carries the fingerprint of every tensor it changes.

## Results

| | before | after |
|---|---|---|
{_table(results["before"], results["after"])}

Losses are mean token cross-entropies in nats; "general loss" is on the text that should not be forgotten. Taking the
delta off gave the base back bit for bit: {"yes" if results["reverted"] else "NO"}.

## Use

With finetooth {version} or later:

```python
{_use(recipe, base)}```

On checkpoint folders, unless the model is a mixture of experts, which has other names there: `finetooth delta apply BASE delta.safetensors --out tuned` writes a model that `from_pretrained`
loads, `finetooth delta revert tuned delta.safetensors --base BASE --out again` takes it off, and `finetooth delta verify`
says which of the two a folder holds.

## Licence

The weights keep the licence of the base model and of the training data.

## Versions

| | |
|---|---|
{_versions(environment)}

## Recipe

`finetooth train` runs it. Every default is written out; of local paths only the last part is shown.

```yaml
{recipe.public().to_yaml()}```
"""


def _at(revision: str | None) -> str:
    return f" at revision `{revision}`" if revision else ""


def _table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {_figure(before.get(name))} | {_figure(after[name])} |" for name in after]
    return "\n".join(rows) or "| nothing was measured | – | – |"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _versions(environment: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in environment.items())


def _is_local(recipe: Recipe) -> bool:
    return Path(recipe.model).is_dir()


def _is_embedded(recipe: Recipe) -> bool:
    return recipe.public().model.startswith(embedded.PREFIX)


def _front(recipe: Recipe, base: str) -> str:
    """The hub's metadata; where there is no `base_model`, a comment that says why."""
    from huggingface_hub import ModelCardData

    link: dict[str, Any] = {} if _is_local(recipe) else {"base_model": base, "base_model_relation": "adapter"}
    tags = ["finetooth", recipe.method.name]
    front = ModelCardData(library_name="finetooth", pipeline_tag="text-generation", tags=tags, **link).to_yaml()
    if _is_embedded(recipe):
        front += f"\n# no base_model: {base} is a part of the package finetooth"
    elif _is_local(recipe):
        front += f"\n# base_model: the hub id of {json.dumps(base, ensure_ascii=False)}, a local folder, if it has one"
    return front


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
delta = "delta.safetensors"  # a file, a run folder, or the hub id of the repository that this card is in
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})
inverse = finetooth.Delta.load(delta).apply(model)  # refuses a base with other weights
# inverse.apply(model) gives the base again, bit for bit
"""
