"""What a run will take, before a weight is read: bytes for each part and phase, what trains, and the cards it fits.

The run is rehearsed (`rehearsal.py`) on tensors without values: the model from its config alone, calibration, then two
optimizer steps of the longest batch with the loss that TRL's trainer computes. Live bytes are counted as they come and go
(`meter.py`), and the peak is the largest of all phases. Making the delta is one more: it holds the new values and those they
replace in the memory of the host.

The longest batch is `train.batch_size` rows as long as the longest training row, of which at least one is shorter where
lengths differ, so that it is padded. A training file over 16 MB is not read: rows are then `train.max_length` long.

A card fits if it holds the peak on a GPU, a twentieth more for blocks that do not fit into each other, and 1 GiB for a CUDA
context and the libraries' workspaces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from finetooth.anatomy import survey
from finetooth.jobs import check_context, check_evaluation, check_method
from finetooth.longest import Batch, batch_of
from finetooth.recipe import Recipe
from finetooth.rehearsal import Rehearsal, rehearse

# Usable GiB of cards by the size they are sold under, as their drivers report it.
CARDS = {"8 GB": 8.0, "12 GB": 12.0, "16 GB": 16.0, "24 GB": 24.0, "32 GB": 31.8, "40 GB": 39.5, "48 GB": 47.5}
CARDS |= {"80 GB": 79.6, "96 GB": 95.0, "141 GB": 140.0, "192 GB": 191.0}
CONTEXT, LOST = (
    1.0,
    0.05,
)  # GiB of a CUDA context with its libraries, and the share that an allocator loses between blocks
ENTRY = 900  # bytes of a tensor's entry in a delta's header: four fingerprints, shape, unit, offsets


@dataclass
class Plan:
    """What `plan` found; bytes, but for counts of tensors and weights."""

    method: str
    dtype: str
    batch: Batch
    weights: int = 0
    state: int = 0
    gradients: int = 0  # alive after backward
    activations: int = 0  # what forward leaves for backward
    delta: int = 0
    gpu: int = 0  # the peak on a GPU
    phases: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    cards: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The largest of all phases."""
        return max(self.phases.values())

    @property
    def training(self) -> int:
        """The largest of the phases of training itself."""
        return max(v for k, v in self.phases.items() if k not in ("evaluate", "delta"))

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        shown = {k: v for k, v in vars(self).items() if k != "batch"}
        return {**shown, "batch": vars(self.batch), "peak": self.peak, "training_peak": self.training}


def plan(recipe: Recipe) -> Plan:
    """Rehearse a recipe; raises what training would raise before it loads anything."""
    check_method(recipe.method)
    check_evaluation(recipe)
    check_context(recipe)
    batch, gpu = batch_of(recipe), torch.cuda.is_available()
    run = rehearse(recipe, batch, gpu)
    found = Plan(recipe.method.name, recipe.train.precision, batch, run.weights, phases=run.phases)
    found.state, found.gradients, found.activations = run.opt.planned_state(), run.gradients, run.activations
    found.kinds, found.notes = kinds(run), run.opt.remarks()
    if recipe.method.exclude is not None:
        found.notes.append(
            "method.exclude was not looked at: where few units are left of a budget, less trains than is said here."
        )
    values = _changes(run, found)
    on_gpu = run.phases if gpu else rehearse(recipe, batch, True).phases
    if not gpu:  # a GPU's values are copied to the host for it
        found.phases["delta"] = found.weights + found.state + found.delta + values
    found.gpu = max(on_gpu.values())
    if on_gpu.get("evaluate", 0) == found.gpu:
        found.notes.append(
            f"evaluation takes more than training: evaluate.batch_size={recipe.evaluate.batch_size} and whole logits decide."
        )
    needed = found.gpu * (1 + LOST) + CONTEXT * 2**30
    found.cards = {name: needed <= size * 2**30 for name, size in CARDS.items()}
    return found


def kinds(run: Rehearsal) -> dict[str, dict[str, int]]:
    """What trains and what does not, by kind of layer: tensors, weights, those chosen at a step, bytes of state."""
    model, opt = run.model, run.opt
    parts, chosen, out = survey(model), opt.chosen(), dict[str, dict[str, int]]()
    for name, p in model.named_parameters():
        part = parts[name]
        label = f"{part.kind}, {part.place}" if part.place and part.kind != "norm" else part.kind
        line = out.setdefault(label, {"tensors": 0, "weights": 0, "chosen": 0, "state": 0})
        more = (1, p.numel(), chosen.get(name, 0), opt.planned_state([name]))
        for key, value in zip(line, more, strict=True):
            line[key] += value
    return out


def _changes(run: Rehearsal, found: Plan) -> int:
    """Set the size of the delta file, at most: rows that choose again may change every entry, the others what they chose.

    Returns the bytes of its values, which are held once more, as they were before.
    """
    opt, values = run.opt, 0
    chosen, again = opt.chosen(), opt.changes_everything()
    for name, p in run.model.named_parameters():
        if chosen.get(name) or (again and name in chosen):
            selection = None if again else opt.selection_of(name)
            units = 1 if selection is None else len(selection)
            size = (p.numel() if selection is None else selection.numel) * p.element_size()
            found.delta += units * 4 + size + ENTRY
            values += size
    return values
