"""An optimizer that keeps its state by parameter name, and can prove what it did not touch.

torch's own `state` is keyed by the Parameter object and casts what lies in it to the parameter's dtype on
load: an int32 index came back as bfloat16. Here everything is in `slots`, by name, and travels as
`state_dict()["selective"]`; parameters are looked up in `param_groups`, never cached, because wrappers swap them.

The proof is a fingerprint per tensor, taken before the first step: rebuilt from what was replaced, a tensor
must still have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import shards
from finetooth.base import fingerprint, open_base
from finetooth.selection import Selection
from finetooth.slot import Slot


class FrozenMoved(RuntimeError):
    """A weight that must not move has moved."""


class NamedOptimizer(torch.optim.Optimizer):
    """What `SelectiveAdamW` keeps, apart from how it steps."""

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], others: dict[str, Tensor], base: Any, defaults: dict[str, Any]
    ) -> None:
        named = list(named)
        self.seed, self.steps, self.skipped = 0, 0, 0
        self._base, self._others = base, others
        self._slots = {name: Slot(name) for name, _ in named}
        self._prints: dict[str, str] = {}
        self._origins: dict[str, str] = {}
        self._rewrote_base = False
        super().__init__(named, defaults)
        self._complete = True

    # -- what a user asks ---------------------------------------------------------------------------

    def selections(self) -> dict[str, Selection]:
        """The present selection of every tensor that has one, by parameter name."""
        return {n: s.selection for n, s in self._slots.items() if s.selection is not None}

    def names(self) -> list[str]:
        """Every parameter this optimizer knows, trained or not."""
        return [*self._slots, *self._others]

    def state_bytes(self) -> int:
        """Bytes of all tensors kept between steps: indices, moments, masters, ages, replaced values."""
        held = {
            t.data_ptr(): t.untyped_storage().nbytes() for s in self._slots.values() for t in s.tensors() if t.numel()
        }
        return sum(held.values())

    @torch.no_grad()
    def verify_frozen(self) -> None:
        """Raise `FrozenMoved`, naming the first tensor, if a weight that must not move has moved."""
        for name, expected in self._prints.items():
            p = self._parameter(name)
            slot = self._slots.get(name)
            found = fingerprint(slot.original(p) if slot else p)
            if found != expected:
                inside = "" if slot is None or not slot.chosen else " outside its selection"
                raise FrozenMoved(
                    f"{name!r} has moved{inside}: fingerprint {found[:19]}, before training {expected[:19]}."
                )

    @torch.no_grad()
    def base_tensor(self, name: str) -> Tensor | None:
        """The pretrained value of a parameter, or None where neither this optimizer nor `base` has it.

        Raises ValueError if `base` holds other values than the model had when the optimizer was built.
        """
        slot, p = self._slots.get(name), self._parameter(name)
        known = slot is None or slot.replaced is not None or name in self._prints
        if known and not (self._rewrote_base and slot is not None):
            return p.detach() if slot is None else slot.original(p.detach())
        if self._base is None:
            return None
        found = open_base(self._base).tensor(name).to(p.dtype)
        if name in self._origins and fingerprint(found) != self._origins[name]:
            raise ValueError(f"base={self._base!r} is not what the model was when training began: {name!r} differs.")
        return found

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: a rule's budget and the frozen rest are settled when the optimizer is built."""
        if self.__dict__.get("_complete"):
            raise ValueError("parameters cannot be added to a selective optimizer: build a new one with other targets.")
        super().add_param_group(param_group)

    # -- books ----------------------------------------------------------------------------------------

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}

    def _parameter(self, name: str) -> Tensor:
        return self._others[name] if name in self._others else self._parameters()[name]

    def _rates(self) -> dict[str, dict[str, Any]]:
        fields = ("lr", "betas", "eps", "weight_decay")
        return {n: {f: group[f] for f in fields} for group in self.param_groups for n in group["param_names"]}

    def _remembers(self, slot: Slot) -> bool:
        """Whether the base values of what trains in this slot are held, or will be."""
        return slot.replaced is not None

    def _take_prints(self) -> None:
        """Fingerprint every tensor with weights that must not move: what takes no part, and what can be rebuilt."""
        self._prints = {name: fingerprint(p) for name, p in self._others.items()}
        for name, p in self._parameters().items():
            slot = self._slots[name]
            if self._remembers(slot) or (slot.selection is not None and not len(slot.selection)):
                self._prints[name] = fingerprint(slot.original(p))
            elif self._base is not None:
                self._origins[name] = fingerprint(p)

    def _extra_state(self) -> dict[str, Any]:
        return {}

    def _load_extra_state(self, extra: dict[str, Any]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """torch's, with everything selective under "selective", keyed by parameter name."""
        out = super().state_dict()
        out["state"] = {}
        out["selective"] = {
            "version": 1,
            "steps": self.steps,
            "skipped": self.skipped,
            "seed": self.seed,
            "origins": dict(self._origins),
            "prints": dict(self._prints),
            "slots": {name: slot.state() for name, slot in self._slots.items()},
            "extra": self._extra_state(),
        }
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; ValueError if it is of other parameters."""
        selective = state_dict.get("selective")
        if selective is None:
            raise ValueError("this state has no 'selective' part: it was not saved by a Finetooth optimizer.")
        if odd := sorted(set(selective["slots"]) ^ set(self._slots)):
            raise ValueError(
                f"the state is of other parameters: {odd[0]!r} is on one side only ({len(odd)} such names)."
            )
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = self._parameters()
        self.steps, self.skipped, self.seed = selective["steps"], selective["skipped"], selective["seed"]
        self._slots = {n: Slot.restore(n, s, parameters[n].device) for n, s in selective["slots"].items()}
        self._origins, self._prints = dict(selective["origins"]), dict(selective["prints"])
        self._load_extra_state(selective["extra"])


def check_rates(**given: Any) -> None:
    """Raise ValueError for a learning rate, betas, eps, decay or norm out of range."""
    lr, betas, norm = given["lr"], given["betas"], given["max_grad_norm"]
    if not lr >= 0:
        raise ValueError(f"lr={lr} is out of range: give a number >= 0.")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} are out of range: give two numbers in [0, 1).")
    for name in ("eps", "weight_decay"):
        if not given[name] >= 0:
            raise ValueError(f"{name}={given[name]} is out of range: give a number >= 0.")
    if norm is not None and not norm >= 0:
        raise ValueError(f"max_grad_norm={norm} is out of range: give a number > 0, or None for no clipping.")


def check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `given` is one of the choices."""
    if given not in choices:
        raise ValueError(f"{name}={given!r} is unknown: choose one of {', '.join(choices)}.")


def check_parameter(name: str, p: Tensor) -> None:
    """Raise ValueError for a parameter that cannot be trained selectively."""
    shards.refuse_sharded(name, p)
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name!r} is {p.dtype}: weights that train are float32, bfloat16 or float16.")
    if not p.is_contiguous():
        raise ValueError(
            f"{name!r} is not contiguous: its entries are selected in storage order. Call .contiguous() on it."
        )
