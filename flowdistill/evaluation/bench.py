"""The measuring itself: every row samples the same noises and is compared with the same solution.

What is finished (the real data, the accurate solution, the paths of a model, a row) is kept in
`checkpoints/`, so an evaluation that was interrupted continues with the next part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from flowdistill import artifact, randomness
from flowdistill.errors import Diverged
from flowdistill.evaluation import extractors, metrics
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, Solver, integrate, nfe
from flowdistill.work import Progress, Work, batches

if TYPE_CHECKING:
    from flowdistill.solvers import OnStep
    from flowdistill.teachers import Model

_CHECKPOINTS = "checkpoints"
_SHOWN_IMAGES, _SHOWN_POINTS = 10, 1000
"""Samples of a row that the picture shows."""
_TIMED_MS, _TIMED_LEAST, _TIMED_MOST = 1000.0, 5, 50
"""A latency comes from runs of about so long in all, but from at least and at most so many."""

Part: TypeAlias = tuple[dict[str, Tensor], dict[str, Any]]
"""What was measured of one thing: tensors with a row for each sample, and figures for JSON."""


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
    batch_size: int
    seed: int
    latency: bool

    @property
    def models(self) -> dict[str, Model]:
        """The models of the rows, by name."""
        return {row.name: row.model for row in self.rows}

    @property
    def evaluations(self) -> int:
        """Evaluations of a network in all, counted by sample."""
        paths = self.paths * self.path_steps * len(self.models)
        rows = self.samples * sum(row.nfe for row in self.rows)
        return self.pairs * self.accurate.nfe + paths + rows

    def facts(self) -> dict[str, Any]:
        """What any part of the evaluation depends on, for JSON."""
        return {
            "accurate": self.accurate.facts(),
            "models": {row.name: row.model.digest for row in (self.accurate, *self.rows)},
            "samples": [self.samples, self.pairs, self.paths, self.path_steps, self.batch_size],
            "seed": self.seed,
            "latency": self.latency,
        }


class Bench:
    """The noises and labels of one evaluation, and what samples are compared with.

    The labels are those of fresh real samples, so that classes are as frequent as in the data whose
    moments the Fréchet distance refers to.
    """

    def __init__(self, plan: Plan, work: Work) -> None:
        self.plan, self.work = plan, work
        self.card = plan.accurate.model.card
        self.extractor = extractors.extractor(self.card, work.device)
        # Apart from what any training draws, whatever its seed.
        self.seed = randomness.key(plan.seed, "evaluation")
        self.shown = _SHOWN_POINTS if len(self.card.shape) == 1 else _SHOWN_IMAGES
        self.done = 0
        artifact.create_folder(work.folder / _CHECKPOINTS)

    @cached_property
    def real(self) -> Part:
        """Index and label of all samples; figures of fresh real ones, which no model can beat."""
        return self._kept("real", {}, 0, self._measure_real)

    @property
    def labels(self) -> Tensor | None:
        """Labels [samples] on the CPU, for models with classes."""
        return self.real[0].get("label")

    @cached_property
    def solution(self) -> Tensor:
        """Where the accurate row takes the first noises, [pairs, *shape]."""
        cost = self.plan.pairs * self.plan.accurate.nfe
        return self._kept("solution", {}, cost, self._solve_accurately)[0]["x"]

    def straightness(self, name: str) -> dict[str, Any]:
        """Figures of how straight a model's paths are."""
        row = Row(name, self.plan.models[name], SOLVERS["euler"], uniform(self.plan.path_steps))
        cost = self.plan.paths * row.nfe
        return self._kept("paths", row.facts(), cost, lambda: self._measure_paths(row))[1]

    def measure(self, row: Row) -> Part:
        """A row against the real data and, sample by sample, against the solution.

        Tensors: `endpoint_error` [pairs], `correct` [samples] where there are classes, and the
        samples that are `shown`.
        """
        cost = self.plan.samples * row.nfe
        return self._kept("row", row.facts(), cost, lambda: self._measure_row(row))

    # --- parts ------------------------------------------------------------------------------------

    def _kept(self, part: str, facts: Mapping[str, Any], cost: int, make: Callable[[], Part]) -> Part:
        """What `make` gives, or gave before an interruption; `cost` in evaluations of the network."""
        extractor = self.extractor.label if self.extractor else None
        key = artifact.digest([self.plan.facts(), extractor, facts])[:16]
        path = self.work.folder / _CHECKPOINTS / f"{part}-{key}.safetensors"
        if path.exists():
            self._advance(cost)
        else:
            artifact.save_tensors(path, *make())
        return artifact.load_tensors(path)

    def _measure_real(self) -> Part:
        indices = torch.arange(self.plan.samples)
        real = extractors.real(self.card)
        if real is None:
            drawn = self.plan.accurate.model.labels(self.seed, range(len(indices)))
            reason = f"there is no way to draw from data '{self.card.data}'"
            figures = {"metrics": {}, "skipped": {"fd": reason, "accuracy": reason}}
            return _present(index=indices, label=drawn), figures
        tally, labels = _Tally(self.extractor), []
        count = min(real.count or len(indices), len(indices))
        for part in self._batches(len(indices)):
            self.work.stop.check()
            x, label = real.batch(indices[part], self.seed)
            labels.append(label)
            if part.start < count:
                tally.add(x[: count - part.start].to(self.work.device))
        known = torch.cat(labels) if self.card.classes else None
        figures = tally.conclude(None if known is None else known[:count])[1]
        return _present(index=indices, label=known), figures

    def _solve_accurately(self) -> Part:
        accurate, parts = self.plan.accurate, self._batches(self.plan.pairs)
        return {"x": torch.cat([self._solve(accurate, part).cpu() for part in parts])}, {}

    def _measure_paths(self, row: Row) -> Part:
        if self.plan.paths < 2:
            return {}, {"metrics": {}, "skipped": {"straightness": "fewer than 2 paths"}}
        found = [self._along(row, part) for part in self._batches(self.plan.paths)]
        squared, plain, displacement = (torch.cat(column) for column in zip(*found, strict=True))
        dimensions = math.prod(self.card.shape)
        estimates = metrics.straightness(squared, plain, displacement, dimensions, self.seed)
        skipped = {} if "curvature" in estimates else {"curvature": "the samples are their noise"}
        return {}, {"metrics": _figures(estimates, paths=f"{row.nfe} Euler steps"), "skipped": skipped}

    def _measure_row(self, row: Row) -> Part:
        tally, errors, shown = _Tally(self.extractor), [], []
        for part in self._batches(self.plan.samples):
            x = self._solve(row, part)
            tally.add(x)
            shown.append(x[: max(0, self.shown - part.start)].cpu())
            paired = self.solution[part]
            errors.append(metrics.endpoint_error(x[: len(paired)], paired))
        tensors, figures = tally.conclude(self.labels if row.model.card.classes else None)
        error = torch.cat(errors)
        estimate = metrics.mean_interval(error, self.seed)
        figures["metrics"] |= _figures({"endpoint_error": estimate})
        if self.plan.latency:
            figures["latency"] = self._latency(row)
        return {**tensors, "endpoint_error": error, "shown": torch.cat(shown)}, figures

    # --- sampling ---------------------------------------------------------------------------------

    def _solve(self, row: Row, part: slice, on_step: OnStep | None = None) -> Tensor:
        """Samples [B, *shape] from the noises `part`, on the device."""
        self.work.stop.check()
        eps, labels = self._start(row, part)
        x = integrate(row.model.field, eps, row.schedule, row.solver, labels, on_step)
        if not x.isfinite().all():
            raise Diverged(f"{row.caption}: the samples are not finite, the model is of no use")
        self._advance(len(x) * row.nfe)
        return x

    def _start(self, row: Row, part: slice) -> tuple[Tensor, Tensor | None]:
        """Noise [B, *shape], and labels [B] for a model with classes."""
        eps = randomness.noise(self.seed, range(part.start, part.stop), self.card.shape)
        labels, device = self.labels if row.model.card.classes else None, self.work.device
        return eps.to(device), None if labels is None else labels[part].to(device)

    def _along(self, row: Row, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """`metrics.deviations` of the paths `part`."""
        states: list[Tensor] = []
        velocities: list[Tensor] = []

        def keep(i: int, t: float, x: Tensor, v: Tensor) -> None:
            states.append(x.cpu())
            velocities.append(v.cpu())

        end = self._solve(row, part, keep).cpu()
        return metrics.deviations(row.schedule.times, velocities, states[0], end)

    def _latency(self, row: Row) -> dict[str, float]:
        """Milliseconds from one noise to its sample, by the host's clock."""
        eps, labels = self._start(row, slice(0, 1))
        runs: list[float] = []
        while len(runs) <= _TIMED_LEAST or (len(runs) <= _TIMED_MOST and sum(runs) < _TIMED_MS):
            started = time.perf_counter()
            # The copy waits for the device.
            integrate(row.model.field, eps, row.schedule, row.solver, labels).cpu()
            runs.append(1000 * (time.perf_counter() - started))
        # The first run warms up.
        middle, late = torch.tensor(runs[1:]).quantile(torch.tensor([0.5, 0.95])).tolist()
        return {"p50_ms": middle, "p95_ms": late, "runs": len(runs) - 1}

    def _batches(self, count: int) -> Iterator[slice]:
        return (slice(part.start, part.stop) for part in batches(range(count), self.plan.batch_size))

    def _advance(self, evaluations: int) -> None:
        self.done += evaluations
        self.work.report(Progress(self.done, self.plan.evaluations, "evaluation"))


class _Tally:
    """What the extractor reads in samples that come in batches."""

    def __init__(self, extractor: extractors.Extractor | None) -> None:
        self.extractor = extractor
        self.features: list[Tensor] = []
        self.classes: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Read samples [B, *shape]."""
        if self.extractor is not None:
            features, classes = self.extractor.read(x)
            self.features.append(features)
            self.classes += [] if classes is None else [classes]

    def conclude(self, labels: Tensor | None) -> Part:
        """Fréchet distance from the real data, and how often the labels [n] are recognised."""
        if self.extractor is None:
            reason = "there is no feature extractor for the data of the model"
            return {}, {"metrics": {}, "skipped": {"fd": reason, "accuracy": reason}}
        features, found, skipped = torch.cat(self.features), {}, {}
        if len(features) > features.shape[1]:
            found["fd"] = self.extractor.reference.estimate(features)
        else:
            skipped["fd"] = f"{len(features)} samples are too few for {features.shape[1]} features"
        tensors = {}
        if labels is not None and self.classes:
            classes = torch.cat(self.classes)
            tensors["correct"] = classes == labels
            found["accuracy"] = metrics.accuracy(classes, labels)
        else:
            skipped["accuracy"] = "the model or its data has no classes"
        figures = _figures(found, extractor=self.extractor.label)
        return tensors, {"metrics": figures, "skipped": skipped}


def _figures(estimates: Mapping[str, metrics.Estimate], **how: str) -> dict[str, Any]:
    """For JSON, with the number of samples in each metric's name."""
    return {f"{name}@{each.n}": {**each.as_dict(), **how} for name, each in estimates.items()}


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}
