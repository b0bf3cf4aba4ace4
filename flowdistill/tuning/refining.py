"""Candidates made better by real rollouts: their end is compared with the accurate solution's.

A calibration prices jumps from the fine trajectory; a solver's own states stray from it, and what it misses
early need not reach the data. `knots` moves the times of a rule one by one. `coefficients` learns times and
multistep coefficients by gradients through all steps, as BNS (arXiv 2403.01329) and NeuralSolver (arXiv
2505.21114) do, from a start that may be any rule of one evaluation a step. Noises that neither has seen say
when to stop, and what is given back is what did best on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Literal

from flowdistill.schedule import Schedule
from flowdistill.solvers import Solver, integrate, multistep, nfe
from flowdistill.tuning.candidates import Candidate
from flowdistill.tuning.trials import Trial

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.flow import VelocityField

Refine = Literal["none", "knots", "coefficients"]
GRADIENT = 4
"""Rollouts that one with its gradient costs: forwards, once more for want of memory, and backwards."""
LEAST_TRAJECTORIES = 256
"""Coefficients of few noises would be those noises' own."""
_LEAST_REACH = 1 / 64
"""Of the distance to the next knot, by which knots are moved."""
_LEARNING_RATE = 0.005
_PATIENCE = 12
"""Epochs or sweeps without a better figure on other noises, until it ends."""


@dataclass
class Refiner:
    """What is refined on: noises to fit and others to validate, and so many rollouts of all of them."""

    fit: Trial
    validate: Trial
    rollouts: int
    seed: int
    velocity: VelocityField
    """With gradients."""
    left: int = dataclass_field(init=False, default=0)
    """Rollouts of single noises that may still be taken."""

    def better(self, start: Candidate, how: Refine) -> Candidate | None:
        """A candidate that does better than `start` on the noises that validate; None where none was found.

        All evaluations that were planned are counted, also where it ends early.
        """
        self.left = self.rollouts * (self.fit.count + self.validate.count)
        best, least, since = None, self._validated(start), 0
        for candidate in self._knots(start) if how == "knots" else self._coefficients(start):
            found = self._validated(candidate)
            since += 1
            if found < least:
                best, least, since = candidate, found, 0
            if since >= _PATIENCE:
                break
        self._spend(start, self.left)
        return best

    def _validated(self, candidate: Candidate) -> float:
        self.left -= self.validate.count
        return float(self.validate(candidate).errors.mean())

    def _spend(self, start: Candidate, rollouts: int) -> None:
        """Count rollouts that no trial has counted."""
        self.left -= rollouts
        self.fit.meter.add(rollouts * nfe(start.solver, start.schedule))

    # Knots, one by one -------------------------------------------------------------------------------------

    def _knots(self, start: Candidate) -> Iterator[Candidate]:
        """The rule at better times after every sweep over the knots, while the budget lasts."""
        times, reach = list(start.schedule.times), 0.5
        least = self._fitted(start)
        while reach >= _LEAST_REACH and len(times) > 2:
            moved = False
            for k in range(1, len(times) - 1):
                for neighbour in (k - 1, k + 1):
                    if self.left < self.fit.count + self.validate.count:
                        if moved:
                            yield self._at(start, times)
                        return
                    tried = [*times]
                    tried[k] += reach * (times[neighbour] - times[k])
                    found = self._fitted(self._at(start, tried))
                    if found < least:
                        times, least, moved = tried, found, True
                        break
            if moved:
                yield self._at(start, times)
            else:
                reach /= 2

    def _at(self, start: Candidate, times: list[float]) -> Candidate:
        return Candidate(start.solver, Schedule(tuple(times), "refined-knots"))

    def _fitted(self, candidate: Candidate) -> float:
        self.left -= self.fit.count
        return float(self.fit(candidate).errors.mean())

    # Times and coefficients, by gradients ------------------------------------------------------------------

    def _coefficients(self, start: Candidate) -> Iterator[Candidate]:
        """The rule after every epoch, while the budget lasts."""
        import torch

        from flowdistill import randomness

        rule = Rule.of(start)
        optimizer = torch.optim.Adam(rule.parts, lr=_LEARNING_RATE)
        epoch_costs = GRADIENT * self.fit.count + self.validate.count
        epochs = self.left // epoch_costs
        steps = epochs * len(self.fit.batches)
        decay = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / max(1, steps))) / 2
        )
        for epoch in range(epochs):
            order = randomness.permutation(self.seed, "refine", epoch, len(self.fit.batches))
            for number in order.tolist():
                noise, labels, accurate = self.fit.batches[number]
                self.fit.meter.work.stop.check()
                end = rule(self.velocity, noise, labels)
                loss = (end - accurate).flatten(1).square().mean(1).sqrt().mean()
                slopes = torch.autograd.grad(loss, rule.parts)
                if not all(slope.isfinite().all() for slope in slopes):
                    return
                for part, slope in zip(rule.parts, slopes, strict=True):
                    part.grad = slope
                optimizer.step()
                decay.step()
                self._spend(start, GRADIENT * len(noise))
            candidate = rule.candidate()
            if candidate is None:
                return
            yield candidate


