"""Two ranks under FSDP2, a loop in plain PyTorch: the state is the whole's, on rank 0; random states are each rank's own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

import finetooth
from tests.resume.entries import ACCUMULATE, BATCH, EPOCHS, EVERY, ROWS, Ended, model_and_tokenizer, optimizer, tokens

PER_EPOCH = ROWS // (BATCH * ACCUMULATE * 2)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def fsdp2(row: str, out: Path) -> Ended:
    """Save on rank 0, load on both."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    model, tokenizer = model_and_tokenizer()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    opt = optimizer(row, model, tokenizer)
    data = {k: torch.tensor([row[k] for row in tokens(tokenizer)]) for k in ("input_ids", "labels")}
    done = 0
    if (folder := finetooth.last_good(out)) is not None:
        state = torch.load(folder / "state.pt", weights_only=True)  # noqa: TID251 - tensors only
        set_model_state_dict(model, state["model"], options=StateDictOptions(full_state_dict=True))
        opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(torch.load(folder / f"random-{rank}.pt", weights_only=True))  # noqa: TID251 - a tensor
        done = state["done"]
    model.train()
    for step in range(done, EPOCHS * PER_EPOCH):
        epoch, at = divmod(step, PER_EPOCH)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))[rank::ranks]
        for batch in order[at * BATCH * ACCUMULATE :][: BATCH * ACCUMULATE].split(BATCH):
            (model(**{k: v[batch] for k, v in data.items()}).loss / ACCUMULATE).backward()
        opt.step()
        opt.zero_grad()
        if (step + 1) % EVERY == 0:
            state = {
                "model": get_model_state_dict(model, options=WHOLE),
                "optimizer": opt.state_dict(),
            }  # on every rank
            with finetooth.saving(out / f"step-{step + 1}", keep=2) as folder:
                torch.save(torch.get_rng_state(), folder / f"random-{rank}.pt")
                if rank == 0:
                    torch.save({**state, "done": step + 1}, folder / "state.pt")
    return Ended(model, opt.state_dict(), [])
