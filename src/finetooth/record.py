"""What a run folder says of its run, read for a report: everything that is there, and None for what is not.

A run that was interrupted has no results and no delta, and maybe a line that is not whole. What is there must be right: a file that
cannot be read is a ValueError that names it.

Paths are those of `Recipe.public`: a report is for others to read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetooth import run
from finetooth.delta import Delta
from finetooth.lines import Lines
from finetooth.recipe import Recipe, RecipeError, parse
from finetooth.rule import layer, stem

Cells = dict[tuple[str, str], tuple[int, int]]  # (layer, kind) -> (entries meant, entries there are)


@dataclass(frozen=True)
class Tensors:
    """Of tensors, how many entries are meant, and how many there are."""

    of: dict[str, int]
    meant: dict[str, float]

    @property
    def share(self) -> float:
        """Of all entries of these tensors."""
        return sum(self.meant.values()) / max(sum(self.of.values()), 1)

    def cells(self) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
        """Layers, kinds of matrices, and shares; what lies outside the blocks is a layer of its own name."""
        sums: dict[tuple[str, str], tuple[float, int]] = {}
        for name, size in self.of.items():
            cell = place(name)
            meant, of = sums.get(cell, (0.0, 0))
            sums[cell] = (meant + self.meant.get(name, 0.0), of + size)
        shares = {cell: meant / max(of, 1) for cell, (meant, of) in sums.items()}
        short = _short([*dict.fromkeys(kind for _, kind in shares)])
        rows = [*dict.fromkeys(row for row, _ in shares)]
        return rows, [*short.values()], {(row, short[kind]): share for (row, kind), share in shares.items()}

    def blocks(self) -> Tensors:
        """Those in the blocks."""
        inside = {name: size for name, size in self.of.items() if layer(name)}
        return Tensors(inside, {name: n for name, n in self.meant.items() if name in inside})

    def outside(self) -> list[tuple[str, float, int]]:
        """Name, share and size of the others."""
        names = [name for name in self.of if not layer(name)]
        return [(name, self.meant.get(name, 0.0) / max(self.of[name], 1), self.of[name]) for name in names]


def place(name: str) -> tuple[str, str]:
    """The layer's number and the kind of a parameter; experts of one kind are one.

    >>> place("model.layers.3.self_attn.q_proj.weight"), place("model.layers.0.mlp.experts.7.up_proj.weight")
    (('3', 'self_attn.q_proj'), ('0', 'mlp.experts.up_proj'))
    """
    block = layer(name)
    kind = ".".join(part for part in stem(name)[len(block) :].strip(".").split(".") if not part.isdigit())
    tail = name[len(stem(name)) :]
    return block.rpartition(".")[2], kind + (tail if tail not in ("", ".weight") else "")


def _short(kinds: list[str]) -> dict[str, str]:
    """The last part of a name, where no other kind has it.

    >>> _short(["attn.c_proj", "mlp.c_proj", "attn.c_attn"])
    {'attn.c_proj': 'attn.c_proj', 'mlp.c_proj': 'mlp.c_proj', 'attn.c_attn': 'c_attn'}
    """
    tails = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: tail if tails.count(tail) == 1 else kind for kind, tail in zip(kinds, tails, strict=True)}


@dataclass(frozen=True)
class Record:
    """The files of a run."""

    folder: Path
    recipe: Recipe
    environment: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    selection: list[dict[str, Any]]
    resources: list[dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    results: Mapping[str, Any] | None = None
    delta: Delta | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines about training."""
        return [line for line in self.metrics if "loss" in line]

    def chosen(self) -> Tensors | None:
        """The entries chosen of every tensor: the mean over the lines that were noted."""
        if not self.selection or "of" not in self.selection[0]:
            return None
        of, now, total = self.selection[0]["of"], dict[str, int](), dict[str, float]()
        for line in self.selection:
            now |= line["chosen"]
            for name, count in now.items():
                total[name] = total.get(name, 0.0) + count
        return Tensors(of, {name: n / len(self.selection) for name, n in total.items()})

    def changed(self) -> Tensors | None:
        """The entries whose bits differ from the base's, of the tensors that the run knows or the delta holds."""
        if self.delta is None:
            return None
        changes = self.delta.changes
        sizes = {name: _numel(change.kind[0]) for name, change in changes.items()}
        of = (self.selection[0].get("of", {}) if self.selection else {}) | sizes
        return Tensors(of, {name: change.changed for name, change in changes.items()})

    def chance(self) -> float | None:
        """What two independent selections of this size would have in common, as a share of one."""
        if not self.selection or "first" not in self.selection[0]:
            return None
        of, first = self.selection[0]["of"], self.selection[0]["chosen"]
        if all(n in (0, of[name]) for name, n in first.items()):
            return None  # whole tensors: chance would choose others, and of which it would, only the rule knows
        return float(sum(n * n / of[name] for name, n in first.items()) / max(sum(first.values()), 1))


def read(folder: Path) -> Record:
    """A run folder; ValueError if it is none, or if a file of it cannot be read."""
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(
            f"{folder} holds no run: there is no recipe.yaml in it. Give the folder that `finetooth train` wrote."
        )
    try:
        recipe = parse(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    except (RecipeError, yaml.YAMLError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'recipe.yaml'} is not the recipe of a run: {error}") from error
    results, delta = read_json(folder / run.RESULTS, dict), folder / "delta.safetensors"
    return Record(
        folder,
        recipe.public(),
        read_json(folder / "environment.json", dict) or {},
        _lines(folder / run.METRICS),
        _lines(folder / run.SELECTION),
        _lines(folder / run.RESOURCES),
        read_json(folder / run.SAMPLES, list) or [],
        results,
        Delta.load(folder) if delta.is_file() else None,
        {path.name: sha256(path) for path in (delta, folder / "recipe.yaml", folder / run.RESULTS) if path.is_file()},
    )


def read_json(path: Path, kind: type) -> Any:
    """What a JSON file holds, None without the file; ValueError if it is something else."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path} holds {type(found).__name__}, and {kind.__name__} was expected.")
    return found


def sha256(path: Path) -> str:
    """The hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(path: Path) -> list[dict[str, Any]]:
    return Lines(path).read()


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
