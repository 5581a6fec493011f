"""PEFT's LoRA and SHiRA under a recipe, for comparisons: the same data, steps, schedule and evaluation, AdamW of torch.

    python -m finetooth.outsiders RECIPE.yaml        # method: {name: lora, r: 16} or {name: shira, share: 0.01}

What is written is what `finetooth train` writes as `results.json`, so that the two can stand side by side. `delta_bytes` is the
size of PEFT's adapter file.

Not covered: resuming; a run that was interrupted begins anew.
"""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetooth import run
from finetooth.anatomy import matching, survey, tied
from finetooth.jobs import Job, check_context, check_evaluation, load
from finetooth.measure import forgetting, measure, notes
from finetooth.recipe import MethodPart, Recipe, RecipeError
from finetooth.recipe import load as read
from finetooth.train import arguments, dataset, peak_bytes
from finetooth.trainer import Trainer

NAMES = ("lora", "shira")
_OPTIONS: dict[str, dict[str, Any]] = {"lora": {"r": 16, "alpha": None}, "shira": {"share": 0.01}}
_ADAPTER = "adapter_model.safetensors"


def check(part: MethodPart) -> None:
    """RecipeError for an option that the outsider has not."""
    options = _OPTIONS[part.name]
    if part.keep is not None or part.targets is not None:
        raise RecipeError(f"{part.name} has neither keep nor targets: its options are {', '.join(options)}.")
    for key, value in (part.model_extra or {}).items():
        if key not in options:
            raise RecipeError(f"{part.name} has no option {key!r}: there are {', '.join(options)}.")
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise RecipeError(f"{part.name}:{key}={value!r}: give a number above 0.")


def wrapped(model: nn.Module, part: MethodPart, seed: int) -> Any:
    """The model with PEFT's adapter on every linear layer of its blocks."""
    try:
        from peft import LoraConfig, ShiraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError(
            f"{part.name} is PEFT's, which is not installed: pip install 'finetooth[compare]'."
        ) from error
    layers = [name.removesuffix(".weight") for name in matching("linear", survey(model), tied(model))]
    options = _OPTIONS[part.name] | (part.model_extra or {})
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if part.name == "lora":
            alpha = options["alpha"] or 2 * options["r"]  # of everybody's recipes
            return get_peft_model(model, LoraConfig(r=options["r"], lora_alpha=alpha, target_modules=layers))
        shapes = [model.get_parameter(f"{name}.weight").shape for name in layers]
        rank = max(1, round(options["share"] * sum(o * i for o, i in shapes) / sum(o + i for o, i in shapes)))
        config = ShiraConfig(r=rank, mask_type="random", random_seed=seed, target_modules=layers)
        return get_peft_model(model, config)


def train(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe whose method is `lora` or `shira`; the results, as they are also written."""
    started = time.monotonic()
    check(recipe.method)
    check_evaluation(recipe)
    check_context(recipe)
    folder = run.start(recipe)
    job = load(recipe, folder)
    before, _ = measure(job)
    tuned = wrapped(job.model, recipe.method, recipe.train.seed)
    rate, trained = recipe.optimizer, [p for p in tuned.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, rate.lr, rate.betas, rate.eps, rate.weight_decay)
    args = arguments(job, clip=rate.max_grad_norm or 0.0, save=False)
    Trainer(
        model=tuned, args=args, train_dataset=dataset(job), processing_class=job.tokenizer, optimizers=(opt, None)
    ).train()
    tuned.save_pretrained(folder / "adapter")
    job.model = tuned
    after, _ = measure(job)
    return _written(job, trained, before, after, started)


def _written(
    job: Job, trained: list[nn.Parameter], before: dict[str, float], after: dict[str, float], started: float
) -> dict[str, Any]:
    recipe, folder, n = job.recipe, job.folder, sum(p.numel() for p in trained)
    weights = sum(p.numel() for p in job.model.parameters()) - n
    results = {
        "method": recipe.method.name,
        "base": Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model,
        "before": before,
        "after": after,
        "forgetting": forgetting(before, after),
        "changed": n,
        "weights": weights,
        "share": n / weights,
        "delta_bytes": (folder / "adapter" / _ADAPTER).stat().st_size,
        "data": notes(job),
        "state_bytes": 8 * n,
        "peak_bytes": peak_bytes(),
        "seconds": round(time.monotonic() - started, 1),
        "run": folder.name,
    }
    run.write_json(folder / "results.json", results)
    return results


def main() -> int:
    """One recipe; a folder that an interrupted run left is emptied first."""
    recipe = read(sys.argv[1])
    shutil.rmtree(recipe.output, ignore_errors=True)
    train(recipe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
