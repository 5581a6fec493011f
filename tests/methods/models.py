"""Tiny random models through the real transformers classes."""

from __future__ import annotations

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

VOCAB = 48
SIZE = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(**SIZE, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=False)
        )
    if family == "llama-tied":
        return LlamaForCausalLM(
            LlamaConfig(**SIZE, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=True)
        )
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32))
    if family == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE, intermediate_size=24))
    if family == "mixtral":
        return MixtralForCausalLM(
            MixtralConfig(
                **SIZE, intermediate_size=24, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
            )
        )
    return GptOssForCausalLM(
        GptOssConfig(
            **SIZE,
            intermediate_size=24,
            head_dim=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["full_attention"] * 2,
        )
    )


FAMILIES = ("llama", "llama-tied", "gpt2", "neox", "mixtral", "gpt-oss")


def ids(rows: int = 4, tokens: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def step(model: PreTrainedModel, opt: torch.optim.Optimizer, batch: torch.Tensor, accumulate: int = 1) -> None:
    model.train()
    for micro in batch.chunk(accumulate):
        (model(input_ids=micro, labels=micro).loss / accumulate).backward()
    opt.step()
    opt.zero_grad()
