"""FSDP2 on two processes, of CPUs or GPUs: half of the model, its gradients and the state on each, one delta file.

    torchrun --nproc_per_node 2 examples/sharded.py

The loop is plain PyTorch. The model and the text are the ones that come with the package.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetooth
from finetooth import embedded
from finetooth.data import documents


def main(method: str = "dst", steps: int = 40, output: Path = Path("runs/sharded")) -> None:
    """Train on half of every batch each; rank 0 saves the delta."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    source = embedded.path("stories260K")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source).to(device)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)

    ids = [t for text in documents(embedded.path("tinystories")) for t in tokenizer(text)["input_ids"]]
    rows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256).to(device)
    mine = rows[rank::ranks].split(4)
    opt = finetooth.build(method, model, lr=1e-3, calibration=list(mine[:2]))
    model.train()
    for step, batch in zip(range(steps), itertools.cycle(mine), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        if rank == 0 and step % 10 == 9:
            typer.echo(f"step {step + 1}: loss {loss.item():.3f} on rank 0, norm {opt.grad_norm:.3f}")
    checked = opt.verify_frozen()
    delta = finetooth.Delta.extract(model, opt)  # on every rank
    if rank == 0:
        delta.save(output / "delta.safetensors")
        info = delta.info()
        typer.echo(
            f"{info['changed']:,} of {info['weights']:,} weights changed; {checked} tensors are what they must be"
        )
        delta.apply(AutoModelForCausalLM.from_pretrained(source))
        typer.echo(f"{output / 'delta.safetensors'}: {info['bytes']:,} bytes, applies to the base")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
