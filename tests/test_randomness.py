"""Keyed randomness: the same for ever, independent of batching and order, and random."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from flowdistill import randomness


def first_numbers() -> dict[str, list[float]]:
    drawn = {
        "noise": randomness.noise(0, [0], (4,)).flatten(),
        "uniforms": randomness.uniforms(0, "time", 0, 3),
        "permutation": randomness.permutation(0, "order", 0, 6),
        "integers": randomness.integers(0, "label", [0, 1, 2, 3], 1000),
    }
    return {name: numbers.tolist() for name, numbers in drawn.items()}


PINNED: dict[str, list[float]] = {
    "noise": [-0.08558579534, 0.81361275911, -0.51656085253, 0.36844247580],
    "uniforms": [0.35336995828, 0.02154254186, 0.51545890152],
    "permutation": [2, 4, 5, 3, 0, 1],
    "integers": [822, 22, 68, 22],
}
"""A change of these numbers changes every artifact that anyone has made: do not."""


def test_numbers_are_the_same_for_ever() -> None:
    assert randomness.key(0, "noise", 0) == 2686582129117073074
    for name, numbers in first_numbers().items():
        assert numbers == pytest.approx(PINNED[name], abs=1e-7), name
    drawn = torch.rand(2, generator=randomness.generator(0, "init"))
    assert drawn.tolist() == pytest.approx([0.9387709498, 0.4239637256], abs=1e-7)


def test_a_key_has_63_bits_and_uses_them() -> None:
    keys = [randomness.key(0, "bits", i) for i in range(4000)]
    assert all(0 <= k < 2**63 for k in keys)
    for bit in range(63):
        ones = sum(k >> bit & 1 for k in keys)
        assert abs(ones - 2000) < 5 * math.sqrt(1000), bit


@pytest.mark.parametrize(
    "one, other",
    [
        (("ab", "c"), ("a", "bc")),
        (("1",), (1,)),
        ((1, 1), (11,)),
        ((-1,), (1,)),
        (("a", 1), (1, "a")),
        (("i1,",), (1,)),
        (("",), ()),
    ],
)
def test_keys_of_different_parts_differ(one: tuple[str | int], other: tuple[str | int]) -> None:
    assert randomness.key(0, *one) != randomness.key(0, *other)


def test_a_noise_sample_depends_on_its_index_alone() -> None:
    whole = randomness.noise(7, range(20), (3, 2))
    assert whole.shape == (20, 3, 2) and whole.dtype == torch.float32
    shuffled = torch.randperm(20, generator=randomness.generator(0, "test"))
    assert torch.equal(randomness.noise(7, shuffled, (3, 2)), whole[shuffled])
    assert torch.equal(randomness.noise(7, [13], (3, 2))[0], whole[13])
    assert not torch.equal(randomness.noise(8, [13], (3, 2))[0], whole[13])


def test_an_integer_depends_on_its_index_alone() -> None:
    whole = randomness.integers(7, "label", range(50), 10)
    assert randomness.integers(7, "label", [41, 3], 10).tolist() == whole[[41, 3]].tolist()
    assert torch.equal(randomness.integers(7, "label", torch.arange(50), 10), whole)


def test_no_global_state_is_read_or_written() -> None:
    before = torch.get_rng_state()
    first_numbers()
    randomness.generator(0, "x")
    assert torch.equal(torch.get_rng_state(), before)


def test_purposes_steps_epochs_and_seeds_do_not_share_numbers() -> None:
    draws: list[Tensor] = [
        randomness.noise(0, [0], (4,))[0].double(),
        randomness.noise(0, [1], (4,))[0].double(),
        randomness.noise(1, [0], (4,))[0].double(),
        *(
            randomness.uniforms(seed, purpose, step, 4)
            for seed, purpose, step in itertools.product((0, 1), ("time", "flip"), (0, 1))
        ),
        *(
            torch.rand(4, generator=randomness.generator(seed, part), dtype=torch.float64)
            for seed, part in itertools.product((0, 1), ("time", "noise", 0))
        ),
    ]
    firsts = [draw[0].item() for draw in draws]
    assert len(set(firsts)) == len(firsts)
    orders = [randomness.permutation(0, p, e, 50).tolist() for p in ("a", "b") for e in (0, 1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


def kolmogorov_smirnov(sample: Tensor, cdf: Tensor) -> float:
    """sqrt(n) times the largest gap between the sample's and the true CDF at the sorted sample."""
    n = len(sample)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max())


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    eps = randomness.noise(3, range(2000), (64,)).double()
    n = eps.numel()
    assert abs(eps.mean()) < 5 / math.sqrt(n)
    assert abs(eps.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((eps**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((eps**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs((eps[1:] * eps[:-1]).mean()) < 5 / math.sqrt(n)  # one sample and the next
    assert abs((eps[:, 1:] * eps[:, :-1]).mean()) < 5 / math.sqrt(n)
    ordered = eps.flatten().sort().values
    assert kolmogorov_smirnov(ordered, torch.special.ndtr(ordered)) < 2.0


def test_uniforms_are_uniform() -> None:
    u = randomness.uniforms(3, "time", 5, 100_000)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    ordered = u.sort().values
    assert kolmogorov_smirnov(ordered, ordered) < 2.0


def test_the_first_uniforms_of_many_steps_are_uniform() -> None:
    first = torch.cat([randomness.uniforms(3, "time", step, 1) for step in range(4000)])
    ordered = first.sort().values
    assert kolmogorov_smirnov(ordered, ordered) < 2.0


def test_integers_are_even() -> None:
    drawn = randomness.integers(3, "label", range(20_000), 8)
    assert drawn.dtype == torch.int64
    counts = drawn.bincount(minlength=8).double()
    assert len(counts) == 8
    assert ((counts - 2500) ** 2 / 2500).sum() < 35  # chi-squared, 7 degrees: p < 1e-5


def test_a_permutation_holds_each_index_once() -> None:
    order = randomness.permutation(3, "order", 0, 1000)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(1000))
    assert order.tolist() != list(range(1000))


def test_a_generator_is_on_the_cpu_and_repeats() -> None:
    one, other = (randomness.generator(5, "init") for _ in range(2))
    assert one.device.type == "cpu"
    assert torch.equal(torch.randn(3, generator=one), torch.randn(3, generator=other))


def test_no_samples_are_an_empty_batch() -> None:
    assert randomness.noise(0, [], (2, 2)).shape == (0, 2, 2)
    assert randomness.integers(0, "label", [], 3).shape == (0,)
