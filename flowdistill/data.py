"""Data sets that need no download: drawn shapes (unlimited) and handwritten digits (1,797).

`SHAPES` draws anti-aliased figures from signed distances. Only +, -, *, /, sqrt, min and max are used,
which IEEE 754 fixes to the last bit: image i is the same bits in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import Protocol

import torch
from torch import Tensor

from flowdistill.errors import UsageError, unknown


class Dataset(Protocol):
    """Labelled samples by number; sample i depends on (seed, i) alone, never on the batch around it."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample's shape, e.g. (3, 16, 16)."""
        ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def count(self) -> int | None:
        """Number of samples; None where they never end."""
        ...

    @property
    def training(self) -> Dataset:
        """The part that a classifier may learn from when `held_out` judges it."""
        ...

    @property
    def held_out(self) -> Dataset:
        """The part that shares no sample with `training`."""
        ...

    def batch(self, indices: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Samples [B, *shape] float32 in [-1, 1] and labels [B] int64 for indices [B] int64."""
        ...


def dataset(name: str) -> Dataset:
    """The data set called `name`. Raises `UsageError` for a name that is not known."""
    if name not in DATASETS:
        raise UsageError(unknown("data set", name, DATASETS))
    return DATASETS[name]


# --- keyed uniforms -----------------------------------------------------------------------------------


def _signed(value: int) -> int:
    """The integer modulo 2**64 as torch's int64 holds it."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right (`>>` on int64 copies the sign bit)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): int64 -> well mixed int64."""
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def counter_uniforms(seed: int, indices: Tensor, count: int) -> Tensor:
    """Uniforms [B, count] float32 in [0, 1), row b a function of (seed, indices[b]) alone.

    A hash of the counters instead of a generator a sample, which would take longer than the drawing.
    """
    start = _mix(torch.tensor(_signed(seed)) + _GOLDEN)
    rows = _mix(indices.to("cpu", torch.int64) * _GOLDEN + start)
    columns = torch.arange(1, count + 1) * _GOLDEN
    return _shift(_mix(rows[:, None] + columns), 40).float() / 2**24


# --- shapes: signed distances in units of the figure's radius, y downwards ------------------------------


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return _length(x, y) - 0.95


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_length(x, y) - 0.75).abs() - 0.23


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.8, 0.8)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slanted = x.abs() * 0.8660254 - y * 0.5
    return torch.maximum(slanted, y) - 0.58


