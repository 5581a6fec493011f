"""What happens to the weights that were not chosen.

`frozen`     they keep the value they have.
`reset`      they go back to the base: what is not selected *is* the base (DST).
`noise`      they are frozen, and training forwards see them with noise of the size of a b-bit rounding error
             (GIFT-SW): y = x (W + E)^T with E_:j = 0 for the chosen columns j and
             E_ij = 1/2 D_i n_ij, n ~ N(0, 1), elsewhere; D_i is the quantization step of output row i.
`quantized`  they are rounded to b bits once, before training (GIFT-SW's second order: quantize, then train).

How the noise gets into a model: `noise.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetooth import quantize
from finetooth.selection import Selection


@dataclass(frozen=True)
class Rest:
    """A choice of this module; make one with `frozen()`, `reset()`, `noise()` or `quantized()`."""

    kind: str = "frozen"
    bits: int = 0
    zero_moments: bool = False


def frozen() -> Rest:
    """Weights that were not chosen keep their value."""
    return Rest()


def reset(zero_moments: bool = False) -> Rest:
    """Weights that were not chosen return to the base; zero_moments: their optimizer moments start again too."""
    return Rest("reset", zero_moments=zero_moments)


def noise(bits: int = 4) -> Rest:
    """Training forwards see the other columns with noise of half a b-bit quantization step."""
    return Rest("noise", _checked(bits))


def quantized(bits: int = 4) -> Rest:
    """The other columns are rounded to b bits before training."""
    return Rest("quantized", _checked(bits))


def _checked(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is out of range: give 2 to 8.")
    return bits


def kept_columns(selection: Selection) -> Tensor:
    """The chosen input columns as bool [in]; a selection of stored rows is one of a transposed weight's columns."""
    n = selection.unit.count(selection.shape)
    kept = torch.zeros(n, dtype=torch.bool, device=selection.index.device)
    kept[selection.index.long()] = True
    return kept


def oriented(stored: Tensor, selection: Selection) -> Tensor:
    """A stored weight as `[out, in]`."""
    return stored.t() if selection.unit.kind == "row" else stored


def quantize_(p: Tensor, selection: Selection, bits: int) -> None:
    """Round the columns of a matrix that were not chosen to b bits, in place; the chosen ones keep their bits."""
    weight = oriented(p, selection)
    kept = kept_columns(selection)
    weight.copy_(torch.where(kept, weight, quantize.quantized(weight, bits, kept).to(p.dtype)))


@contextmanager
def quantized_rest(model: nn.Module, columns: Mapping[str, Selection], bits: int) -> Iterator[None]:
    """The model with its frozen columns in b bits and the chosen ones as trained, for the length of a block.

    This is what is left after quantizing a GIFT-SW result: evaluate inside. The weights come back bit for bit.
    """
    parameters = {name: model.get_parameter(name) for name in columns}
    held = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                quantize_(p.detach(), columns[name], _checked(bits))
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.detach().copy_(held[name])
