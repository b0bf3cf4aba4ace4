"""Schedules against their formulas; the dynamic programme against brute force and BOSS itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from safetensors.numpy import load_file

from flowdistill import schedule
from flowdistill.errors import Diverged, UsageError
from flowdistill.schedule import Schedule, bellman, local_cost

Floats = NDArray[np.float64]
FIXTURES = Path(__file__).parent / "fixtures"
KARRAS_18 = (57.58598, 40.78557, 28.37458, 19.35245, 12.91008, 8.400935, 5.315195, 3.256822, 1.9233398)
"""sigma_1 .. sigma_9 of EDM's grid with 18 steps."""


# Grids


def test_uniform_steps_are_equal() -> None:
    assert schedule.uniform(4).times == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert schedule.uniform(1).times == (1.0, 0.0)
    assert schedule.uniform(3).name == "uniform"


def test_shift_3_by_hand() -> None:
    assert schedule.shifted(4, 3.0).times == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    assert schedule.shifted(4, 3.0).name == "shifted-3"
    assert schedule.shifted(5, 1.0).times == pytest.approx(schedule.uniform(5).times)
    # The inverse shift undoes the shift: t -> 1 - t swaps 3 and 1/3.
    mirrored = [1 - t for t in reversed(schedule.shifted(7, 1 / 3).times)]
    assert schedule.shifted(7, 3.0).times == pytest.approx(mirrored)


def test_edm_grid_is_karras() -> None:
    times = schedule.edm(18).times
    assert len(times) == 19
    assert times[0] == 1.0 and times[-1] == 0.0
    sigmas = [t / (1 - t) for t in times[1:-1]]
    assert sigmas[:9] == pytest.approx(KARRAS_18, rel=1e-6)
    assert sigmas[-1] == pytest.approx(0.002)
    assert schedule.edm(18).name == "edm"


def test_edm_grid_follows_its_arguments() -> None:
    times = schedule.edm(3, sigma_min=1.0, sigma_max=9.0, rho=2.0).times
    assert times == pytest.approx((1.0, 4 / 5, 1 / 2, 0.0))
    assert schedule.edm(2, sigma_min=1.0).times == pytest.approx((1.0, 0.5, 0.0))
    assert schedule.edm(1).times == (1.0, 0.0)


@given(st.integers(1, 300), st.floats(0.02, 50.0))
def test_every_grid_is_a_schedule_of_the_steps_asked_for(steps: int, shift: float) -> None:
    grids = schedule.uniform(steps), schedule.shifted(steps, shift), schedule.edm(steps)
    for grid in grids:
        assert grid.steps == steps == len(grid.intervals)
        assert grid.times[0] == 1.0 and grid.times[-1] == 0.0


def test_intervals_and_sigmas() -> None:
    grid = Schedule((1.0, 0.7, 0.2, 0.0), "mine")
    assert grid.intervals == [(1.0, 0.7), (0.7, 0.2), (0.2, 0.0)]
    assert grid.sigmas() == [1.0, 0.7, 0.2]


@pytest.mark.parametrize(
    "times",
    [
        (),
        (1.0,),
        (0.0,),
        (0.9, 0.0),
        (1.0, 0.1),
        (0.0, 0.5, 1.0),
        (1.0, 0.5, 0.5, 0.0),
        (1.0, 0.2, 0.3, 0.0),
        (1.0, float("nan"), 0.0),
        (float("inf"), 1.0, 0.0),
    ],
)
def test_times_that_are_no_schedule_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="schedule 'bad': times must fall strictly from 1 to 0, "):
        Schedule(times, "bad")


def test_refusals_show_what_was_found() -> None:
    with pytest.raises(UsageError, match=r"found 1, 0\.5, 0\.6, 0$"):
        Schedule((1.0, 0.5, 0.6, 0.0), "bad")
    with pytest.raises(UsageError, match=r"found 9, 8, 7, 6, 5, 4$"):
        Schedule((9.0, 8.0, 7.0, 6.0, 5.0, 4.0), "bad")
    with pytest.raises(UsageError, match=r"found 9, 8, 7, \.\.\., 4, 3$"):
        Schedule((9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0), "bad")
    with pytest.raises(UsageError, match="found none$"):
        Schedule((), "bad")
    for make in (schedule.uniform, schedule.edm):
        with pytest.raises(UsageError, match="at least 1 step, found 0"):
            make(0)
    for shift in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="shift of a schedule must be positive, found"):
            schedule.shifted(4, shift)


