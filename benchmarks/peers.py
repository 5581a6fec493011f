"""What the benchmarks train: models of several sizes, every Finetooth row, and the peers a user would take instead.

Every contender is a function model -> (model to call, optimizer). All train with AdamW at the same rates and clip to a
norm of 1 in the way that is natural to them.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

RATES: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
# hidden, layers, intermediate, heads, vocabulary; embeddings tied
SIZES = {
    "tiny": (256, 1, 256, 2, 2048),  # what a process warms up on
    "1M": (128, 4, 352, 4, 2048),
    "10M": (320, 7, 880, 5, 4096),
    "35M": (512, 10, 1408, 8, 8192),
    "107M": (1024, 8, 2816, 16, 4096),
    "300M": (1024, 23, 2816, 16, 4096),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(size: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama-style model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, inner, heads, vocab = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


class Clipped:
    """A torch optimizer that clips first, as trainers do."""

    def __init__(self, parameters: list[torch.Tensor], make: Callable[..., torch.optim.Optimizer]) -> None:
        self.parameters, self.inner = parameters, make(parameters, **RATES)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad()


def trainable(model: nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def fused(parameters: list[torch.Tensor], **rates: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **rates)


def full_adamw(model: nn.Module) -> tuple[nn.Module, Any]:
    """Full fine-tuning with torch.optim.AdamW(fused=True)."""
    return model, Clipped(trainable(model), fused)


def topk_gmt(model: nn.Module) -> tuple[nn.Module, Any]:
    """GMT as it is published: zero the gradients below the 20 % largest of a tensor by topk, then AdamW."""

    class Masked(Clipped):
        def step(self) -> None:
            for p in self.parameters:
                size = p.grad.abs().flatten()
                threshold = torch.topk(size, max(1, round(0.2 * size.numel()))).values[-1]
                p.grad.mul_(p.grad.abs() >= threshold)
            super().step()

    return model, Masked(trainable(model), fused)


def half_frozen(model: nn.Module) -> tuple[nn.Module, Any]:
    """requires_grad=False for every second matrix of the blocks."""
    for i, (name, module) in enumerate((n, m) for n, m in model.named_modules() if n.split(".")[-1] in LINEARS):
        module.requires_grad_(i % 2 == 0)
        assert name
    return model, Clipped(trainable(model), fused)


def lora(model: nn.Module) -> tuple[nn.Module, Any]:
    """PEFT LoRA, r = 16, on all linear layers of the blocks."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"))
    return tuned, Clipped(trainable(tuned), fused)


def shira(model: nn.Module) -> tuple[nn.Module, Any]:
    """PEFT SHiRA, random mask, with as many trained weights as 1 % of the linear layers."""
    from peft import ShiraConfig, get_peft_model

    shapes = [m.weight.shape for n, m in model.named_modules() if n.split(".")[-1] in LINEARS]
    rank = max(1, round(0.01 * sum(o * i for o, i in shapes) / sum(o + i for o, i in shapes)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, ShiraConfig(r=rank, mask_type="random", random_seed=0, target_modules=LINEARS))
    return tuned, Clipped(trainable(tuned), fused)


def hft(model: nn.Module) -> tuple[nn.Module, Any]:
    """Half Fine-Tuning of a model whose pretrained values can be read on disk, as they can of every model that was loaded."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    model.save_pretrained(folder)
    return ours("hft", base=folder)(model)


def ours(row: str, **given: Any) -> Callable[[nn.Module], tuple[nn.Module, Any]]:
    """A Finetooth row."""

    def make(model: nn.Module) -> tuple[nn.Module, Any]:
        import finetooth

        calibration = None
        if finetooth.METHODS[row].calibrated:
            calibration = [
                torch.randint(0, 2000, (2, 64), generator=torch.Generator().manual_seed(i)) for i in range(2)
            ]
        return model, finetooth.build(row, model, calibration=calibration, max_grad_norm=1.0, **(RATES | given))

    return make


CONTENDERS: dict[str, Callable[[nn.Module], tuple[nn.Module, Any]]] = {
    "AdamW(fused)": full_adamw,
    "topk-GMT": topk_gmt,
    "half-frozen": half_frozen,
    "LoRA r16": lora,
    "SHiRA": shira,
    "full": ours("full"),
    "gmt": ours("gmt"),
    "gmt-strict": ours("gmt-strict", keep=0.2),  # as measured
    "dst": ours("dst"),
    "dst absolute": ours("dst", relative=False),
    "hft": hft,
    "gift-sw 128": ours("gift-sw"),
    "gift-sw 3%": ours("gift-sw", keep=0.03),
    "random 1%": ours("random", keep=0.01),
    "grad 1%": ours("grad", keep=0.01),
    "columns 1%": ours("magnitude", unit="column", keep=0.01),
    "rows 1%": ours("magnitude", unit="row", keep=0.01),
}
