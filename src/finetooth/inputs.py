"""What a comparison reads, by content: results that were made of other contents under the same names are not gone on with.

Files are hashed whole. Of a model's folder the first and the last megabyte of every file of weights and its size are, so that starting
a comparison of a large one costs nothing; weights that were trained again differ there.

Not covered: a model or an adapter on the hub, by its name alone; files that a runner of one's own opens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from finetooth import run
from finetooth.recipe import Recipe, RecipeError

_PART = 1 << 20


def digests(recipe: Recipe, **files: Path | None) -> dict[str, str]:
    """Hashes by the key that names what was hashed; what is no file or folder here has none."""
    named = {
        "data.train": recipe.data.train,
        "data.eval": recipe.data.eval,
        "evaluate.forgetting": recipe.evaluate.forgetting,
    }
    named |= {key: str(file) for key, file in files.items() if file is not None}
    found = {key: _file(Path(name)) for key, name in named.items() if name is not None and Path(name).is_file()}
    return {**found, **({"model": _model(Path(recipe.model))} if Path(recipe.model).is_dir() else {})}


def require_same(found: dict[str, str], file: Path) -> None:
    """RecipeError if `file` has noted other hashes; else note these."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if changed := sorted(key for key in found.keys() & known.keys() if found[key] != known[key]):
        raise RecipeError(
            f"{file.parent} has results that were made with another content of {' and '.join(changed)}: give another --out."
        )
    run.write_json(file, {**known, **found})


def _file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (".safetensors", ".json", ".model")):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name}\n{size}\n".encode() + file.read(_PART))
            file.seek(max(0, size - _PART))
            digest.update(file.read(_PART))
    return digest.hexdigest()
