"""What is measured, and how sure it is: every figure is a value with its 95 % interval.

Pure mathematics on tensors; features and samples are made elsewhere. Arithmetic is float64, since
the Fréchet distance is a small difference of large traces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowdistill import randomness

NORMAL_95 = 1.959963984540054
"""Standard deviations either side that hold 95 % of a normal distribution."""
_RESAMPLES = 4000
_NORMAL_FROM = 2000
"""From this many values on, the mean counts as normal and is not bootstrapped."""
_DRAWN_AT_ONCE = 2**22
_PSNR_AT_MOST = 100.0
"""Of equal images it would be infinite, and so would a mean."""


@dataclass(frozen=True)
class Estimate:
    """A figure from `n` samples, its 95 % interval [low, high] and how that was found."""

    value: float
    low: float
    high: float
    n: int
    method: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def named(estimates: Mapping[str, Estimate], **how: str) -> dict[str, Any]:
    """For JSON, with the number of samples in each metric's name."""
    return {f"{kind}@{each.n}": {**each.as_dict(), **how} for kind, each in estimates.items()}


# --- inverted noise ---------------------------------------------------------------------------------


def normality(eps: Tensor) -> dict[str, float]:
    """How far noises [n, *shape] are from N(0, I), where every `..._ratio` is 1.

    |eps|^2 / d has mean 1 and deviation sqrt(2 / d); `chi_square_ks` is the Kolmogorov-Smirnov distance of
    |eps|^2 from the chi-square distribution with d degrees of freedom, `chi_square_p` its p-value.
    """
    rows = eps.double().flatten(1)
    n, d = rows.shape
    squares = rows.square().sum(1).sort().values
    cdf = torch.special.gammainc(torch.tensor(d / 2, dtype=torch.float64), squares / 2)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    ks = max(float((cdf - steps[:-1]).max()), float((steps[1:] - cdf).max()))
    return {
        "mean": float(rows.mean()),
        "std": float(rows.std()),
        "norm_mean_ratio": float(squares.mean() / d),
        "norm_spread_ratio": float(squares.std(correction=min(1, n - 1)) / math.sqrt(2 * d)),
        "chi_square_ks": ks,
        "chi_square_p": _kolmogorov_p(ks, n),
        "pairs": n,
    }


def _kolmogorov_p(distance: float, n: int) -> float:
    """Probability of a larger distance under the hypothesis, asymptotic with Stephens' correction (1970)."""
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if x < 0.2:  # the series does not converge there, and the answer is 1
        return 1.0
    terms = (2.0 * (1 if k % 2 else -1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))
    return min(1.0, max(0.0, sum(terms)))


# --- Fréchet distance -----------------------------------------------------------------------------


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] (divisor n - 1) of features [n, D], float64."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


