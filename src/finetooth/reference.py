"""A reference model that takes no memory of its own: the model that trains, with its delta taken off while it runs.

    DPOTrainer(model, ref_model=finetooth.Reference(model, opt), optimizers=(opt, None), ...)

Preference losses compare a policy with what it was before training. Where only a part of the weights trains, that model is
here already: the optimizer holds the values it has replaced (see `reverted.py`). Its logits are those of a separate copy,
bit for bit, with dropout and GIFT-SW's noise off.

To a trainer it is a module without parameters: `.to(device)`, freezing and counting parameters find nothing, so that
nothing is moved or counted twice. What it does not have itself (config, dtype, get_output_embeddings, ...) is the model's.
A trainer may replace its `forward` (TRL puts a fused head there): the exchange happens around the call.

Not covered: a reference that follows the policy (`sync_ref_model`), and parallel wrappers around the reference itself (under
FSDP2 it uses the shards of the policy).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import shards
from finetooth.named import NamedOptimizer


class Reference(nn.Module):
    """The pretrained model, as a module that shares everything with the model that trains.

    Args:
        model: the model that trains.
        optimizer: what `finetooth.build` gave for it, or accelerate's wrapper of that.

    Raises TypeError for another optimizer, and ValueError if it does not know the pretrained values: rows that train
    whole tensors need base=.

    >>> import finetooth
    >>> model, x = nn.Linear(2, 1), torch.ones(1, 2)
    >>> opt, before = finetooth.build("magnitude", model, keep=1.0, targets="all"), model(x)
    >>> model(x).sum().backward(); opt.step()
    >>> torch.equal(Reference(model, opt)(x), before), torch.equal(model(x), before)
    (True, False)
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        super().__init__()
        while not isinstance(optimizer, NamedOptimizer) and hasattr(optimizer, "optimizer"):  # accelerate wraps them
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, NamedOptimizer):
            raise TypeError(
                f"a reference needs the optimizer that finetooth.build gave, not a {type(optimizer).__name__}."
            )
        optimizer.check_reverts()
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        self._shared = (model, optimizer)  # in a tuple, so that the model is no submodule
        self._off = False
        self.eval()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the weights change places under it, see `reverted.py`
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run with the pretrained weights, in evaluation mode and without gradients."""
        with self.pretrained():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own; a trainer may put another in its place."""
        with self.pretrained():
            return self._shared[0](*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the pretrained model generates."""
        with self.pretrained():
            return self._shared[0].generate(*args, **kwargs)  # type: ignore[operator]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """A copy of the pretrained weights in the host's memory (TRL hashes it to precompute references)."""
        with self.pretrained():
            return {name: t.to("cpu", copy=True) for name, t in self._shared[0].state_dict().items()}

    @contextmanager
    def pretrained(self) -> Iterator[nn.Module]:
        """The model as it was before training, for the length of a block; blocks may be nested."""
        model, optimizer = self._shared
        if self._off:
            yield model
            return
        training = [m for m in model.modules() if m.training]
        try:
            self._off = True
            for m in training:
                m.training = False
            with torch.no_grad(), optimizer.reverted():
                shards.reshard(model)  # what FSDP2 has gathered of the policy
                yield model
        finally:
            shards.reshard(model)
            self._off = False
            for m in training:
                m.training = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):  # what libraries note on a model for themselves is not noted on this one
                raise
        found: Tensor | nn.Module = getattr(self._shared[0], name)
        return found