# The dynamic programme


def brute_force(cost: Floats, nfe: int) -> tuple[float, tuple[int, ...]]:
    """The least (cost, path) of all paths, summed from the end as the recursion does."""
    last = len(cost) - 1
    candidates = []
    for inner in itertools.combinations(range(1, last), nfe - 1):
        path = (0, *inner, last)
        total = 0.0
        for i, j in reversed(list(itertools.pairwise(path))):
            total = cost[i, j] + total
        candidates.append((float(total), path))
    return min(candidates)


def solve(cost: Floats) -> list[tuple[float, tuple[int, ...]]]:
    """(total, path) for every number of jumps from 1 on."""
    solution = bellman(cost)
    return [(float(solution.totals[k]), solution.path(k)) for k in range(1, len(cost))]


def test_boss_itself_agrees_in_82_cases() -> None:
    fixture = json.loads((FIXTURES / "dp_small.json").read_text())
    assert len(fixture["cases"]) == 82
    for case in fixture["cases"]:
        solution = bellman(np.array(fixture["matrices"][case["matrix"]]))
        assert solution.path(case["nfe"]) == tuple(case["path"]), case["tag"]
        assert solution.totals[case["nfe"]] == pytest.approx(case["cost"], rel=1e-12)


def costs(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Floats]:
    """Square matrices of 2 to 8 knots; what is not above the diagonal must not be read."""

    def spoil(cost: Floats) -> Floats:
        cost[np.tril_indices(len(cost))] = np.nan
        return cost

    square = st.integers(2, 8).flatmap(lambda n: arrays(np.float64, (n, n), elements=elements))
    return square.map(spoil)


@given(costs(st.integers(0, 10**6).map(float)))  # whose sums are exact in any order, so that ties are ties
def test_it_is_the_brute_force_optimum(cost: Floats) -> None:
    assert solve(cost) == [brute_force(cost, k) for k in range(1, len(cost))]


@given(costs(st.integers(0, 3).map(float)))
def test_ties_go_to_the_lexicographically_first_path(cost: Floats) -> None:
    assert solve(cost) == [brute_force(cost, k) for k in range(1, len(cost))]


def test_it_takes_integers_and_leaves_the_matrix_alone() -> None:
    cost = np.array([[-1, 5, 9], [-1, -1, 1], [-1, -1, -1]])
    kept = cost.copy()
    assert solve(cost) == [(9.0, (0, 2)), (6.0, (0, 1, 2))]
    assert np.array_equal(cost, kept)


def test_no_jump_and_more_jumps_than_the_grid_are_refused() -> None:
    solution = bellman(np.ones((4, 4)))
    assert solution.totals[0] == np.inf and len(solution.totals) == 4
    for nfe in (-1, 0, 4):
        with pytest.raises(UsageError, match=f"grid of 3 steps has no path of {nfe}: .* 1 to 3"):
            solution.path(nfe)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1e-9])
@pytest.mark.parametrize("place", [(0, 1), (0, 3), (2, 3)])
def test_costs_that_are_not_numbers_are_refused(wrong: float, place: tuple[int, int]) -> None:
    cost = np.ones((4, 4))
    cost[place] = wrong
    with pytest.raises(Diverged, match=f"from knot {place[0]} to knot {place[1]} is {wrong:g}"):
        bellman(cost)


def test_the_first_wrong_cost_is_named() -> None:
    cost = np.ones((4, 4))
    cost[1, 2], cost[2, 3] = -2.0, np.nan
    with pytest.raises(Diverged, match="from knot 1 to knot 2 is -2"):
        bellman(cost)


@given(arrays(np.float64, st.integers(2, 12), elements=st.floats(0.01, 1)))
def test_more_jumps_never_cost_more_where_splitting_a_jump_helps(lengths: Floats) -> None:
    knots = np.concatenate([[0.0], lengths.cumsum()])
    cost = np.triu(np.subtract.outer(knots, knots) ** 2)  # (a + b)^2 >= a^2 + b^2
    totals = bellman(cost).totals
    assert np.all(np.diff(totals[1:]) <= 1e-12)


