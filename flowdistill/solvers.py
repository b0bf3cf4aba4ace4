"""Step functions, the one integration loop, and the count of network calls.

A solver is its step: from the state at t and the velocity there, which the loop has evaluated, to
the state at s: s < t from noise to data, s > t on the way back. A walk begins with the solver being
told where, so that a rule may remember its start or its own steps. The solvers of dx/dt = v(x, t)
are explicit Runge-Kutta rules, which remember nothing, and rules of one evaluation a step that
remember the last one; in canonical coordinates `euler` is DDIM.

`reinterpolate` and `reinterpolate-heun` are rf++'s rule "new" (arXiv 2405.20320; its code). They go
down only, and solve no ODE: see `_reinterpolate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from flowdistill.errors import ArtifactError, UsageError, listed
from flowdistill.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.flow import VelocityField

    Velocity: TypeAlias = Callable[[Tensor, float], Tensor]
    """(x [B, *shape], t) -> v [B, *shape] in the dtype of x"""

    Step: TypeAlias = Callable[[Velocity, Tensor, Tensor, float, float], Tensor]
    """(velocity, x at t, v at (x, t), t, s) -> x at s"""

    Begin: TypeAlias = Callable[[Tensor], Step]
    """(the state that a walk starts at) -> the step function of this walk"""

    OnStep: TypeAlias = Callable[[int, float, Tensor, Tensor], None]
    """(i, t_i, x at t_i, v at t_i), called at every knot but the last, in the order of the walk;
    v is what the step begins with: of a rule that reuses velocities, what stands for the one there"""

OdeSolver = Literal[
    "euler",
    "heun",
    "midpoint",
    "rk4",
    "rf-solver",
    "ab2",
    "midpoint-cached",
    "fireflow",
    "pec",
    "dpm++2m",
]
"""Those that converge to the flow with more steps, and take it both ways."""

SolverName = Literal[OdeSolver, "reinterpolate", "reinterpolate-heun"]


@dataclass(frozen=True)
class Solver:
    """One integration rule; a step evaluates `evaluations` velocities, the step down to t = 0 `last`.

    The `order` of a rule that does not converge to the flow is 0. A rule that `reuses` begins a step
    with the velocity that the step before evaluated last, in place of the one there: its first step
    evaluates one more. A rule with coefficients for so many `steps` makes no other number.
    """

    name: SolverName | Literal["multistep"]
    order: int
    evaluations: int
    last: int
    begin: Begin
    reuses: bool = False
    steps: int | None = None


def _euler(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
    return x.add(v, alpha=s - t)


def _heun(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
    """Karras et al. 2022 (arXiv 2206.00364), Algorithm 1: the last step, to t = 0, is Euler's.

    Upwards no step leads to t = 0, so every one is Heun's.
    """
    predicted = x.add(v, alpha=s - t)
    if s == 0:
        return predicted
    # The corrector in terms of the predictor: large states in as few passes through memory as can be.
    return predicted.add(velocity(predicted, s) - v, alpha=(s - t) / 2)


def _midpoint(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
    """Also published as RF-Solver (arXiv 2411.04746), whose update cancels to this rule: `rf-solver`.

    FireFlow (arXiv 2412.07517), `midpoint-cached`, is the same step from a v that is reused: the
    velocity in the middle of the step before.
    """
    return x.add(velocity(x.add(v, alpha=(s - t) / 2), (t + s) / 2), alpha=s - t)


def _rk4(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
    h, middle = s - t, (t + s) / 2
    v2 = velocity(x.add(v, alpha=h / 2), middle)
    v3 = velocity(x.add(v2, alpha=h / 2), middle)
    v4 = velocity(x.add(v3, alpha=h), s)
    return x + h / 6 * (v + 2 * v2 + 2 * v3 + v4)


def _ab2(start: Tensor) -> Step:
    """Adams-Bashforth's rule of two steps, for steps of any lengths; the first step is Euler's.

    x + h ((1 + r / 2) v - (r / 2) v'), with v' the velocity of the step before, h' long, r = h / h'.
    """
    before: tuple[Tensor, float] | None = None

    def step(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
        nonlocal before
        slope = v if before is None else v.lerp(before[0], (t - s) / (t - before[1]) / 2)
        before = v, t
        return x.add(slope, alpha=s - t)

    return step


def _pec(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
    """FlowTurbo's pseudo-corrector (arXiv 2409.18128): Heun's step, also to t = 0, that begins with the
    velocity which the last one evaluated where it predicted its end: predict, evaluate, correct.
    """
    return x.add(v + velocity(x.add(v, alpha=s - t), s), alpha=(s - t) / 2)


def _dpmpp_2m(start: Tensor) -> Step:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2), of the data x0 = x - t v in sight.

    In lambda = log((1 - t) / t) a step is exact for a constant x0, which is Euler's step:
    (s / t) x + (1 - s / t) x0 = x + (s - t) v. The data are extrapolated to the middle of the step,
    x0 + (x0 - x0') h / (2 h'), from those of the step before, h' long in lambda. Where t = 1 or t = 0,
    at which lambda is infinite, ends this step or began the one before, Euler's step is what is left.
    """
    before: tuple[Tensor, float] | None = None

    def step(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
        nonlocal before
        x0, after = x.add(v, alpha=-t), x.add(v, alpha=s - t)
        if before is not None and 0 < s < 1 and 0 < before[1] < 1:
            ratio = (_log_snr(s) - _log_snr(t)) / (_log_snr(t) - _log_snr(before[1]))
            after = after.add(x0 - before[0], alpha=(1 - s / t) * ratio / 2)
        before = x0, t
        return after

    return step


def _log_snr(t: float) -> float:
    return math.log((1 - t) / t)


def _reinterpolate(start: Tensor) -> Step:
    """rf++'s: the line between the data x0 = x_t - t v that are now in sight and the walk's noise, at s.

    Euler goes along the line through x_t instead, whose noise is the one in sight. The two agree in
    a single step, in the last one, and wherever paths are straight. Where a field is curved this is
    no solver of its ODE: however many the steps, the end is another one than the flow's.
    """

    def step(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
        return x.add(v, alpha=-t).lerp(start, s)

    return step


def _reinterpolate_heun(start: Tensor) -> Step:
    """rf++'s Heun with its rule: predictor and corrector re-interpolate; the last step is Euler's."""
    once = _reinterpolate(start)

    def step(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
        predicted = once(velocity, x, v, t, s)
        return predicted if s == 0 else once(velocity, x, (v + velocity(predicted, s)) / 2, t, s)

    return step


def _memoryless(step: Step) -> Begin:
    return lambda start: step


_MIDPOINT = Solver("midpoint", order=2, evaluations=2, last=2, begin=_memoryless(_midpoint))
_MIDPOINT_CACHED = Solver(
    "midpoint-cached", order=2, evaluations=1, last=1, begin=_memoryless(_midpoint), reuses=True
)

SOLVERS: dict[SolverName, Solver] = {
    "euler": Solver("euler", order=1, evaluations=1, last=1, begin=_memoryless(_euler)),
    "heun": Solver("heun", order=2, evaluations=2, last=1, begin=_memoryless(_heun)),
    "midpoint": _MIDPOINT,
    "rk4": Solver("rk4", order=4, evaluations=4, last=4, begin=_memoryless(_rk4)),
    "rf-solver": _MIDPOINT,
    "ab2": Solver("ab2", order=2, evaluations=1, last=1, begin=_ab2),
    "midpoint-cached": _MIDPOINT_CACHED,
    "fireflow": _MIDPOINT_CACHED,
    "pec": Solver("pec", order=2, evaluations=1, last=1, begin=_memoryless(_pec), reuses=True),
    "dpm++2m": Solver("dpm++2m", order=2, evaluations=1, last=1, begin=_dpmpp_2m),
    "reinterpolate": Solver("reinterpolate", order=0, evaluations=1, last=1, begin=_reinterpolate),
    "reinterpolate-heun": Solver(
        "reinterpolate-heun", order=0, evaluations=2, last=1, begin=_reinterpolate_heun
    ),
}
"""By every name that is accepted; an alias gives the same object, whose name is the rule's own."""


def multistep(coefficients: Sequence[Sequence[float]]) -> Solver:
    """A rule for one schedule, x_{k+1} = x_k + sum_j c[k][j] v_j over the velocities v_0 .. v_k at all knots.

    Row k of the table has k + 1 numbers, the lengths of the steps among them. All explicit rules of one
    evaluation at every knot are such tables: Euler's has t_{k+1} - t_k on the diagonal and 0 elsewhere.
    So are fitted ones, as of NeuralSolver (arXiv 2505.21114), S4S (arXiv 2502.17423), and BNS (arXiv
    2403.01329) with weights 1 of x_0. They go down only. A walk keeps the velocities of all its knots.

    UsageError where the table is not of this shape or holds what is not finite.
    """
    table = tuple(map(tuple, coefficients))
    if not table or any(len(row) != k for k, row in enumerate(table, start=1)):
        lengths = ", ".join(str(len(row)) for row in table) or "none"
        raise UsageError(
            f"coefficients of a multistep rule: rows must have 1, 2, 3, ... numbers, found {lengths}"
        )
    if not all(map(math.isfinite, (c for row in table for c in row))):
        raise UsageError("coefficients of a multistep rule must be finite")

    def begin(start: Tensor) -> Step:
        velocities: list[Tensor] = []

        def step(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
            velocities.append(v)
            for c, known in zip(table[len(velocities) - 1], velocities, strict=True):
                x = x.add(known, alpha=c)
            return x

        return step

    return Solver("multistep", order=0, evaluations=1, last=1, begin=begin, steps=len(table))


def recorded(content: Mapping[str, Any], name: str, path: object = None) -> tuple[Solver, Schedule]:
    """What a schedule file says: a solver, of coefficients where it has them, and its times.

    Raises ArtifactError, which names the file, where it is none.
    """
    try:
        table = content.get("coefficients")
        solver = SOLVERS[content["solver"]] if table is None else multistep(table)
        schedule = Schedule(tuple(map(float, content["times"])), name)
        _check_steps(solver, schedule)
    except UsageError as error:
        raise ArtifactError(f"{path or name}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path or name}: not a schedule, expected a file that `flowdistill boss` wrote"
        ) from error
    return solver, schedule


def integrate(
    field: VelocityField,
    x: Tensor,
    schedule: Schedule,
    solver: Solver,
    labels: Tensor | None = None,
    on_step: OnStep | None = None,
    inverse: bool = False,
) -> Tensor:
    """The state at t = 0 of the flow that starts at x [B, *shape], t = 1; `inverse`, from 0 to 1.

    The way up takes the same steps in reverse, each from its lower end. It evaluates the field at
    t = 0, where Euler's and Heun's way down never does. UsageError where the rule has no way up or
    is for another number of steps.

    The state is float32, or float64 where x is: rounded to bfloat16 at every step it would drift
    by more than the solver's error, and more so with more steps. The field may answer in any dtype.
    Gradients flow through; callers who want none say so.
    """
    if inverse and solver.name not in get_args(OdeSolver):
        raise UsageError(
            f"solver {solver.name} has no way from data to noise; those that have one are "
            f"{listed(get_args(OdeSolver))}"
        )
    _check_steps(solver, schedule)
    x = x.float() if x.element_size() < 4 else x
    step, latest = solver.begin(x), x

    def velocity(x: Tensor, t: float) -> Tensor:
        nonlocal latest
        latest = field(x, x.new_full((len(x),), t), labels).to(x.dtype)
        return latest

    upwards = [(t, s) for s, t in reversed(schedule.intervals)]
    for i, (t, s) in enumerate(upwards if inverse else schedule.intervals):
        v = latest if solver.reuses and i else velocity(x, t)
        if on_step is not None:
            on_step(i, t, x, v)
        x = step(velocity, x, v, t, s)
    return x


def nfe(solver: Solver, schedule: Schedule, inverse: bool = False) -> int:
    """Evaluations of the field that `integrate` makes for one sample."""
    _check_steps(solver, schedule)
    last = solver.evaluations if inverse else solver.last
    return solver.reuses + solver.evaluations * (schedule.steps - 1) + last


def steps_for(solver: Solver, nfe: int) -> int:
    """Steps down that cost exactly `nfe` evaluations; UsageError where no number of steps does."""
    least = solver.reuses + solver.last
    more, rest = divmod(nfe - least, solver.evaluations)
    if solver.steps is not None:
        possible = [least + solver.evaluations * (solver.steps - 1)]
    else:
        possible = [n for n in (nfe - rest, nfe - rest + solver.evaluations) if n >= least] or [least]
    if nfe not in possible:
        raise UsageError(
            f"solver {solver.name} cannot make exactly {nfe} evaluations: "
            f"{' or '.join(map(str, possible))} would do"
        )
    return more + 1


def _check_steps(solver: Solver, schedule: Schedule) -> None:
    if solver.steps not in (None, schedule.steps):
        raise UsageError(
            f"solver {solver.name}: its coefficients are for {solver.steps} steps, "
            f"schedule '{schedule.name}' has {schedule.steps}"
        )
