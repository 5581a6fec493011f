"""PEFT's LoRA and SHiRA under a recipe, for comparisons: the same data, steps, schedule and evaluation, AdamW of torch.

    method: {name: lora, r: 16} or {name: shira, share: 0.01}

`embeddings: true` gives LoRA an adapter on the token embeddings too, and none on the head: TRL, which reads the head's weight itself, refuses
one there. It is not merged: where embeddings and head are one weight, that would change what the head computes.

What is written is what `finetooth train` writes as `results.json`, so that the two can stand side by side. `delta_bytes` is the
size of PEFT's adapter file.

Not covered: resuming; a run that was interrupted begins anew.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetooth import run
from finetooth.anatomy import matching, survey
from finetooth.jobs import Job, check_context, check_evaluation, load
from finetooth.measure import Measured, forgetting, measure, notes
from finetooth.recipe import MethodPart, Recipe, RecipeError
from finetooth.train import arguments, dataset, fitted, peak_bytes
from finetooth.trainer import Trainer

NAMES = ("lora", "shira")
_OPTIONS: dict[str, dict[str, Any]] = {"lora": {"r": 16, "alpha": None, "embeddings": False}, "shira": {"share": 0.01}}
_ADAPTER = "adapter_model.safetensors"


def check(part: MethodPart, merged: bool = False) -> None:
    """RecipeError for an option that the outsider has not, or that cannot be `merged`."""
    options = _OPTIONS[part.name]
    if part.keep is not None or part.targets is not None:
        raise RecipeError(f"{part.name} has neither keep nor targets: its options are {', '.join(options)}.")
    for key, value in (part.model_extra or {}).items():
        if key not in options:
            raise RecipeError(f"{part.name} has no option {key!r}: there are {', '.join(options)}.")
        if isinstance(options[key], bool):
            if not isinstance(value, bool):
                raise RecipeError(f"{part.name}:{key}={value!r}: give true or false.")
        elif not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise RecipeError(f"{part.name}:{key}={value!r}: give a number above 0.")
    if merged and (part.model_extra or {}).get("embeddings"):
        raise RecipeError("merged: true cannot be had with lora:embeddings=true: the head has no adapter.")


def wrapped(model: nn.Module, part: MethodPart, seed: int) -> Any:
    """The model with PEFT's adapter on every linear layer of its blocks; of LoRA on its embeddings, if wanted."""
    try:
        from peft import LoraConfig, ShiraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError(
            f"{part.name} is PEFT's, which is not installed: pip install 'finetooth[compare]'."
        ) from error
    options, parts = _OPTIONS[part.name] | (part.model_extra or {}), survey(model)
    wanted = matching("linear", parts)
    if options.get("embeddings"):
        wanted += [name for name, one in parts.items() if one.kind == "embedding" and one.token_rows]
    layers = [name.removesuffix(".weight") for name in wanted]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if part.name == "lora":
            alpha = options["alpha"] or 2 * options["r"]  # of everybody's recipes
            tuned = get_peft_model(model, LoraConfig(r=options["r"], lora_alpha=alpha, target_modules=layers))
            return _drawn(tuned, seed)
        shapes = [model.get_parameter(f"{name}.weight").shape for name in layers]
        least = sum(o + i for o, i in shapes) / sum(o * i for o, i in shapes)
        if (rank := round(options["share"] / least)) < 1:
            raise RecipeError(
                f"shira: share={options['share']:g} is less than PEFT trains: rank 1 is {least:.2g} of the matrices."
            )
        config = ShiraConfig(r=rank, mask_type="random", random_seed=seed, target_modules=layers)
        return get_peft_model(model, config)


def _drawn(tuned: Any, seed: int) -> Any:
    """LoRA's A, and the B of an embedding, from PEFT's distributions, but by a generator of their own; the other is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in tuned.named_parameters():
        if "lora_A" in name:
            p.data.copy_(nn.init.kaiming_uniform_(torch.empty(p.shape), a=math.sqrt(5), generator=generator))
        elif "lora_embedding_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator))
    return tuned


def adamw(tuned: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """torch's, over what trains, with the settings of the recipe."""
    rate, trained = recipe.optimizer, [p for p in tuned.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, rate.lr, rate.betas, rate.eps, rate.weight_decay)


def train(recipe: Recipe, before: Measured | None = None) -> dict[str, Any]:
    """Run a recipe whose method is `lora` or `shira`, in an empty folder; the results, as they are also written.

    `before` is what `measure` said of the base, where it is known.
    """
    started = time.monotonic()
    check(recipe.method, recipe.merged)
    check_evaluation(recipe)
    check_context(recipe)
    shutil.rmtree(recipe.output, ignore_errors=True)
    folder = run.start(recipe)
    job = load(recipe, folder)
    base, _ = before or measure(job)
    job.model = tuned = wrapped(job.model, recipe.method, recipe.train.seed)
    args = arguments(job, clip=recipe.optimizer.max_grad_norm or 0.0, save=False)
    opt = adamw(tuned, recipe)
    costs = fitted(
        Trainer(
            model=tuned, args=args, train_dataset=dataset(job), processing_class=job.tokenizer, optimizers=(opt, None)
        )
    )
    tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)  # the base's, by default beside theirs
    after, _ = measure(job)
    facts = {"before": base, "after": after, "forgetting": forgetting(base, after), "data": notes(job), **costs}
    results = {
        "method": recipe.method.name,
        "base": Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model,
        **facts,
        **size(tuned, folder),
        "peak_bytes": peak_bytes(),
        "seconds": round(time.monotonic() - started, 1),
        "run": folder.name,
    }
    if recipe.merged:
        merge(job, tuned)
    run.write_json(folder / "results.json", results)
    return results


def size(tuned: nn.Module, folder: Path) -> dict[str, Any]:
    """How much trains, and what it takes on disk and in the optimizer."""
    n = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in tuned.parameters()) - n
    stored = (folder / "adapter" / _ADAPTER).stat().st_size
    return {"changed": n, "weights": weights, "share": n / weights, "delta_bytes": stored, "state_bytes": 8 * n}


def merge(job: Job, tuned: Any) -> None:
    """Write the whole tuned model, as `merged: true` asks for."""
    tuned.merge_and_unload().save_pretrained(job.folder / "merged")
    job.tokenizer.save_pretrained(job.folder / "merged")
