"""The reference kernels against slower or more exact forms of themselves."""

import pytest
import torch

from finetooth.kernels import reference

MASK = (1 << 64) - 1


def splitmix(position: int, key: int) -> int:
    """The same mixer on Python's integers, which do not wrap by themselves."""
    x = (position * 0x9E3779B97F4A7C15 + key) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_hash_is_splitmix() -> None:
    positions, key = [0, 1, 2, 1000003, 2**40 + 7], reference.key(3, "a.weight", 5)
    ours = reference.hash64(torch.tensor(positions), key).tolist()
    assert [h & MASK for h in ours] == [splitmix(p, key & MASK) for p in positions]


def test_uniform_is_uniform_and_positional() -> None:
    n = reference.CHUNK + 5  # across a chunk's edge
    u = reference.uniform(n, reference.key(0, "x"))
    assert torch.equal(u[: n // 2], reference.uniform(n // 2, reference.key(0, "x")))
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 64, 0, 1)  # each bin is binomial with sd sqrt(n/64) = 128: six of them
    assert (counts - n / 64).abs().max() < 6 * (n / 64) ** 0.5
    other = reference.uniform(n, reference.key(1, "x"))
    assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 6 / n**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_lands_on_neighbours(dtype: torch.dtype) -> None:
    x = torch.tensor([1.001, -3.337, 0.1234567, 1e-3, 1.0]).repeat_interleave(40000)
    out = torch.empty_like(x, dtype=dtype)
    reference.round_stochastic(x, dtype, reference.key(0, "r"), out)
    for value, drawn in zip(x.view(5, -1), out.float().view(5, -1), strict=True):
        low, high = float(drawn.min()), float(drawn.max())
        assert len(drawn.unique()) <= 2
        assert low <= value[0] <= high
        # the mean of n draws that differ by at most one ulp: five standard deviations of a fair coin
        assert abs(float(drawn.double().mean() - value[0].double())) <= 5 * (high - low) / 2 / 200
    assert (out.float().view(5, -1)[4] == 1.0).all()


def test_bf16_swallows_small_steps_and_stochastic_rounding_does_not() -> None:
    """1,000 steps of 1e-6 from 1.0, whose bf16 neighbour is 4e-3 away."""
    nearest = torch.ones(20000, dtype=torch.bfloat16)
    random = nearest.clone()
    for step in range(1000):
        nearest = (nearest.float() - 1e-6).bfloat16()
        reference.round_stochastic(random.float() - 1e-6, torch.bfloat16, reference.key(0, "w", step), random)
    assert (nearest == 1).all()
    # each entry is a random walk of jumps of 2^-8: its sd is sqrt(1e-3 * 2^-8) = 2e-3; the mean of 20,000 has 1.4e-5
    assert abs(float(random.double().mean()) - (1 - 1e-3)) < 5 * 1.4e-5


def test_ages_per_unit_are_adamw_from_their_own_start() -> None:
    g = torch.Generator().manual_seed(0)
    p, m, v = torch.randn(3, 4, generator=g), torch.zeros(3, 4), torch.zeros(3, 4)
    alone = [(p[i : i + 1].clone(), m[i : i + 1].clone(), v[i : i + 1].clone()) for i in range(3)]
    ages = torch.tensor([0, 4, 9], dtype=torch.int32)
    rates = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    for _ in range(5):
        grad, ages = torch.randn(3, 4, generator=g), ages + 1
        reference.adamw_(p, grad, m, v, age=ages, **rates)
        for i, (pi, mi, vi) in enumerate(alone):
            reference.adamw_(pi, grad[i : i + 1], mi, vi, age=int(ages[i]), **rates)
    for i, (pi, _, _) in enumerate(alone):
        torch.testing.assert_close(p[i : i + 1], pi, rtol=1e-6, atol=1e-7)  # one rounding of the step size differs


def test_decay_to_a_base() -> None:
    p, base = torch.tensor([2.0]), torch.tensor([1.0])
    zero = torch.zeros(1)
    reference.adamw_(
        p, zero, zero.clone(), zero.clone(), age=1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5, decay_to=base
    )
    assert p.item() == pytest.approx(2.0 - 0.1 * 0.5 * (2.0 - 1.0))


def test_normals_are_normal_and_positional() -> None:
    n = 400_000
    z = reference.normal(0, n, reference.key(0, "w")).double()
    assert torch.equal(z[1001:2003].float(), reference.normal(1001, 1002, reference.key(0, "w")))
    # five standard errors of each estimate for a normal distribution
    assert abs(float(z.mean())) < 5 / n**0.5 and abs(float(z.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 5 * (96 / n) ** 0.5
    assert abs(float((z[:-1] * z[1:]).mean())) < 5 / n**0.5  # neighbours, which share a hash
    table = reference.normal_table().double()
    assert abs(float(table.square().mean()) - 1) < 1e-6 and 4.2 < float(table.max()) < 4.4


def test_two_bytes_make_a_bfloat16_weight_exact() -> None:
    """Over every low half, both signs, both neighbours: nearest-even weights, and the value again but for the tie that goes down."""
    low = torch.arange(1 << 16, dtype=torch.int32)
    for high in (0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7F):
        for sign in (0, -(1 << 31)):
            values = (low + (high << 16) + sign).view(torch.float32)
            master = torch.zeros(1 << 16, dtype=torch.int16)
            x = reference.remembered(values, torch.bfloat16, master)
            assert torch.equal(x.view(torch.int16), values.bfloat16().view(torch.int16))
            back = reference.exact(x, master).view(torch.int32) - values.view(torch.int32)
            moved = back.nonzero().flatten().tolist()
            assert moved == ([0x8000] if high % 2 == 0 else []) and back.abs().max() <= 1
