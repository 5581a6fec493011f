"""Good delta files, and the models they were made for: what a fuzzer starts from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

Weights = dict[str, torch.Tensor]


@dataclass
class Seed:
    """A good file and the model it was made for."""

    blob: bytes
    base: Weights


def seeds(folder: Path, size: int = 24) -> list[Seed]:
    """What the writer makes of every unit in every dtype, and every golden file; names differ, so that each finds its base."""
    from finetooth.base import DTYPES
    from finetooth.units import KINDS

    draw, out = torch.Generator().manual_seed(0), []
    for code, dtype in DTYPES.items():
        for kind in KINDS:
            out.append(_written(folder, f"{code}.{kind}", dtype, kind, (4, size), 0.2, draw))
        out.append(_written(folder, f"{code}.dense", dtype, "element", (16, size), 0.6, draw))
        out.append(_written(folder, f"{code}.sparse", dtype, "element", (128, 256), 0.0005, draw))
        out.append(_written(folder, f"{code}.near", dtype, "element", (16, size), 0.3, draw, against=True))
    out.append(_written(folder, "stack", torch.bfloat16, "column", (2, 4, 6), 0.2, draw))
    return out + list(_golden())


def large(folder: Path) -> Seed:
    """5 MiB of values and their index, enough that the interpreter's own memory is small beside it."""
    draw = torch.Generator().manual_seed(1)
    return _written(folder, "large", torch.bfloat16, "element", (2048, 2048), 0.66, draw)


def _written(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    kind: str,
    shape: tuple[int, ...],
    share: float,
    draw: torch.Generator,
    against: bool = False,
) -> Seed:
    from finetooth.base import fingerprint
    from finetooth.codec import Change, Origin
    from finetooth.delta import Delta
    from finetooth.diff import gather, scatter_
    from finetooth.selection import Selection
    from finetooth.units import Unit

    unit, width = Unit(kind, 8 if kind == "block" else 1), dtype.itemsize
    low = torch.randint(0, 2 if dtype == torch.bool else 100, (*shape, width), generator=draw, dtype=torch.uint8)
    base = low.view(dtype).reshape(shape)  # no exponent is large enough for an infinity
    n = unit.count(shape)
    index = torch.randperm(n, generator=draw)[: max(1, round(share * n))].sort().values.to(torch.int32)
    chosen = Selection(index, unit, shape)
    new = (gather(chosen, base).view(torch.uint8) ^ 1).view(dtype)
    after = base.clone()
    scatter_(chosen, after, new)
    key = f"{name}.weight"
    change = Change(chosen, new, new.numel(), fingerprint(base), fingerprint(after))
    delta = Delta({key: change}, {f"{name}.tied": key}, Origin("org/name", "abc", 99), "gmt", {"lr": 0.1}, "seed")
    path = folder / "seed"
    delta.save(path, against={key: base} if against else None)
    return Seed(path.read_bytes(), {key: base})


def _golden() -> Iterator[Seed]:
    from tests.format.golden import make

    for path in sorted(Path(make.__file__).parent.glob("*.safetensors")):
        yield Seed(path.read_bytes(), make.second_base() if path.stem.endswith("-2") else make.base())
