"""Averages of the weights along a training, and those that are made when it is over.

A running average moves towards the weights by 1 - decay(n) at update n. Its profile, the share that the
weights of each step have in it, is exponential for a constant decay and a power t^gamma for the decay
(1 - 1/n)^(gamma + 1). Power profiles of any width are combinations of kept ones of two widths: Karras et al.
2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2, arXiv 2312.02696), Sec. 3 and
App. C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from flowdistill import artifact
from flowdistill.errors import MissingInput, UsageError
from flowdistill.teachers import Card

if TYPE_CHECKING:
    from flowdistill.optimization import Ema, PostHoc

SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Average:
    """One average: its decay at the 1-based update, and the file that it becomes; power ones become none."""

    decay_at: Callable[[int], float]
    file: str | None = None
    std: float | None = None


def chosen(ema: Ema, post_hoc: PostHoc | None, model: str) -> list[Average]:
    """The averages that a recipe asks for; the first is the one that is shipped, as `model`."""
    stem, suffix = Path(model).stem, Path(model).suffix
    averages = [Average(partial(exponential_decay, ema.decay, ema.ramp), model)]
    averages += [
        Average(partial(exponential_decay, decay, ema.ramp), f"{stem}-ema-{decay}{suffix}")
        for decay in ema.also
    ]
    for std in post_hoc.stds if post_hoc else ():
        averages.append(Average(partial(power_decay, gamma_of(std)), std=std))
    return averages


def exponential_decay(decay: float, ramp: bool, update: int) -> float:
    """A constant decay, which with `ramp` begins as SlimFlow's does: min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + update) / (10 + update)) if ramp else decay


def power_decay(gamma: float, update: int) -> float:
    """EDM2's (1 - 1/n)^(gamma + 1), whose first update takes the weights as they are."""
    return float((1 - 1 / update) ** (gamma + 1))


def gamma_of(std: float) -> float:
    """Exponent of the power profile whose standard deviation is `std` of its length (EDM2, Eq. 126)."""
    squared = std**-2
    return float(np.roots([1, 7, 16 - squared, 12 - squared]).real.max())


def combination(kept: Sequence[tuple[float, float]], step: float, std: float) -> np.ndarray:
    """How much of each kept average (its step, its std) makes the one at `step` with `std`, [n] of sum 1.

    The least-squares fit of the profiles (EDM2, App. C.3) with the sum of all shares kept at 1.
    """
    steps, gammas = zip(*((at, gamma_of(width)) for at, width in kept), strict=True)
    gram = _overlap(steps, gammas, steps, gammas)
    wanted = _overlap(steps, gammas, [step], [gamma_of(std)])[:, 0]
    n = len(kept)
    # Scaled to a unit diagonal, and bordered by the condition on the sum.
    scale = np.diag(gram) ** -0.5
    system = np.block([[gram * np.outer(scale, scale), scale[:, None]], [scale, np.zeros(1)]])
    solved = np.linalg.lstsq(system, np.append(wanted * scale, 1.0), rcond=None)[0]
    shares: np.ndarray = solved[:n] * scale
    return shares


def _overlap(
    steps: Sequence[float], gammas: Sequence[float], others: Sequence[float], their_gammas: Sequence[float]
) -> np.ndarray:
    """Inner products of the profiles (gamma + 1) t^gamma / step^(gamma + 1) on [0, step] (EDM2, Eq. 139)."""
    t_a, g_a = (np.asarray(each, dtype=np.float64)[:, None] for each in (steps, gammas))
    t_b, g_b = (np.asarray(each, dtype=np.float64)[None, :] for each in (others, their_gammas))
    ratio = np.where(t_a < t_b, (t_a / t_b) ** g_b, (t_b / t_a) ** g_a)
    product: np.ndarray = (g_a + 1) * (g_b + 1) * ratio / ((g_a + g_b + 1) * np.maximum(t_a, t_b))
    return product


def snapshot_file(step: int, std: float) -> str:
    """Where the average of width `std` is kept as it is after `step` steps."""
    return f"{SNAPSHOTS}/{step:08d}-{std}.safetensors"


def export(stage: Path, destination: Path, std: float) -> str:
    """Write what `reconstruct` makes as a model file, which must not be there; returns its SHA-256."""
    if destination.exists():
        raise UsageError(f"{destination}: is there already; name a new file, or remove it")
    shipped = stage / "model.safetensors"
    if not shipped.exists():
        raise MissingInput(f"{shipped}: no such model; expected the folder of a training that is done")
    weights = reconstruct(stage, std)
    card = Card.parse(artifact.read_header(shipped), shipped)
    return card.model_copy(update={"figures": {"ema_std": std}}).write(destination, weights)


def reconstruct(stage: Path, std: float) -> dict[str, Tensor]:
    """The weights of `stage`'s training, averaged with the power profile of width `std` at its end.

    Raises `MissingInput` where the stage has kept nothing, and `UsageError` for a width that cannot be made
    of what it has kept.
    """
    kept = {(h["step"], h["std"]): path for path, h in _headers(stage)}
    if not kept:
        raise MissingInput(
            f"{stage / SNAPSHOTS}: no averages are kept there; "
            "train with post_hoc: {every: STEPS} in the recipe to make others afterwards"
        )
    last = max(step for step, _ in kept)
    narrowest = min(width for _, width in kept)
    if not narrowest <= std < 0.25:
        raise UsageError(
            f"--ema {std:g}: of what is kept in {stage / SNAPSHOTS} widths from {narrowest:g} to 0.25 "
            "can be made"
        )
    total: dict[str, Tensor] = {}
    for share, path in zip(combination(list(kept), last, std), kept.values(), strict=True):
        for name, value in artifact.load_tensors(path)[0].items():
            part = value.double() * share if value.is_floating_point() else value
            total[name] = total[name] + part if name in total and value.is_floating_point() else part
    return {name: value.float() if value.is_floating_point() else value for name, value in total.items()}


def _headers(stage: Path) -> Iterator[tuple[Path, dict[str, float]]]:
    for path in sorted((stage / SNAPSHOTS).glob("*.safetensors")):
        yield path, artifact.read_header(path)
