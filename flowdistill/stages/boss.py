"""BOSS: the best step sizes for every number of steps, from one calibration, and what is better still.

Nguyen, Nguyen and Nguyen, "Bellman Optimal Stepsize Straightening of Flow-Matching Models" (arXiv
2312.16414). Follow the model's own fine trajectory; a jump from knot i to knot j costs c_ij = E||x_j - x_i -
(t_j - t_i) v_i||^2 (Eq. 5); the path over the knots of least total cost with exactly NFE jumps is found by
dynamic programming (Eq. 8). The cost of all M (M + 1) / 2 jumps needs the trajectory and no more; the mean
Gram matrix of its increments and velocities holds it all, and with it the best schedules and coefficients of
rules with memory.

The paper's cost is local, and its solver Euler. So for each number of evaluations many solvers and schedules
are tried on noises that the calibration has not seen, and what is written is the best of them, unless it is
no better than uniform Euler steps on yet others. `choose: boss` writes the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from flowdistill.errors import Diverged
from flowdistill.evaluation.candidates import Candidate, calibrated, choose, closed
from flowdistill.multistep import ab2_cost, ab2_paths
from flowdistill.recipe import Reference
from flowdistill.schedule import Schedule, bellman, local_cost, uniform
from flowdistill.solvers import SOLVERS, integrate, nfe
from flowdistill.stages import Stage
from flowdistill.work import Done, Progress, Work
from flowdistill.work import batches as in_batches

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from flowdistill.flow import VelocityField
    from flowdistill.teachers import Model

TENSORS = "boss.safetensors"
_RESAMPLED = 20
"""So often are trajectories drawn anew, to tell whether there are enough of them."""
REFERENCE = (SOLVERS["heun"], uniform(32))
"""The accurate solution on the held-out noises: 63 evaluations."""
LOST = 1e9
"""Stands for the endpoint error of what is not finite: JSON has no such numbers."""


def file_name(nfe: int) -> str:
    """Name of the schedule file for `nfe` evaluations."""
    return f"schedule-nfe{nfe}.json"


class Boss(Stage):
    """Step sizes by dynamic programming, for every number of steps up to `grid`."""

    verb: ClassVar[str] = "boss"
    produces: ClassVar[str] = "schedule"

    model: Annotated[str | None, Reference("model", allow_teacher=True)] = Field(
        None, description="model that is to be sampled in few steps"
    )
    nfe: list[Annotated[int, Field(ge=1)]] = Field(
        [2, 4, 6, 8],
        min_length=1,
        description="numbers of evaluations to write a schedule file for",
    )
    choose: Literal["best", "euler", "boss"] = Field(
        "best",
        description="what is written: the best of all candidates; the best of Euler's, for programs that "
        "know no other solver; or Euler steps at BOSS's times",
    )
    grid: int = Field(100, ge=2, le=1000, description="steps of the fine trajectory (K_max in the paper)")
    reference: Literal["heun", "euler"] = Field(
        "heun",
        description="how the fine trajectory is solved: by Heun's rule at every other knot and Hermite's "
        "cubics between, or by Euler steps at all, as in the paper; both take `grid` evaluations",
    )
    cost: Literal["l2", "rms"] = Field(
        "l2", description="of a jump: the mean of squared errors, as in the paper, or of errors"
    )
    trajectories: int = Field(64, gt=0, description="noises that the cost is averaged over")
    until_regret: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="take no more trajectories once schedules of resampled ones cost at most this share more "
        "than the best, for every `nfe`; `trajectories` is then the most",
    )
    held_out: int = Field(
        64,
        ge=16,
        description="further noises: one half chooses among candidates, the other judges the choice",
    )
    batch_size: int = Field(32, gt=0, description="noises that are integrated at once")

    @model_validator(mode="after")
    def _within_the_grid(self) -> Boss:
        if max(self.nfe) > self.grid:
            raise ValueError(
                f"nfe {max(self.nfe)} is more than the {self.grid} steps of the grid; raise `grid`"
            )
        return self

    def run(self, work: Work) -> Done:
        from flowdistill import artifact

        model, fine = work.model(), uniform(self.grid)
        meter = Meter(work, self.evaluations)
        gram, costs = self.calibrate(model, fine, meter)
        cost = self.mean_cost(costs)
        solution = bellman(cost)
        paths = {k: solution.path(k) for k in range(1, self.grid + 1)}
        best = self.choose != "boss"
        after_ab2 = ab2_paths(cost, ab2_cost(gram, fine.times), max(self.nfe)) if best else {}
        halves = self.halves(model, meter)
        figures = {}
        for k in self.nfe:
            boss = Candidate(SOLVERS["euler"], Schedule(tuple(fine.times[i] for i in paths[k]), "boss"))
            even = [round(i * self.grid / k) for i in range(k + 1)]
            local = {"boss": float(solution.totals[k]), "uniform": float(cost[even[:-1], even[1:]].sum())}
            compared: dict[str, Any] = {"local_cost": local, "regret": self.regret(costs, k, work.seed)}
            compared["held_out"] = compare(boss, halves, work.seed)
            written = boss
            if best:
                named = {"boss": paths[k], "ab2-boss": after_ab2[k]}
                tried = self._wanted([*closed(k), *calibrated(gram, fine, named)])
                verdict = choose(tried, halves[0].errors, halves[1].errors, work.seed)
                written, compared = verdict.chosen, {**compared, "choice": verdict.facts}
            figures[str(k)] = {**described(written), **compared}
            used = {"grid": self.grid, "trajectories": len(costs), "seed": work.seed}
            content = {**schedule_file(written, model), **used, **compared}
            artifact.save_json(work.folder / file_name(k), content)
        arrays = {"gram": gram, "cost": cost, "times": fine.times, "totals": solution.totals[1:]}
        header = {"kind": "schedule", "model": model.digest, "settings": dict(work.settings)}
        _save_arrays(work, arrays | {f"path.{k}": path for k, path in paths.items()}, header)
        return Done((TENSORS, *map(file_name, self.nfe)), {"schedules": figures})

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for all noises; every candidate takes as many as any other."""
        half, best = self.held_out // 2, self.choose != "boss"
        fitted = 6 if self.choose == "best" else 2  # Euler's, AB2's and fitted coefficients at two times
        tried = {k: len(self._wanted(list(closed(k)))) + fitted for k in self.nfe}
        chosen = {k: half * tried[k] + 2 * (self.held_out - half) for k in self.nfe}
        rows = sum(k * (2 * self.held_out + best * chosen[k]) for k in self.nfe)
        return self.trajectories * self.grid + self.held_out * nfe(*REFERENCE) + rows

    def _wanted(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that may be written."""
        return [each for each in candidates if self.choose == "best" or each.solver.name == "euler"]

    def calibrate(
        self, model: Model, fine: Schedule, meter: Meter
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean Gram matrix [2M, 2M] of increments and velocities; each trajectory's costs [N, M + 1, M + 1].

        Batches stream through it: of states and velocities those of one batch are held at a time.
        """
        import numpy as np
        import torch

        total = torch.zeros(2 * self.grid, 2 * self.grid, dtype=torch.float64)
        solve = by_euler if self.reference == "euler" else by_heun
        costs: list[NDArray[np.float64]] = []
        for noise, labels in self._noises(model, meter, 0, self.trajectories):
            states, speeds = solve(model.field, noise, labels, fine)
            meter.add(len(noise) * self.grid)
            basis = torch.cat([states.diff(dim=0), speeds]).flatten(2).transpose(0, 1)
            for rows in basis.to("cpu", torch.float64):
                gram = rows @ rows.T
                if not gram.isfinite().all():
                    raise Diverged("the model's velocity is not finite along its trajectory: it is of no use")
                total += gram
                costs.append(local_cost(gram.numpy(), fine.times))
            if self.until_regret and len(costs) > 1 and self._settled(np.stack(costs)):
                break
        mean: NDArray[np.float64] = (total / len(costs)).numpy()
        return mean, np.stack(costs)

    def _settled(self, costs: NDArray[np.float64]) -> bool:
        return max(self.regret(costs, k, 0) for k in self.nfe) <= (self.until_regret or 0.0)

    def mean_cost(self, costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of every jump, over trajectories [N, M + 1, M + 1]."""
        import numpy as np

        found: NDArray[np.float64] = (np.sqrt(costs) if self.cost == "rms" else costs).mean(axis=0)
        return found

    def regret(self, costs: NDArray[np.float64], nfe: int, seed: int) -> float:
        """Share by which schedules of trajectories drawn with replacement cost more than the best."""
        import numpy as np

        chance = np.random.default_rng(seed)
        cost = self.mean_cost(costs)
        least = float(bellman(cost).totals[nfe])
        if least == 0:
            return 0.0
        paths = (
            bellman(self.mean_cost(costs[chance.integers(len(costs), size=len(costs))])).path(nfe)
            for _ in range(_RESAMPLED)
        )
        found = [sum(cost[i, j] for i, j in pairwise(path)) for path in paths]
        return float(np.mean(found)) / least - 1

    def halves(self, model: Model, meter: Meter) -> tuple[Half, Half]:
        """The noises that choose, and those that judge, with their accurate solutions."""
        solver, steps = REFERENCE[0], REFERENCE[1]
        half, found = self.held_out // 2, []
        for first, count in ((self.trajectories, half), (self.trajectories + half, self.held_out - half)):
            batches = []
            for noise, labels in self._noises(model, meter, first, count):
                accurate = integrate(model.field, noise, steps, solver, labels)
                if not accurate.isfinite().all():
                    raise Diverged("the model's accurate solution is not finite: it is of no use")
                meter.add(len(noise) * nfe(solver, steps))
                batches.append((noise, labels, accurate))
            found.append(Half(model.field, batches, meter))
        return found[0], found[1]

    def _noises(
        self, model: Model, meter: Meter, first: int, count: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        from flowdistill import randomness

        for indices in in_batches(range(first, first + count), self.batch_size):
            meter.work.stop.check()
            noise = randomness.noise(meter.work.seed, indices, model.card.shape)
            yield noise.to(meter.work.device), model.labels(meter.work.seed, indices)


def by_euler(
    field: VelocityField, noise: Tensor, labels: Tensor | None, fine: Schedule
) -> tuple[Tensor, Tensor]:
    """States [M + 1, B, *shape] and velocities [M, B, *shape] of Euler's steps (the paper's)."""
    import torch

    states: list[Tensor] = []
    speeds: list[Tensor] = []

    def keep(i: int, t: float, x: Tensor, v: Tensor) -> None:
        states.append(x)
        speeds.append(v)

    end = integrate(field, noise, fine, SOLVERS["euler"], labels, keep)
    return torch.stack([*states, end]), torch.stack(speeds)


def by_heun(
    field: VelocityField, noise: Tensor, labels: Tensor | None, fine: Schedule
) -> tuple[Tensor, Tensor]:
    """The same of Heun's steps at every other knot, and of Hermite's cubics between them.

    A cubic has the states and velocities of both its ends; its slope is the velocity in the middle.
    """
    import torch

    nodes = [*fine.times[:-1:2], fine.times[-1]]
    coarse = Schedule(tuple(nodes), "nodes")
    states: list[Tensor] = []
    speeds: list[Tensor] = []

    def keep(i: int, t: float, x: Tensor, v: Tensor) -> None:
        states.append(x)
        speeds.append(v)

    end = integrate(field, noise, coarse, SOLVERS["heun"], labels, keep)
    states.append(end)
    if fine.steps % 2 == 0:  # an odd grid ends without a middle
        speeds.append(field(end, end.new_zeros(len(end)), labels).to(end.dtype))
    dense: list[Tensor] = []
    slopes: list[Tensor] = []
    for number, (t, s) in enumerate(coarse.intervals):
        x, y, v = states[number], states[number + 1], speeds[number]
        dense, slopes = [*dense, x], [*slopes, v]
        if 2 * number + 1 < fine.steps:
            w = speeds[number + 1]
            dense.append((x + y) / 2 + (s - t) / 8 * (v - w))
            slopes.append(1.5 * (y - x) / (s - t) - (v + w) / 4)
    return torch.stack([*dense, end]), torch.stack(slopes)


@dataclass(frozen=True)
class Half:
    """Noises in batches with their labels and accurate solutions, on which candidates are tried."""

    field: VelocityField
    batches: list[tuple[Tensor, Tensor | None, Tensor]]
    meter: Meter
    known: dict[tuple[str, Schedule], Tensor] = dataclass_field(default_factory=dict)
    """Errors by solver and schedule, since the first candidates are asked for more than once."""

    def errors(self, candidate: Candidate) -> Tensor:
        """Endpoint error [n], RMSE over the dimensions; `LOST` where a sample is not finite."""
        key = candidate.solver.name, candidate.schedule
        if key in self.known:
            noises = sum(len(noise) for noise, _, _ in self.batches)
            self.meter.add(noises * nfe(candidate.solver, candidate.schedule))
        else:
            self.known[key] = self._measured(candidate)
        return self.known[key]

    def _measured(self, candidate: Candidate) -> Tensor:
        import torch

        from flowdistill.evaluation import metrics

        found = []
        for noise, labels, accurate in self.batches:
            self.meter.work.stop.check()
            x = integrate(self.field, noise, candidate.schedule, candidate.solver, labels)
            self.meter.add(len(x) * nfe(candidate.solver, candidate.schedule))
            found.append(metrics.endpoint_error(x, accurate).cpu())
        return torch.cat(found).nan_to_num(nan=LOST, posinf=LOST)


def compare(boss: Candidate, halves: tuple[Half, Half], seed: int) -> dict[str, Any]:
    """BOSS's schedule beside uniform steps, both Euler's, on all held-out noises."""
    import torch

    from flowdistill.evaluation import metrics

    even = Candidate(SOLVERS["euler"], uniform(boss.schedule.steps))
    ours, theirs = (torch.cat([half.errors(each) for half in halves]) for each in (boss, even))
    difference = metrics.paired_difference(ours, theirs, seed)
    return {
        "boss": metrics.mean_interval(ours, seed).as_dict(),
        "uniform": metrics.mean_interval(theirs, seed).as_dict(),
        "difference": difference.as_dict(),
        "verdict": "better" if difference.high < 0 else "worse" if difference.low > 0 else "no difference",
    }


def described(written: Candidate) -> dict[str, Any]:
    """Which way of sampling it is, by its names."""
    return {"solver": written.solver.name, "schedule": written.schedule.name}


def schedule_file(written: Candidate, model: Model) -> dict[str, Any]:
    """What a schedule file says of the way of sampling itself and of the model it is for."""
    guidance = model.card.guidance
    # Others take Euler steps at them, whatever the solver that they were made for.
    sigmas = {"sigmas": written.schedule.sigmas()} if written.solver.name == "euler" else {}
    return {
        "nfe": nfe(written.solver, written.schedule),
        **described(written),
        "times": list(written.schedule.times),
        **sigmas,
        "coefficients": written.coefficients,
        "model": model.digest,
        "guidance": guidance.model_dump(mode="json") if guidance else None,
    }


@dataclass
class Meter:
    """Counts evaluations of the network and reports them."""

    work: Work
    total: int
    done: int = 0

    def add(self, evaluations: int) -> None:
        self.done += evaluations
        self.work.report(Progress(self.done, self.total, "evaluation"))


def _save_arrays(work: Work, arrays: dict[str, Any], header: dict[str, Any]) -> None:
    import torch

    from flowdistill import artifact

    tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
    artifact.save_tensors(work.folder / TENSORS, tensors, header)
