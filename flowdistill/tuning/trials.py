"""Trials of candidates on noises: their endpoint errors beside an accurate solution, and their features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, TypeAlias

from flowdistill.errors import Diverged
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate, nfe
from flowdistill.tuning.candidates import LOST, Candidate, Outcome
from flowdistill.work import Progress, Work, batches

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.flow import VelocityField
    from flowdistill.teachers import Model

    Batch: TypeAlias = tuple[Tensor, Tensor | None, Tensor]
    """Noise [B, *shape], labels [B] and accurate solution [B, *shape]."""

REFERENCE = (SOLVERS["heun"], uniform(32))
"""The accurate solution: 63 evaluations."""


@dataclass
class Meter:
    """Counts evaluations of the network and reports them."""

    work: Work
    total: int
    done: int = 0

    def add(self, evaluations: int) -> None:
        """So many more are done."""
        self.done += evaluations
        self.work.report(Progress(self.done, self.total, "evaluation"))


@dataclass(frozen=True)
class Noises:
    """The noises of a run by their index, in batches that end early where the work has to stop."""

    model: Model
    meter: Meter
    batch_size: int

    def __call__(self, first: int, count: int) -> Iterator[tuple[range, Tensor, Tensor | None]]:
        """Indices, noise [B, *shape] and labels [B] of `count` noises from number `first` on."""
        for indices in batches(range(first, first + count), self.batch_size):
            self.meter.work.stop.check()
            yield indices, *self.drawn(indices)

    def drawn(self, indices: range) -> tuple[Tensor, Tensor | None]:
        """Noise [B, *shape] and labels [B]."""
        from flowdistill import randomness

        work = self.meter.work
        noise = randomness.noise(work.seed, indices, self.model.card.shape)
        return noise.to(work.device), self.model.labels(work.seed, indices)

    def solved(self, first: int, count: int, read: Read | None = None) -> Trial:
        """Noises with their accurate solutions, for trials; Diverged where one is not finite."""
        solver, steps = REFERENCE
        found = []
        for _, noise, labels in self(first, count):
            accurate = integrate(self.model.field, noise, steps, solver, labels)
            if not accurate.isfinite().all():
                raise Diverged("the model's accurate solution is not finite: it is of no use")
            self.meter.add(len(noise) * nfe(solver, steps))
            found.append((noise, labels, accurate))
        return Trial(self.model.field, found, self.meter, read)


Read: TypeAlias = "Callable[[Tensor], Tensor]"
"""Features [B, D] of samples [B, *shape], on the CPU."""


@dataclass(frozen=True)
class Trial:
    """Noises in batches with their labels and accurate solutions, on which candidates are tried."""

    field: VelocityField
    batches: list[Batch]
    meter: Meter
    read: Read | None = None
    known: dict[Candidate, Outcome] = dataclass_field(default_factory=dict)
    """Some candidates are asked for more than once."""

    @property
    def count(self) -> int:
        """How many noises there are."""
        return sum(len(noise) for noise, _, _ in self.batches)

    def __call__(self, candidate: Candidate) -> Outcome:
        """What became of the noises; errors are `LOST` where a sample is not finite."""
        if candidate in self.known:
            self.meter.add(self.count * nfe(candidate.solver, candidate.schedule))
        else:
            self.known[candidate] = self._measured(candidate)
        return self.known[candidate]

    def _measured(self, candidate: Candidate) -> Outcome:
        import torch

        from flowdistill.evaluation import metrics

        errors, features = [], []
        for noise, labels, accurate in self.batches:
            self.meter.work.stop.check()
            x = integrate(self.field, noise, candidate.schedule, candidate.solver, labels)
            self.meter.add(len(x) * nfe(candidate.solver, candidate.schedule))
            errors.append(metrics.endpoint_error(x, accurate).cpu())
            if self.read is not None:
                features.append(self.read(x).double())
        lost = torch.cat(errors).nan_to_num(nan=LOST, posinf=LOST)
        return Outcome(lost, torch.cat(features) if features else None)
