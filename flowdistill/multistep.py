"""Multistep rules from one calibration: what a jump by Adams-Bashforth costs, and which coefficients are
best.

Along a model's own fine trajectory every error that is linear in its velocities is a combination of the rows
of the Gram matrix of `schedule.local_cost`. So schedules and coefficients for rules with memory follow from
it with no further evaluation of the network.

Two-step Adams-Bashforth on uneven steps: from knot j to k, h = t_k - t_j, with the velocity at the knot i
before, g = t_j - t_i,

    x_k = x_j + h ((1 + h / 2g) v_j - h / 2g v_i)

Its best schedule is a path over pairs of neighbouring knots, the first jump being Euler's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from flowdistill.errors import UsageError
from flowdistill.schedule import products

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]
    Jumps: TypeAlias = Callable[[int], Floats]
    """j -> c[i, k], what a jump from knot j to k costs after one from i; of all j at once it is a lot."""

_RIDGE = 1e-6
"""Of the velocities' own mean square, added where coefficients are fitted: neighbours are nearly alike."""


def ab2_cost(gram: Floats, times: Sequence[float]) -> Jumps:
    """At j, c[i, k] = E ||x_k - x_j - AB2's step||^2 for i < j < k, infinite elsewhere, [M, M + 1].

    `gram` [2M, 2M] and `times` [M + 1] are those of `schedule.local_cost`.
    """
    import numpy as np

    steps = len(times) - 1
    corner, along, speeds = products(gram)
    t, norm = np.asarray(times, dtype=np.float64), corner.diagonal()
    i, k = np.ogrid[:steps, : steps + 1]

    def at(j: int) -> Floats:
        h = t[k] - t[j]
        share = h / (2 * np.where(i < j, t[j] - t[i], 1.0))  # h / 2g
        now, before = h * (1 + share), -h * share
        overlap = (along - along[j]).T  # <x_k - x_j, v_i> at [i, k]
        cost = (
            (norm - 2 * corner[j] + norm[j])
            - 2 * (now * overlap[j] + before * overlap)
            + now**2 * speeds[j, j]
            + 2 * now * before * speeds[:, [j]]
            + before**2 * speeds.diagonal()[:, None]
        )
        return np.where((i < j) & (j < k), cost.clip(min=0.0), np.inf)

    return at


def ab2_paths(first: Floats, cost: Jumps, most: int) -> dict[int, tuple[int, ...]]:
    """The best knots for 1 to `most` jumps: the first costs `first[0, j]`, the others `cost(j)[i, k]`.

    Exact: the state of the recursion is the jump before. O(most M^3) work, O(most M^2) memory.
    """
    import numpy as np

    knots = len(first)
    end = knots - 1
    if not 1 <= most <= end:
        raise UsageError(f"a grid of {end} steps has no path of {most}: choose 1 to {end}")
    to_end = np.full((end, knots), np.inf)  # V(i, j): least cost from the pair (i, j) to the end
    to_end[:, end] = 0.0
    following: list[NDArray[np.int64]] = []
    paths: dict[int, tuple[int, ...]] = {1: (0, end)}
    for jumps in range(2, most + 1):
        left, to_end = to_end, np.full((end, knots), np.inf)
        following.append(np.zeros((end, knots), dtype=np.int64))
        for j in range(1, end):
            ways = cost(j) + left[j]  # [i, k]: jump to k, then from the pair (j, k)
            following[-1][:, j], to_end[:, j] = ways.argmin(axis=1), ways.min(axis=1)
        path = [0, 1 + int((first[0, 1:end] + to_end[0, 1:end]).argmin())]
        for chosen in reversed(following):
            path.append(int(chosen[path[-2], path[-1]]))
        paths[jumps] = tuple(path)
    return paths


def fitted(gram: Floats, times: Sequence[float], knots: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Coefficients c[k][j] of x_{k+1} = x_k + sum_j c[k][j] v_j over all velocities so far, [K, 1..K].

    Each row is the least-squares fit of the trajectory's own increment, teacher-forced, with a little ridge.
    Raises UsageError where the knots are not a path from the first to the last.
    """
    import numpy as np

    steps = len(times) - 1
    if list(knots) != sorted(set(knots)) or (knots[0], knots[-1]) != (0, steps):
        raise UsageError(f"knots must rise from 0 to {steps}, found {list(knots)}")
    _, along, speeds = products(gram)
    table = []
    for number in range(1, len(knots)):
        known = np.asarray(knots[:number])
        inner = speeds[np.ix_(known, known)]
        ridge = _RIDGE * float(np.trace(inner)) / number
        wanted = along[knots[number], known] - along[knots[number - 1], known]
        found = np.linalg.lstsq(inner + ridge * np.eye(number), wanted)[0]  # all 0 of a model at rest
        table.append(tuple(found.tolist()))
    return tuple(table)
