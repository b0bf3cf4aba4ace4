"""Making pairs: from the indices of a batch to its noise, labels and samples, the same whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flowdistill.chords import merged
from flowdistill.errors import UsageError
from flowdistill.grids import schedule
from flowdistill.schedule import Schedule
from flowdistill.solvers import SOLVERS, integrate, nfe
from flowdistill.work import Figures, Progress, Work, batches

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.flow import VelocityField
    from flowdistill.images import Samples
    from flowdistill.pairstore import Block, PairSpec, PairWriter
    from flowdistill.stages.pairs import Pairs
    from flowdistill.teachers import Model

ORDER_RK45 = 5
INVERT_FROM = 0.001
"""t at which the way up begins in rf++'s code."""


@dataclass(frozen=True)
class Maker:
    """Makes the pairs of any indices, each the same whoever asks, in batches of a fixed size."""

    stage: Pairs
    work: Work
    model: Model
    spec: PairSpec
    data: Samples | None
    chosen: Sequence[int] | None

    def shard(self, shard: int, writer: PairWriter) -> list[Block]:
        """The pairs of a shard, by batches."""
        parts: list[Block] = []
        for indices in batches(self.spec.indices(shard), self.stage.batch_size):
            self.work.stop.check()
            parts.append(self.block(indices))
            done = writer.committed_pairs + sum(len(part.x0) for part in parts)
            self.work.report(Progress(min(done, self.spec.count), self.spec.count, "pair"))
        return parts

    def block(self, indices: range) -> Block:
        """The pairs of one batch, on the CPU."""
        import torch

        from flowdistill.pairstore import Block

        path: list[Tensor] = []

        if self.data is not None:
            x0, labels = self.data.read(indices)
            start = self._noised(x0, indices)
            eps, calls = self.solve(start, self._checked(labels), inverse=True)
            record = None
        else:
            eps, record = self.spec.draw(indices)
            labels = self.labels(indices)
            x0, calls = self.solve(eps, labels, on_path=path.append)
        kept = torch.stack(path, dim=1) if path else None
        block = Block(eps, x0, labels if self.spec.classes else None, nfe=calls, record=record, path=kept)
        return replace(block, error=self.error(block, indices)) if self.spec.error else block

    def solve(
        self,
        x: Tensor,
        labels: Tensor | None,
        inverse: bool = False,
        halved: bool = False,
        on_path: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The other end of the flow [B, *shape], and the evaluations of each sample where they differ.

        `on_path` is given the states at the times of the spec's path.
        """
        from flowdistill.adaptive import integrate_adaptive

        x = x.to(self.work.device)
        labels = None if labels is None else labels.to(self.work.device)
        field = self.field if self.data is None else beginning_at(self.stage.invert_from, self.field)
        if self.stage.solver == "rk45":
            finer = 2.0**-ORDER_RK45 if halved else 1.0
            rtol, atol = self.stage.rtol * finer, self.stage.atol * finer
            end, calls = integrate_adaptive(field, x, rtol, atol, labels, inverse=inverse)
            return end.cpu(), calls
        grid, kept = self.grid.halved() if halved else self.grid, set(self.spec.path)

        def on_step(i: int, t: float, x: Tensor, v: Tensor) -> None:
            if on_path is not None and t in kept:
                on_path(x.cpu())

        solver = SOLVERS[self.stage.solver]
        return integrate(field, x, grid, solver, labels, on_step, inverse).cpu(), None

    def error(self, block: Block, indices: range) -> Tensor:
        """What the solver is off by, [B]: against every step halved or, of data, after there and back.

        RMS per dimension.
        """
        from flowdistill.pairstore import rms

        if self.data is not None:
            return rms(self.solve(block.eps, block.labels)[0], self._noised(block.x0, indices))
        return rms(self.solve(block.eps, block.labels, halved=True)[0], block.x0)

    def errors(self, indices: range) -> tuple[Tensor, Tensor]:
        """Error and distance [n] of the pairs of these indices."""
        import torch

        from flowdistill.pairstore import rms

        found = []
        for part in batches(indices, self.stage.batch_size):
            self.work.stop.check()
            block = self.block(part)
            error = self.error(block, part) if block.error is None else block.error
            found.append((error, rms(block.eps, block.x0)))
        error, distance = map(torch.cat, zip(*found, strict=True))
        return error, distance

    def labels(self, indices: range) -> Tensor | None:
        """Labels [B], each a function of (seed, index) alone; None without classes."""
        import torch

        from flowdistill import randomness

        if self.chosen is None:
            return self.model.labels(self.work.seed, indices)
        if self.stage.labels:
            return torch.tensor([self.chosen[index % len(self.chosen)] for index in indices])
        return torch.tensor(self.chosen)[
            randomness.integers(self.work.seed, "labels", indices, len(self.chosen))
        ]

    def evaluations(self) -> Figures:
        """NFE of a pair, and forward passes where guidance makes them more."""
        if self.stage.solver == "rk45":
            return {}
        solver, inverse = SOLVERS[self.stage.solver], self.data is not None
        calls = nfe(solver, self.grid, inverse=inverse)
        if self.model.passes == 1 or not self.spec.classes:
            return {"nfe": calls}
        start = self.stage.invert_from if inverse else 0.0
        return {"nfe": calls, "forward_passes": self.model.forward_passes(solver, self.grid, inverse, start)}

    @property
    def grid(self) -> Schedule:
        """The times of the recipe and, between them, those of the path that is kept."""
        chosen = schedule(self.stage.schedule, self.stage.steps)
        if not self.spec.path:
            return chosen
        return Schedule(merged((1.0, *self.spec.path, 0.0), chosen.times), chosen.name)

    @property
    def field(self) -> VelocityField:
        """The model's velocity in the arithmetic that the recipe asks for."""
        import torch

        field = self.model.field
        if self.stage.precision == "fp32":
            return field
        dtype = torch.bfloat16 if self.stage.precision == "bf16" else torch.float16

        def velocity(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            with torch.autocast(torch.device(self.work.device).type, dtype):
                return field(x, t, labels)

        return velocity

    def _noised(self, x0: Tensor, indices: range) -> Tensor:
        return noised(x0, self.stage.invert_from, self.work.seed, indices)

    def _checked(self, labels: Tensor | None) -> Tensor | None:
        """The labels of data, if the model wants any."""
        classes = self.spec.classes
        if not classes:
            return None
        what = f"{self.work.stage}.data"
        if labels is None:
            raise UsageError(f"{what}: has no labels, and the model has {classes} classes")
        check_labels(labels, classes, what)
        return labels


def check_labels(labels: Tensor, classes: int, what: str) -> None:
    """Refuse the labels [n] of `what` where the model has no such class."""
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < classes:
        raise UsageError(f"{what}: labels {low} to {high}, the model has 0 to {classes - 1}")


def noised(x0: Tensor, t: float, seed: int, indices: range) -> Tensor:
    """Where the way up from the samples x0 [B, *shape] of these indices begins, [B, *shape].

    Images that hold no noise at all lie on a set without volume, which the ODE carries to a set without
    volume, and not to N(0, I).
    """
    from flowdistill import randomness

    noise = randomness.noise(randomness.key(seed, "inversion"), indices, x0.shape[1:])
    return (1 - t) * x0 + t * noise


def beginning_at(start: float, field: VelocityField) -> VelocityField:
    """The field over a time that is 0 at t = `start` and 1 at t = 1."""
    return lambda x, time, labels: (1 - start) * field(x, start + (1 - start) * time, labels)


def read_labels(path: Path) -> list[int]:
    """The labels of a text file, one in each line; UsageError names a line that is none."""
    from flowdistill import artifact

    with artifact.opened(path) as file:
        lines = file.read().decode("utf-8-sig", errors="replace").rstrip().split("\n")
    if lines == [""]:
        raise UsageError(f"{path}: is empty, expected a label in each line")
    labels = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line.isascii() or not line.isdecimal() or len(line) > 9:
            raise UsageError(f"{path}:{number}: expected a label, a whole number, found {line[:40]!r}")
        labels.append(int(line))
    return labels
