"""Ways to sample a model in so many evaluations: families of schedules and solvers, measured and chosen.

A schedule that is best for its own cost need not make better samples than uniform steps, and a schedule for
one solver is not one for another. So all are tried on noises that nothing was fitted to, one half to choose,
the other to judge the choice beside uniform Euler steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from flowdistill import schedule as schedules
from flowdistill.errors import UsageError
from flowdistill.multistep import fitted
from flowdistill.schedule import Schedule
from flowdistill.solvers import SOLVERS, Solver, SolverName, multistep, steps_for

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SHIFTS = (0.7, 1.25, 1.5, 1.75, 2.0, 3.0)
"""SD3's family; 1 is uniform."""
_ONE_CALL: tuple[SolverName, ...] = ("euler", "ab2", "dpm++2m")
_TWO_CALLS: tuple[SolverName, ...] = ("heun", "midpoint")


@dataclass(frozen=True)
class Candidate:
    """A solver on a schedule; `coefficients` of one that was fitted."""

    solver: Solver
    schedule: Schedule
    coefficients: tuple[tuple[float, ...], ...] | None = None

    @property
    def name(self) -> str:
        """`euler, uniform`, `ab2, shifted-1.5`."""
        return f"{self.solver.name}, {self.schedule.name}"


def closed(evaluations: int) -> Iterator[Candidate]:
    """Those that are known without a calibration: uniform Euler first."""
    grids = [schedules.uniform(evaluations)]
    grids += [schedules.shifted(evaluations, shift) for shift in SHIFTS]
    grids.append(schedules.edm(evaluations))
    for solver in _ONE_CALL:
        yield from (Candidate(SOLVERS[solver], grid) for grid in (grids if evaluations > 1 else grids[:1]))
    for solver in _TWO_CALLS:
        with_steps = _steps(SOLVERS[solver], evaluations)
        if with_steps:
            yield Candidate(SOLVERS[solver], schedules.uniform(with_steps))


def calibrated(
    gram: NDArray[np.float64], fine: Schedule, paths: dict[str, tuple[int, ...]]
) -> Iterator[Candidate]:
    """Those that follow from a calibration on the `fine` grid; `paths` are knots on it, by their names."""
    for name, path in paths.items():
        chosen = Schedule(tuple(fine.times[i] for i in path), name)
        yield from (Candidate(SOLVERS[solver], chosen) for solver in _ONE_CALL[:2])
        table = fitted(gram, fine.times, path)
        yield Candidate(multistep(table), chosen, table)


def _steps(solver: Solver, evaluations: int) -> int | None:
    try:
        return steps_for(solver, evaluations)
    except UsageError:
        return None


@dataclass(frozen=True)
class Verdict:
    """What was chosen of many for a number of evaluations, and how it compares, for JSON."""

    chosen: Candidate
    improved: bool
    """Whether it is better than uniform Euler steps on noises that it was not chosen by."""
    facts: dict[str, Any]


Solve: TypeAlias = "Callable[[Candidate], Tensor]"
"""Endpoint error [n] of a candidate on some noises."""


def choose(candidates: Sequence[Candidate], on_one_half: Solve, on_the_other: Solve, seed: int) -> Verdict:
    """The candidate of least mean endpoint error, unless it is no better than the first, uniform Euler.

    It is chosen by the errors on one half of the noises. Whether it is better is judged by the other half,
    pair by pair: the 95 % interval of the difference has to lie below 0, else uniform Euler is kept.
    """
    from flowdistill.evaluation import metrics

    errors = {each.name: on_one_half(each) for each in candidates}
    uniform = candidates[0]
    best = min(candidates, key=lambda each: float(errors[each.name].mean()))
    judged = {"uniform": on_the_other(uniform), "chosen": on_the_other(best)}
    difference = metrics.paired_difference(judged["chosen"], judged["uniform"], seed)
    improved = difference.high < 0
    table = [{"name": name, **metrics.mean_interval(error, seed).as_dict()} for name, error in errors.items()]
    facts = {
        "candidates": sorted(table, key=lambda row: row["value"]),
        "best": best.name,
        "held_out": {name: metrics.mean_interval(error, seed).as_dict() for name, error in judged.items()},
        "difference": difference.as_dict(),
        "improved": improved,
    }
    return Verdict(best if improved else uniform, improved, facts)
