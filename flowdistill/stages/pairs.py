"""Pairs: the teacher's ODE solved from many noises, (eps, x0) kept for reflow.

The noise of pair i is a function of (seed, i), so the store holds samples only, and the same bytes come out
whether it is made in one go or after any number of kills.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowdistill import schedule
from flowdistill.recipe import Reference
from flowdistill.solvers import SOLVERS, SolverName, integrate, nfe
from flowdistill.stages import Stage
from flowdistill.work import Done, Progress, Work, batches

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.teachers import Model

GRIDS = {"uniform": schedule.uniform, "edm": schedule.edm}


class Pairs(Stage):
    """Generate (noise, data, label) pairs with a model."""

    verb: ClassVar[str] = "pairs"
    produces: ClassVar[str] = "pairs"

    model: Annotated[str | None, Reference("model", allow_teacher=True)] = Field(
        "teacher", description="model that makes the pairs"
    )
    count: int = Field(20_000, gt=0, description="number of pairs")
    solver: SolverName = "heun"
    steps: int = Field(18, gt=0, description="steps of the solver; heun makes 2 steps - 1 evaluations")
    schedule: Literal["uniform", "edm"] = Field(
        "uniform", description="times of the steps; edm is for EDM teachers"
    )
    batch_size: int = Field(256, gt=0, description="pairs that are integrated at once")
    shard_size: int = Field(1024, gt=0, description="pairs in a file; what a kill costs at most")
    dtype: Literal["uint8", "float16", "bfloat16", "float32"] = Field(
        "float16", description="type of the stored data"
    )
    store_noise: bool = Field(False, description="store the noise too, for readers other than flowdistill")

    def run(self, work: Work) -> Done:
        import time

        from flowdistill.pairstore import PairSpec, PairWriter

        model = work.model()
        calls = nfe(SOLVERS[self.solver], GRIDS[self.schedule](self.steps))
        spec = PairSpec(
            count=self.count,
            shape=model.card.shape,
            classes=model.card.classes,
            shard_size=self.shard_size,
            dtype=self.dtype,
            store_noise=self.store_noise,
            seed=work.seed,
            origin={
                "model": model.digest,
                "solver": self.solver,
                "steps": self.steps,
                "schedule": self.schedule,
            },
        )
        started, made = time.monotonic(), 0
        with PairWriter(work.folder, spec) as writer:
            for shard in writer.missing():
                parts = []
                for part in batches(spec.indices(shard), self.batch_size):
                    work.stop.check()
                    parts.append(self.solve(model, work, part))
                    made += len(part)
                    work.report(Progress(part.stop, self.count, "pair"))
                eps, x0, labels = map(_join, zip(*parts, strict=True))
                assert x0 is not None
                writer.commit(shard, x0, labels, eps if self.store_noise else None)
            files = writer.files()
        seconds = time.monotonic() - started
        figures = {
            "pairs": self.count,
            "nfe": calls,
            "pairs_per_second": made / seconds,
            "seconds": seconds,
        }
        return Done(files, figures)

    def solve(self, model: Model, work: Work, indices: range) -> tuple[Tensor, Tensor, Tensor | None]:
        """eps, x0 [B, *shape] and labels [B] of the pairs `indices`, on the CPU."""
        from flowdistill import randomness

        eps = randomness.noise(work.seed, indices, model.card.shape)
        labels = model.labels(work.seed, indices)
        grid = GRIDS[self.schedule](self.steps)
        x0 = integrate(model.field, eps.to(work.device), grid, SOLVERS[self.solver], labels)
        return eps, x0.cpu(), None if labels is None else labels.cpu()


def _join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    import torch

    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