def refinable(candidate: Candidate, how: Refine) -> bool:
    """Whether it can be the start: coefficients are for their own times, and are learnt of one evaluation a
    step."""
    solver = candidate.solver
    fixed = how == "knots" and candidate.coefficients is not None
    return solver.evaluations == 1 and not solver.reuses and not fixed


@dataclass(frozen=True)
class Rule:
    """A multistep rule of K steps that can be learnt: x_{k+1} = x_k - h_k sum_j a[k][j] v_j.

    The lengths h are the softmax of `lengths` [K]; `shares` holds a[k], [k + 1] numbers each.
    """

    lengths: Tensor
    shares: list[Tensor]

    @classmethod
    def of(cls, start: Candidate) -> Rule:
        """The candidate's own rule."""
        import torch

        steps = torch.tensor([t - s for t, s in start.schedule.intervals], dtype=torch.float64)
        table = start.coefficients or as_table(start.solver, start.schedule)
        rows = (torch.tensor(row, dtype=torch.float64) for row in table)
        shares = [(-row / h).requires_grad_() for row, h in zip(rows, steps, strict=True)]
        return cls(steps.log().requires_grad_(), shares)

    @property
    def parts(self) -> list[Tensor]:
        """All that is learnt."""
        return [self.lengths, *self.shares]

    def __call__(self, velocity: VelocityField, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The end of a rollout [B, *shape], with gradients; between steps no activations are kept."""
        from torch.utils.checkpoint import checkpoint

        lengths = self.lengths.softmax(0).to(noise)
        times = 1 - lengths.cumsum(0)
        known: list[Tensor] = []
        x = noise
        for k, share in enumerate(self.shares):
            t = times[k - 1].expand(len(x)) if k else x.new_ones(len(x))
            v: Tensor = checkpoint(velocity, x, t, labels, use_reentrant=False)
            known.append(v)
            weights = lengths[k] * share.to(x)
            for weight, each in zip(weights, known, strict=True):  # stacked, they would be kept K times
                x = x.sub(weight * each)
        return x

    def candidate(self) -> Candidate | None:
        """As it is now; None where it has no times any more."""
        import torch

        with torch.no_grad():
            lengths = self.lengths.softmax(0)
            inner = (1 - lengths.cumsum(0))[:-1].tolist()
            rows = (-h * share for h, share in zip(lengths, self.shares, strict=True))
            table = tuple(tuple(row.tolist()) for row in rows)
        times = (1.0, *inner, 0.0)
        if not all(t > s for t, s in zip(times, times[1:], strict=False)):
            return None
        return Candidate(multistep(table), Schedule(times, "refined-coefficients"), table)


def as_table(solver: Solver, schedule: Schedule) -> tuple[tuple[float, ...], ...]:
    """Coefficients of `solvers.multistep` for a rule of one evaluation a step, which is linear in velocities.

    It walks on unit vectors in their place: the state after a step is what the rule makes of them.
    """
    import torch

    unit = torch.eye(schedule.steps, dtype=torch.float64)
    states: list[Tensor] = []
    asked = iter(unit)

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        found: Tensor = next(asked)[None]
        return found

    def keep(i: int, t: float, x: Tensor, v: Tensor) -> None:
        states.append(x[0])

    states.append(integrate(field, torch.zeros_like(unit[:1]), schedule, solver, None, keep)[0])
    steps = zip(states, states[1:], strict=False)
    return tuple(tuple((s - t)[: k + 1].tolist()) for k, (t, s) in enumerate(steps))
