"""The measuring itself: every row samples the same noises and is compared with the same solution.

Finished parts (the accurate solution, the paths, each row) are kept in `checkpoints/`, so an
evaluation that was interrupted continues with the next part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from flowdistill import artifact, pictures, randomness
from flowdistill.errors import ArtifactError, Diverged, UsageError
from flowdistill.evaluation import extractors, metrics
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, OnStep, Solver, integrate, nfe, steps_for
from flowdistill.stages import Done, Progress

if TYPE_CHECKING:
    from flowdistill.stages import Work
    from flowdistill.stages.evaluate import Evaluate
    from flowdistill.teachers import Model

RESULT, SAMPLES, PICTURE = "eval.json", "samples.safetensors", "grid.png"
_CHECKPOINTS = "checkpoints"
_IMAGES, _POINTS = 10, 1000
"""Samples of a row that the picture shows."""
_TIMED_S, _TIMED_RUNS = 1.0, (5, 50)
"""A latency is measured for about so long, with at least and at most so many runs."""

Part: TypeAlias = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and figures of something that has been measured."""


@dataclass(frozen=True)
class Row:
    """One way to sample one model."""

    name: str
    model: Model
    solver: Solver
    schedule: Schedule

    @property
    def nfe(self) -> int:
        return nfe(self.solver, self.schedule)

    @property
    def id(self) -> str:
        """Names the row in files: `reflow@4-boss`, `teacher@63-uniform-heun`."""
        solver = "" if self.solver.name == "euler" else f"-{self.solver.name}"
        return f"{self.name}@{self.nfe}-{self.schedule.name}{solver}"

    @property
    def caption(self) -> str:
        """Names the row in the picture."""
        extra = (self.schedule.name, self.solver.name)
        shown = [word for word in extra if word not in ("uniform", "euler")]
        return " ".join([self.name, str(self.nfe), *shown])

    def facts(self) -> dict[str, Any]:
        """What the samples of a noise depend on."""
        return {
            "model": self.model.digest,
            "solver": self.solver.name,
            "times": list(self.schedule.times),
        }


class Figures:
    """Metrics by name, each with its number of samples in the name, and what could not be had."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}

    def add(self, name: str, estimate: metrics.Estimate, **how: Any) -> None:
        self.metrics[f"{name}@{estimate.n}"] = {**estimate.as_dict(), **how}

    def as_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "skipped": self.skipped}


class Bench:
    """One evaluation: its models, the noises, and what they are compared with."""

    def __init__(self, settings: Evaluate, work: Work) -> None:
        self.settings, self.work = settings, work
        self.seed = randomness.key(settings.seed, "evaluation")
        self.models = _named(work.models("models"))
        first = next(iter(self.models))
        teacher = "teacher" if "teacher" in self.models else first
        self.card = self.models[teacher].card
        _check_shapes(self.models)
        self.extractor = extractors.extractor(self.card, work.device)
        self.real = extractors.real(self.card)
        self.labels = self._labels(self.models[teacher])
        accurate = settings.reference
        self.accurate = Row(
            teacher, self.models[teacher], SOLVERS[accurate.solver], uniform(accurate.steps)
        )
        self.pairs = min(accurate.samples, settings.samples)
        self.paths = min(settings.straightness, settings.samples)
        self.rows = list(self._rows())
        self.total = self.pairs * self.accurate.nfe + self.paths * accurate.steps * len(self.models)
        self.total += settings.samples * sum(row.nfe for row in self.rows)
        self.done = 0

    def run(self) -> Done:
        """Measure everything and write the artifact."""
        artifact.create_folder(self.work.folder / _CHECKPOINTS)
        real = self.kept({"part": "real"}, 0, self.measure_real)
        solution = self.kept(
            {"part": "solution"}, self.pairs * self.accurate.nfe, self.solve_accurately
        )
        models = {name: self._describe(name) for name in self.models}
        parts = {}
        for row in self.rows:
            cost = self.settings.samples * row.nfe
            parts[row] = self.kept(
                {"part": "row", **row.facts()}, cost, lambda: self.measure(row, solution[0]["x"])
            )
        return self._write(real, solution, models, parts)
