"""The model that a recipe names: whether it can be trained here, said before its weights are read; then its tokenizer and itself.

    folder -> config.json -> a model that predicts the next token -> weights that are all there -> tokenizer

What transformers says of a broken folder is about its own classes; here it is said in words of the folder.

Not covered: weights that are there and are those of another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

from finetooth import checkpoint
from finetooth.checks import check_finite
from finetooth.recipe import RecipeError


@contextmanager
def _about(what: str) -> Iterator[None]:
    """transformers' many errors as one that says what was being read, and the first line of why."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RecipeError(f"{what} cannot be read: {first}") from error


def config(source: str) -> Any:
    """The config of a folder or hub id, of a model that predicts the next token; RecipeError otherwise."""
    folder = checkpoint.resolve(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RecipeError(f"{source} holds no config.json: expected a model folder, as save_pretrained writes it.")
    with _about(f"config.json of {source}"):
        found = AutoConfig.from_pretrained(str(folder))
    name, kind = next(iter(found.architectures or ()), type(found).__name__), found.model_type
    if getattr(found, "is_encoder_decoder", False):
        why = "is an encoder-decoder"
    elif kind in MASKED and not getattr(found, "is_decoder", False):
        why = "sees the tokens that it is to predict (a masked language model)"
    elif kind not in CAUSAL and "AutoModelForCausalLM" not in (getattr(found, "auto_map", None) or {}):
        why = "is not one that transformers can load to predict the next token"
    else:
        return found
    raise RecipeError(
        f"{source} is a {name}, which {why}: recipes train decoders (AutoModelForCausalLM). In Python, finetooth.build takes any model."
    )


def context(config: Any) -> int | None:
    """How many tokens a model was made for; None where its config does not say."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "context_length")
    return next((int(n) for name in names if (n := getattr(text, name, None))), None)


def check_weights(source: str) -> None:
    """Whether all files of weights are there, and whole; their headers are read. Pickle files are left to transformers."""
    folder = Path(checkpoint.resolve(source))
    if folder.is_dir() and ([*folder.glob("*.safetensors*")] or not [*folder.glob("*.bin")]):
        checkpoint.shards(folder)


def tokenizer(source: str) -> Any:
    """The tokenizer; RecipeError if there is none."""
    folder = checkpoint.resolve(source)
    with _about(f"the tokenizer of {source} (tokenizer.json, tokenizer_config.json, beside config.json)"):
        return AutoTokenizer.from_pretrained(str(folder))


def model(source: str, dtype: torch.dtype) -> nn.Module:
    """The model, of finite weights that all come from the checkpoint: transformers makes up what is missing."""
    folder, found, told = str(checkpoint.resolve(source)), None, dict[str, Any]()
    with _about(f"the model {source}"):
        try:
            found, told = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        except RuntimeError as error:
            if "mismatched" not in str(error):
                raise
    if found is None or told.get("mismatched_keys"):
        raise RecipeError(
            f"the weights of {source} have other shapes than its config.json says: they are not of one model."
        )
    if missing := sorted(told["missing_keys"]):
        raise RecipeError(
            f"{source} has no weights for {len(missing)} tensors of the model, such as {missing[0]!r}: the checkpoint is not whole, or is "
            f"not of a {type(found).__name__}."
        )
    check_finite(dict(found.named_parameters()))
    return found  # type: ignore[no-any-return]
