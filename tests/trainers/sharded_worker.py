"""One of two ranks: preference steps on a sharded model, with a reference that shares it and with a second, sharded one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import finetooth

SIZE = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS: dict[str, Any] = {"gmt": 0.2, "dst": 0.2, "grad": 0.2, "gift-sw": 3, "hft": None}


def plain() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=False))


def sharded() -> nn.Module:
    model, mesh = plain(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(row: str, shared: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The reference's log-probabilities of three steps, and the weights after them."""
    ids, base = torch.arange(32).reshape(4, 8), plain().state_dict() if row == "gmt" else None
    model = sharded()
    calibration = [{"input_ids": ids, "labels": ids}]
    opt = finetooth.build(row, model, lr=1e-2, keep=ROWS[row], base=base, calibration=calibration)
    reference = finetooth.Reference(model, opt) if shared else sharded().eval()
    seen = []
    model.train()
    for _ in range(3):
        policy = model(input_ids=ids).logits.log_softmax(-1)
        with torch.no_grad():
            seen.append(reference(input_ids=ids).logits.log_softmax(-1).clone())
        margin = policy - seen[-1]
        (
            policy[..., 0].square().mean() - nn.functional.logsigmoid(margin[:2].sum() - 0.9 * margin[2:].sum())
        ).backward()
        opt.step()
        opt.zero_grad()
    return seen, [p.full_tensor().clone() for p in model.parameters()]


def main(folder: Path) -> None:
    """Write, for every row, whether both runs are the same, and whether anything was learnt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for row in ROWS:
        ours, theirs = run(row, True), run(row, False)
        same = [
            torch.equal(a, b)
            for mine, other in zip(ours, theirs, strict=True)
            for a, b in zip(mine, other, strict=True)
        ]
        found[row] = [all(same), not all(torch.equal(p, q) for p, q in zip(ours[1], plain().parameters(), strict=True))]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
