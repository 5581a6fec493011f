"""What a score may read about one tensor.

A score is a pure function `Weight` -> non-negative tensor, larger = train it. What it reads is filled when it
is first read, so that a score pays only for what it uses, and asking for what is not known yet is an error that
says so (`Unavailable`) and not a None that fails later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from finetooth.shards import Cut
from finetooth.units import Unit

Lazy = Tensor | Callable[[], Tensor] | None


class Unavailable(ValueError):
    """A score asked for something that is not known at this point, such as a gradient before the first step."""


class Weight:
    """Everything a score may read about one tensor, all local, filled when it is first read.

    `value`, `grad`, `base` and `proposed` are `[out, in]` (experts: `[expert, out, in]`) whatever the storage,
    so that a column is an input feature for `nn.Linear` and `Conv1D` alike. `grad` is the mean gradient of
    the accumulation window, or of the calibration batches; `base` the pretrained value; `proposed` the value
    a dense optimizer step would give, in float32; `squares` the sum over calibration rows of each row's squared gradient;
    `chosen` is the selection in force and `window` what was added up of the gradients outside it (`rule.Exchange`);
    `stats` what else `probe` measured, by name; `unit` what is chosen together. `transposed` tells `select` that the
    storage is `[in, out]`. `turn` is how many selections were made before this one; `peers` are the modules or layers
    that share its pool, in the model's order, where whole tensors are chosen.

    Of a sharded tensor (`cut`) a score sees all, put together when it is read (`whole`); a score of single entries that has an
    attribute `by_entry = True` sees what its rank holds, in units of elements.
    """

    __slots__ = (
        "_given",
        "_lazy",
        "cut",
        "name",
        "peers",
        "seed",
        "stats",
        "step",
        "transposed",
        "turn",
        "unit",
        "whole",
    )

    def __init__(
        self,
        name: str,
        value: Tensor | Callable[[], Tensor],
        grad: Lazy = None,
        base: Lazy = None,
        proposed: Lazy = None,
        stats: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        step: int = 0,
        unit: Unit = Unit(),
        transposed: bool = False,
        cut: Cut | None = None,
        whole: bool = False,
        squares: Lazy = None,
        window: Lazy = None,
        chosen: Lazy = None,
        turn: int = 0,
    ) -> None:
        self.name, self.seed, self.step, self.turn = name, seed, step, turn
        self.peers: tuple[str, ...] = ()
        self.unit, self.transposed, self.cut, self.whole = unit, transposed, cut, whole
        self.stats: Mapping[str, Tensor] = stats or {}
        self._given: dict[str, Lazy] = {
            "value": value,
            "grad": grad,
            "base": base,
            "proposed": proposed,
            "squares": squares,
        }
        self._given |= {"window": window, "chosen": chosen}
        self._lazy = dict(self._given)

    def forget(self) -> None:
        """Let go of what was put together of a sharded tensor; it is put together again when it is read again."""
        if self.whole:
            self._lazy = dict(self._given)

    @property
    def value(self) -> Tensor:
        """The weight as it is."""
        return self._read("value")

    def _read(self, field_name: str) -> Tensor:
        found = self._lazy[field_name]
        if found is None:
            raise Unavailable(
                f"the score reads w.{field_name}, which is not known for {self.name!r} at step {self.step}."
            )
        if not isinstance(found, Tensor):
            found = self._lazy[field_name] = found()
        return found

    @property
    def grad(self) -> Tensor:
        """The accumulated (or calibration) gradient, in its own dtype."""
        return self._read("grad")

    @property
    def base(self) -> Tensor:
        """The pretrained value."""
        return self._read("base")

    @property
    def proposed(self) -> Tensor:
        """The value after a dense optimizer step, float32."""
        return self._read("proposed")

    @property
    def squares(self) -> Tensor:
        """The sum over calibration rows of the squared gradient of each, float32."""
        return self._read("squares")

    @property
    def window(self) -> Tensor:
        """Gradients added up over the steps before this selection, float32; 0 where nobody looked (see `rule.Exchange`)."""
        return self._read("window")

    @property
    def chosen(self) -> Tensor:
        """What is chosen now, bool."""
        return self._read("chosen")

    @property
    def stored(self) -> tuple[tuple[int, ...], Unit]:
        """The shape and the unit in storage, which is what a selection counts."""
        if self.whole and self.cut is not None:
            return self.cut.shape, self.unit.transposed() if self.transposed else self.unit
        shape = tuple(self.value.shape)
        return (shape[:-2] + shape[:-3:-1], self.unit.transposed()) if self.transposed else (shape, self.unit)

    def stat(self, key: str) -> Tensor:
        """A calibration statistic; raises `Unavailable` where it was not measured."""
        if key not in self.stats:
            raise Unavailable(f"the score reads the statistic {key!r} of {self.name!r}: give calibration=batches.")
        return self.stats[key]


Score = Callable[[Weight], Tensor]