class Moments:
    """The `moments` of features that come in parts and are not kept (Chan et al. 1979)."""

    mean: Tensor
    scatter: Tensor

    def __init__(self) -> None:
        self.n = 0

    def add(self, features: Tensor) -> None:
        """Count features [n, D] in."""
        features = features.double()
        n, mean = len(features), features.mean(0)
        centred = features - mean
        scatter = centred.T @ centred
        if self.n:
            apart, total = mean - self.mean, self.n + n
            scatter = self.scatter + scatter + torch.outer(apart, apart) * (self.n * n / total)
            mean = self.mean + apart * (n / total)
        self.mean, self.scatter = mean, scatter
        self.n += n

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D], float64."""
        return self.mean, self.scatter / (self.n - 1)


@dataclass(frozen=True, eq=False)
class Reference:
    """Moments to which others are compared; the factor of the covariance is computed once.

    The Fréchet distance between Gaussians (Dowson and Landau 1982; the formula of FID, arXiv
    1706.08500), |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), needs the eigenvalues of S1 S2.
    Those of the symmetric S1^(1/2) S2 S1^(1/2) are the same, and cost much less than a matrix
    square root.
    """

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """S^(1/2) [D, D]."""
        values, vectors = torch.linalg.eigh(self.covariance.double())
        root: Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
        return root

    def distance(self, mean: Tensor, covariance: Tensor) -> float:
        """Fréchet distance to the Gaussian with this mean [D] and covariance [D, D]."""
        values = torch.linalg.eigvalsh(self._between(covariance))
        return self._distance(mean, covariance, values)

    def estimate(self, features: Tensor) -> Estimate:
        """Fréchet distance of features [n, D] from the reference; see `measure`."""
        return self.measure(features)[0]

    def measure(self, features: Tensor) -> tuple[Estimate, Tensor]:
        """Fréchet distance of features [n, D] from the reference, and each sample's influence [n] on it.

        The interval is one for the expectation at this n, which exceeds the limit for infinite n
        by about b / n: compare figures of the same n only, and with that of real samples. (A
        bootstrap would add the bias a second time.) The variance is that of the influence function,
        the limit of a jackknife's (Efron 1982): with T = S1^(1/2) (S1^(1/2) S2 S1^(1/2))^(-1/2)
        S1^(1/2), which transports the samples to the reference,

            2 (m2 - m1)'(x - m2) + (x - m2)'(I - T)(x - m2) - const

        The interval is laid around the root of the distance, whose distribution is less skewed. It
        is too wide, never too narrow, where the distance is hardly more than its bias.
        """
        mean, covariance = moments(features)
        values, vectors = torch.linalg.eigh(self._between(covariance))
        floor = values[-1] * len(values) * torch.finfo(values.dtype).eps
        inverse = torch.where(values > floor, values, torch.inf).rsqrt()
        transport = self.root @ (vectors * inverse) @ vectors.T @ self.root
        centred = features.double() - mean
        linear = 2 * centred @ (mean - self.mean.double())
        quadratic = (centred**2).sum(1) - ((centred @ transport) * centred).sum(1)
        influence = linear + quadratic
        n = len(features)
        error = float(influence.std()) / math.sqrt(n)
        value = self._distance(mean, covariance, values)
        low, high = _around_a_square(value, NORMAL_95 * error)
        return Estimate(value, low, high, n, "influence function"), influence - influence.mean()

    def _between(self, covariance: Tensor) -> Tensor:
        """S1^(1/2) S2 S1^(1/2) [D, D]."""
        product = self.root @ covariance.double() @ self.root
        return (product + product.T) / 2

    def _distance(self, mean: Tensor, covariance: Tensor, values: Tensor) -> float:
        """The distance, given the eigenvalues [D] of S1 S2."""
        shift = ((mean.double() - self.mean.double()) ** 2).sum()
        traces = self.covariance.double().trace() + covariance.double().trace()
        return max(0.0, float(shift + traces - 2 * values.clamp(min=0.0).sqrt().sum()))


def frechet(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Fréchet distance between Gaussians with means [D], covariances [D, D]; see `Reference`."""
    return Reference(mean1, covariance1).distance(mean2, covariance2)


def _around_a_square(value: float, reach: float) -> tuple[float, float]:
    """The interval of half-width `reach` around a square, laid symmetrically around its root."""
    if value == 0.0:
        return 0.0, reach
    root, half = math.sqrt(value), reach / (2 * math.sqrt(value))
    return max(0.0, root - half) ** 2, (root + half) ** 2


# --- means, shares, ratios ------------------------------------------------------------------------


def mean_interval(values: Tensor, seed: int = 0) -> Estimate:
    """Mean of values [n], n >= 2; the interval is BCa's (Efron 1987) below n = 2,000, else normal."""
    values = values.double().cpu()
    n, mean = len(values), float(values.mean())
    if n < 2:
        raise ValueError("one value has no interval")
    if float(values.amax() - values.amin()) == 0.0:
        return Estimate(mean, mean, mean, n, "all equal")
    if n >= _NORMAL_FROM:
        reach = NORMAL_95 * float(values.std()) / math.sqrt(n)
        return Estimate(mean, mean - reach, mean + reach, n, "normal")
    low, high = _bca(values, seed)
    return Estimate(mean, low, high, n, "bootstrap (BCa)")


def paired_difference(a: Tensor, b: Tensor, seed: int = 0) -> Estimate:
    """Mean of a - b for values [n] of the same n samples; below 0 where a's are smaller."""
    if a.shape != b.shape:
        raise ValueError(f"values of {len(a)} and {len(b)} samples cannot be paired")
    return mean_interval(a.double() - b.double(), seed)


def ratio_interval(numerator: Tensor, denominator: Tensor, seed: int = 0) -> Estimate:
    """E[numerator] / E[denominator] from paired values [n], by linearisation around the ratio."""
    numerator, denominator = numerator.double(), denominator.double()
    scale = denominator.mean()
    ratio = numerator.mean() / scale
    return mean_interval(ratio + (numerator - ratio * denominator) / scale, seed)


def accuracy(predicted: Tensor, labels: Tensor) -> Estimate:
    """Share of equal entries of two [n] int64, with Wilson's interval: 100 % has a width too."""
    n = len(labels)
    share = float((predicted == labels).double().mean())
    denominator = 1 + NORMAL_95**2 / n
    centre = (share + NORMAL_95**2 / (2 * n)) / denominator
    reach = NORMAL_95 * math.sqrt(share * (1 - share) / n + NORMAL_95**2 / (4 * n * n)) / denominator
    # At shares of 0 and 1 an end is the share itself, but for rounding.
    low, high = max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach))
    return Estimate(share, low, high, n, "Wilson")


