"""The kernel distance of features: KID, where they are Inception's.

Bińkowski et al., "Demystifying MMD GANs" (arXiv 1801.01401): the squared maximum mean discrepancy under the
kernel k(x, y) = (x'y / D + 1)^3, estimated without bias. The estimate may be negative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowdistill.evaluation.metrics import Estimate, mean_interval

_KERNELS_AT_ONCE = 2**23


def kernel_distance(
    samples: Tensor, real: Tensor, real_among: Tensor | None = None
) -> tuple[Estimate, Tensor]:
    """Distance of features [n, D] from real ones [m, D], and each sample's influence [n] on it.

    `real_among` [m] are the `means` of the real ones, where they are known.

    This is the expectation of what torch-fidelity averages over 100 random subsets of 1,000, without their
    noise: every pair counts once. The influence is the Hájek projection of the U-statistic. The interval is
    that of the means of both sets' influences; where the two distributions are equal it is wide.
    """
    among, across = means(samples, samples), means(samples, real)
    real_among = means(real, real) if real_among is None else real_among
    real_across = means(real, samples)
    value = float(among.mean() + real_among.mean() - 2 * across.mean())
    influence = _centred(2 * (among - across))
    ends = mean_interval(value + influence), mean_interval(value + _centred(2 * (real_among - real_across)))
    low, high = (math.hypot(*(getattr(end, side) - value for end in ends)) for side in ("low", "high"))
    return Estimate(value, value - low, value + high, len(samples), "influence function"), influence


def _centred(values: Tensor) -> Tensor:
    return values - values.mean()


def means(a: Tensor, b: Tensor) -> Tensor:
    """mean_j k(a_i, b_j) [n], float64, for features a [n, D], b [m, D]; of the same ones over j != i."""
    rows = max(1, _KERNELS_AT_ONCE // len(b))
    other = b.double().T / b.shape[1]
    sums = torch.cat([(part.double() @ other + 1).pow(3).sum(1) for part in torch.split(a, rows)])
    if a is not b:
        return sums / len(b)
    return (sums - (a.double().square().mean(1) + 1).pow(3)) / (len(b) - 1)
