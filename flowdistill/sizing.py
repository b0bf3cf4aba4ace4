"""How large networks are, and how small they can be made: parameters, multiply-adds, latency.

A network is made smaller within its family: fewer channels everywhere, fewer blocks a level. Sizes are
counted on torch's meta device, where nothing is computed; latency is measured.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowdistill import networks
from flowdistill.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from flowdistill.architectures import Budget
    from flowdistill.teachers import Model

_RUNS_LEAST, _RUNS_SECONDS = 3, 0.5
"""A latency is the median of so many runs, and of as many as there is time for."""
_EIGHTHS = 8
"""Widths that are tried, in eighths of the family's own."""


@dataclass(frozen=True)
class Family:
    """Names of the arguments that make a network wide and deep, and what its width is a multiple of."""

    width: str
    depth: str
    multiple: int
    along: str = ""
    """An argument that keeps its ratio to the width."""


FAMILIES: Mapping[str, Family] = {
    "unet": Family("channels", "blocks", 8, along="embedding"),
    "mlp": Family("width", "depth", 8),
    "songunet": Family("model_channels", "num_blocks", 16),
    "dhariwalunet": Family("model_channels", "num_blocks", 32),
    "ncsnpp": Family("nf", "num_res_blocks", 16),
    "admunet": Family("model_channels", "num_res_blocks", 32),
    "dit": Family("hidden_size", "depth", 64, along="num_heads"),
}
"""By architecture."""


@dataclass(frozen=True)
class Size:
    """A network of a family and what it costs; `latency_ms` where it was measured."""

    arguments: Mapping[str, Any]
    parameters: int
    macs: int
    """Multiply-adds of one evaluation for one sample: convolutions, linear maps and attention."""
    latency_ms: float | None = None


def size_of(architecture: str, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> Size:
    """Count parameters and multiply-adds for samples of `shape`; ArtifactError where that cannot be."""
    with torch.device("meta"):
        network = networks.build(architecture, arguments).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.empty(1, *shape), torch.empty(1), torch.zeros(1, dtype=torch.int64))
    parameters = sum(each.numel() for each in network.parameters())
    return Size(dict(arguments), parameters, counter.get_total_flops() // 2)


def latency_ms(network: nn.Module, shape: tuple[int, ...], batch: int, device: str) -> float:
    """Median time of one evaluation for `batch` samples, by the host's clock."""
    network = network.to(device).eval()
    x, t = torch.zeros(batch, *shape, device=device), torch.full((batch,), 0.5, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    runs: list[float] = []
    with torch.inference_mode():
        while len(runs) <= _RUNS_LEAST or sum(runs) < _RUNS_SECONDS:
            started = time.perf_counter()
            network(x, t, labels).cpu()  # the copy waits for the device
            runs.append(time.perf_counter() - started)
    return 1000 * statistics.median(runs[1:])  # the first warms up


def evaluations_per_second(model: Model, batch: int) -> float:
    """Velocities of single samples that a model evaluates in batches of this size."""
    milliseconds = latency_ms(model.network, model.card.shape, batch, model.device) * model.passes
    return 1000 * batch / milliseconds


def scaled(
    architecture: str, arguments: Mapping[str, Any], width: float, depth: int | None
) -> dict[str, Any]:
    """The arguments of a network of a family with `width` times the channels, `depth` blocks or as many."""
    family = FAMILIES[architecture]
    channels = networks.argument(architecture, arguments, family.width)
    fitting = max(family.multiple, family.multiple * round(width * channels / family.multiple))
    wide = channels if width == 1 else min(channels, fitting)
    changes = {family.width: wide}
    if depth is not None:
        changes[family.depth] = depth
    if family.along:
        before = networks.argument(architecture, arguments, family.along)
        changes[family.along] = max(1, round(before * wide / channels))
    return {**arguments, **changes}


def fitting(
    architecture: str, arguments: Mapping[str, Any], shape: tuple[int, ...], width: float, depth: int | None
) -> dict[str, Any]:
    """The arguments that `scaled` makes or, where they fit no network, those of the nearest width that do."""
    family = FAMILIES[architecture]
    channels = networks.argument(architecture, arguments, family.width)
    shares = [n * family.multiple / channels for n in range(1, channels // family.multiple + 1)]
    for share in [width, *sorted(shares, key=lambda share: abs(share - width)), 1.0]:
        found = scaled(architecture, arguments, share, depth)
        if any(_possible(architecture, found, shape)):
            break
    return found


def candidates(architecture: str, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> list[Size]:
    """Networks of the family that are no larger, smallest first; of equal ones the shallower."""
    return list(_candidates(architecture, json.dumps(dict(arguments)), tuple(shape)))


@lru_cache(maxsize=8)  # large families take their seconds, and are asked for more than once
def _candidates(architecture: str, described: str, shape: tuple[int, ...]) -> tuple[Size, ...]:
    family, arguments = FAMILIES[architecture], json.loads(described)
    deepest = networks.argument(architecture, arguments, family.depth)
    tried = (
        scaled(architecture, arguments, eighths / _EIGHTHS, depth)
        for depth in range(1, deepest + 1)
        for eighths in range(1, _EIGHTHS + 1)
    )
    different = {(each[family.width], each[family.depth]): each for each in tried}
    found = [size for each in different.values() for size in _possible(architecture, each, shape)]
    return tuple(sorted(found, key=lambda size: (size.parameters, size.macs)))


def _possible(architecture: str, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> Iterator[Size]:
    try:
        yield size_of(architecture, arguments, shape)
    except ArtifactError:  # heads or groups that do not divide such a width
        return


def choose(
    architecture: str, arguments: Mapping[str, Any], shape: tuple[int, ...], budget: Budget, device: str
) -> Size:
    """The largest network of the family within a budget; UsageError where none is."""
    found = candidates(architecture, arguments, shape)
    within = [size for size in found if budget.allows(size.parameters, size.macs)]
    for size in reversed(within):
        if budget.latency_ms is None:
            return size
        network = networks.build(architecture, size.arguments)
        measured = latency_ms(network, shape, budget.batch, device)
        if measured <= budget.latency_ms:
            return replace(size, latency_ms=measured)
    least = found[0]
    raise UsageError(
        f"student: no '{architecture}' keeps to {budget}; the smallest that was tried has "
        f"{least.parameters:,} parameters and {least.macs:,} multiply-adds"
    )


def sliced(student: nn.Module, teacher: Mapping[str, Tensor]) -> int:
    """Give a student the leading entries of the teacher's weights of the same name; returns how many it took.

    A warm start, and no more: what a narrower network makes of them is not what the teacher makes.
    """
    taken = 0
    with torch.no_grad():
        for name, value in student.state_dict().items():
            source = teacher.get(name)
            if source is None or source.ndim != value.ndim:
                continue
            if all(mine <= theirs for mine, theirs in zip(value.shape, source.shape, strict=True)):
                value.copy_(source[tuple(slice(side) for side in value.shape)])
                taken += 1
    return taken
