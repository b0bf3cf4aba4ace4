"""What a training leaves to look at while it goes on: the log, trackers, pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowdistill import artifact, pictures, randomness
from flowdistill.errors import UsageError
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate

if TYPE_CHECKING:
    from flowdistill.optimization import Previews
    from flowdistill.teachers import Model

PREVIEWS = "previews"
_NO_MEANS = ("step", "lr", "loss_by_t")


class Log:
    """`log.jsonl`: one line for each window, without times, so that equal runs write equal bytes."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines = [line for line in lines if _step_of(line) <= step]

    def add(self, step: int, figures: Mapping[str, Any]) -> None:
        self.lines.append(json.dumps({"step": step, **figures}))

    def figures(self) -> dict[str, float]:
        """The means of the last window."""
        shown = json.loads(self.lines[-1]) if self.lines else {}
        return {name: value for name, value in shown.items() if name not in _NO_MEANS}

    def save(self) -> None:
        artifact.atomic_write(self.path, "".join(f"{line}\n" for line in self.lines).encode())


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def check_drawable(student: Model, stage: str) -> None:
    """Raise `UsageError` where no picture can be made of what a model makes."""
    shape = student.card.shape
    if not pictures.drawable(shape) or (student.card.latent is not None and student.card.latent.vae):
        raise UsageError(
            f"{stage}.previews: nothing can be drawn of samples of shape {list(shape)}; "
            "expected images of 1 or 3 channels, or points in the plane"
        )


@torch.no_grad()
def preview(
    student: Model, network: nn.Module, weights: dict[str, Tensor], settings: Previews, seed: int
) -> bytes:
    """PNG of what `network` makes with `weights` of the noises of all previews, a row for each NFE."""
    device = next(iter(weights.values())).device
    eps = randomness.noise(randomness.key(seed, "previews"), range(settings.count), student.card.shape)
    classes = student.card.classes
    labels = torch.arange(settings.count, device=device) % classes if classes else None

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        velocity: Tensor = torch.func.functional_call(network, weights, (x, t, labels))
        return velocity

    training = network.training
    network.eval()
    rows = []
    for nfe in settings.nfe:
        x = integrate(field, eps.to(device), uniform(nfe), SOLVERS["euler"], labels)
        shown = student.pixels(x)
        assert shown is not None
        rows.append((f"{nfe} NFE", shown))
    network.train(training)
    return pictures.labelled_rows(rows)
