"""How far a number has moved, how sure that is, and what may be said of it.

Pure statistics. A figure of an evaluation is the mean of `values` [n], one of each noise. That of a
metric that is a mean, such as the endpoint error, needs no words. Of one that is not (a Fréchet
distance, a quantile) they are the metric's value plus each sample's influence on it, whose mean is 0:
var(influence) / n is the metric's variance to first order, as a jackknife finds it (Efron 1982).

Two evaluations that share their noises are compared by the differences of their values. For metrics
with an influence that is the limit of a bootstrap which draws the same indices for both. Such a
bootstrap has the same variance, but it is centred wrongly: a Fréchet distance of n samples exceeds
its limit by about b / n, and one of n samples drawn from n samples exceeds that by b / n again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from flowdistill import randomness

NORMAL_FROM = 2000
"""From this many values on a mean counts as normal, as in `metrics.mean_interval`."""
LEVEL = 0.025
"""Error of either end of the intervals that are shown: they hold 95 %."""
_POWER = 0.8
"""Chance of a verdict that the sample counts given for it would have."""
_RESAMPLES = 10_000
_LEAST = 5 / _RESAMPLES
"""Share of resamples that bounds are still read from."""
_DRAWN_AT_ONCE = 2**22
NORMAL = NormalDist()


@dataclass(frozen=True, eq=False)
class Change(ABC):
    """A number, and bounds that it lies above or below, each wrong with a chance `alpha`."""

    value: float
    n: int
    method: str
    paired: bool

    @abstractmethod
    def low(self, alpha: float) -> float:
        """The number is above this."""

    @abstractmethod
    def high(self, alpha: float) -> float:
        """The number is below this."""

    @abstractmethod
    def p_above(self, margin: float) -> float:
        """Chance of such a value or a greater one, were the number no more than `margin`."""

    @abstractmethod
    def reversed(self) -> Change:
        """The number with the other sign."""

    def needed(self, margin: float, alpha: float) -> int | None:
        """Samples that would tell it from `margin` with a chance of 80 %; None where that cannot be said.

        For a true value as it was measured, and normal errors: ((z_alpha + z_power) s / (value - margin))^2,
        s being the deviation of one sample.
        """
        gap, error = abs(self.value - margin), (self.high(LEVEL) - self.low(LEVEL)) / (2 * _z(LEVEL))
        if not self.n or gap < 1e-3 * error:
            return None
        return math.ceil(self.n * ((_z(alpha) + _z(1 - _POWER)) * error / gap) ** 2)


@dataclass(frozen=True, eq=False)
class Normal(Change):
    """A number with its standard errors, which may differ to either side."""

    below: float
    above: float

    def low(self, alpha: float) -> float:
        return self.value - _z(alpha) * self.below

    def high(self, alpha: float) -> float:
        return self.value + _z(alpha) * self.above

    def p_above(self, margin: float) -> float:
        if self.below == 0.0:
            return float(self.value <= margin)
        return NORMAL.cdf((margin - self.value) / self.below)

    def reversed(self) -> Normal:
        return replace(self, value=-self.value, below=self.above, above=self.below)


@dataclass(frozen=True, eq=False)
class Resampled(Change):
    """The mean of terms [n], by its bias-corrected and accelerated bootstrap (BCa; Efron 1987).

    Levels are widened by Student's t and the bootstrap's divisor n, as in Hesterberg's expanded
    interval (The American Statistician 69, 2015): a plain one of few samples is too narrow.
    """

    terms: Tensor

    def low(self, alpha: float) -> float:
        return self._bound(-_z(alpha))

    def high(self, alpha: float) -> float:
        return self._bound(_z(alpha))

    def p_above(self, margin: float) -> float:
        bias, acceleration = self._shape
        share = float((self._means <= margin + self._rounding).double().mean())
        w = NORMAL.inv_cdf(min(max(share, 0.5 / _RESAMPLES), 1 - 0.5 / _RESAMPLES)) - bias
        return NORMAL.cdf(_narrowed(w / (1 + acceleration * w) - bias, self.n))

    def reversed(self) -> Resampled:
        return replace(self, value=-self.value, terms=-self.terms)

    def _bound(self, z: float) -> float:
        bias, acceleration = self._shape
        wide = _widened(z, self.n)
        share = NORMAL.cdf(bias + (bias + wide) / max(0.1, 1 - acceleration * (bias + wide)))
        end = float(torch.quantile(self._means, min(max(share, _LEAST), 1 - _LEAST)))
        end += math.copysign(self._rounding, z)
        if _LEAST <= share <= 1 - _LEAST:
            return end
        # Further out than the resamples reach.
        normal = self.value + wide * float(self.terms.std(correction=0)) / math.sqrt(self.n)
        return max(normal, end) if z > 0 else min(normal, end)

    @cached_property
    def _means(self) -> Tensor:
        """Means of resamples, [_RESAMPLES], float64."""
        return _resampling(self.n) @ self.terms / self.n

    @property
    def _rounding(self) -> float:
        """Means that differ by less are equal: terms of few different values have many such."""
        return 1e-9 * float(self.terms.abs().max())

    @cached_property
    def _shape(self) -> tuple[float, float]:
        """Bias, and acceleration, of the distribution of the mean."""
        centred = self.terms - self.value
        apart = self._means - self.value
        below = float((apart < -self._rounding).double().mean())
        below = (below + float((apart <= self._rounding).double().mean())) / 2  # of what is equal one half
        bias = NORMAL.inv_cdf(min(max(below, 1 / _RESAMPLES), 1 - 1 / _RESAMPLES))
        return bias, float((centred**3).sum() / (6 * (centred**2).sum() ** 1.5))


@dataclass(frozen=True, eq=False)
class Shares(Change):
    """How much more often something is so: in `more` of n pairs of the second only, in `fewer` of the first.

    Bounds are those of the score test (Tango, Statistics in Medicine 17, 1998): they hold, too, where hardly
    any pair differs, or none. In units of `scale`, a share.
    """

    more: int
    fewer: int
    scale: float = 1.0

    def low(self, alpha: float) -> float:
        return self._where(_z(alpha))

    def high(self, alpha: float) -> float:
        return self._where(-_z(alpha))

    def p_above(self, margin: float) -> float:
        return NORMAL.cdf(-self._score(margin * self.scale))

    def reversed(self) -> Shares:
        return replace(self, value=-self.value, more=self.fewer, fewer=self.more)

    def _score(self, difference: float) -> float:
        """Deviations that were found beyond a true difference, whose other parameter is the likeliest."""
        n, more, fewer = self.n, self.more, self.fewer
        b = (2 * n - more + fewer) * difference - more - fewer
        c = -fewer * difference * (1 - difference)
        likeliest = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * likeliest + difference * (1 - difference))
        excess = more - fewer - n * difference
        if variance <= 0:
            return math.copysign(math.inf, excess) if excess else 0.0
        return excess / math.sqrt(variance)

    def _where(self, score: float) -> float:
        """The difference of this score, which falls with the difference."""
        least, most = -1.0, 1.0
        for _ in range(60):
            middle = (least + most) / 2
            least, most = (middle, most) if self._score(middle) > score else (least, middle)
        return (least + most) / 2 / self.scale


def mean_change(terms: Tensor) -> Change:
    """The mean of terms [n], float64: bootstrapped below n = 2,000, and normal above."""
    n, value = len(terms), float(terms.mean())
    spread = float(terms.std()) if n > 1 else math.inf
    if spread <= 1e-14 * abs(value):
        return Normal(value, n, "paired, all equal", True, 0.0, 0.0)
    if 1 < n < NORMAL_FROM:
        return Resampled(value, n, "paired bootstrap (BCa)", True, terms)
    error = spread / math.sqrt(n)
    return Normal(value, n, "paired, normal", True, error, error)


def paired_change(a: Tensor, b: Tensor, relative: bool) -> Change:
    """Mean of b less that of a, for values [n] of the same noises; `relative` as a share of a's.

    The share is E[b] / E[a] - 1, linearised around the ratio: its term of a sample is
    (b - ratio a) / E[a] more than the share itself.
    """
    a, b = a.double(), b.double()
    if _is_share(a) and _is_share(b):
        more, fewer, unit = int((b > a).sum()), int((b < a).sum()), float(a.mean()) if relative else 1.0
        value = (more - fewer) / len(a) / unit
        return Shares(value, len(a), "paired, score test", True, more, fewer, unit)
    if not relative:
        return mean_change(b - a)
    scale = a.mean()
    ratio = b.mean() / scale
    return mean_change(ratio - 1 + (b - ratio * a) / scale)


def _is_share(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def unpaired_change(a: Change, b: Change, relative: bool) -> Normal:
    """b less a for two numbers of which nothing is known but their errors; `relative` as a share of a's."""
    scale = a.value if relative else 1.0
    ratio = b.value / scale if relative else 1.0
    below, above = (
        math.hypot(*(each / scale for each in errors))
        for errors in ((_below(b), ratio * _above(a)), (_above(b), ratio * _below(a)))
    )
    value = ratio - 1 if relative else b.value - a.value
    return Normal(value, min(a.n, b.n), "unpaired", False, below, above)


