"""The measuring itself: every row samples the same noises and is compared with the same solution.

What is finished (the real data, the accurate solution, the paths of a model, a row) is kept, so an
evaluation that was interrupted continues with the next part.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowdistill import artifact, randomness
from flowdistill.errors import Diverged
from flowdistill.evaluation import costs, instruments, metrics, targets
from flowdistill.evaluation.kinds import distances
from flowdistill.evaluation.parts import Part, Parts
from flowdistill.evaluation.realdata import RealData
from flowdistill.evaluation.rows import Plan, Row
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.work import Work

if TYPE_CHECKING:
    from flowdistill.solvers import OnStep

_SHOWN_IMAGES, _SHOWN_POINTS = 10, 1000
"""Samples of a row that the picture shows."""
_QUANTILES = {"endpoint_error_median": 0.5, "endpoint_error_p95": 0.95}
_NOT_FINITE = -1.0
"""In the place of a round trip's error."""


class Bench:
    """The noises and labels of one evaluation, and what samples are compared with.

    The labels are those of fresh real samples, so that classes are as frequent as in the data whose
    moments the Fréchet distance refers to.
    """

    def __init__(self, plan: Plan, work: Work) -> None:
        self.plan, self.work = plan, work
        self.card = plan.accurate.model.card
        # Apart from what any training draws, whatever its seed.
        self.seed = randomness.key(plan.seed, "evaluation")
        self.shown = _SHOWN_POINTS if len(self.card.shape) == 1 else _SHOWN_IMAGES
        self.instruments = instruments.equip(plan.accurate.model, work.device, plan.wanted)
        given = None
        if (path := plan.reference_data) is not None:
            given = targets.given(path, self.card, work.parents.get(path) or artifact.fingerprint(Path(path)))
        described = [plan.facts(), self.instruments.labels, given.fingerprint if given else None]
        self.parts = Parts(work, plan.batch_size, described, plan.evaluations)
        self.real = RealData(plan, self.instruments, self.parts, given, self.seed)
        # Here and not where they are first needed, since all processes have to make a part in step.
        self.targets = self.real.targets
        self.labels: Tensor | None = self.real.samples.get("label")

    @cached_property
    def solution(self) -> Tensor:
        """Where the accurate row takes the first noises, [pairs, *shape]."""
        cost = self.plan.pairs * self.plan.accurate.nfe
        return self.parts.kept("solution", {}, cost, self._solve_accurately)[0]["x"]

    def straightness(self, name: str) -> dict[str, Any]:
        """Figures of how straight a model's paths are."""
        row = Row(name, self.plan.models[name], SOLVERS["euler"], uniform(self.plan.path_steps))
        cost = self.plan.paths * row.nfe
        return self.parts.kept("paths", row.facts(), cost, lambda: self._measure_paths(row))[1]

    def measured(self) -> list[tuple[Row, Part]]:
        """Every row against the reference and, sample by sample, against the solution.

        Tensors by kind: values [n] whose mean is the figure, for what is no mean `KIND.influence`,
        `correct` [samples] where there are classes, and the samples that are `shown`. On a GPU the
        statistics of a row are computed while the next one is sampled.
        """
        rows = {row: self.parts.path("row", row.facts()) for row in self.plan.rows}
        assert len(self.solution)  # made by all processes in step
        with ThreadPoolExecutor(1) as beside:
            before = beside.submit(lambda: None)
            for row, path in rows.items():
                if not self.parts.any(not path.exists()):
                    self.parts.advance(self.plan.cost(row))
                    continue
                found, cost = self._sample(row)
                before.result()
                if found is not None:
                    before = beside.submit(self._conclude, row, found, cost, path)
                if self.work.device == "cpu":
                    before.result()
            before.result()
        self.work.world.wait()
        return [(row, artifact.load_tensors(path)) for row, path in rows.items()]

    def latency(self, row: Row) -> dict[str, float]:
        """Milliseconds from one noise to its sample; for when all else is done, by the first process."""
        return self.parts.kept("latency", row.facts(), 0, lambda: self._measure_latency(row))[1]

    # --- parts ------------------------------------------------------------------------------------

    def _solve_accurately(self) -> Part | None:
        row = self.plan.accurate
        found = self.parts.gathered(
            self.parts.batches(self.plan.pairs), lambda part: {"x": self._solve(row, part).cpu()}, row.nfe
        )
        return None if found is None else (found, {})

    def _measure_paths(self, row: Row) -> Part | None:
        if self.plan.paths < 2:
            return {}, {"metrics": {}, "skipped": {"straightness": "fewer than 2 paths"}}
        parts = self.parts.batches(self.plan.paths)
        found = self.parts.gathered(parts, lambda part: self._along(row, part), row.nfe)
        if found is None:
            return None
        columns = found["squared"], found["plain"], found["displacement"]
        estimates = metrics.straightness(*columns, math.prod(self.card.shape), self.seed)
        skipped = {} if "curvature" in estimates else {"curvature": "the samples are their noise"}
        figures = metrics.named(estimates, paths=f"{row.nfe} Euler steps")
        return {}, {"metrics": figures, "skipped": skipped}

    def _sample(self, row: Row) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """All that is to be known of each sample, for the first process, and what sampling took."""
        timed: list[tuple[int, float]] = []
        costs.forget_peak(self.work.device)

        def read(part: slice) -> dict[str, Tensor]:
            started = time.perf_counter()
            x = self._solve(row, part)  # which waits for the device
            timed.append((len(x), time.perf_counter() - started))
            paired = self.solution[part]
            return {
                "shown": x[: max(0, self.shown - part.start)].cpu(),
                **self.real.read(x),
                **self.instruments.compare(x[: len(paired)], paired),
                **self._round_trip(row, x, part),
            }

        found = self.parts.gathered(self.parts.batches(self.plan.samples), read, row.nfe)
        if not (self.plan.timed and timed):
            return found, {}
        return found, {"memory": costs.peak_memory(self.work.device), "throughput": costs.throughput(timed)}

    def _conclude(self, row: Row, found: dict[str, Tensor], cost: dict[str, Any], path: Path) -> None:
        """Write what is to be known of a row."""
        there = [reader for reader in self.real.readers if reader.key in self.targets]
        compared = [targets.compare(each.key, found[each.key], self.targets[each.key]) for each in there]
        labels = self.labels if row.model.card.classes else None
        tensors, figures = targets.summary(there, compared, found.get("classes"), labels)
        values, paired, skipped = self._paired(row, found)
        for reader in self.real.readers:
            if reader not in there:
                reason = f"there is no way to draw from data '{self.card.data}'; give `reference_data`"
                skipped |= dict.fromkeys(distances(reader.key), reason)
        figures["metrics"] |= paired
        figures["skipped"] = {**self.instruments.absent, **skipped, **figures["skipped"]}
        artifact.save_tensors(path, {**tensors, **values, "shown": found["shown"]}, {**figures, **cost})

    def _paired(
        self, row: Row, found: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
        """Values, figures and what is left out of that which each sample has for itself."""
        values: dict[str, Tensor] = {}
        figures: dict[str, Any] = {}
        skipped: dict[str, str] = {}
        for kind in ("endpoint_error", "psnr", *self.instruments.paired):
            if kind in found:
                label = getattr(self.instruments.paired.get(kind), "label", None)
                estimate = {kind: metrics.mean_interval(found[kind], self.seed)}
                figures |= metrics.named(estimate, **({"extractor": label} if label else {}))
                values[kind] = found[kind]
        for kind, share in _QUANTILES.items():
            quantile = metrics.quantile_interval(found["endpoint_error"], share)
            if quantile is None:
                reason = f"{self.plan.pairs} pairs are too few for an interval; raise `reference.samples`"
                skipped[kind] = reason
            else:
                figures |= metrics.named({kind: quantile})
        trips = found.get("inversion")
        if not row.way_up:
            skipped["inversion"] = f"solver {row.solver.name} has no way from data to noise"
        elif trips is None or len(trips) < 2:
            skipped["inversion"] = "fewer than 2 samples; raise `inversion`"
        elif bool((trips == _NOT_FINITE).any()):
            skipped["inversion"] = "the way up is not finite: the model has no velocity at t = 0"
        else:
            figures |= metrics.named({"inversion": metrics.mean_interval(trips, self.seed)})
            values["inversion"] = trips
        return values, figures, skipped

    def _measure_latency(self, row: Row) -> Part | None:
        self.parts.check()
        if self.work.world.rank:
            return None
        eps, labels = self._start(row, slice(0, 1))

        def once() -> Tensor:
            return integrate(row.model.field, eps, row.schedule, row.solver, labels).cpu()  # which waits

        return {}, costs.latency(once)

    # --- sampling ---------------------------------------------------------------------------------

    def _solve(self, row: Row, part: slice, on_step: OnStep | None = None) -> Tensor:
        """Samples [B, *shape] from the noises `part`, on the device."""
        eps, labels = self._start(row, part)
        x = integrate(row.model.field, eps, row.schedule, row.solver, labels, on_step)
        if not x.isfinite().all():
            raise Diverged(f"{row.caption}: the samples are not finite, the model is of no use")
        self.parts.advance(len(x) * row.nfe)
        return x

    def _round_trip(self, row: Row, x: Tensor, part: slice) -> dict[str, Tensor]:
        """How far the first noises are from those that their samples lead back to, root mean square [b]."""
        count = min(len(x), self.plan.inversions - part.start)
        if count < 1 or not row.way_up:
            return {}
        eps, labels = self._start(row, slice(part.start, part.start + count))
        back = integrate(row.model.field, x[:count], row.schedule, row.solver, labels, inverse=True)
        self.parts.advance(count * row.way_up)
        error = metrics.endpoint_error(back, eps)
        return {"inversion": torch.where(error.isfinite(), error, _NOT_FINITE)}

    def _start(self, row: Row, part: slice) -> tuple[Tensor, Tensor | None]:
        """Noise [B, *shape], and labels [B] for a model with classes."""
        eps = randomness.noise(self.seed, range(part.start, part.stop), self.card.shape)
        labels, device = self.labels if row.model.card.classes else None, self.work.device
        return eps.to(device), None if labels is None else labels[part].to(device)

    def _along(self, row: Row, part: slice) -> dict[str, Tensor]:
        """`metrics.deviations` of the paths `part`."""
        states: list[Tensor] = []
        velocities: list[Tensor] = []

        def keep(i: int, t: float, x: Tensor, v: Tensor) -> None:
            states.append(x.cpu())
            velocities.append(v.cpu())

        end = self._solve(row, part, keep).cpu()
        found = metrics.deviations(row.schedule.times, velocities, states[0], end)
        return dict(zip(("squared", "plain", "displacement"), found, strict=True))
