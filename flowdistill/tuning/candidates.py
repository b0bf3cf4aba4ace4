"""Ways to sample a model in so many evaluations: families of schedules and solvers, measured and chosen.

A schedule that is best for its own cost need not make better samples than uniform steps, and a schedule for
one solver is not one for another. So all are tried on noises that nothing was fitted to, one half to choose,
the other to judge the choice beside uniform Euler steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flowdistill import schedule as schedules
from flowdistill.errors import UsageError
from flowdistill.multistep import fitted
from flowdistill.schedule import Schedule
from flowdistill.solvers import SOLVERS, Solver, SolverName, multistep, steps_for

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from flowdistill.evaluation.metrics import Estimate, Reference

Criterion = Literal["endpoint", "fd"]
LOST = 1e9
"""Stands for the error of what is not finite: JSON has no such numbers."""
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
class Outcome:
    """What a candidate made of noises: endpoint errors [n], RMSE over the dimensions, and features [n, D]."""

    errors: Tensor
    features: Tensor | None = None


Try: TypeAlias = Callable[[Candidate], Outcome]
"""A candidate's outcome on some noises."""


@dataclass(frozen=True)
class Judge:
    """What makes a candidate better than another: the mean endpoint error, or the Fréchet distance of the
    features from those of the data, whose moments are `reference`."""

    seed: int
    criterion: Criterion = "endpoint"
    reference: Reference | None = None

    def score(self, figures: Mapping[str, Any]) -> float:
        """Of what `figures` says; less is better."""
        return float((figures if self.criterion == "endpoint" else figures["fd"])["value"])

    def figures(self, outcome: Outcome) -> dict[str, Any]:
        """The mean endpoint error and, under `fd`, the Fréchet distance where there are features."""
        from flowdistill.evaluation import metrics

        found = metrics.mean_interval(outcome.errors, self.seed).as_dict()
        if self.reference is None or outcome.features is None:
            return found
        return {**found, "fd": self._fd(outcome).as_dict()}

    def differences(self, ours: Outcome, theirs: Outcome) -> dict[Criterion, Estimate]:
        """By every criterion that can be computed, from the same noises; below 0 where ours is better."""
        from flowdistill.evaluation import metrics

        found: dict[Criterion, Estimate] = {
            "endpoint": metrics.paired_difference(ours.errors, theirs.errors, self.seed)
        }
        if self.reference is not None and ours.features is not None and theirs.features is not None:
            found["fd"] = _apart(self.reference, ours, theirs)
        return found

    def _fd(self, outcome: Outcome) -> Estimate:
        from flowdistill.evaluation import metrics

        assert self.reference is not None and outcome.features is not None
        if not outcome.features.isfinite().all():
            return metrics.Estimate(LOST, LOST, LOST, len(outcome.features), "not finite")
        return self.reference.estimate(outcome.features)


@dataclass(frozen=True)
class Verdict:
    """What was chosen of many for a number of evaluations, and how it compares, for JSON."""

    chosen: Candidate
    improved: bool
    """Whether it is better than uniform Euler steps on noises that it was not chosen by."""
    facts: dict[str, Any]


def choose(candidates: Sequence[Candidate], on_one_half: Try, on_the_other: Try, judge: Judge) -> Verdict:
    """The best candidate by the judge's criterion, unless it is no better than the first, uniform Euler.

    It is chosen by the outcomes on one half of the noises. Whether it is better is judged by the other half,
    pair by pair: the 95 % interval of the difference has to lie below 0, else uniform Euler is kept.
    """
    figures = {each.name: judge.figures(on_one_half(each)) for each in candidates}
    uniform = candidates[0]
    best = min(candidates, key=lambda each: judge.score(figures[each.name]))
    judged = {"uniform": on_the_other(uniform), "chosen": on_the_other(best)}
    differences = judge.differences(judged["chosen"], judged["uniform"])
    improved = differences[judge.criterion].high < 0
    facts = {
        "criterion": judge.criterion,
        "candidates": [
            {"name": name, **row}
            for name, row in sorted(figures.items(), key=lambda item: judge.score(item[1]))
        ],
        "best": best.name,
        "held_out": {name: judge.figures(outcome) for name, outcome in judged.items()},
        "difference": differences["endpoint"].as_dict(),
        "improved": improved,
    }
    if "fd" in differences:
        facts["fd_difference"] = differences["fd"].as_dict()
    return Verdict(best if improved else uniform, improved, facts)


def _apart(reference: Reference, ours: Outcome, theirs: Outcome) -> Estimate:
    """Difference of two Fréchet distances from the same noises, with the interval of its influence function.

    Each sample's influences on the two are taken from one another: what samples have in common cancels.
    """
    import math

    from flowdistill.evaluation import metrics

    n = len(ours.errors)
    assert ours.features is not None and theirs.features is not None
    if not (ours.features.isfinite().all() and theirs.features.isfinite().all()):
        return metrics.Estimate(LOST, LOST, LOST, n, "not finite")
    (a, of_ours), (b, of_theirs) = (reference.measure(each) for each in (ours.features, theirs.features))
    value = a.value - b.value
    reach = metrics.NORMAL_95 * float((of_ours - of_theirs).std()) / math.sqrt(n)
    return metrics.Estimate(value, value - reach, value + reach, n, "paired influence function")
