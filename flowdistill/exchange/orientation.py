"""Which of two arrays is the noise: the one whose numbers are distributed as N(0, 1).

Nothing fails when noise and data are exchanged, or the noise is scaled by a largest sigma: the student only
learns something else. So the claim is checked, by the Kolmogorov-Smirnov distance sup |F_n - Phi| of numbers
from pairs that are spread over the set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowdistill.errors import UsageError
from flowdistill.exchange.sources import Source, batches, damaged

_NUMBERS = 1_000_000
_PAIRS_AT_LEAST = 16
_NORMAL = 0.05
"""Distances below it count as normal; Gaussian noise of variance 0.66 or 1.52 has it."""
_CHANCE = 1.95
"""Over sqrt(n): the distance that n normal numbers exceed once in a thousand times."""


@dataclass(frozen=True)
class Look:
    """How numbers are distributed."""

    numbers: int
    distance: float
    variance: float

    @property
    def normal(self) -> bool:
        return self.distance < max(_NORMAL, _CHANCE / math.sqrt(self.numbers))

    def __str__(self) -> str:
        return f"KS distance {self.distance:.3g}, variance {self.variance:.3g}"


def look(values: Tensor) -> Look:
    """Compare finite numbers [n] with N(0, 1)."""
    ordered = values.double().sort().values
    below = torch.special.ndtr(ordered)
    ranks = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    distance = torch.maximum(ranks[1:] - below, below - ranks[:-1]).max()
    return Look(len(ordered), float(distance), float(ordered.var(correction=0)))


def check(source: Source, *, swap: bool, force: bool) -> tuple[float, list[str]]:
    """The distance of the noise from N(0, 1), and what is to be said about it.

    `swap` says whether noise and data of this source were exchanged already.

    Raises:
        UsageError: the noise is not normal, and `force` was not given.
        ArtifactError: there are numbers that are not finite.
    """
    eps, x0 = _numbers(source)
    noise, data = look(eps), look(x0)
    if noise.normal:
        both = (
            f"the data look like N(0, 1) too ({data}): that noise and data are not exchanged is not checked"
        )
        return noise.distance, [both] if data.normal else []
    if force:
        return noise.distance, [f"the noise is not N(0, 1): {noise}; it was taken as it is"]
    if data.normal:
        raise UsageError(
            f"{source.path}: the two look swapped: the noise has {noise}; "
            f"the data have {data}, as N(0, 1) has\n"
            f"{'leave out' if swap else 'pass'} --swap"
        )
    raise UsageError(
        f"{source.path}: neither of the two is N(0, 1): the noise has {noise}; the data have {data}\n"
        f"expected noise with a distance below {_NORMAL} and variance 1; --force takes it as it is"
    )


def _numbers(source: Source) -> tuple[Tensor, Tensor]:
    """Noise and data of pairs that are spread over the set, up to about a million numbers of each."""
    each = math.prod(source.shape)
    count = min(source.count, max(_PAIRS_AT_LEAST, _NUMBERS // each))
    rows = torch.linspace(0, source.count - 1, count, dtype=torch.float64).round().long().tolist()
    step = -(-len(rows) * each // _NUMBERS) | 1  # odd, so as not to see the same column of every row only
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for part in batches(rows, source.shape):
        block = source.read(part)
        for kept, values in zip(found, (block.eps, block.x0), strict=True):
            kept.append(values.flatten(1)[:, ::step].flatten().clone())
    eps, x0 = map(torch.cat, found)
    for name, values in (("noise", eps), ("data", x0)):
        if not values.isfinite().all():
            raise damaged(source.path, f"the {name} holds values that are not finite")
    return eps, x0