def quantile_interval(values: Tensor, share: float) -> Estimate | None:
    """A quantile of values [n]; None where so few have no two-sided interval.

    The ends are order statistics: the number of values below the quantile is binomial, whatever their
    distribution (David and Nagaraja 2003, section 7.1). The interval holds it with 95 % or more.
    """
    ordered = values.double().cpu().sort().values
    n = len(ordered)
    k = torch.arange(n + 1, dtype=torch.float64)
    log = torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    below = (log + k * math.log(share) + (n - k) * math.log1p(-share)).exp().cumsum(0)
    low, high = int((below <= 0.025).sum()) - 1, int((below < 0.975).sum())
    if low < 0 or high >= n:
        return None
    value = float(ordered.quantile(share))
    return Estimate(value, float(ordered[low]), float(ordered[high]), n, "order statistics")


def _bca(values: Tensor, seed: int) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean of values [n]."""
    means = _resampled_means(values, seed)
    centred = values - values.mean()
    acceleration = float((centred**3).sum() / (6 * (centred**2).sum() ** 1.5))
    # Of what is equal one half: of few values many means are.
    below = float((means < values.mean()).double().mean() + (means <= values.mean()).double().mean()) / 2
    # A share of 0 or 1 would be infinitely far out.
    bias = _ndtri(min(max(below, 1 / _RESAMPLES), 1 - 1 / _RESAMPLES))
    ends = []
    for z in (bias - NORMAL_95, bias + NORMAL_95):
        level = float(torch.special.ndtr(torch.tensor(bias + z / (1 - acceleration * z)).double()))
        ends.append(float(torch.quantile(means, level)))
    return ends[0], ends[1]


def _ndtri(share: float) -> float:
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))


def _resampled_means(values: Tensor, seed: int) -> Tensor:
    """Means [_RESAMPLES] of resamples of values [n], in pieces that fit into memory."""
    generator = randomness.generator(seed, "bootstrap")
    rows = max(1, _DRAWN_AT_ONCE // len(values))
    pieces = []
    for start in range(0, _RESAMPLES, rows):
        size = (min(rows, _RESAMPLES - start), len(values))
        pieces.append(values[torch.randint(len(values), size, generator=generator)].mean(1))
    return torch.cat(pieces)


# --- per sample -----------------------------------------------------------------------------------


def endpoint_error(x: Tensor, reference: Tensor) -> Tensor:
    """Root mean square over the dimensions of x - reference [B, *shape], [B] on the CPU."""
    return (x.cpu().double() - reference.cpu().double()).flatten(1).square().mean(1).sqrt()


def psnr(x: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], clamped to it, [B] on the CPU; at most 100."""
    squares = endpoint_error(x.clamp(-1.0, 1.0), reference.clamp(-1.0, 1.0)).square()
    return 10 * (4.0 / squares).log10().clamp(max=_PSNR_AT_MOST / 10)


def deviations(
    times: Sequence[float], velocities: Sequence[Tensor], start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """int ||(Z1 - Z0) - v||^2 dt and int ||(Z1 - Z0) - v|| dt along each path, and ||Z1 - Z0||^2.

    `velocities[k]` [B, *shape] is held from times[k] to times[k + 1], as Euler does; `start`
    [B, *shape] is at t = 1, `end` at t = 0. Norms are over all dimensions; the results are [B],
    float64.
    """
    displacement = start.double() - end.double()
    squared, plain = displacement.new_zeros(2, len(start))
    for (t, s), velocity in zip(pairwise(times), velocities, strict=True):
        square = _squared_norm(displacement - velocity.double())
        squared += (t - s) * square
        plain += (t - s) * square.sqrt()
    return squared, plain, _squared_norm(displacement)


def straightness(
    squared: Tensor, plain: Tensor, displacement: Tensor, dimensions: int, seed: int = 0
) -> dict[str, Estimate]:
    """What is called straightness, each by its name, from the `deviations` [n] of paths; 0 if straight.

    straightness: S = int E||(Z1 - Z0) - v||^2 dt, of rectified flow (arXiv 2209.03003).
    straightness_per_dim: S divided by the number of dimensions, of rf++'s code (arXiv 2405.20320).
    straightness_norm: int E||(Z1 - Z0) - v|| dt, the norm not squared, of SlimFlow's code (arXiv
    2407.12718).
    curvature: S / E||Z1 - Z0||^2, which has no unit; left out where no path leads anywhere.
    """
    found = {
        "straightness": mean_interval(squared, seed),
        "straightness_per_dim": mean_interval(squared / dimensions, seed),
        "straightness_norm": mean_interval(plain, seed),
    }
    if displacement.any():
        found["curvature"] = ratio_interval(squared, displacement, seed)
    return found


def _squared_norm(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1)
