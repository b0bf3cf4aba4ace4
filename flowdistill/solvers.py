"""Step functions, the one integration loop, and the count of network calls.

A solver is its step: from the state at t and the velocity there, which the loop has evaluated, to
the state at s: s < t from noise to data, s > t on the way back. All are explicit Runge-Kutta rules
for dx/dt = v(x, t). In canonical coordinates `euler` is DDIM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from flowdistill.errors import UsageError
from flowdistill.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.flow import VelocityField

    Velocity: TypeAlias = Callable[[Tensor, float], Tensor]
    """(x [B, *shape], t) -> v [B, *shape] in the dtype of x"""

    Step: TypeAlias = Callable[[Velocity, Tensor, Tensor, float, float], Tensor]
    """(velocity, x at t, v at (x, t), t, s) -> x at s"""

    OnStep: TypeAlias = Callable[[int, float, Tensor, Tensor], None]
    """(i, t_i, x at t_i, v at t_i), called at every knot but the last, in the order of the walk"""

SolverName = Literal["euler", "heun", "midpoint", "rk4", "rf-solver"]


@dataclass(frozen=True)
class Solver:
    """One integration rule; a step evaluates `evaluations` velocities, the step down to t = 0 `last`."""

    name: SolverName
    order: int
    evaluations: int
    last: int
    step: Step


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


_MIDPOINT = Solver("midpoint", order=2, evaluations=2, last=2, step=_midpoint)

SOLVERS: dict[SolverName, Solver] = {
    "euler": Solver("euler", order=1, evaluations=1, last=1, step=_euler),
    "heun": Solver("heun", order=2, evaluations=2, last=1, step=_heun),
    "midpoint": _MIDPOINT,
    "rk4": Solver("rk4", order=4, evaluations=4, last=4, step=_rk4),
    "rf-solver": _MIDPOINT,
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
    t = 0, where Euler's and Heun's way down never does.

    The state is float32, or float64 where x is: rounded to bfloat16 at every step it would drift
    by more than the solver's error, and more so with more steps. The field may answer in any dtype.
    Gradients flow through; callers who want none say so.
    """
    x = x.float() if x.element_size() < 4 else x

    def velocity(x: Tensor, t: float) -> Tensor:
        return field(x, x.new_full((len(x),), t), labels).to(x.dtype)

    upwards = [(t, s) for s, t in reversed(schedule.intervals)]
    for i, (t, s) in enumerate(upwards if inverse else schedule.intervals):
        v = velocity(x, t)
        if on_step is not None:
            on_step(i, t, x, v)
        x = solver.step(velocity, x, v, t, s)
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
