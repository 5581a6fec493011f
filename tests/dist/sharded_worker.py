"""One of two ranks: train rows under FSDP2, and save what rank 0 gets: masks, weights, delta, and state half way.

Then, from the state that one process saved half way, the second half: resume on another number of ranks.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from finetooth import Delta
from tests.laws.toy import DTYPES, Toy, batches, build, train

# A norm is a sum over ranks, in another order; stochastic rounding depends on the place in the shard.
EXACT = {"max_grad_norm": None, "rounding": "nearest"}


def sharded(model: nn.Module) -> nn.Module:
    """A layer by itself, as accelerate has it of the last ones, and the rest with the model."""
    fully_shard(model.get_submodule("model.layers.0.mlp.up_proj"))
    return fully_shard(model)


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    early = Toy()
    built = build("random", early)  # before there are ranks
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def mine(ids: list[torch.Tensor]) -> list[torch.Tensor]:
        return [b.chunk(2)[rank] for b in ids]

    calibration = [{"input_ids": b} for b in mine(batches(2, seed=9))]
    for case in cases:
        row, dtype = case.split(".")
        base = {n: p.detach().clone() for n, p in Toy(DTYPES[dtype]).named_parameters()}
        found = {}
        for kind in ("whole", "resumed"):
            model = sharded(Toy(DTYPES[dtype]))
            opt = build(row, model, weight_decay=0.1, calibration=calibration, base=base, **EXACT)
            ids = mine(batches(4))
            if kind == "resumed":
                half = torch.load(folder / f"{case}.half.pt", weights_only=True)  # noqa: TID251 - tensors only
                for name, p in model.named_parameters():
                    p.detach().copy_(torch.distributed.tensor.distribute_tensor(half["model"][name], p.device_mesh, p.placements))
                opt.load_state_dict(half["optimizer"])
                ids = ids[2:]
            for step in train(model, opt, ids):
                if kind == "whole" and step == 1:
                    found["half"] = {"optimizer": opt.state_dict(), "model": gathered(model)}
            opt.verify_frozen()
            chosen = {n: s.index for n, s in opt.selections().items()}
            found[kind] = {"model": gathered(model), "chosen": chosen, "state": opt.state_dict()["selective"]}
            delta = Delta.extract(model, opt)
            if rank == 0 and kind == "whole":
                delta.save(folder / f"{case}.delta.safetensors")
        if rank == 0:
            torch.save(found, folder / f"{case}.sharded.pt")
    clipped(folder, mine)
    refused(folder, early, built)
    dist.destroy_process_group()


def clipped(folder: Path, mine: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> None:
    model, base = sharded(Toy()), dict(Toy().named_parameters())
    opt = build("gmt", model, weight_decay=0.1, base=base, max_grad_norm=0.5)
    list(train(model, opt, mine(batches(4))))
    torch.save({"model": gathered(model), "norm": opt.grad_norm}, folder / ("clipped.pt" if not dist.get_rank() else "other.pt"))


def refused(folder: Path, early: Toy, built: torch.optim.Optimizer) -> None:
    """What is said to what cannot work, on rank 1; a collective call that only one rank refused would hang."""
    said = {}

    def try_(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)

    half = Toy()
    fully_shard(half.lm_head)
    try_("some", lambda: build("full", half, base=dict(Toy().named_parameters())))
    model = sharded(Toy())
    try_("eight bits", lambda: build("random", model, moments="8bit"))
    try_("structured", lambda: build("random", model, gradients="structured"))
    plain = Toy()
    plain.lm_head.weight.data[0] += 1
    delta = Delta.extract(plain, dict(Toy().named_parameters()))
    try_("apply", lambda: delta.apply(model))
    opt = build("random", model)
    state = opt.state_dict()
    try_("rank 1", lambda: opt.load_state_dict(state))
    list(train(model, opt, [b.chunk(2)[dist.get_rank()] for b in batches(1)]))
    before = opt.steps
    try_("checkpoint", lambda: get_optimizer_state_dict(model, opt))
    assert opt.steps == before
    sharded(early)
    held = dict(early.named_parameters())
    built.param_groups[0]["params"] = [held[name] for name in built.param_groups[0]["param_names"]]  # as accelerate does
    try_("early", lambda: list(train(early, built, [b.chunk(2)[dist.get_rank()] for b in batches(1)])))
    if dist.get_rank() == 1:
        torch.save(said, folder / "refused.pt")


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
