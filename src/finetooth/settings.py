"""Settings of a trainer that do not go with a selective optimizer: refused before training, by name, with the remedy.

A trainer that is given its optimizer ignores its own learning rate, decay and clipping without a word. What somebody
has set, to something else than the class has by default and than the optimizer was built with, would be such a setting.

Not covered: FSDP with `optimizers=`, which transformers refuses itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from finetooth.optim import SelectiveAdamW


def check(args: Any, model: nn.Module, opt: SelectiveAdamW) -> None:
    """Raise ValueError for transformers' (or TRL's) `args` that cannot do what they say with this model and optimizer.

    RuntimeError for a model that was cast or resized since the optimizer was built.
    """
    opt.check_parameters()
    found = [*_other_model(model, opt), *_ignored(args, opt), *_engines(args, opt), *_weights(args, model, opt)]
    if found:
        raise ValueError("these settings do not go together:\n" + "\n".join(f"* {said}" for said in found))


def _other_model(model: nn.Module, opt: SelectiveAdamW) -> Iterator[str]:
    live = {id(p) for p in model.parameters()}
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if id(p) not in live:
                yield f"the optimizer was built for another model: {name!r} is not in the trainer's. Build it for that one."
                return
    if not any(p.requires_grad for group in opt.param_groups for p in group["params"]):
        yield "nothing that the optimizer trains asks for a gradient any more, as peft_config leaves a model: leave that out."


def _default(args: Any, name: str) -> Any:
    field = getattr(type(args), "__dataclass_fields__", {}).get(name)
    return None if field is None else field.default


def _ignored(args: Any, opt: SelectiveAdamW) -> Iterator[str]:
    """What is set twice, to different values; the trainer's would be silently ignored."""
    group = opt.param_groups[0]
    built = {
        "learning_rate": ("lr", group.get("initial_lr", group["lr"])),  # a schedule may have begun
        "weight_decay": ("weight_decay", group["weight_decay"]),
        "adam_beta1": ("betas[0]", group["betas"][0]),
        "adam_beta2": ("betas[1]", group["betas"][1]),
        "adam_epsilon": ("eps", group["eps"]),
        "max_grad_norm": ("max_grad_norm", opt.max_grad_norm),
    }
    for name, (word, value) in built.items():
        given = getattr(args, name, None)
        off = name == "max_grad_norm" and not given  # as it should be
        if not off and given not in (None, float(value), _default(args, name)):
            yield f"{name}={given} has no effect, the optimizer has {word}={value}: give build the same {word}, or leave it out of {type(args).__name__}."
    if (given := getattr(args, "optim", None)) not in (None, _default(args, "optim")):
        yield f"optim={getattr(given, 'value', given)!r} has no effect, because the trainer is given an optimizer: leave it out."


def _engines(args: Any, opt: SelectiveAdamW) -> Iterator[str]:
    """What takes gradients or weights into its own hands."""
    if getattr(args, "fp16", False) and opt.gathers:
        yield "fp16=True scales the loss, and a scaler does not see gathered gradients: set bf16=True, or build with gradients='dense'."
    if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        yield "deepspeed shards gradients and optimizer itself, past this optimizer: use DDP (torchrun, accelerate launch), or FSDP2."
    if getattr(args, "n_gpu", 1) > 1:
        yield f"{args.n_gpu} GPUs in one process make copies of the model (DataParallel), whose gradients are not gathered: start with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one."


def _weights(args: Any, model: nn.Module, opt: SelectiveAdamW) -> Iterator[str]:
    """What changes weights, or keeps gradients from them."""
    how = getattr(args, "gradient_checkpointing_kwargs", None) or {}
    if getattr(args, "gradient_checkpointing", False) and how.get("use_reentrant") and _embeddings_stop(model):
        yield "gradient_checkpointing_kwargs={'use_reentrant': True} passes no gradient on from frozen embeddings: set it to False, or call model.enable_input_require_grads()."
    for name, dtype in (("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)):
        if getattr(args, name, False) and any(p.dtype != dtype for p in model.parameters()):
            yield f"{name}=True casts the weights themselves, frozen ones too, so that no delta fits the base any more: leave it out."
    if getattr(args, "load_best_model_at_end", False) and opt.rest.kind == "reset":
        yield "load_best_model_at_end=True brings back weights of a step whose selection the optimizer no longer knows (rest=reset): take the delta of that checkpoint against the base instead."


def _embeddings_stop(model: nn.Module) -> bool:
    """Whether the layers' inputs need no gradient."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    return (
        isinstance(embeddings, nn.Module)
        and not any(p.requires_grad for p in embeddings.parameters())
        and not getattr(model, "_require_grads_hooks", None)  # what enable_input_require_grads leaves
    )
