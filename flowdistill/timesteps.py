"""Where in time a training looks: densities of t in (0, 1), each by its inverse CDF.

Each class is a choice in a recipe (`timesteps: {name: u-shaped, a: 4}`) and its fields are the keys. A time
is a function of one uniform number, so that it is keyed by sample and step like all that is random.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from flowdistill.interpolants import Interpolant
from flowdistill.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 1e-5
"""Training times stay this far from 0 and 1, as in rf++ (arXiv 2405.20320)."""


class UShaped(Settings):
    """p(t) ~ cosh(a (t - 1/2)): most often at both ends, where the loss of a reflow is largest.

    Lee et al. 2024 (rf++, arXiv 2405.20320) print exp(a u) + exp(-a u), which has this shape only
    if u is measured from the middle, as their code does. The inverse CDF is closed:
    t = 1/2 + asinh((2 u - 1) sinh(a / 2)) / a.
    """

    name: Literal["u-shaped"] = "u-shaped"
    a: float = Field(4.0, ge=0, le=100, description="steepness; 0 is uniform, 4 is the paper's")

    def from_uniform(self, u: Tensor) -> Tensor:
        """Times whose CDF is u, any shape."""
        if self.a == 0:  # the limit of the formula, which is 0 / 0 there
            return _inside(u)
        return _inside(0.5 + ((2 * u - 1) * math.sinh(self.a / 2)).asinh() / self.a)


class Uniform(Settings):
    """All times alike, as in the first rectified flows (arXiv 2209.03003)."""

    name: Literal["uniform"] = "uniform"

    def from_uniform(self, u: Tensor) -> Tensor:
        """Times whose CDF is u, any shape."""
        return _inside(u)


class LogitNormal(Settings):
    """logit(t) ~ N(mean, std^2): mostly mid-way, for base flows (SD3, arXiv 2403.03206).

    EDM's ln sigma ~ N(-1.2, 1.2^2) (arXiv 2206.00364) is mean -1.2, std 1.2: logit(t) is ln sigma.
    """

    name: Literal["logit-normal"] = "logit-normal"
    mean: float = Field(0.0, ge=-20, le=20, description="of logit(t); above 0 favours noise")
    std: float = Field(1.0, gt=0, le=20, description="of logit(t)")

    def from_uniform(self, u: Tensor) -> Tensor:
        """Times whose CDF is u, any shape."""
        import torch

        return _inside((self.mean + self.std * torch.special.ndtri(u)).sigmoid())


class Native(Settings):
    """Uniform in the own time of another path, as its networks were trained: Rectified Diffusion's choice.

    Wang et al. 2024 (arXiv 2410.07303) keep DDPM's clock and prediction; of DDPM's steps few are near data.
    """

    name: Literal["native"] = "native"
    interpolant: Interpolant = Field(description="the path whose time is meant, as in the model's card")

    def from_uniform(self, u: Tensor) -> Tensor:
        """Canonical times of the path's times first + u (last - first), any shape."""
        low, high = (self.interpolant.time_at(u.new_tensor(end)) for end in self.interpolant.span)
        return _inside(self.interpolant.t_at(low + u * (high - low)))


class Mixture(Settings):
    """Several densities by weights, such as much at the ends and some everywhere.

    The unit interval is dealt out by the weights, and each density has its own part of it: u chooses the
    component and, stretched, is its CDF.
    """

    name: Literal["mixture"] = "mixture"
    parts: list[Annotated[UShaped | Uniform | LogitNormal | Native, Field(discriminator="name")]] = Field(
        min_length=1, description="the densities, each written like `timesteps` itself"
    )
    weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="one for each part, of any sum; left out, all alike"
    )

    @model_validator(mode="after")
    def _weighted(self) -> Mixture:
        if self.weights and len(self.weights) != len(self.parts):
            raise ValueError(f"weights: {len(self.weights)} numbers for {len(self.parts)} parts")
        return self

    def from_uniform(self, u: Tensor) -> Tensor:
        """Times [B] of u [B], independent and uniform."""
        import torch

        weights = self.weights or [1.0] * len(self.parts)
        ends = (torch.tensor(weights, dtype=torch.float64).cumsum(0) / sum(weights)).to(u)
        chosen = torch.bucketize(u, ends[:-1], right=True)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        within = ((u - starts[chosen]) / (ends - starts)[chosen]).clamp(0, 1)
        t = torch.empty_like(u)
        for number, part in enumerate(self.parts):
            t[chosen == number] = part.from_uniform(within[chosen == number])
        return t


BINS = 32
"""Equal stretches of [0, 1] by which losses are sorted."""


def sorted_by_time(t: Tensor, loss: Tensor) -> Tensor:
    """Sum and number of the losses [B] whose t [B] lies in each stretch, [2, BINS]."""
    bins = (t * BINS).long().clamp(0, BINS - 1)
    found = loss.new_zeros(2, BINS)
    found[0].index_add_(0, bins, loss)
    found[1].index_add_(0, bins, loss.new_ones(len(loss)))
    return found


class Fitted(Settings):
    """p(t) ~ the loss at t, as the training measures it while it goes on.

    rf++ (arXiv 2405.20320, Sec. 4.1) shapes its density after a measured loss by hand; here the mean loss of
    each of `BINS` stretches, smoothed, takes the place of the curve. The loss in a stretch does not depend
    on how often it is looked at. Until something is measured the density is uniform.
    """

    name: Literal["fitted"] = "fitted"
    smoothing: float = Field(
        1.0, gt=0, le=32, description="standard deviation of the Gaussian that smooths, in stretches of 1/32"
    )
    floor: float = Field(0.2, gt=0, le=1, description="share of the times that stay uniform")

    def density(self, measured: Tensor) -> Tensor:
        """Density in each stretch, [BINS] of mean 1, for the sums and numbers of losses [2, BINS]."""
        import torch

        places = torch.arange(BINS, dtype=measured.dtype, device=measured.device)
        kernel = (-0.5 * ((places[:, None] - places) / self.smoothing).square()).exp()
        sums, numbers = measured @ kernel
        mean = measured[0].sum() / measured[1].sum()
        loss = torch.where(numbers > 0, sums / numbers, mean)
        if not (mean.isfinite() and mean > 0):  # nothing is measured, or nothing is left to learn
            return torch.ones_like(places)
        return self.floor + (1 - self.floor) * loss / loss.mean()

    def from_uniform(self, u: Tensor, measured: Tensor) -> Tensor:
        """Times whose CDF is u, any shape, for the sums and numbers of losses [2, BINS]."""
        import torch

        density = self.density(measured).to(u)
        ends = density.cumsum(0) / density.sum()
        bins = torch.searchsorted(ends, u, right=True).clamp(max=BINS - 1)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        within = ((u - starts[bins]) / (ends - starts)[bins]).clamp(0, 1)
        return _inside((bins + within) / BINS)


Timesteps: TypeAlias = Annotated[
    UShaped | Uniform | LogitNormal | Native | Mixture | Fitted, Field(discriminator="name")
]


def times(timesteps: Timesteps, u: Tensor, measured: Tensor) -> Tensor:
    """Times of independent uniform numbers u [B], given what is `measured` of the loss by t, [2, BINS]."""
    if isinstance(timesteps, Fitted):
        return timesteps.from_uniform(u, measured)
    return timesteps.from_uniform(u)


def _inside(t: Tensor) -> Tensor:
    """[0, 1] mapped onto [MARGIN, 1 - MARGIN]."""
    return t * (1 - 2 * MARGIN) + MARGIN
