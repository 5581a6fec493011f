"""Law 11 in one place: every kernel of a backend against its reference, on odd shapes, k = 0, ties and every dtype.

Integers (selections, positions, hashes, rounded bits) must be equal. Float arithmetic may differ in the last places: a twin may
contract a multiplication and an addition, and sums over tokens are taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finetooth.kernels import pick, reference

RATES: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
ULPS = {"rtol": 3e-6, "atol": 1e-7}  # some 20 units in the last place: five rounded operations, contracted or not
SHAPES = ((1,), (7,), (33, 5), (64, 129), (257, 300))
Kernel = Callable[..., Any]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def twins(backend: str, op: str, device: str) -> tuple[Kernel, Kernel]:
    return pick(op, device, backend), getattr(reference, op)


def masked_adamw(backend: str, device: str) -> None:
    ours, theirs = twins(backend, "masked_adamw_", device)
    for shape in SHAPES:
        for dtype, key in ((torch.float32, None), (torch.bfloat16, 7), (torch.bfloat16, None)):
            for cut, strict in ((None, False), (0.8, False), (0.8, True), (1e9, True)):
                g = draw(*shape, seed=1, dtype=dtype)
                found = []
                for kernel, where in ((ours, device), (theirs, "cpu")):
                    state = [
                        draw(*shape, seed=2, dtype=dtype),
                        draw(*shape, seed=3) * 0.1,
                        draw(*shape, seed=4).square(),
                    ]
                    p, m, v = (t.to(where) for t in state)
                    bits = torch.full(((p.numel() + 7) // 8,), 255, dtype=torch.uint8, device=where)
                    more = {"chosen": bits} if strict or cut else {}
                    kernel(p, g.to(where), m, v, cut=cut, strict=strict, scale=0.7, key=key, age=3, **more, **RATES)
                    found.append([t.cpu() for t in (p, m, v, bits)])
                (p, m, v, bits), (p0, m0, v0, bits0) = found
                assert torch.equal(bits, bits0)
                torch.testing.assert_close(m, m0, **ULPS)
                torch.testing.assert_close(v, v0, **ULPS)
                if dtype == torch.float32:
                    torch.testing.assert_close(p, p0, **ULPS)
                else:  # a step on the edge between two bf16 numbers may fall on either side
                    assert (p != p0).float().mean() < 0.01
                    torch.testing.assert_close(p.float(), p0.float(), rtol=2**-7, atol=0)
                if strict and cut is not None:
                    still = g.abs() < cut
                    assert torch.equal(p[still], draw(*shape, seed=2, dtype=dtype)[still])


def adamw_at(backend: str, device: str) -> None:
    ours, theirs = twins(backend, "adamw_at_", device)
    for n, k in ((1, 0), (1, 1), (100, 0), (100, 7), (5000, 5000), (100_003, 1001)):
        every = n == k > 1
        index = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k].sort().values.int()
        plain = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None)]
        for dtype, kind in (*plain, (torch.bfloat16, torch.int16), (torch.float16, torch.float32)):
            for ages in (4, torch.randint(1, 9, (k,), generator=torch.Generator().manual_seed(5)).int()):
                found = []
                for kernel, where in ((ours, device), (theirs, "cpu")):
                    p = draw(n, seed=1, dtype=dtype).to(where)
                    m, v = (draw(k, seed=2) * 0.1).to(where), draw(k, seed=3).square().to(where)
                    master = None if kind is None else p[index.long().to(where)].float()
                    if kind == torch.int16:
                        master = torch.randint(-(2**15), 2**15, (k,), generator=torch.Generator().manual_seed(6))
                        master = master.to(torch.int16).to(where)
                    values = [] if master is None else [master]
                    age = ages if isinstance(ages, int) else ages.to(where)
                    g = draw(k, seed=4, dtype=dtype).to(where)
                    at = None if every else index.to(where)
                    kernel(p, at, g, m, v, master, scale=0.7, age=age, **RATES)
                    if kind == torch.int16:
                        values = [reference.exact(p[index.long().to(where)], master)]
                    found.append([t.float().cpu() for t in (p, m, v, *values)])
                loose = ULPS if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-7}
                for i, (a, b) in enumerate(zip(*found, strict=True)):
                    torch.testing.assert_close(a, b, **(loose if i == 0 else ULPS))
                outside = torch.ones(n, dtype=torch.bool)
                outside[index.long()] = False
                assert torch.equal(found[0][0][outside], draw(n, seed=1, dtype=dtype).float()[outside])


def magnitude_cut(backend: str, device: str) -> None:
    ours, theirs = twins(backend, "magnitude_cut", device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for make in (draw, tied, heavy, zeros):
            for shape in (*SHAPES, (1000, 300)):
                gs = [make(*shape, seed=1).to(dtype), make(13, seed=2).to(dtype)]
                n = gs[0].numel() + 13
                for k in sorted({1, 2, max(1, n // 5), n - 1, n}):
                    cut, square = ours([g.to(device) for g in gs], k)
                    cut0, square0 = theirs(gs, k)
                    assert cut == cut0, (dtype, make.__name__, shape, k)
                    assert abs(square - square0) <= 1e-6 * abs(square0)
        for bad in (float("nan"), float("inf"), float("-inf")):
            g = draw(1000, seed=3).to(dtype)
            g[7] = bad
            assert not torch.isfinite(torch.tensor(ours([g.to(device)], 200)[1]))


def tied(*shape: int, seed: int) -> Tensor:
    """Few different values."""
    return (draw(*shape, seed=seed) * 2).round() / 2


def heavy(*shape: int, seed: int) -> Tensor:
    """Magnitudes over many orders, as gradients have them, in blocks: what a sample may misjudge."""
    x = draw(*shape, seed=seed)
    return x * torch.linspace(-18, 8, x.numel()).exp().view(x.shape)


def zeros(*shape: int, seed: int) -> Tensor:
    """Mostly zero, with both signs of it and denormals."""
    x = draw(*shape, seed=seed)
    return torch.where(x > 1.5, x, torch.where(x > 1.2, 1e-42, torch.where(x > 0, 0.0, -0.0)))


def reaching(backend: str, device: str) -> None:
    ours, theirs = twins(backend, "reaching", device)
    for n in (1, 100, 100_003):
        x = tied(n, seed=1).abs()
        for cut in (0.0, 0.5, 1.5, 1e9):
            for a, b in zip(ours(x.to(device), cut), theirs(x, cut), strict=True):
                assert torch.equal(a.cpu().long(), b)


def flagged(backend: str, device: str) -> None:
    ours, theirs = twins(backend, "flagged", device)
    back = pick("positions", device, backend)
    for n, k in ((1, 0), (1, 1), (9, 9), (100, 7), (500_003, 40_000), (500_003, 500_003)):
        index = torch.randperm(n, generator=torch.Generator().manual_seed(n))[:k].sort().values.int()
        packed = ours(index.to(device), n)
        assert torch.equal(packed.cpu(), theirs(index, n))
        found = back(packed, n)
        assert found.dtype == torch.int32 and torch.equal(found.cpu(), index)
        assert torch.equal(reference.positions(packed.cpu(), n), index)


def sampled_product(backend: str, device: str) -> None:
    ours, theirs = twins(backend, "sampled_product_", device)
    for t, out, width, k in ((1, 3, 2, 0), (1, 3, 2, 4), (33, 65, 17, 300), (256, 128, 200, 1000), (100, 64, 64, 4096)):
        flat = torch.randperm(out * width, generator=torch.Generator().manual_seed(0))[:k].sort().values.int()
        for dtype in (torch.float32, torch.bfloat16):
            dy, x, acc = draw(t, out, seed=1, dtype=dtype), draw(t, width, seed=2, dtype=dtype), draw(k, seed=3)
            rows, columns, mine = flat // width, flat % width, acc.clone().to(device)
            ours(mine, dy.to(device), x.to(device), rows.to(device), columns.to(device))
            theirs(acc, dy, x, rows, columns)
            # t products of numbers of size 1, added in another order: the error of a sum of t float32 terms
            torch.testing.assert_close(mine.cpu(), acc, rtol=1e-5, atol=1e-6 * t**0.5 + 1e-6)


def best_steps(backend: str, device: str) -> None:
    ours, theirs = twins(backend, "best_steps", device)
    for rows, width, top in ((1, 1, 7), (3, 7, 1), (65, 130, 7), (40, 3000, 127)):
        w = draw(rows, width, seed=rows)
        w[0] = 0.0
        full, fractions = w.abs().amax(1, keepdim=True) / top, [1 - 0.01 * i for i in range(80)]
        chosen = [ours(w.to(device), full.to(device), fractions, top).cpu(), theirs(w, full, fractions, top)]
        level = [(w / s.clamp_min(1e-30)).round().clamp(-top, top) * s for s in chosen]
        a, b = ((x - w).double().square().sum(1) for x in level)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)  # of two equally good steps either may be taken


def noisy(backend: str, device: str) -> None:
    ours, theirs = twins(backend, "noisy", device)
    for rows, width, first in ((1, 1, 0), (3, 7, 0), (5, 130, 1300), (64, 129, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            w, half = draw(rows, width, seed=1, dtype=dtype), draw(rows, 1, seed=2).abs()
            kept = torch.arange(width) % 3 == 0
            out, expected = torch.empty_like(w, device=device), torch.empty_like(w)
            ours(w.to(device), half.to(device), kept.to(device), 11, first, out)
            theirs(w, half, kept, 11, first, expected)
            torch.testing.assert_close(
                out.cpu(), expected, **(ULPS if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-7})
            )
            assert torch.equal(out.cpu()[:, kept], w[:, kept])


def round_stochastic(backend: str, device: str) -> None:
    ours, theirs = twins(backend, "round_stochastic", device)
    for dtype in (torch.bfloat16, torch.float16):
        for n in (1, 77, 100_003):
            x = draw(n, seed=1)
            out, expected = torch.empty(n, dtype=dtype, device=device), torch.empty(n, dtype=dtype)
            ours(x.to(device), dtype, 5, out)
            theirs(x, dtype, 5, expected)
            assert torch.equal(out.cpu(), expected)


def uniform(backend: str, device: str) -> None:
    ours, theirs = twins(backend, "uniform", device)
    for n in (0, 1, 77, 100_003):
        assert torch.equal(ours(n, 5, device).cpu(), theirs(n, 5))


CASES = (
    masked_adamw,
    adamw_at,
    magnitude_cut,
    reaching,
    flagged,
    sampled_product,
    best_steps,
    noisy,
    round_stochastic,
    uniform,
)
