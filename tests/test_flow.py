"""The convention: every conversion on random points, and EDM denoisers as velocity fields."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowdistill import flow

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
