"""Time grids from noise to data, and BOSS's choice of the best one by dynamic programming.

BOSS (Nguyen, Nguyen and Nguyen 2024, arXiv 2312.16414): of the knots of a fine grid, keep those
whose Euler jumps stray least from the fine trajectory in total (Eq. 5 is the cost, Eq. 8 the
recursion).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from flowdistill.errors import Diverged, UsageError
from flowdistill.flow import t_from_sigma

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]
    Integers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """Knots in canonical time, strictly decreasing from 1.0 (noise) to 0.0 (data)."""

    times: tuple[float, ...]
    name: str

    def __post_init__(self) -> None:
        falls = all(t > s for t, s in self.intervals)
        if not (falls and self.times[:1] == (1.0,) and self.times[-1:] == (0.0,)):
            raise UsageError(
                f"schedule '{self.name}': times must fall strictly from 1 to 0, found {_short(self.times)}"
            )

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """(from, to) of every step, from > to."""
        return list(pairwise(self.times))

    def halved(self) -> Schedule:
        """Every step in two of equal length."""
        middles = (0.5 * (t + s) for t, s in self.intervals)
        knots = [time for pair in zip(self.times, middles, strict=False) for time in pair]
        return Schedule((*knots, self.times[-1]), f"{self.name}, halved")

    def sigmas(self, shift: float = 1.0) -> list[float]:
        """The times without the 0, as diffusers' FlowMatchEulerDiscreteScheduler takes `sigmas`.

        A scheduler shifts what it is given once more, by its own `shift` or, with dynamic shifting, exp(mu).
        For that, these are t / (shift - (shift - 1) t), the inverse of `shifted`.
        """
        return [t / (shift - (shift - 1) * t) for t in self.times[:-1]]


def uniform(steps: int) -> Schedule:
    """Equal steps."""
    _at_least_one(steps)
    return Schedule(tuple(i / steps for i in range(steps, -1, -1)), "uniform")


def shifted(steps: int, shift: float) -> Schedule:
    """t' = shift t / (shift t + 1 - t) of the uniform grid, as in SD3 (arXiv 2403.03206)."""
    if not shift > 0:
        raise UsageError(f"the shift of a schedule must be positive, found {shift:g}")
    times = (shift * t / (shift * t + (1 - t)) for t in uniform(steps).times)
    return Schedule(tuple(times), f"shifted-{shift:g}")


def edm(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """Karras et al. 2022 (arXiv 2206.00364), Eq. 5, in canonical time; the first knot becomes 1."""
    _at_least_one(steps)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    roots = (first + i / (steps - 1) * (last - first) for i in range(1, steps))
    return Schedule((1.0, *(t_from_sigma(root**rho) for root in roots), 0.0), "edm")


@dataclass(frozen=True)
class Bellman:
    """Solutions for every number of jumps at once.

    `totals[nfe]` [M + 1] is the least total cost with exactly `nfe` jumps (infinite for none);
    `following[k, i]` is the knot after knot i on the best way to the end with k jumps left.
    """

    totals: Floats
    following: Integers

    def path(self, nfe: int) -> tuple[int, ...]:
        """Knots 0 = i_0 < ... < i_nfe = M of the best path, of equals the first in order."""
        most = len(self.totals) - 1
        if not 1 <= nfe <= most:
            raise UsageError(f"a grid of {most} steps has no path of {nfe}: choose 1 to {most}")
        knots = [0]
        for left in range(nfe, 0, -1):
            knots.append(int(self.following[left, knots[-1]]))
        return tuple(knots)


def bellman(cost: Floats) -> Bellman:
    """Best paths over the knots 0..M for every number of jumps (BOSS, Eq. 8), exactly.

    `cost[i, j]` [M + 1, M + 1] is the price of jumping from knot i to knot j > i; nothing else of
    the matrix is read. O(M^3) work, milliseconds at M = 100. Diverged where a cost is not a finite
    number >= 0.
    """
    import numpy as np

    knots = len(cost)
    _check_costs(cost)
    forward = np.arange(knots)[:, None] < np.arange(knots)
    jumps = np.where(forward, cost, np.inf)
    totals = np.full(knots, np.inf)
    following = np.zeros((knots, knots), dtype=np.int64)
    to_end = np.full(knots, np.inf)  # V_k(i): least cost from knot i to the end in exactly k jumps
    to_end[-1] = 0.0
    for k in range(1, knots):
        ways = jumps + to_end
        following[k] = ways.argmin(axis=1)  # the first of equals, so ties go to the smaller knot
        to_end = ways.min(axis=1)
        totals[k] = to_end[0]
    return Bellman(totals, following)


def local_cost(gram: Floats, times: Sequence[float]) -> Floats:
    """c[i, j] = E ||x_j - x_i - (t_j - t_i) v_i||^2 for i < j, else 0 (BOSS, Eq. 5).

    `gram` [2M, 2M] float64 is E[B B^T], summed over the dimensions of the data, of the rows
    B = [x_1 - x_0, ..., x_M - x_{M-1}; v_0, ..., v_{M-1}] of the fine trajectory x_0 .. x_M at
    `times` [M + 1]. It holds all that any jump needs, so no state is stored and no network called
    again; increments instead of states keep the differences from cancelling. Returns
    [M + 1, M + 1].
    """
    import numpy as np

    steps = len(times) - 1
    corner, along, speeds = products(gram)
    norm = corner.diagonal()
    start = np.arange(steps)
    length = np.subtract.outer(times, times).T[:-1]  # length[i, j] = t_j - t_i
    displacement = norm[None, :] - 2 * corner[:-1] + norm[:-1, None]
    overlap = (along - along[start, start]).T  # overlap[i, j] = <x_j - x_i, v_i>
    cost = np.zeros((steps + 1, steps + 1))
    cost[:-1] = displacement - 2 * length * overlap + length**2 * speeds.diagonal()[:, None]
    return np.triu(cost.clip(min=0.0), k=1)


def products(gram: Floats) -> tuple[Floats, Floats, Floats]:
    """Of the Gram matrix of `local_cost`: inner products of the states and the velocities themselves.

    <x_j - x_0, x_k - x_0> [M + 1, M + 1], <x_j - x_0, v_i> [M + 1, M] and <v_i, v_j> [M, M].
    """
    import numpy as np

    steps = len(gram) // 2
    corner = np.zeros((steps + 1, steps + 1))
    corner[1:, 1:] = gram[:steps, :steps].cumsum(axis=0).cumsum(axis=1)
    along = np.zeros((steps + 1, steps))
    along[1:] = gram[:steps, steps:].cumsum(axis=0)
    return corner, along, gram[steps:, steps:]


def _check_costs(cost: Floats) -> None:
    import numpy as np

    rows, columns = np.triu_indices(len(cost), k=1)
    values = cost[rows, columns]
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if wrong.size:
        i, j = rows[wrong[0]], columns[wrong[0]]
        raise Diverged(
            f"the cost of the jump from knot {i} to knot {j} is {cost[i, j]:g}, expected a finite "
            "number that is not negative: is the model's velocity finite at these times?"
        )


def _at_least_one(steps: int) -> None:
    if steps < 1:
        raise UsageError(f"a schedule needs at least 1 step, found {steps}")


def _short(times: Sequence[float]) -> str:
    shown = [f"{t:g}" for t in times]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]]) or "none"
