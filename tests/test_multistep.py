"""What Adams-Bashforth's jumps cost, their best paths and fitted coefficients, against their definitions."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flowdistill.errors import UsageError
from flowdistill.multistep import ab2_cost, ab2_paths, fitted
from flowdistill.schedule import Schedule, bellman, local_cost, uniform
from flowdistill.solvers import SOLVERS, integrate, multistep

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trajectory:
    """States x [M + 1, n] and velocities v [M, n] of all samples at once, at times [M + 1]."""

    times: tuple[float, ...]
    x: Floats
    v: Floats
    samples: int

    @property
    def gram(self) -> Floats:
        rows = np.concatenate([np.diff(self.x, axis=0), self.v])
        return rows @ rows.T / self.samples


def random_one(steps: int, seed: int = 0, samples: int = 7, dimensions: int = 5) -> Trajectory:
    """Of no flow at all: states and velocities have nothing to do with each other."""
    draw = np.random.default_rng(seed)
    inner = np.sort(draw.uniform(0.01, 0.99, steps - 1))[::-1].tolist()
    x, v = (draw.normal(size=(count, samples * dimensions)) for count in (steps + 1, steps))
    return Trajectory((1.0, *inner, 0.0), x, v, samples)


# The cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_the_cost_of_every_jump_is_what_the_solver_misses_by(steps: int) -> None:
    path = random_one(steps, seed=steps)
    cost, rule = ab2_cost(path.gram, path.times), SOLVERS["ab2"]
    x, v, t = torch.from_numpy(path.x), torch.from_numpy(path.v), path.times
    for j in range(steps):
        at = cost(j)
        assert at.shape == (steps, steps + 1)
        for i, k in itertools.product(range(steps), range(steps + 1)):
            if not i < j < k:
                assert at[i, k] == np.inf
                continue
            step = rule.begin(x[i])
            step(None, x[i], v[i], t[i], t[j])  # type: ignore[arg-type]  # it remembers where it was
            end = step(None, x[j], v[j], t[j], t[k])  # type: ignore[arg-type]
            direct = float((x[k] - end).square().sum()) / path.samples
            assert at[i, k] == pytest.approx(direct, rel=1e-9)


def test_a_jump_along_a_parabola_costs_nothing() -> None:
    """Velocities that are linear in time are what the rule is exact for, however uneven the steps."""
    t = np.array(random_one(9, seed=4).times)
    slope, bend = np.random.default_rng(1).normal(size=(2, 6))
    x, v = np.outer(t, slope) + np.outer(t**2, bend), slope + np.outer(2 * t[:-1], bend)
    path = Trajectory(tuple(t.tolist()), x, v, 3)
    cost = ab2_cost(path.gram, path.times)
    for j in range(1, 9):
        assert cost(j)[:j, j + 1 :].max() < 1e-12
    assert local_cost(path.gram, path.times)[0, 9] > 0.1


# The paths -------------------------------------------------------------------------------------------------


def total(path: Sequence[int], first: Floats, cost: Floats) -> float:
    """`cost` [j, i, k]."""
    later = zip(path, path[1:], path[2:], strict=False)
    return float(first[0, path[1]] + sum(cost[j, i, k] for i, j, k in later))


@st.composite
def prices(draw: Any) -> tuple[Floats, Floats]:
    """Of all first and later jumps of a grid; small integers, so that ties are many."""
    steps, most = draw(st.integers(2, 7)), draw(st.sampled_from([2, 1000]))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32)))
    first = numbers.integers(0, most, (steps + 1, steps + 1)).astype(float)
    later = numbers.integers(0, most, (steps, steps, steps + 1)).astype(float)
    j, i, k = np.ogrid[:steps, :steps, : steps + 1]
    return first, np.where((i < j) & (j < k), later, np.inf)


@given(prices())
def test_the_paths_are_the_best_of_all(given_prices: tuple[Floats, Floats]) -> None:
    """And of equals the first in order, for every number of jumps."""
    first, later = given_prices
    steps = len(later)
    found = ab2_paths(first, lambda j: later[j], steps)
    assert list(found) == list(range(1, steps + 1))
    for jumps, path in found.items():
        inner = itertools.combinations(range(1, steps), jumps - 1)
        ways = [(0, *between, steps) for between in inner]  # in order
        assert path == min(ways, key=lambda way: total(way, first, later))
    assert found[1] == (0, steps) and found[steps] == tuple(range(steps + 1))


def test_the_best_path_of_a_trajectory_is_no_worse_than_eulers() -> None:
    path = random_one(12, seed=9)
    first, cost = local_cost(path.gram, path.times), ab2_cost(path.gram, path.times)
    later = np.stack([cost(j) for j in range(12)])
    euler = bellman(first)
    for jumps, found in ab2_paths(first, cost, 12).items():
        assert total(found, first, later) <= total(euler.path(jumps), first, later) * (1 + 1e-12)


@pytest.mark.parametrize("most", [0, -1, 5])
def test_there_is_no_path_of_other_numbers(most: int) -> None:
    path = random_one(4)
    with pytest.raises(UsageError, match=f"a grid of 4 steps has no path of {most}: choose 1 to 4"):
        ab2_paths(local_cost(path.gram, path.times), ab2_cost(path.gram, path.times), most)


def test_a_fine_grid_takes_little_memory() -> None:
    """All jumps of 200 steps at once would be 64 MB, and 8 GB of 1000."""
    path = random_one(200)
    first, cost = local_cost(path.gram, path.times), ab2_cost(path.gram, path.times)
    tracemalloc.start()
    found = ab2_paths(first, cost, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found[8]) == 9 and peak < 10e6


# The coefficients ------------------------------------------------------------------------------------------

KNOTS = (0, 2, 3, 7, 9)


def test_coefficients_are_those_of_least_squares() -> None:
    path = random_one(9, seed=2)
    table = fitted(path.gram, path.times, KNOTS)
    assert [len(row) for row in table] == [1, 2, 3, 4]
    for number, row in enumerate(table, start=1):
        known = path.v[list(KNOTS[:number])].T
        wanted = path.x[KNOTS[number]] - path.x[KNOTS[number - 1]]
        plain = np.linalg.lstsq(known, wanted)[0]
        assert row == pytest.approx(plain, abs=1e-5)
        ridge = np.sqrt(1e-6 * (known**2).sum() / number)  # as rows of data that are 0
        damped = np.linalg.lstsq(np.concatenate([known, ridge * np.eye(number)]), [*wanted, *[0] * number])
        assert row == pytest.approx(damped[0], rel=1e-9)


def test_a_trajectory_that_follows_a_rule_gives_it_away() -> None:
    """And the solver of its coefficients walks along the trajectory."""
    draw, grid = np.random.default_rng(3), uniform(5)
    rule = [draw.normal(size=number) for number in range(1, 6)]
    v = draw.normal(size=(5, 40))
    x = np.concatenate([np.zeros((1, 40)), np.cumsum([row @ v[: len(row)] for row in rule], axis=0)])
    table = fitted(Trajectory(grid.times, x, v, 8).gram, grid.times, range(6))
    for row, true in zip(table, rule, strict=True):
        assert row == pytest.approx(true, abs=1e-4)
    speeds = {round(t, 6): torch.from_numpy(each) for t, each in zip(grid.times, v, strict=False)}

    def field(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return speeds[round(float(t[0]), 6)].reshape(x.shape)

    start = torch.zeros(8, 5, dtype=torch.float64)
    end = integrate(field, start, grid, multistep(table))
    torch.testing.assert_close(end, torch.from_numpy(x[-1]).reshape(8, 5), rtol=0, atol=1e-3)


def test_velocities_that_are_all_the_same_have_coefficients_all_the_same() -> None:
    """A straight path: the normal equations are singular but for the ridge."""
    grid = Schedule((1.0, 0.6, 0.3, 0.0), "any")
    v = np.ones((3, 4))
    x = np.outer(np.array(grid.times), np.ones(4))
    table = fitted(Trajectory(grid.times, x, v, 2).gram, grid.times, range(4))
    for (t, s), row in zip(grid.intervals, table, strict=True):
        assert sum(row) == pytest.approx(s - t, rel=1e-5) and max(row) - min(row) < 1e-6


def test_a_model_at_rest_has_coefficients_of_zero() -> None:
    """Its normal equations have no ridge either."""
    path = random_one(6)
    still = Trajectory(path.times, np.zeros_like(path.x), np.zeros_like(path.v), 1)
    assert fitted(still.gram, path.times, (0, 3, 6)) == ((0.0,), (0.0, 0.0))


@pytest.mark.parametrize("knots", [(0, 4), (1, 9), (0, 3, 3, 9), (0, 5, 3, 9), (0, 10), (9, 0)])
def test_knots_have_to_be_a_path(knots: tuple[int, ...]) -> None:
    path = random_one(9)
    with pytest.raises(UsageError, match="knots must rise from 0 to 9"):
        fitted(path.gram, path.times, knots)
