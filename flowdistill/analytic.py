"""Flows with a closed form: teachers that need no training, and the oracles of the tests.

For x0 ~ sum_k w_k N(mu_k, diag(s_k^2)) and eps ~ N(0, I) independent, x_t = (1 - t) x0 + t eps
is again a mixture: component k has mean (1 - t) mu_k and variance c_k = (1 - t)^2 s_k^2 + t^2. With
r_k = P(k | x_t)

    E[eps - x0 | x_t] = sum_k r_k [ (t - (1 - t) s_k^2) / c_k (x_t - (1 - t) mu_k) - mu_k ]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowdistill.errors import UsageError
from flowdistill.randomness import integers, key, noise


class Mixture(nn.Module):
    """A mixture of K Gaussians as a velocity field; with labels, the one component that they name.

    `weights` [K] need not sum to 1; `means` and `stds` are [K, *shape]. The arithmetic is done in
    the dtype of the state. One component is unconditional and has `classes` 0.
    """

    log_weights: Tensor
    means: Tensor
    stds: Tensor

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor) -> None:
        super().__init__()
        weights = weights.double()
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means.double())
        self.register_buffer("stds", stds.double())
        self.shape: tuple[int, ...] = tuple(means.shape[1:])
        self.classes = len(means) if len(means) > 1 else 0

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """v [B, *shape] at x [B, *shape], t [B]; labels [B] int64 or None for the marginal."""
        share, offset, variance, t = self._at(x, t, labels)
        slope = (t - (1 - t) * self.stds.to(x) ** 2) / variance
        return (share * (slope * offset - self.means.to(x))).sum(1)

    def score(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Gradient of the log-density of x_t, [B, *shape]; arguments as for the velocity."""
        share, offset, variance, _ = self._at(x, t, labels)
        return -(share * offset / variance).sum(1)

    def flow_map(self, eps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Where the flow carries noise eps [B, *shape], exactly, [B, *shape].

        One Gaussian, or the labelled one, is stretched: mu + s eps. A mixture in one dimension
        keeps quantiles, F_0(x0) = F_1(eps), since paths cannot cross. Other mixtures have no closed
        form: UsageError.
        """
        if labels is not None or len(self.means) == 1:
            index = eps.new_zeros(len(eps), dtype=torch.int64) if labels is None else labels
            return self.means.to(eps)[index] + self.stds.to(eps)[index] * eps
        if math.prod(self.shape) != 1:
            raise UsageError("a mixture's flow map has a closed form in one dimension only")
        return self._quantile(eps.double().reshape(-1, 1)).reshape(eps.shape).to(eps)

    def data(self, indices: Sequence[int] | Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Exact samples x0 [B, *shape] float32 and their components [B], by (seed, index) alone."""
        u = integers(seed, "component", indices, 2**53).double() / 2**53
        labels = torch.searchsorted(self._weights().cpu().cumsum(0)[:-1], u, right=True)
        eps = noise(key(seed, "data"), indices, self.shape)
        return (self.means.cpu()[labels] + self.stds.cpu()[labels] * eps).float(), labels

    def _at(self, x: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """P(k | x_t) [B, K, 1..], x - (1 - t) mu_k and c_k [B, K, *shape], and t [B, 1, 1..]."""
        t = t.to(x).reshape(-1, *[1] * x.ndim)
        offset = x[:, None] - (1 - t) * self.means.to(x)
        variance = ((1 - t) * self.stds.to(x)) ** 2 + t**2
        if labels is None:
            log_density = -0.5 * (offset**2 / variance + variance.log()).flatten(2).sum(2)
            share = (self.log_weights.to(x) + log_density).softmax(1)
        else:
            share = nn.functional.one_hot(labels, len(self.means)).to(x)
        return share.reshape(*share.shape, *[1] * (x.ndim - 1)), offset, variance, t

    def _quantile(self, eps: Tensor) -> Tensor:
        """x [B, 1] with F_0(x) = Phi(eps), by bisection to the last bit.

        The components' own maps bracket the root. The tail that eps lies in is compared, so that
        far quantiles do not round to 0 or 1.
        """
        means, stds = self.means.reshape(1, -1), self.stds.reshape(1, -1)
        side = torch.where(eps > 0, -1.0, 1.0)
        stretched = means + stds * eps
        low = stretched.amin(1, keepdim=True)
        high = stretched.amax(1, keepdim=True)
        tail = _normal_cdf(side * eps)
        for _ in range(64):
            x = (low + high) / 2
            parts = self._weights() * _normal_cdf(side * (x - means) / stds)
            below = side * (parts.sum(1, keepdim=True) - tail) < 0
            low, high = torch.where(below, x, low), torch.where(below, high, x)
        return (low + high) / 2

    def _weights(self) -> Tensor:
        return self.log_weights.exp()


def _normal_cdf(z: Tensor) -> Tensor:
    """Accurate in the lower tail, where torch.special.ndtr is 0 from -9 on."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def gaussian(shape: Sequence[int] = (2,)) -> Mixture:
    """One Gaussian whose mean and standard deviation differ from one dimension to the next."""
    place = torch.arange(math.prod(shape), dtype=torch.float64).reshape(1, *shape)
    return Mixture(torch.ones(1), 0.5 * (place + 1).cos(), 0.5 + 0.3 * (2 * place).cos())


def mixture(shape: Sequence[int] = (2,)) -> Mixture:
    """Three Gaussians of unequal weight and width; in one dimension at -1.5, 0.7 and 2.2."""
    place = torch.arange(math.prod(shape), dtype=torch.float64).reshape(1, *shape)
    component = torch.arange(3).reshape(3, *[1] * len(shape))
    centres = torch.tensor([-1.5, 0.7, 2.2], dtype=torch.float64).reshape(component.shape)
    stds = torch.tensor([0.3, 0.5, 0.15], dtype=torch.float64).reshape(component.shape)
    means = centres * (component * place).cos()
    return Mixture(torch.tensor([0.5, 0.3, 0.2]), means, stds.expand(means.shape))


def ring(components: int = 8) -> Mixture:
    """Gaussians of unequal weight and width on the unit circle in two dimensions."""
    number = torch.arange(components, dtype=torch.float64)
    angle = 2 * math.pi * number / components
    means = torch.stack([angle.cos(), angle.sin()], dim=1)
    stds = 0.06 + 0.04 * (number % 2)
    return Mixture(number + 2, means, stds[:, None].expand(means.shape))
