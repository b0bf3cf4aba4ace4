"""THE convention, used by every module: canonical coordinates of a rectified flow.

    x_t = (1 - t) x0 + t eps,   t = 0 data, t = 1 noise,   v = dx_t/dt = E[eps - x0 | x_t]

Sampling integrates t from 1 down to 0. x0, eps, x_t and v are [B, *shape], t is [B]. Foreign
conventions are converted here, once, at the edge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

VelocityField: TypeAlias = "Callable[[Tensor, Tensor, Tensor | None], Tensor]"
"""(x [B, *shape], t [B], labels [B] int64 or None) -> v [B, *shape]"""

Denoiser: TypeAlias = "Callable[[Tensor, Tensor, Tensor | None], Tensor]"
"""(x [B, *shape], sigma [B], labels [B] int64 or None) -> E[x0 | x0 + sigma n = x] [B, *shape]"""

Time = TypeVar("Time", float, "Tensor")


def expand(t: Tensor, x: Tensor) -> Tensor:
    """t [B] as [B, 1, ..., 1], ready to multiply x [B, *shape]."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """v = eps - x0, the training target, the same at every t of one pair."""
    return eps - x0


def x0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 = x_t - t v."""
    return x_t - expand(t, x_t) * v


def eps_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """eps = x_t + (1 - t) v."""
    return x_t + (1 - expand(t, x_t)) * v


def velocity_from_x0(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x0) / t; singular at t = 0."""
    return (x_t - x0) / expand(t, x_t)


def velocity_from_eps(x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """v = (eps - x_t) / (1 - t); singular at t = 1."""
    return (eps - x_t) / (1 - expand(t, x_t))


def sigma_from_t(t: Time) -> Time:
    """EDM's noise level, sigma = t / (1 - t)."""
    return t / (1 - t)


def t_from_sigma(sigma: Time) -> Time:
    """t = sigma / (1 + sigma)."""
    return sigma / (1 + sigma)


def velocity_from_denoiser(
    denoiser: Denoiser, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> VelocityField:
    """EDM's denoiser D(x; sigma) as a velocity field (Lee et al. 2024, arXiv 2405.20320, Prop. 1).

        v(x_t, t) = (x_t - D(sigma x_t / t; sigma)) / t,   sigma = t / (1 - t)

    Between `sigma_min` and `sigma_max`, the noise levels the denoiser was trained for, sigma / t
    is 1 / (1 - t) and the formula is exact. Above, sigma stays at its maximum: t = 1 is the EDM
    sampler's start x = sigma_max eps. Below, t stays at the smallest level, where x_t hardly
    differs from x0.
    """

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        t = t.clamp(min=t_from_sigma(sigma_min))
        sigma = sigma_from_t(t).clamp(max=sigma_max)
        x0 = denoiser(x * expand(sigma / t, x), sigma, labels)
        return velocity_from_x0(x, x0, t)

    return field
