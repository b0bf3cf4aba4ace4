"""The rows of an evaluation, each a way to sample a model, and what is measured of how many samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from flowdistill.evaluation.instruments import Wanted
from flowdistill.schedule import Schedule
from flowdistill.solvers import OdeSolver, Solver, nfe

if TYPE_CHECKING:
    from flowdistill.teachers import Model


@dataclass(frozen=True, eq=False)
class Row:
    """One way to sample one model."""

    name: str
    model: Model
    solver: Solver
    schedule: Schedule

    @property
    def nfe(self) -> int:
        """Evaluations of the network for one sample."""
        return nfe(self.solver, self.schedule)

    @property
    def forward_passes(self) -> int:
        """Calls of the network for one sample: with guidance two an evaluation, where it applies."""
        return self.model.forward_passes(self.solver, self.schedule)

    @property
    def way_up(self) -> int:
        """Evaluations from a sample to its noise; 0 where the solver has no such way."""
        if self.solver.name not in get_args(OdeSolver):
            return 0
        return nfe(self.solver, self.schedule, inverse=True)

    @property
    def caption(self) -> str:
        """Names the row: `teacher, 4 NFE`, `teacher, 4 NFE, boss`, `teacher, 63 NFE, heun`."""
        return ", ".join([self.name, f"{self.nfe} NFE", *self._unusual])

    @property
    def id(self) -> str:
        """Names the row in files: `teacher-4`, `teacher-4-boss`."""
        return "-".join([self.name, str(self.nfe), *self._unusual])

    @property
    def _unusual(self) -> list[str]:
        words = (self.schedule.name, self.solver.name)
        return [word for word in words if word not in ("uniform", "euler")]

    def facts(self) -> dict[str, Any]:
        """What, beside the noise, its samples depend on, for JSON."""
        steps = {"solver": self.solver.name, "schedule": self.schedule.name, "nfe": self.nfe}
        return {"model": self.name, **steps, "times": list(self.schedule.times)}


@dataclass(frozen=True)
class Plan:
    """The rows of an evaluation, and on how many samples what is measured."""

    rows: tuple[Row, ...]
    accurate: Row
    """The solution that endpoints are compared with."""
    samples: int
    pairs: int
    """Samples whose solution is computed."""
    paths: int
    """Samples whose straightness is measured."""
    path_steps: int
    inversions: int
    """Samples that are taken back to their noise."""
    batch_size: int
    seed: int
    timed: bool = True
    """Whether what differs from run to run is measured, too."""
    wanted: Wanted = Wanted()
    reference_data: str | None = None

    @property
    def models(self) -> dict[str, Model]:
        """The models of the rows, by name."""
        return {row.name: row.model for row in self.rows}

    @property
    def evaluations(self) -> int:
        """Evaluations of a network in all, counted by sample."""
        paths = self.paths * self.path_steps * len(self.models)
        rows = sum(self.cost(row) for row in self.rows)
        return self.pairs * self.accurate.nfe + paths + rows

    def cost(self, row: Row) -> int:
        """The same of one row."""
        return self.samples * row.nfe + self.inversions * row.way_up

    def facts(self) -> dict[str, Any]:
        """What any part of the evaluation depends on, for JSON."""
        return {
            "accurate": self.accurate.facts(),
            "models": {row.name: row.model.digest for row in (self.accurate, *self.rows)},
            "samples": [self.samples, self.pairs, self.paths, self.path_steps, self.inversions],
            "batch_size": self.batch_size,
            "seed": self.seed,
            "timed": self.timed,
        }
