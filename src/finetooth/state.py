"""What an optimizer saves and loads: `state_dict()["selective"]`, by parameter name, in the form that one process has.

torch casts what lies under `state[p]` to the parameter's dtype when it loads it, so nothing lies there. Of sharded parameters rank 0
gets the whole, and any number of ranks loads it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from finetooth import pieces, shards
from finetooth.named import NamedOptimizer
from finetooth.slot import Slot


class SavedOptimizer(NamedOptimizer):
    """What `SelectiveAdamW` saves, apart from how it steps."""

    def _check_complete(self, slots: dict[str, Any]) -> None:
        """ValueError, on all ranks alike, if one of them was given the state that is no state."""
        known = shards.counts([len(slots)], self._device())[:, 0].tolist() if self._cuts else [len(slots)]
        if 0 in known:
            raise ValueError(
                f"the state that rank {known.index(0)} was given has no slots: under FSDP2 rank 0 alone gets the state. Save what it "
                "gets, and load that on every rank."
            )

    def _count_chosen(self) -> None:
        """Let every slot know how much is chosen on all ranks together."""
        if self._cuts:
            sums = shards.counts([slot.numel for slot in self._slots.values()], self._device()).sum(0).tolist()
            for slot, n in zip(self._slots.values(), sums, strict=True):
                slot.everywhere = int(n)

    def _choices(self) -> dict[str, Any]:
        """What the meaning of the slots depends on, in words."""
        return {}

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
            "choices": self._choices(),
            "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in self._dtypes.items()},
            "origins": dict(self._origins),
            "prints": dict(self._prints),
            "rests": dict(self._rests),
            "slots": self._states(),
            "extra": self._extra_state(),
        }
        return out

    def _states(self) -> dict[str, Any]:
        """Of every slot; of sharded ones the whole, in the memory of rank 0, and nothing on other ranks."""
        out = {}
        for name, slot in self._slots.items():
            state = pieces.join_state(slot.state(), self._cuts.get(name), self._compact)
            if not self._cuts:
                out[name] = state
            elif shards.rank() == 0:
                out[name] = _on_host(state)
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; ValueError if it is of other parameters, or of another method."""
        selective = state_dict.get("selective")
        if selective is None:
            raise ValueError("this state has no 'selective' part: it was not saved by a Finetooth optimizer.")
        self._check_complete(selective["slots"])
        if odd := sorted(set(selective["slots"]) ^ set(self._slots)):
            raise ValueError(
                f"the state is of other parameters: {odd[0]!r} is on one side only ({len(odd)} such names)."
            )
        mine, saved = self._choices(), selective["choices"]
        if other := [f"{k}={saved.get(k)!r} (here {v!r})" for k, v in mine.items() if saved.get(k) != v]:
            raise ValueError(f"the state is of another method: {', '.join(other)}.")
        kinds = {name: str(dtype).removeprefix("torch.") for name, dtype in self._dtypes.items()}
        if odd := [n for n, kind in selective["dtypes"].items() if kinds[n] != kind]:
            raise ValueError(
                f"the state is of a model in another precision: {odd[0]!r} was {selective['dtypes'][odd[0]]}, here it is "
                f"{kinds[odd[0]]}."
            )
        groups = [dict(group) for group in state_dict["param_groups"]]
        if len(groups) != len(self.param_groups):
            raise ValueError(f"the state has {len(groups)} parameter groups, this optimizer {len(self.param_groups)}.")
        for group, own in zip(groups, self.param_groups, strict=True):
            group["param_names"] = own["param_names"]  # by name, whatever order they were saved in
        super().load_state_dict({"state": {}, "param_groups": groups})
        live = self._live()
        self.steps, self.skipped, self.seed = selective["steps"], selective["skipped"], selective["seed"]
        self._slots = {
            n: Slot.restore(
                n, pieces.cut_state(s, self._cuts.get(n), self._compact), live[n].device, self._slots[n].kind
            )
            for n, s in selective["slots"].items()
        }
        self._count_chosen()
        self._origins, self._prints = dict(selective["origins"]), dict(selective["prints"])
        self._rests = dict(selective.get("rests", {}))
        self._load_extra_state(selective["extra"])


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.cpu() if isinstance(v, Tensor) else _on_host(v) if isinstance(v, dict) else v for k, v in state.items()
    }
