"""An optimizer that keeps its state by parameter name, and can prove what it did not touch.

torch's own `state` is keyed by the Parameter object and casts what lies in it to the parameter's dtype on
load: an int32 index came back as bfloat16. Here everything is in `slots`, by name, and travels apart (`state.py`); parameters are looked up in `param_groups`, never cached, because wrappers swap them.

Of sharded parameters a slot is about the rows that this rank holds. What a user gets (selections, base tensors, state) is whole,
so asking for it is collective: every rank must ask.

The proof is a fingerprint per tensor, taken before the first step: rebuilt from what was replaced, a tensor
must still have it. What has trained and rests now is replaced there, so it has a fingerprint of its own (`_rests`), taken when its
rest begins and compared when that ends. The alternative, a new fingerprint of all that rests at every selection, reads the whole
model each time; this reads what has ever trained, and of whole tensors only those whose turn begins or is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finetooth import pieces, shards
from finetooth.base import Base, Held, bits, fingerprint, open_base
from finetooth.reverted import Part, exchanged
from finetooth.selection import Selection
from finetooth.slot import Slot
from finetooth.units import WHOLE, Unit


class FrozenMoved(RuntimeError):
    """A weight that must not move has moved."""


class NamedOptimizer(torch.optim.Optimizer):
    """What `SelectiveAdamW` keeps, apart from how it steps."""

    _compact = False  # whether state is held for what is chosen only

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], others: dict[str, Tensor | None], base: Any, defaults: dict[str, Any]
    ) -> None:
        named = list(named)
        self.seed, self.steps, self.skipped = 0, 0, 0
        self._base: Base | None = None if base is None else open_base(base)
        self._others = others
        self._cuts = {
            n: cut for n, p in [*named, *others.items()] if p is not None and (cut := shards.cut(n, p)) is not None
        }
        self._slots = {name: Slot(name) for name, _ in named}
        self._prints: dict[str, str] = {}
        self._rests: dict[str, str] = {}  # of what is not chosen now and is not the base any more, or cannot be rebuilt
        self._origins: dict[str, str] = {}
        self._rewrote_base = False
        self._dtypes = {name: p.dtype for name, p in named}
        self._shapes = {name: p.shape for name, p in named}
        super().__init__(named, defaults)
        self._complete = True

    # -- what a user asks ---------------------------------------------------------------------------

    def selections(self) -> dict[str, Selection]:
        """The selection of every tensor that has one, by parameter name: what the next step trains, where that is known already."""
        return {n: pieces.joined(selection, self._cuts.get(n)) for n, selection in self._held().items()}

    def _held(self) -> dict[str, Selection]:
        """The same of what this rank holds."""
        live = self._live()
        found = {n: s.seen(tuple(live[n].shape)) for n, s in self._slots.items()}
        return {n: selection for n, selection in found.items() if selection is not None}

    def slots(self) -> dict[str, tuple[Slot, tuple[int, ...]]]:
        """What is remembered of every tensor that takes part, with the tensor's shape, as this rank holds it."""
        live = self._live()
        return {name: (slot, tuple(live[name].shape)) for name, slot in self._slots.items()}

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
    def verify_frozen(self) -> int:
        """Raise `FrozenMoved`, naming the first tensor, if a weight that must not move has moved.

        What never trained is compared with what it was at the start; what has trained and rests now, with what it was when its rest
        began. Returns how many tensors were checked: none where every weight may move, as in `full` and `gmt`.
        """
        since = ((self._prints, self._print, "before training"), (self._rests, self._rest_print, "when its rest began"))
        for prints, now, then in since:
            for name, expected in prints.items():
                if (found := now(name)) != expected:
                    slot = self._slots.get(name)
                    inside = "" if slot is None or not slot.chosen else " outside its selection"
                    raise FrozenMoved(f"{name!r} has moved{inside}: fingerprint {found[:19]}, {then} {expected[:19]}.")
        return len(self._prints.keys() | self._rests.keys())

    @torch.no_grad()
    def base_tensor(self, name: str) -> Tensor | None:
        """The pretrained value of a parameter, or None where neither this optimizer nor `base` has it.

        Raises ValueError if `base` holds other values than the model had when the optimizer was built.
        """
        found = self._pretrained(name)
        if found is None:
            return None
        found = self._whole(name, found)
        if name in self._origins and fingerprint(found) != self._origins[name]:
            raise ValueError(f"base={self._base} is not what the model was when training began: {name!r} differs.")
        return found

    def _pretrained(self, name: str) -> Tensor | None:
        """What this rank holds of it, without the check: `_take_prints` has made it."""
        slot, p = self._slots.get(name), shards.local(self._parameter(name)).detach()
        if slot is None:
            return p
        if (slot.knows_base or name in self._prints or not self.steps) and not self._rewrote_base:
            return slot.original(p)
        return None if self._base is None else pieces.rows(self._base.tensor(name), self._cuts.get(name)).to(p)

    def _whole(self, name: str, held: Tensor) -> Tensor:
        """The tensor of which every rank holds some rows."""
        return shards.joined(held) if name in self._cuts else held

    def _print(self, name: str) -> str:
        """The fingerprint of the base tensor, rebuilt where the slot can."""
        p, slot = shards.local(self._parameter(name)).detach(), self._slots.get(name)
        return fingerprint(self._whole(name, slot.original(p) if slot else p))

    def _rested(self, name: str, chosen: Selection | None) -> Selection:
        """The part of a tensor that `_rests` is about, of all ranks: not chosen, and it has trained, or cannot be rebuilt."""
        slot, p = self._slots[name], shards.local(self._parameter(name))
        if slot.replaced is not None:
            unit, index = slot.replaced.unit, slot.replaced.without(None if chosen is None else chosen.index)
        else:
            whole = not self._remembers(slot) and not (chosen is not None and len(chosen))
            unit, index = Unit("matrix"), torch.zeros(int(whole), dtype=torch.int32, device=p.device)
        return pieces.joined(Selection(index, unit, tuple(p.shape)), self._cuts.get(name))

    def _rest_print(self, name: str, part: Selection | None = None) -> str:
        """The fingerprint of that part, by default of the one that rests now."""
        whole = self._whole(name, shards.local(self._parameter(name)).detach())
        part = self._rested(name, self._slots[name].selection) if part is None else part
        return fingerprint(whole if part.unit.kind in WHOLE and len(part) else part.gather(whole))

    def _renew_rests(self, found: Mapping[str, Selection]) -> None:
        """Before the selections `found` (of this rank) are taken over: check what rested until now, and take down what rests from now on.

        What has moved keeps its old fingerprint, which nothing has any more, so that `verify_frozen` raises whenever it is asked.
        """
        for name, chosen in found.items():
            before, after = (self._rested(name, s) for s in (self._slots[name].selection, chosen))
            if torch.equal(before.index, after.index):
                continue
            if name in self._rests and self._rest_print(name, before) != self._rests[name]:
                continue
            self._rests.pop(name, None)
            if len(after):
                self._rests[name] = self._rest_print(name, after)

    @contextmanager
    def reverted(self) -> Iterator[None]:
        """The pretrained weights for the length of a block, those of now again afterwards, bit for bit (see `reverted.py`).

        Raises ValueError, before anything is written, if they are not known. It is about weights only: a reference that
        must not see dropout or noise also needs `model.eval()`, and one under FSDP2 must gather again: `Reference` does both.
        """
        self.check_reverts()
        with nullcontext() if self._base is None else self._base.opened(), exchanged(self._replaced_parts()):
            yield

    def check_reverts(self) -> None:
        """Raise ValueError, naming the first tensor, if the pretrained weights are not known now or will not be."""
        for name, slot in self._slots.items():
            if self._base is None and not self._rebuilds(slot):
                raise ValueError(
                    f"the pretrained values of {name!r} are not held (every entry of it trains, or rest=quantized rewrote "
                    "them): build with base= as a folder, a hub id or a state dict."
                )

    def _replaced_parts(self) -> Iterator[Part]:
        """What makes the parameters the pretrained ones: where, and the values there."""
        if not self.steps and not self._rewrote_base:
            return
        for name, p in self._live().items():
            held = None if self._rewrote_base else self._slots[name].before(p)
            if held is not None:
                yield p, *held
            elif self._rewrote_base or name not in self._prints:
                assert self._base is not None  # check_reverts has asked
                yield p, None, pieces.rows(self._base.tensor(name), self._cuts.get(name))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: a rule's budget and the frozen rest are settled when the optimizer is built."""
        if self.__dict__.get("_complete"):
            raise ValueError("parameters cannot be added to a selective optimizer: build a new one with other targets.")
        super().add_param_group(param_group)

    # -- books ----------------------------------------------------------------------------------------

    def _parameters(self) -> dict[str, nn.Parameter]:
        for group in self.param_groups:
            if len(group["params"]) != len(group["param_names"]):
                raise RuntimeError(
                    f"the optimizer was built with {len(group['param_names'])} parameters and has {len(group['params'])} now: DeepSpeed "
                    "(ZeRO-1, 2 and 3) and FSDP1 put flat buffers in their place, which is not supported. Use DDP or FSDP2."
                )
        return {n: p for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}

    def _live(self) -> dict[str, Tensor]:
        """What this rank holds of every parameter that takes part; writing to it writes to the model."""
        return {name: shards.local(p) for name, p in self._parameters().items()}

    def _parameter(self, name: str) -> Tensor:
        if name not in self._others:
            return self._parameters()[name]
        found = self._others[name]
        return self._resharded(name) if found is None else found

    def _resharded(self, name: str) -> Tensor:
        """A parameter that takes no part, of a model that was sharded after the optimizer was built."""
        raise NotImplementedError

    def check_parameters(self) -> None:
        """Raise RuntimeError for a parameter of another dtype or shape than at the start: what is held beside it does not fit."""
        for name, p in self._parameters().items():
            then, now = (self._dtypes[name], list(self._shapes[name])), (p.dtype, list(p.shape))
            if then != now:
                raise RuntimeError(
                    f"{name!r} is {now[0]} {now[1]} and was {then[0]} {then[1]} when the optimizer was built: cast a model, and "
                    "resize its embeddings, first, then build."
                )

    def _rates(self) -> dict[str, dict[str, Any]]:
        fields = ("lr", "betas", "eps", "weight_decay")
        return {n: {f: group[f] for f in fields} for group in self.param_groups for n in group["param_names"]}

    def _remembers(self, slot: Slot) -> bool:
        """Whether the base values of what trains in this slot are held, or will be."""
        return slot.knows_base

    def _never_trains(self, slot: Slot) -> bool:
        """Whether nothing in this slot is chosen, now and later."""
        return slot.selection is not None and not slot.chosen

    def _rebuilds(self, slot: Slot) -> bool:
        """Whether the base tensor of this slot can be had from the weight and what is held, at every step."""
        return not self._rewrote_base and (self._remembers(slot) or self._never_trains(slot))

    def _take_origins(self) -> None:
        """What cannot be rebuilt must be in `base` as it is now, or no delta could be taken at the end."""
        if self._base is None:
            return
        for name, p in self._parameters().items():
            if not self._rebuilds(self._slots[name]):
                self._origins[name] = self._checked_base(name, shards.whole(p))

    def _take_prints(self) -> None:
        """Fingerprint every tensor with weights that must not move: what takes no part, and what can be rebuilt."""
        self._prints = {name: self._print(name) for name in self._others}
        for name, slot in self._slots.items():
            if self._remembers(slot) or self._never_trains(slot):
                self._prints[name] = self._print(name)
            elif self._compact and not slot.chosen:
                self._rests[name] = self._origins[name]

    def _checked_base(self, name: str, p: Tensor) -> str:
        """The fingerprint of a tensor of `base`; ValueError unless it is the parameter as it is before training."""
        assert self._base is not None
        try:
            found = self._base.tensor(name)
        except KeyError:
            raise ValueError(f"base={self._base} has no {name!r}: give the values that training starts from.") from None
        if isinstance(self._base, Held) and found.data_ptr() == p.data_ptr():
            raise ValueError(
                f"base= shares its memory with the model ({name!r}): give clones, which do not train along."
            )
        found = found.to(p)
        if found.shape != p.shape or not torch.equal(bits(found), bits(p.detach())):
            raise ValueError(
                f"base={self._base} is not what training starts from: {name!r} differs. If the model was changed after it was "
                "loaded, give base= as a copy of its state dict."
            )
        return fingerprint(found)

    def _device(self) -> torch.device:
        return next(iter(self._live().values())).device
