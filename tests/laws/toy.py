"""A model whose gradients are exact, so that laws can ask for equal bits.

It has the names, layers and classes of a small Llama, but every layer multiplies integers of its own
(looked up by token) and the loss is linear in the weights: gradients are sums of small integers, exact in
float32 and bfloat16 in any order of summation, and the same whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import finetooth
from finetooth.weight import Weight

VOCAB, WIDTH, INNER = 16, 8, 12


class ToyNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class ToyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 2)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH, bias=False)


class ToyMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = ToyAttention(), ToyMLP()
        self.input_layernorm, self.post_attention_layernorm = ToyNorm(), ToyNorm()


class Toy(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.model.layers = nn.ModuleList(ToyBlock() for _ in range(2))
        self.model.norm = ToyNorm()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        g = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g))
        self._tables = {}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | ToyNorm | nn.Embedding):
                x = torch.randint(-3, 4, (VOCAB, getattr(module, "in_features", WIDTH)), generator=g)
                out = getattr(module, "out_features", WIDTH)
                self._tables[name] = (x, torch.randint(0, 2, (VOCAB, out), generator=g) * 2 - 1)
        self.to(dtype)

    def forward(self, input_ids: Tensor, labels: Any = None, attention_mask: Any = None) -> CausalLMOutput:
        dtype, loss = self.lm_head.weight.dtype, torch.zeros(())
        for name, (x, r) in self._tables.items():
            module = self.get_submodule(name)
            inputs = input_ids if isinstance(module, nn.Embedding) else x[input_ids].to(dtype)
            loss = loss + (module(inputs) * r[input_ids].to(dtype)).sum() / len(input_ids)
        return CausalLMOutput(loss=loss)  # FSDP2 finds the tensors in it


def own_score(w: Weight) -> Tensor:
    """A user's rule: weights that are large for their row and matter to the loss."""
    value = w.value.abs().float()
    centre = value.mean(-1, keepdim=True)
    return (value / (centre + 1e-6)) * w.grad.abs().float()


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = [*finetooth.METHODS, "own"]
NEEDED: dict[str, dict[str, Any]] = {
    "rows": {"rows": [1, 3, "8-9"]}
}  # options without a default; some on each of two ranks
SMALL: dict[str, dict[str, Any]] = {  # budgets that mean something in matrices this small
    "gift-sw": {"keep": 3},
    "random": {"keep": 0.1},
    "grad": {"keep": 0.1},
    "snip": {"keep": 0.1},
    "magnitude": {"keep": 0.1},
    "own": {"keep": 0.1},
    "fish": {"keep": 0.1},
    "lift": {"rank": 2, "when": "every(2)"},
    **NEEDED,
    "spiel": {"keep": 0.1, "when": "every(2)", "window": 1, "steps": 8},
    "lisa": {"keep": 1, "when": "every(2)"},
    "badam": {"when": "every(2)"},
    "nano": {"when": "every(2)"},  # so that a few steps choose again
}
AGAIN = ("nano", "lift", "lisa", "badam")  # compact rows that choose again and leave what they trained as it is


def batches(n: int, seed: int = 0, size: int = 8) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (size, 2), generator=g) for _ in range(n)]


def build(row: str, model: nn.Module, **given: Any) -> finetooth.SelectiveAdamW:
    settings = {
        "lr": 1e-2,
        "calibration": [{"input_ids": b} for b in batches(2, seed=9)],
        **SMALL.get(row, {}),
        **given,
    }
    return finetooth.build(own_score if row == "own" else row, model, **settings)


def train(model: nn.Module, opt: torch.optim.Optimizer, ids: list[Tensor], accumulate: int = 1) -> Iterator[int]:
    """Yield after every optimizer step; every batch is cut into `accumulate` micro-batches."""
    model.train()
    for step, batch in enumerate(ids):
        for micro in batch.chunk(accumulate):
            (model(micro).loss / accumulate).backward()
        opt.step()
        opt.zero_grad()
        yield step


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits: -0.0 is not 0.0."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))
