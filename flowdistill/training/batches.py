"""What a loss is shown: the part of a process in the batch of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from flowdistill.errors import UsageError
from flowdistill.sources import Draws, Source
from flowdistill.timesteps import BINS, times

if TYPE_CHECKING:
    from flowdistill.objectives import Distance
    from flowdistill.stages import Training
    from flowdistill.teachers import Card
    from flowdistill.timesteps import Timesteps
    from flowdistill.training.state import State
    from flowdistill.work import Work

    Parts: TypeAlias = Callable[[State], Iterator["Batch"]]
    """The part of this process in the batch of a state's next step, itself in parts."""


def nothing_measured() -> Tensor:
    """Sum and number of losses by t, [2, BINS] float64, before there are any."""
    return torch.zeros(2, BINS, dtype=torch.float64)


@dataclass(frozen=True)
class Batch:
    """What a loss sees: data x0 and noise eps [B, *shape], labels [B] or None, fresh random numbers."""

    x0: Tensor
    eps: Tensor
    labels: Tensor | None
    null: int
    """The label that stands for none."""
    draw: Draws
    progress: float
    """Share of the training that is done, in [0, 1)."""
    perceptual: Distance | None = None
    equipment: Any = None
    """What the stage has opened for its loss."""
    measured: Tensor | None = None
    """What is known of the loss by t, as `timesteps.sorted_by_time` has it; None at first."""

    def times(self, timesteps: Timesteps) -> Tensor:
        """t [B], drawn from a density."""
        measured = nothing_measured() if self.measured is None else self.measured
        return times(timesteps, self.draw.uniform("timesteps"), measured).to(self.x0)

    def some_labels(self, dropout: float) -> Tensor | None:
        """The labels, a share of which is replaced by the one that stands for none."""
        if self.labels is None or not dropout:
            return self.labels
        withheld = self.draw.uniform("label dropout") < dropout
        return self.labels.masked_fill(withheld.to(self.labels.device), self.null)


def parts(
    stage: Training,
    work: Work,
    source: Source,
    card: Card,
    perceptual: Distance | None,
    accelerator: Any,
) -> Parts:
    """The batches of a training, as functions of its state; UsageError where one cannot be divided."""
    world, rank, pieces = accelerator.num_processes, accelerator.process_index, stage.accumulate
    if stage.batch_size % (world * pieces):
        accumulated = f" with accumulate {pieces}" if pieces > 1 else ""
        raise UsageError(
            f"{work.stage}.batch_size: {stage.batch_size} does not divide by {world} processes{accumulated}"
        )
    size, equipment = stage.batch_size // (world * pieces), stage.equipment(work)

    def batch(state: State, piece: int) -> Batch:
        start = (rank * pieces + piece) * size
        draw = Draws(work.seed, state.draws, slice(start, start + size), stage.batch_size, accelerator.device)
        x0, eps, labels = source.batch(draw)
        return Batch(
            x0.to(draw.device),
            eps.to(draw.device),
            None if labels is None else labels.to(draw.device),
            card.null,
            draw,
            state.step / stage.steps,
            perceptual,
            equipment,
            state.measured,
        )

    return lambda state: (batch(state, piece) for piece in range(pieces))