def _below(change: Change) -> float:
    return (change.value - change.low(LEVEL)) / _z(LEVEL)


def _above(change: Change) -> float:
    return (change.high(LEVEL) - change.value) / _z(LEVEL)


def quantile_values(values: Tensor, level: float) -> Tensor:
    """The quantile of values [n] and each sample's influence on it, [n], as a sum.

    The influence is (level - [x <= q]) / f(q); 1 / f(q) is the slope of the quantiles between those of
    levels a bandwidth apart (Siddiqui 1960), which is Hall and Sheather's (1988).
    """
    values, n = values.double(), len(values)
    z = NORMAL.inv_cdf(level)
    width = n ** (-1 / 3) * _z(LEVEL) ** (2 / 3) * (1.5 * NORMAL.pdf(z) ** 2 / (2 * z * z + 1)) ** (1 / 3)
    width = min(width, 0.9 * level, 0.9 * (1 - level))
    wanted = torch.tensor([level - width, level, level + width], dtype=torch.float64)
    low, quantile, high = values.quantile(wanted)
    influence = (level - (values <= quantile).double()) * (high - low) / (2 * width)
    around: Tensor = quantile + influence - influence.mean()
    return around


# --- p-values and verdicts ------------------------------------------------------------------------


def sign_flip_p(a: Tensor, b: Tensor) -> float:
    """Two-sided p-value of values [n] of the same noises, were a and b exchangeable in each.

    The permutation test for pairs: the sign of each difference is flipped or not, 10,000 times. From
    2,000 pairs on the flipped means are normal with variance sum (b - a)^2 / n^2.
    """
    differences = b.double() - a.double()
    n, mean = len(differences), abs(float(differences.mean()))
    if mean == 0.0:
        return 1.0
    if n >= NORMAL_FROM:
        return 2 * NORMAL.cdf(-mean * n / float(differences.square().sum().sqrt()))
    generator = randomness.generator(0, "sign flips", n)
    rows, beyond = max(1, _DRAWN_AT_ONCE // n), 0
    for start in range(0, _RESAMPLES, rows):
        size = (min(rows, _RESAMPLES - start), n)
        signs = 2.0 * torch.randint(2, size, generator=generator).double() - 1.0
        beyond += int(((signs @ differences).abs() >= mean * n * (1 - 1e-12)).sum())
    return (1 + beyond) / (1 + _RESAMPLES)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold for all of them together (Holm 1979), in the same order."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def verdict(change: Change, better: int, margin: float) -> str:
    """`better`, `worse`, `equivalent` or `inconclusive`, by the 95 % interval; `better` is -1 if less is.

    Equivalence is two one-sided tests (TOST; Schuirmann 1987): the whole interval lies within the
    margin. Better and worse are more than the margin, too, not merely a difference.
    """
    low, high = change.low(LEVEL), change.high(LEVEL)
    if low > margin or high < -margin:
        return "better" if (low > margin) == (better > 0) else "worse"
    return "equivalent" if -margin <= low and high <= margin else "inconclusive"


# --- distributions --------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _resampling(n: int) -> Tensor:
    """How often each of n samples is drawn, [_RESAMPLES, n] float64; the same draws every time.

    A product with it makes all means at once: gates that are rehearsed need them thousands of times.
    """
    generator = randomness.generator(0, "resampling", n)
    counts = torch.zeros(_RESAMPLES, n, dtype=torch.float64)
    rows = max(1, _DRAWN_AT_ONCE // n)
    for start in range(0, _RESAMPLES, rows):
        part = counts[start : start + rows]
        drawn = torch.randint(n, (len(part), n), generator=generator)
        part.scatter_add_(1, drawn, counts.new_ones(1, 1).expand_as(drawn))
    return counts


def _z(alpha: float) -> float:
    """Deviations above the middle beyond which lies `alpha` of a normal distribution."""
    return -NORMAL.inv_cdf(alpha)


def _widened(z: float, n: int) -> float:
    """Student's t, of n - 1 degrees, of the same level as z, times sqrt(n / (n - 1)); by Wallace (1959)."""
    degrees = n - 1
    stretched = z * (8 * degrees + 3) / (8 * degrees + 1)
    t = math.copysign(math.sqrt(degrees * math.expm1(stretched**2 / degrees)), z)
    return t * math.sqrt(n / degrees)


def _narrowed(t: float, n: int) -> float:
    """The z of which `_widened` makes t."""
    degrees = n - 1
    bare = abs(t) * math.sqrt(degrees / n)
    z = (8 * degrees + 1) / (8 * degrees + 3) * math.sqrt(degrees * math.log1p(bare**2 / degrees))
    return math.copysign(z, t)
