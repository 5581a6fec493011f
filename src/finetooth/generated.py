"""What trainers that write their own texts (TRL's GRPOTrainer and RLOOTrainer) keep in memory and in no checkpoint.

They write texts for several steps at once, `steps_per_generation` batches used `num_iterations` times each: a checkpoint taken
in between lacks what is left of them, and a run that goes on from it writes others. And the order of their prompts comes from
a generator that is made anew with the seed: an epoch that a run goes on in would have the first epoch's order.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from torch.utils.data import Sampler
from transformers.trainer_utils import has_length


def check(args: Any, state: Any, loader: Any) -> None:
    """ValueError for a run that would save, or goes on, where texts are left from the last generation."""
    every = getattr(args, "steps_per_generation", None)
    if every is None:
        return
    every *= getattr(args, "num_iterations", 1)
    accumulated = args.gradient_accumulation_steps
    steps = every // gcd(every, accumulated)  # optimizer steps from one that ends with nothing left to the next
    epoch = -(-len(loader) // accumulated) if has_length(loader) else state.max_steps  # ends with nothing left
    words = (
        f"texts are written for {every} batches at once (steps_per_generation x num_iterations), of which a step takes "
        f"{accumulated}, and no checkpoint has what is left of them: "
    )
    if state.global_step % epoch % steps:
        raise ValueError(
            f"the checkpoint is of step {state.global_step}; {words}go on from one of a multiple of {steps} steps into its epoch."
        )
    saves = range(state.save_steps, state.max_steps, state.save_steps) if args.save_strategy == "steps" else range(0)
    if any(step % epoch % steps for step in saves):
        raise ValueError(
            f"save_steps={state.save_steps} saves what cannot be gone on from: {words}save_steps must be a multiple of {steps}"
            f"{f' that divides the {epoch} steps of an epoch' if epoch < state.max_steps else ''}, or save_strategy 'epoch'; "
            "or the callback not seal (seal=False)."
        )


def go_on(state: Any, loader: Any) -> None:
    """Draw the orders of the epochs that are done, so that the next one has its own."""
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    if isinstance(sampler, Sampler) and type(sampler).__name__ == "RepeatSampler":
        for _ in range(int(state.epoch or 0)):
            next(iter(sampler), None)  # an order is drawn whole, when its first index is asked for
