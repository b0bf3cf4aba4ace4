"""Where in time a training looked: the times it drew, made again from its seed, and the density it meant."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from flowdistill import randomness
from flowdistill.artifact import Manifest
from flowdistill.timesteps import BINS, Timesteps, times

_STEPS_AT_MOST = 256
_GRID = 2**16
_FINE = 64


def drawn(manifest: Manifest, log: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Density of the times of evenly spaced steps in each stretch, [BINS] of mean 1.

    They are those that the training drew, as long as it skipped no step. None where its stage has no
    timesteps of its own to choose, or others for its last part.
    """
    settings = manifest.settings
    if not _chosen(settings):
        return None
    steps, size = int(str(settings["steps"])), int(str(settings["batch_size"]))
    seed = randomness.key(manifest.seed, manifest.stage)
    seen = range(0, steps, -(-steps // _STEPS_AT_MOST))
    u = torch.cat([randomness.uniforms(seed, "timesteps", step, size) for step in seen])
    return _density(_times(settings, u, log), BINS)


def nominal(manifest: Manifest, log: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(t, density) as the settings have it; of one that is fitted, as the last line of the log has it."""
    u = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
    density = _density(_times(manifest.settings, u, log), _FINE)
    return [((place + 0.5) / _FINE, value) for place, value in enumerate(density)]


def _chosen(settings: Mapping[str, Any]) -> bool:
    return {"timesteps", "steps", "batch_size"} <= settings.keys() and not settings.get("settled")


def _times(settings: Mapping[str, Any], u: Tensor, log: Sequence[Mapping[str, Any]]) -> Tensor:
    rule: Timesteps = TypeAdapter[Timesteps](Timesteps).validate_json(json.dumps(settings["timesteps"]))
    found = next((line["loss_by_t"] for line in reversed(log) if "loss_by_t" in line), [None] * BINS)
    measured = torch.tensor(
        [[loss or 0.0 for loss in found], [float(loss is not None) for loss in found]], dtype=torch.float64
    )
    return times(rule, u, measured)


def _density(t: Tensor, bins: int) -> list[float]:
    return [float(count) * bins / len(t) for count in torch.histc(t, bins, 0.0, 1.0)]
