"""BOSS: the best step sizes for every number of steps, from one calibration.

Nguyen, Nguyen and Nguyen, "Bellman Optimal Stepsize Straightening of Flow-Matching Models" (arXiv
2312.16414). Follow the model's own fine Euler trajectory; a jump from knot i to knot j costs
c_ij = E||x_j - x_i - (t_j - t_i) v_i||^2 (Eq. 5); the path over the knots of least total cost with exactly
NFE jumps is found by dynamic programming (Eq. 8). The cost of all M (M + 1) / 2 jumps needs the M velocities
of the trajectory and no more; their mean Gram matrix holds it all.

The paper's cost is local. So every schedule is measured on noises that the calibration has not seen, against
the accurate solution and beside uniform steps, and the file says what came out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from flowdistill.recipe import Reference
from flowdistill.schedule import Schedule, bellman, local_cost, uniform
from flowdistill.solvers import SOLVERS, integrate, nfe
from flowdistill.stages import Stage
from flowdistill.work import Done, Progress, Work, batches

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from flowdistill.teachers import Model

TENSORS = "boss.safetensors"
REFERENCE = (SOLVERS["heun"], uniform(32))
"""The accurate solution on the held-out noises: 63 evaluations."""


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
    grid: int = Field(100, ge=2, le=1000, description="steps of the fine trajectory (K_max in the paper)")
    trajectories: int = Field(64, gt=0, description="noises that the cost is averaged over")
    held_out: int = Field(32, ge=8, description="further noises that the schedules are measured on")
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
        meter = Meter(
            work,
            self.trajectories * self.grid + self.held_out * (nfe(*REFERENCE) + 2 * sum(self.nfe)),
        )
        gram = self.gram(model, fine, meter)
        cost = local_cost(gram, fine.times)
        solution = bellman(cost)
        paths = {k: solution.path(k) for k in range(1, self.grid + 1)}
        schedules = {k: Schedule(tuple(fine.times[i] for i in paths[k]), "boss") for k in self.nfe}
        figures = {}
        for k, held_out in self.measure(model, schedules, meter).items():
            even = [round(i * self.grid / k) for i in range(k + 1)]
            local = {
                "boss": float(solution.totals[k]),
                "uniform": float(cost[even[:-1], even[1:]].sum()),
            }
            figures[str(k)] = {"local_cost": local, "held_out": held_out}
            used = {"grid": self.grid, "trajectories": self.trajectories, "seed": work.seed}
            content = {**describe(schedules[k], model), **used, **figures[str(k)]}
            artifact.save_json(work.folder / file_name(k), content)
        arrays = {"gram": gram, "cost": cost, "times": fine.times, "totals": solution.totals[1:]}
        header = {"kind": "schedule", "model": model.digest, "settings": dict(work.settings)}
        _save_arrays(work, arrays | {f"path.{k}": path for k, path in paths.items()}, header)
        return Done((TENSORS, *map(file_name, self.nfe)), {"schedules": figures})

    def gram(self, model: Model, fine: Schedule, meter: Meter) -> NDArray[np.float64]:
        """Mean Gram matrix of increments and velocities [2M, 2M] along the fine Euler trajectories.

        Batches stream through it: memory does not grow with the number of trajectories.
        """
        import torch

        total = torch.zeros(2 * self.grid, 2 * self.grid, dtype=torch.float64)
        for noise, labels in self._noises(model, meter, 0, self.trajectories):
            states: list[Tensor] = []
            speeds: list[Tensor] = []

            def keep(i: int, t: float, x: Tensor, v: Tensor) -> None:
                states.append(x)  # noqa: B023  (both lists live for this one call)
                speeds.append(v)  # noqa: B023
                meter.add(len(x))

            end = integrate(model.field, noise, fine, SOLVERS["euler"], labels, keep)
            basis = torch.cat([torch.stack([*states, end]).diff(dim=0), torch.stack(speeds)])
            rows = basis.flatten(1).to("cpu", torch.float64)
            total += rows @ rows.T
        gram: NDArray[np.float64] = (total / self.trajectories).numpy()
        return gram

    def measure(
        self, model: Model, schedules: dict[int, Schedule], meter: Meter
    ) -> dict[int, dict[str, Any]]:
        """Endpoint error (RMSE per sample) of every schedule and of uniform steps on held-out noises."""
        import torch

        from flowdistill.evaluation import metrics

        errors: dict[tuple[int, str], list[Tensor]] = {}
        for noise, labels in self._noises(model, meter, self.trajectories, self.held_out):

            def end(schedule: Schedule, solver: Any = SOLVERS["euler"]) -> Tensor:
                x = integrate(model.field, noise, schedule, solver, labels)  # noqa: B023
                meter.add(len(x) * nfe(solver, schedule))
                return x

            accurate = end(REFERENCE[1], REFERENCE[0])
            for k, schedule in schedules.items():
                for name, candidate in (("boss", schedule), ("uniform", uniform(k))):
                    error = metrics.endpoint_error(end(candidate), accurate).cpu()
                    errors.setdefault((k, name), []).append(error)
        found = {}
        for k in schedules:
            boss, even = (torch.cat(errors[k, name]) for name in ("boss", "uniform"))
            difference = metrics.paired_difference(boss, even, meter.work.seed)
            found[k] = {
                "boss": metrics.mean_interval(boss, meter.work.seed).as_dict(),
                "uniform": metrics.mean_interval(even, meter.work.seed).as_dict(),
                "difference": difference.as_dict(),
                "verdict": "better"
                if difference.high < 0
                else "worse"
                if difference.low > 0
                else "no difference",
            }
        return found

    def _noises(
        self, model: Model, meter: Meter, first: int, count: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        from flowdistill import randomness

        for indices in batches(range(first, first + count), self.batch_size):
            meter.work.stop.check()
            noise = randomness.noise(meter.work.seed, indices, model.card.shape)
            yield noise.to(meter.work.device), model.labels(meter.work.seed, indices)


def describe(schedule: Schedule, model: Model) -> dict[str, Any]:
    """What a schedule file says of the schedule itself and of the model it is for."""
    return {
        "nfe": schedule.steps,
        "solver": "euler",
        "times": list(schedule.times),
        "sigmas": schedule.sigmas(),
        "model": model.digest,
        "guidance": None,
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
