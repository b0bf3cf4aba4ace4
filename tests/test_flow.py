"""The convention: every conversion on random points, and EDM denoisers as velocity fields."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowdistill import flow
from flowdistill.analytic import Mixture

inner_times = st.floats(0.001, 0.999)


def points(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).double()
    return drawn[0], drawn[1]


def test_data_at_zero_and_noise_at_one() -> None:
    x0, eps = points(0, 2, 3, 4, 4)
    x = flow.interpolate(x0, eps, torch.tensor([0.0, 1.0]))
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[1], eps[1])


def test_the_way_between_is_by_hand() -> None:
    x0, eps = torch.tensor([[2.0, -1.0]]), torch.tensor([[4.0, 1.0]])
    assert torch.equal(flow.interpolate(x0, eps, torch.tensor([0.25])), torch.tensor([[2.5, -0.5]]))
    assert torch.equal(flow.velocity(x0, eps), torch.tensor([[2.0, 2.0]]))


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, eps = points(1, 5, 3)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    step = flow.interpolate(x0, eps, t + 1e-3) - flow.interpolate(x0, eps, t - 1e-3)
    torch.testing.assert_close(step / 2e-3, flow.velocity(x0, eps))


def test_time_is_per_sample() -> None:
    t = torch.tensor([0.1, 0.2, 0.3])
    assert flow.expand(t, torch.empty(3, 4, 5, 6)).shape == (3, 1, 1, 1)
    assert flow.expand(t, torch.empty(3, 7))[:, 0].tolist() == t.tolist()
    assert flow.expand(t, torch.empty(3)).shape == (3,)


@given(t=inner_times, seed=st.integers(0, 2**31))
def test_predictions_convert_both_ways(t: float, seed: int) -> None:
    x0, eps = points(seed, 2, 3)
    times = torch.tensor([t, 1 - t], dtype=torch.float64)
    x_t, v = flow.interpolate(x0, eps, times), flow.velocity(x0, eps)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(flow.x0_from_velocity(x_t, v, times), x0, **close)
    torch.testing.assert_close(flow.eps_from_velocity(x_t, v, times), eps, **close)
    torch.testing.assert_close(flow.velocity_from_x0(x_t, x0, times), v, **close)
    torch.testing.assert_close(flow.velocity_from_eps(x_t, eps, times), v, **close)


def test_noise_levels() -> None:
    assert flow.t_from_sigma(80.0) == pytest.approx(80 / 81)
    assert flow.sigma_from_t(0.75) == pytest.approx(3.0)
    sigma = torch.logspace(-3, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(flow.sigma_from_t(flow.t_from_sigma(sigma)), sigma)


MEAN, STD = 0.4, 0.5


def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """E[x0 | x0 + sigma n] for x0 ~ N(MEAN, STD^2), in EDM's own coordinates."""
    level = sigma.reshape(-1, 1)
    return MEAN + STD**2 / (STD**2 + level**2) * (x - MEAN)


def test_a_denoiser_is_its_velocity_field_within_its_range() -> None:
    truth = Mixture(torch.ones(1), torch.full((1, 3), MEAN), torch.full((1, 3), STD))
    t = torch.linspace(flow.t_from_sigma(0.002) + 1e-9, 80 / 81, 50, dtype=torch.float64)
    x, _ = points(2, 50, 3)
    field = flow.velocity_from_denoiser(denoise)
    torch.testing.assert_close(field(x, t, None), truth(x, t), rtol=1e-6, atol=1e-6)


def test_edm_steps_are_euler_steps() -> None:
    """x + (sigma' - sigma) (x - D) / sigma, brought to canonical coordinates."""
    x, _ = points(3, 4, 3)
    sigma, lower = torch.tensor([60.0, 5.0, 1.0, 0.1]).double(), torch.tensor([20.0, 2.0, 0.5, 0.0])
    level, below = sigma.reshape(-1, 1), lower.reshape(-1, 1)
    edm = x + (below - level) * (x - denoise(x, sigma, None)) / level
    t, s = flow.t_from_sigma(sigma), flow.t_from_sigma(lower.double())
    z = x / (1 + level)
    v = flow.velocity_from_denoiser(denoise)(z, t, None)
    torch.testing.assert_close(z + flow.expand(s - t, z) * v, edm / (1 + below))


def test_outside_its_range_a_denoiser_sees_the_ends() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def spy(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        seen.append((x, sigma, labels))
        return torch.zeros_like(x)

    x = torch.ones(3, 2, dtype=torch.float64)
    t = torch.tensor([1.0, 0.999, 0.0], dtype=torch.float64)
    labels = torch.tensor([3, 1, 2])
    v = flow.velocity_from_denoiser(spy, sigma_min=0.01, sigma_max=50.0)(x, t, labels)
    inputs, sigma, given_labels = seen[0]
    torch.testing.assert_close(sigma, torch.tensor([50.0, 50.0, 0.01], dtype=torch.float64))
    # At t = 1 the state is pure noise, and the denoiser's input is the EDM sampler's start.
    expected = torch.tensor([50.0, 50 / 0.999, 1.01], dtype=torch.float64)
    torch.testing.assert_close(inputs, expected[:, None].expand(3, 2))
    torch.testing.assert_close(v[:, 0], torch.tensor([1.0, 1 / 0.999, 101.0]).double())
    assert given_labels is labels


def test_the_range_is_edms_by_default() -> None:
    levels: list[Tensor] = []

    def spy(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        levels.append(sigma)
        return x

    flow.velocity_from_denoiser(spy)(torch.zeros(2, 1), torch.tensor([0.0, 1.0]), None)
    torch.testing.assert_close(levels[0], torch.tensor([0.002, 80.0]))
