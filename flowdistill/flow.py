"""THE convention, used by every module: canonical coordinates of a rectified flow.

    x_t = (1 - t) x0 + t eps,   t = 0 data, t = 1 noise,   v = dx_t/dt = E[eps - x0 | x_t]

Sampling integrates t from 1 down to 0. x0, eps, x_t and v are [B, *shape], t is [B]. Foreign
conventions are converted by `conventions`, once, at the edge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

VelocityField: TypeAlias = "Callable[[Tensor, Tensor, Tensor | None], Tensor]"
"""(x [B, *shape], t [B], labels [B] int64 or None) -> v [B, *shape]"""

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