def test_on_an_even_grid_of_convex_costs_the_jumps_are_even() -> None:
    knots = np.arange(13.0)
    cost = np.subtract.outer(knots, knots) ** 2
    assert bellman(cost).path(4) == (0, 3, 6, 9, 12)
    assert bellman(cost).totals[4] == 36.0


def test_a_hundred_steps_are_solved_for_every_budget() -> None:
    knots = np.linspace(0, 1, 101)
    solution = bellman(np.subtract.outer(knots, knots) ** 2)
    for nfe in (1, 2, 5, 50, 100):
        path = solution.path(nfe)
        assert path[0] == 0 and path[-1] == 100 and len(path) == nfe + 1
        assert solution.totals[nfe] == pytest.approx(1 / nfe)


# The cost of a jump


def gram_of(x: Floats, v: Floats) -> Floats:
    """E[B B^T] of trajectories x [M + 1, N, D] with velocities v [M, N, D]."""
    rows = np.concatenate([np.diff(x, axis=0), v])
    return np.einsum("ind,jnd->ij", rows, rows) / x.shape[1]


def cost_by_definition(x: Floats, v: Floats, times: Floats) -> Floats:
    cost = np.zeros((len(x), len(x)))
    for i, j in itertools.combinations(range(len(x)), 2):
        residual = x[j] - x[i] - (times[j] - times[i]) * v[i]
        cost[i, j] = (residual**2).sum(axis=1).mean()
    return cost


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_cost_from_the_gram_matrix_is_the_cost_of_the_jump(steps: int) -> None:
    drawn = np.random.default_rng(steps)
    x, v = drawn.normal(size=(steps + 1, 6, 5)), drawn.normal(size=(steps, 6, 5))
    times = np.array([1.0, *np.sort(drawn.uniform(size=steps - 1))[::-1], 0.0])
    found = local_cost(gram_of(x, v), tuple(times))
    np.testing.assert_allclose(found, cost_by_definition(x, v, times), rtol=1e-12, atol=1e-12)


def test_straight_paths_cost_nothing_and_never_less() -> None:
    drawn = np.random.default_rng(0)
    times = np.linspace(1, 0, 21) ** 2
    start, speed = drawn.normal(size=(2, 8, 3))
    x = start + (times[:, None, None] - 1) * speed
    cost = local_cost(gram_of(x, np.broadcast_to(speed, (20, 8, 3))), tuple(times))
    assert cost.max() < 1e-12
    assert cost.min() == 0.0


@pytest.mark.parametrize("name", ["gaussian", "mixture3"])
def test_boss_itself_has_the_same_costs_and_schedules(name: str) -> None:
    fixture = load_file(FIXTURES / f"cost_{name}_K10.safetensors")
    x = fixture["traj_x"].reshape(11, 16, 4).astype(np.float64)
    v = -fixture["traj_v"].reshape(10, 16, 4).astype(np.float64)  # its time runs from noise to data
    cost = local_cost(gram_of(x, v), schedule.uniform(10).times)
    np.testing.assert_allclose(cost, fixture["cost_matrix"], rtol=1e-5, atol=1e-5)
    for nfe in range(1, 11):
        assert bellman(cost).path(nfe) == bellman(fixture["cost_matrix"]).path(nfe)


GRIDS = [schedule.uniform(1), schedule.uniform(3), schedule.edm(4), schedule.shifted(2, 3.0)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name}-{grid.steps}")
def test_halved_steps_meet_the_old_knots_and_their_middles(grid: Schedule) -> None:
    halved = grid.halved()
    assert halved.times[::2] == grid.times and halved.steps == 2 * grid.steps
    middles = [0.5 * (t + s) for t, s in grid.intervals]
    assert list(halved.times[1::2]) == pytest.approx(middles, abs=1e-15)
    assert halved.name == f"{grid.name}, halved"


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_sigmas_come_back_when_a_scheduler_shifts_them(shift: float) -> None:
    times = schedule.edm(5).times[:-1]
    sigmas = schedule.edm(5).sigmas(shift)
    assert [shift * s / (1 + (shift - 1) * s) for s in sigmas] == pytest.approx(list(times), abs=1e-14)
    assert schedule.edm(5).sigmas() == pytest.approx(list(times), abs=1e-14)