def _plus(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.33), _box(x, y, 0.33, 1.0))


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: fold the plane into one half of one point, then the distance to that edge's line."""
    cos36, sin36 = 0.80901699, 0.58778525
    x, y = x.abs(), -y
    for side in (1.0, -1.0):
        beyond = 2.0 * (side * cos36 * x - sin36 * y).clamp(min=0.0)
        x, y = x - beyond * side * cos36, y + beyond * sin36
    tip, valley = 1.12, 0.52
    edge_x, edge_y = valley * sin36, valley * cos36 - tip
    edge_length = math.sqrt(edge_x * edge_x + edge_y * edge_y)
    return ((y - tip) * edge_x - x.abs() * edge_y) / edge_length


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    bite = 0.78 - _length(x - 0.48, y + 0.16)
    return torch.maximum(_length(x, y) - 1.0, bite)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Two half discs on the sides of a square that stands on its corner."""
    scale = 0.6
    x, y = x.abs() * scale, 0.52 - y * scale
    lobe = _length(x - 0.25, y - 0.75) - 0.35355339
    middle = (x + y).clamp(min=0.0) * 0.5
    inner = torch.minimum(_length(x, y - 1.0), _length(x - middle, y - middle))
    inner = torch.where(x > y, inner, -inner)
    return torch.where(x + y > 1.0, lobe, inner) / scale


_FIGURES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _disc, _ring, _square, _triangle, _plus, _star, _crescent, _heart,
)  # fmt: skip


def _channels(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """HSV in [0, 1] -> RGB [B, 3, 1, 1] in [0, 1], piecewise linear in the hue."""
    thirds = torch.tensor([0.0, 2.0 / 3.0, 1.0 / 3.0])
    distance = ((hue[:, None] + thirds) % 1.0 - 0.5).abs() * 6.0
    pure = (distance - 1.0).clamp(0.0, 1.0)
    return (value[:, None] * (1.0 - saturation[:, None] * (1.0 - pure)))[:, :, None, None]


@dataclass(frozen=True)
class Shapes:
    """One saturated figure on a dark muted ground, 16x16 RGB, eight classes, without end.

    Centre, radius (4.6 to 6.2 px), tilt (up to 16 degrees), both hues and the ground's darkness vary.
    """

    name: str = "shapes"
    size: int = 16
    stream: int = 0
    """Separates `held_out` from the rest: the two never share a draw."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(figure.__name__.removeprefix("_") for figure in _FIGURES)

    @property
    def count(self) -> int | None:
        return None

    @property
    def training(self) -> Dataset:
        return self

    @property
    def held_out(self) -> Dataset:
        return replace(self, stream=1)

    def batch(self, indices: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """See `Dataset.batch`; indices may be any int64."""
        draws = counter_uniforms(2 * seed + self.stream, indices, 9).unbind(1)
        labels = (draws[0] * len(_FIGURES)).long()
        coverage = self._coverage(labels, *draws[1:5])
        full = torch.ones_like(draws[5])
        figure = _channels(draws[5], full * 0.78, full)
        ground = _channels(draws[6], 0.25 + 0.3 * draws[7], 0.12 + 0.16 * draws[8])
        return (ground + coverage * (figure - ground)) * 2.0 - 1.0, labels

    def _coverage(self, labels: Tensor, dx: Tensor, dy: Tensor, grow: Tensor, tilt: Tensor) -> Tensor:
        """Share of each pixel inside the figure, [B, 1, H, W] in [0, 1], from uniforms [B]."""
        unit = self.size / 16
        radius = (4.6 + 1.6 * grow)[:, None, None] * unit
        # The half angle's tangent gives cosine and sine by division alone.
        tangent = (0.28 * tilt - 0.14)[:, None, None]
        stretch = 1.0 + tangent * tangent
        cosine, sine = (1.0 - tangent * tangent) / stretch, 2.0 * tangent / stretch
        pixels = torch.arange(self.size) + 0.5 - self.size / 2
        x = pixels[None, None, :] - (3.0 * dx - 1.5)[:, None, None] * unit
        y = pixels[None, :, None] - (3.0 * dy - 1.5)[:, None, None] * unit
        x, y = (cosine * x + sine * y) / radius, (cosine * y - sine * x) / radius
        distance = torch.empty_like(x)
        for label, figure in enumerate(_FIGURES):
            rows = (labels == label).nonzero()[:, 0]
            distance[rows] = figure(x[rows], y[rows])
        return (0.5 - distance * radius).clamp(0.0, 1.0)[:, None]


# --- digits -------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _digit_rows() -> tuple[Tensor, Tensor]:
    from safetensors.torch import load

    content = resources.files("flowdistill").joinpath("assets/digits-data.safetensors").read_bytes()
    tensors = load(content)
    return tensors["images"], tensors["labels"].long()


@lru_cache(maxsize=1)
def _every_fifth() -> Tensor:
    """True [1797] at every fifth image of each digit; the file's order runs through the digits in turn."""
    same = torch.nn.functional.one_hot(_digit_rows()[1])
    return (same.cumsum(0) * same).sum(1) % 5 == 0


@dataclass(frozen=True)
class Digits:
    """The 1,797 8x8 grey digits of scikit-learn (UCI optical digits, CC BY 4.0), ten classes."""

    name: str = "digits"
    part: str = "all"
    """"all", "held-out" (every fifth image of each digit) or "training" (the others)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 8, 8)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("0123456789")

    @property
    def count(self) -> int | None:
        return len(self._rows())

    @property
    def training(self) -> Dataset:
        return replace(self, part="training")

    @property
    def held_out(self) -> Dataset:
        return replace(self, part="held-out")

    def _rows(self) -> Tensor:
        fifth = _every_fifth()
        chosen = {"all": fifth | ~fifth, "training": ~fifth, "held-out": fifth}[self.part]
        return chosen.nonzero()[:, 0]

    def batch(self, indices: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """See `Dataset.batch`; indices count modulo `count`. Nothing is drawn, so `seed` is not used."""
        images, labels = _digit_rows()
        rows = self._rows()
        chosen = rows[indices.to("cpu", torch.int64) % len(rows)]
        return images[chosen][:, None].float() / 8.0 - 1.0, labels[chosen]


SHAPES = Shapes()
DIGITS = Digits()
DATASETS: dict[str, Dataset] = {entry.name: entry for entry in (SHAPES, DIGITS)}
