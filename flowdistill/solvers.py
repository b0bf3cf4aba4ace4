"""Step functions, the one integration loop, and the count of network calls.

A solver is its step: from the state at t and the velocity there, which the loop has evaluated, to
the state at s: s < t from noise to data, s > t on the way back. A walk begins with the solver being
told where, so that a rule may remember its start or its own steps. The solvers of dx/dt = v(x, t)
are explicit Runge-Kutta rules, which remember nothing; in canonical coordinates `euler` is DDIM.

`reinterpolate` and `reinterpolate-heun` are rf++'s rule "new" (arXiv 2405.20320; its code). They go
down only, and solve no ODE: see `_reinterpolate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from flowdistill.errors import UsageError, listed
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
    """(i, t_i, x at t_i, v at t_i), called at every knot but the last, in the order of the walk"""

OdeSolver = Literal["euler", "heun", "midpoint", "rk4", "rf-solver"]
"""Those that converge to the flow with more steps, and take it both ways."""

SolverName = Literal[OdeSolver, "reinterpolate", "reinterpolate-heun"]


@dataclass(frozen=True)
class Solver:
    """One integration rule; a step evaluates `evaluations` velocities, the step down to t = 0 `last`.

    The `order` of a rule that does not converge to the flow is 0.
    """

    name: SolverName
    order: int
    evaluations: int
    last: int
    begin: Begin


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
    """Also published as RF-Solver (arXiv 2411.04746), whose update cancels to this rule: `rf-solver`."""
    return x.add(velocity(x.add(v, alpha=(s - t) / 2), (t + s) / 2), alpha=s - t)


def _rk4(velocity: Velocity, x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
    h, middle = s - t, (t + s) / 2
    v2 = velocity(x.add(v, alpha=h / 2), middle)
    v3 = velocity(x.add(v2, alpha=h / 2), middle)
    v4 = velocity(x.add(v3, alpha=h), s)
    return x + h / 6 * (v + 2 * v2 + 2 * v3 + v4)


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

SOLVERS: dict[SolverName, Solver] = {
    "euler": Solver("euler", order=1, evaluations=1, last=1, begin=_memoryless(_euler)),
    "heun": Solver("heun", order=2, evaluations=2, last=1, begin=_memoryless(_heun)),
    "midpoint": _MIDPOINT,
    "rk4": Solver("rk4", order=4, evaluations=4, last=4, begin=_memoryless(_rk4)),
    "rf-solver": _MIDPOINT,
    "reinterpolate": Solver("reinterpolate", order=0, evaluations=1, last=1, begin=_reinterpolate),
    "reinterpolate-heun": Solver(
        "reinterpolate-heun", order=0, evaluations=2, last=1, begin=_reinterpolate_heun
    ),
}
"""By every name that is accepted; an alias gives the same object, whose name is the rule's own."""


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
    t = 0, where Euler's and Heun's way down never does. UsageError where the rule has no way up.

    The state is float32, or float64 where x is: rounded to bfloat16 at every step it would drift
    by more than the solver's error, and more so with more steps. The field may answer in any dtype.
    Gradients flow through; callers who want none say so.
    """
    if inverse and solver.name not in get_args(OdeSolver):
        raise UsageError(
            f"solver {solver.name} has no way from data to noise; those that have one are "
            f"{listed(get_args(OdeSolver))}"
        )
    x = x.float() if x.element_size() < 4 else x
    step = solver.begin(x)

    def velocity(x: Tensor, t: float) -> Tensor:
        return field(x, x.new_full((len(x),), t), labels).to(x.dtype)

    upwards = [(t, s) for s, t in reversed(schedule.intervals)]
    for i, (t, s) in enumerate(upwards if inverse else schedule.intervals):
        v = velocity(x, t)
        if on_step is not None:
            on_step(i, t, x, v)
        x = step(velocity, x, v, t, s)
    return x


def nfe(solver: Solver, schedule: Schedule, inverse: bool = False) -> int:
    """Evaluations of the field that `integrate` makes for one sample."""
    last = solver.evaluations if inverse else solver.last
    return solver.evaluations * (schedule.steps - 1) + last


def steps_for(solver: Solver, nfe: int) -> int:
    """Steps down that cost exactly `nfe` evaluations; UsageError where no number of steps does."""
    steps, rest = divmod(nfe - solver.last + solver.evaluations, solver.evaluations)
    if rest or steps < 1:
        below = nfe - rest
        possible = [str(n) for n in (below, below + solver.evaluations) if n >= solver.last]
        raise UsageError(
            f"solver {solver.name} cannot make exactly {nfe} evaluations: "
            f"{' or '.join(possible or [str(solver.last)])} would do"
        )
    return steps
