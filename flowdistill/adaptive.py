"""Integration to a tolerance: the step sizes follow the error, for each sample by itself.

The rule is the pair of orders 5 and 4 of Dormand and Prince (A family of embedded Runge-Kutta
formulae, J. Comput. Appl. Math. 6, 1980); the fifth order goes on, the difference is the error. The
control is that of Hairer, Nørsett and Wanner (Solving Ordinary Differential Equations I, II.4),
with the limits of scipy's RK45: of one sample, both take the same steps.

RectifiedFlow and SlimFlow hand scipy the whole batch as one state. Its steps are then too short for
most samples and the error of a few is lost in the mean, so that a sample depends on its company.
Here each has its own t, step and acceptance, and one that has arrived leaves the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowdistill.errors import Diverged, UsageError
from flowdistill.flow import expand

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.flow import VelocityField

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""The last state is the step's end: its velocity begins the next step (first same as last)."""

_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Weights of the fifth order less those of the fourth."""

_START = 2
"""Evaluations before the first step: at the start, and for the size of the first step."""

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
_STRETCH = 1.01
"""A step that would end this close to the end goes there, else a sliver is left (as dopri5 does)."""

_INTACT = -1.0


def integrate_adaptive(
    field: VelocityField,
    x: Tensor,
    rtol: float,
    atol: float,
    labels: Tensor | None = None,
    *,
    inverse: bool = False,
    most: int = 10_000,
) -> tuple[Tensor, Tensor]:
    """Where the flow carries x [B, *shape] from t = 1 to t = 0, or from 0 to 1 if `inverse`.

    A step is accepted where the root mean square, over a sample's dimensions, of its error /
    (atol + rtol max(|x before|, |x after|)) is below 1. Returns the state [B, *shape] in the dtype
    of x and the evaluations that each sample took part in, rejected steps included, [B] int64 on
    the CPU. In between the state is float32, or float64 where x is; so is the t [b] that the field
    is given, within [0, 1] and both ends included. No gradients.

    Raises `Diverged` where a velocity is not finite or a sample needs more than `most` evaluations,
    and `UsageError` for tolerances that no step can meet.
    """
    import torch

    if not (0 <= rtol < math.inf and 0 < atol < math.inf):
        raise UsageError(f"tolerances must be finite, rtol >= 0 and atol > 0, found {rtol:g} and {atol:g}")
    nfe = torch.zeros(len(x), dtype=torch.int64)
    if not x.numel():
        return x.clone(), nfe
    with torch.no_grad():
        state = x.float() if x.element_size() < 4 else x
        walk, spent = _start(_Problem(field, rtol, atol, inverse), state, labels), _START
        end = torch.empty_like(state)
        while len(walk.index):
            if spent + len(_NODES) > most:
                raise walk.too_many(most)
            walk.step()
            spent += len(_NODES)
            arrived = walk.arrived()
            if arrived.any():
                there = walk.index[arrived]
                nfe[there] = spent  # all that are under way take part in every step
                end[there.to(end.device)] = walk.x[arrived.to(end.device)]
                walk.keep(~arrived)
    return end.to(x.dtype), nfe


@dataclass(frozen=True)
class _Problem:
    field: VelocityField
    rtol: float
    atol: float
    inverse: bool

    def time(self, left: Tensor) -> Tensor:
        """t [b] where `left` [b] of the way remains: within [0, 1] as long as `left` is."""
        return 1 - left if self.inverse else left

    def norm(self, change: Tensor, *states: Tensor) -> Tensor:
        """Root mean square [b] of a change [b, *shape] in units of what is tolerated at the states."""
        size = states[0].abs()
        for state in states[1:]:
            size = size.maximum(state.abs())
        share = change / (self.atol + self.rtol * size)
        return share.reshape(len(share), -1).square().mean(1).sqrt()


@dataclass
class _Walk:
    """The b samples that are under way, with `left` [b] of their way of length 1 before them.

    `index` [b] is their place in the whole batch, on the CPU; x, v [b, *shape] are the state and
    the velocity there, h [b] <= left the next step; `capped` [b] forbids the step after a rejected
    one to grow. `broken` [b] is the first t at which a velocity was not finite, or _INTACT.
    """

    problem: _Problem
    index: Tensor
    labels: Tensor | None
    x: Tensor
    v: Tensor
    left: Tensor
    h: Tensor
    capped: Tensor
    broken: Tensor

    def velocity(self, x: Tensor, left: Tensor) -> Tensor:
        t = self.problem.time(left)
        v = self.problem.field(x, t, self.labels).to(x.dtype)
        finite = v.isfinite().reshape(len(v), -1).all(1)
        self.broken = self.broken.where(finite | (self.broken != _INTACT), t)
        return v

    def moved(self, h: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
        """h times the weighted sum of the slopes, in the direction of the walk, [b, *shape]."""
        total = weights[0] * slopes[0]
        for weight, slope in zip(weights[1:], slopes[1:], strict=True):
            total.add_(slope, alpha=weight)
        return expand(h if self.problem.inverse else -h, total) * total

    def step(self) -> None:
        """One step of each sample, those that err too much stay where they are."""
        slopes, x = [self.v], self.x
        for node, weights in zip(_NODES, _WEIGHTS, strict=True):
            x = self.x + self.moved(self.h, weights, slopes)
            slopes.append(self.velocity(x, self.left - node * self.h))
        error = self.problem.norm(self.moved(self.h, _ERROR, slopes), self.x, x)
        good = error < 1
        # An error that overflowed is no number, and asks for the shortest step like an infinite one.
        factor = (_SAFETY * error**-0.2).clamp(_SHRINK, _GROW).nan_to_num(nan=_SHRINK)
        factor = factor.where(~self.capped, factor.clamp(max=1.0))
        self.x = x.where(expand(good, x), self.x)
        self.v = slopes[-1].where(expand(good, x), self.v)
        self.left = (self.left - self.h).where(good, self.left)
        self.capped = ~good
        self.aim(factor * self.h)

    def aim(self, h: Tensor) -> None:
        """Take h as the next step, or what is left of the way: to subtract that gives 0 exactly."""
        self.h = h.where(_STRETCH * h < self.left, self.left)

    def arrived(self) -> Tensor:
        """Which samples have no way left, [b] bool on the CPU; the one wait for the device in a step."""
        import torch

        seen = torch.stack((self.left, self.broken)).cpu()
        wrong = seen[1].ne(_INTACT).nonzero()
        if len(wrong):
            place = int(wrong[0])
            sample, t = int(self.index[place]), float(seen[1, place])
            raise Diverged(
                f"sample {sample}: the velocity is not finite at t = {t:g}; "
                "evaluate the model in float32, or check its convention at this time"
            )
        return seen[0].eq(0)

    def keep(self, rows: Tensor) -> None:
        """Go on with the samples that `rows` [b] bool on the CPU names."""
        here = rows.nonzero().flatten().to(self.x.device)
        self.index = self.index[rows]
        if self.labels is not None:
            self.labels = self.labels[here.to(self.labels.device)]
        for name in ("x", "v", "left", "h", "capped", "broken"):
            setattr(self, name, getattr(self, name)[here])

    def too_many(self, most: int) -> Diverged:
        """What to raise where the samples may not go on: it names the one that is furthest behind."""
        place = int(self.left.argmax())
        problem, t = self.problem, float(self.problem.time(self.left)[place])
        return Diverged(
            f"sample {int(self.index[place])}: has come to t = {t:g} only and needs more than {most} "
            f"evaluations; raise rtol ({problem.rtol:g}) or atol ({problem.atol:g}), or allow more"
        )


def _start(problem: _Problem, x: Tensor, labels: Tensor | None) -> _Walk:
    """All samples at the start, with the first step of Hairer, Nørsett and Wanner, II.4.

    It makes the error of an Euler step about 1/100 of the tolerated one, judging the second
    derivative by a step so small that the state hardly moves.
    """
    import torch

    left = x.new_ones(len(x))
    walk = _Walk(
        problem=problem,
        index=torch.arange(len(x)),
        labels=labels,
        x=x,
        v=x,
        left=left,
        h=left,
        capped=torch.zeros_like(left, dtype=torch.bool),
        broken=torch.full_like(left, _INTACT),
    )
    walk.v = walk.velocity(x, left)
    state, slope = problem.norm(x, x), problem.norm(walk.v, x)
    tiny = (state < 1e-5) | (slope < 1e-5)
    probe = (0.01 * state / slope).where(~tiny, 1e-6).clamp(max=1.0).nan_to_num(nan=1e-6)
    bent = walk.velocity(x + walk.moved(probe, (1.0,), (walk.v,)), left - probe)
    steepest = slope.maximum(problem.norm(bent - walk.v, x) / probe)
    first = (0.01 / steepest).pow(0.2).where(steepest > 1e-15, (1e-3 * probe).clamp(min=1e-6))
    walk.aim(first.minimum(100 * probe).clamp(max=1.0).nan_to_num(nan=1e-6))
    return walk
