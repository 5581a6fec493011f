"""`finetooth demo`: the main job on the embedded model and data, offline, in under a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetooth.cli import show

# What each row needs to show something in 100 steps on a model 64 wide: found by trying, not tuned to a target.
SETTINGS: dict[str, dict[str, Any]] = {
    "gift-sw": {"method": {"keep": 8}},
    "random": {"method": {"keep": 0.1}},
    "grad": {"method": {"keep": 0.1}},
    "snip": {"method": {"keep": 0.1}},
    "magnitude": {"method": {"keep": 0.1}},
}


def demo(
    method: Annotated[str, typer.Option(help="A row of `finetooth methods`.")] = "gmt",
    output: Annotated[Path | None, typer.Option(help="The run folder to write; runs/demo-METHOD by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")] = False,
) -> None:
    """Fine-tune stories260K on BANKING77, see what it forgets of TinyStories, and take it off again."""
    with show.clean_errors():
        from finetooth.recipe import located, parse

        recipe = located(parse(_recipe(method, output or _free(Path("runs") / f"demo-{method}"))), Path.cwd())
        show.quiet()
        from finetooth.train import train

        with show.bar(method) as progress:
            found = train(recipe, progress=progress, say=show.note)
        show.results(found, as_json)


def _free(folder: Path) -> Path:
    """The folder, or its name with the first free number."""
    if not folder.exists():
        return folder
    return next(new for n in range(2, 10_000) if not (new := folder.with_name(f"{folder.name}-{n}")).exists())


def _recipe(method: str, output: Path) -> dict[str, Any]:
    return {
        "model": "embedded:stories260K",
        "method": {"name": method, **SETTINGS.get(method, {}).get("method", {})},
        "optimizer": {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 5},
        "data": {"train": "embedded:banking77/train", "eval": "embedded:banking77/test", "eval_limit": 200},
        "train": {"epochs": 1.4, "batch_size": 32, "max_length": 256},
        "evaluate": {
            "task": "exact_match",
            "max_new_tokens": 24,
            "batch_size": 200,
            "forgetting": "embedded:tinystories",
        },
        "output": str(output),
    }
