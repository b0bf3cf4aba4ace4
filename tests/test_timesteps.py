"""Densities of training times against their CDFs, and the fitted one against a loss that was planted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from flowdistill.conventions import Convention
from flowdistill.interpolants import DDPM, EDM, LFM, VE, VP, AffinePath, Cosine, Rectified, SubVP
from flowdistill.timesteps import (
    BINS,
    Fitted,
    LogitNormal,
    Mixture,
    Native,
    Timesteps,
    Uniform,
    UShaped,
    sorted_by_time,
    times,
)

FIXTURES = Path(__file__).parent / "fixtures"
GRID = torch.linspace(0, 1, 201, dtype=torch.float64)


@pytest.mark.parametrize("a", [1, 2, 4])
def test_u_shape_has_the_quantiles_of_rf_plus_plus(a: int) -> None:
    case = json.loads((FIXTURES / "u_shape.json").read_text())[f"a{a}"]
    t = UShaped(a=float(a)).from_uniform(torch.tensor(case["u"], dtype=torch.float64))
    np.testing.assert_allclose(t.numpy(), case["quantile_after_affine"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("a", [1e-9, 0.1, 4.0, 30.0])
def test_u_shape_inverts_its_cdf(a: float) -> None:
    t = (UShaped(a=a).from_uniform(GRID) - 1e-5) / (1 - 2e-5)
    cdf = 0.5 + (a * (t - 0.5)).sinh() / (2 * math.sinh(a / 2))
    torch.testing.assert_close(cdf, GRID, rtol=0, atol=1e-13)


def test_u_shape_of_random_numbers_has_its_density() -> None:
    u = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = UShaped().from_uniform(u).sort().values
    cdf = 0.5 + (4 * (t - 0.5)).sinh() / (2 * math.sinh(2))
    gap = (torch.arange(1, len(t) + 1) / len(t) - cdf).abs().max()
    assert math.sqrt(len(t)) * gap < 2.0  # Kolmogorov-Smirnov, p = 7e-4
    assert float((t < 0.1).double().mean()) == pytest.approx(0.1725, abs=0.01)


def test_u_shape_tends_to_uniform() -> None:
    uniform = Uniform().from_uniform(GRID)
    assert torch.equal(UShaped(a=0).from_uniform(GRID), uniform)
    for a in (1e-300, 1e-12, 1e-6):
        torch.testing.assert_close(UShaped(a=a).from_uniform(GRID), uniform, rtol=0, atol=1e-13)
    bent = UShaped(a=1e-2).from_uniform(GRID)
    assert 0 < float((bent - uniform).abs().max()) < 1e-6


def test_logit_normal_has_its_quantiles() -> None:
    times = LogitNormal(mean=-0.4, std=1.7)
    u = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64)
    expected = [1 / (1 + math.exp(-NormalDist(-0.4, 1.7).inv_cdf(p))) for p in u.tolist()]
    torch.testing.assert_close((times.from_uniform(u) - 1e-5) / (1 - 2e-5), torch.tensor(expected).double())


@pytest.mark.parametrize("times", [UShaped(), UShaped(a=100.0), Uniform(), LogitNormal()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_rise_with_u_are_symmetric_and_keep_off_the_ends(
    times: UShaped | Uniform | LogitNormal, dtype: torch.dtype
) -> None:
    t = times.from_uniform(GRID.to(dtype))
    assert t.dtype == dtype
    assert bool((t.diff() >= 0).all())
    torch.testing.assert_close(t + t.flip(0), torch.ones_like(t))
    assert float(t[0]) == pytest.approx(1e-5, rel=1e-6 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_a_mixture_has_the_mixed_cdf(weights: list[float] | None) -> None:
    parts = [UShaped(), Uniform(), LogitNormal(mean=0.5)]
    u = (torch.arange(300_000, dtype=torch.float64) + 0.5) / 300_000
    found = Mixture(parts=parts, weights=weights).from_uniform(u).sort().values
    shares = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    at = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    expected = sum(
        share * torch.searchsorted(part.from_uniform(u), at) / len(u)
        for share, part in zip(shares / shares.sum(), parts, strict=True)
    )
    assert (torch.searchsorted(found, at) / len(u) - expected).abs().max() < 1e-4
    assert found.min() > 0 and found.max() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_of_one_is_that_one_and_ends_stay_inside(dtype: torch.dtype) -> None:
    u = torch.linspace(0, 1, 1001, dtype=dtype)
    for part in (UShaped(), Uniform(), LogitNormal()):
        assert torch.equal(Mixture(parts=[part]).from_uniform(u), part.from_uniform(u))
    times = Mixture(parts=[Uniform(), UShaped(), LogitNormal()], weights=[0.1, 0.2, 0.7]).from_uniform(u)
    assert times.min() > 0 and times.max() < 1 and times.dtype == dtype


def test_defaults_are_the_papers() -> None:
    assert UShaped().a == 4.0
    assert (LogitNormal().mean, LogitNormal().std) == (0.0, 1.0)


# The time of another path


def outer(t: Tensor) -> Tensor:
    """What keeps times off the ends, undone."""
    return (t - 1e-5) / (1 - 2e-5)


@pytest.mark.parametrize(
    "path",
    [Rectified(), LFM(sigma_min=0.1), Cosine(), VP(), SubVP(), DDPM(), DDPM(betas="squaredcos_cap_v2"), VE()],
    ids=lambda path: path.name,
)
def test_native_times_are_uniform_on_the_clock_of_their_path(path: AffinePath) -> None:
    t = outer(Native(interpolant=path).from_uniform(GRID))  # type: ignore[arg-type]
    inside = t[1:-1].clamp(*path.span)
    clock = path.time_at(inside)
    low, high = clock[0] - (clock[1] - clock[0]), clock[-1] + (clock[-1] - clock[-2])
    torch.testing.assert_close(clock, low + GRID[1:-1] * (high - low), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(path.t_at(clock), inside, rtol=0, atol=1e-9)
    assert float(t[0]) == pytest.approx(path.span[0], abs=1e-6)
    assert float(t[-1]) == pytest.approx(path.span[1], abs=1e-6)


def test_native_times_of_ddpm_have_the_density_that_its_convention_says() -> None:
    path, u = DDPM(), (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t = outer(Native(interpolant=path).from_uniform(u))
    edges = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    found = torch.searchsorted(t, edges).diff().double() / len(t)
    convention = Convention.model_validate({"interpolant": {"name": "ddpm"}, "prediction": "eps"})
    fine = torch.linspace(0.05, 0.95, 18 * 500 + 1, dtype=torch.float64)
    density = convention.density(lambda time: torch.full_like(time, 1 / 999), fine)
    areas = ((density[1:] + density[:-1]) / 2).reshape(18, 500).sum(1) * (0.9 / 9000)
    torch.testing.assert_close(found, areas, rtol=5e-3, atol=1e-4)


def test_the_logit_normal_of_edm_is_its_noise_levels() -> None:
    """ln sigma ~ N(-1.2, 1.2^2), on EDM's own path."""
    t = outer(LogitNormal(mean=-1.2, std=1.2).from_uniform(GRID[1:-1]))
    log_sigma = EDM().time_at(t).log()
    levels = [NormalDist(-1.2, 1.2).inv_cdf(u) for u in GRID[1:-1].tolist()]
    torch.testing.assert_close(log_sigma, torch.tensor(levels, dtype=torch.float64), rtol=0, atol=1e-9)


def test_native_times_mix_with_others() -> None:
    native = Native(interpolant=DDPM())
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = Mixture(parts=[native, Uniform()], weights=[1.0, 3.0]).from_uniform(u)
    torch.testing.assert_close(t[:250], native.from_uniform(4 * u[:250]))
    torch.testing.assert_close(t[250:], Uniform().from_uniform((u[250:] - 0.25) / 0.75))


# The times of a measured loss


def test_losses_are_sorted_by_hand() -> None:
    t = torch.tensor([0.0, 0.5 / 32, 1 / 32, 0.5, 31.999 / 32, 1.0])
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    expected = torch.zeros(2, BINS)
    expected[:, 0] = torch.tensor([3.0, 2.0])
    expected[:, 1] = torch.tensor([4.0, 1.0])
    expected[:, 16] = torch.tensor([8.0, 1.0])
    expected[:, 31] = torch.tensor([48.0, 2.0])
    assert torch.equal(sorted_by_time(t, loss), expected)


def profile(t: Tensor) -> Tensor:
    return 0.3 + (3 * t).sin().square() + 4 * (t - 0.9).clamp(min=0)


def measured(count: int = 200_000) -> Tensor:
    """Losses with the profile and noise of their own, looked at mostly near the data."""
    drawn = torch.Generator().manual_seed(0)
    t = torch.rand(count, generator=drawn, dtype=torch.float64) ** 2
    return sorted_by_time(t, profile(t) * (0.5 + torch.rand(count, generator=drawn, dtype=torch.float64)))


def test_a_fitted_density_is_proportional_to_the_planted_loss() -> None:
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    expected = profile(centres) / profile(centres).mean()
    density = Fitted(smoothing=0.05, floor=1e-9).density(measured())
    torch.testing.assert_close(density, expected, rtol=0.05, atol=0.02)
    assert float(density.mean()) == pytest.approx(1.0)
    floored = Fitted(smoothing=0.05, floor=0.25).density(measured())
    torch.testing.assert_close(floored, 0.25 + 0.75 * density)


def test_a_fitted_density_is_smoothed_by_the_gaussian_that_is_asked_for() -> None:
    found = measured(2000)
    kernel = [[math.exp(-0.5 * ((i - j) / 1.5) ** 2) for j in range(BINS)] for i in range(BINS)]
    smooth = [
        sum(kernel[i][j] * float(found[0, j]) for j in range(BINS))
        / sum(kernel[i][j] * float(found[1, j]) for j in range(BINS))
        for i in range(BINS)
    ]
    expected = torch.tensor([0.2 + 0.8 * each / (sum(smooth) / BINS) for each in smooth], dtype=torch.float64)
    torch.testing.assert_close(Fitted(smoothing=1.5).density(found), expected)


@pytest.mark.parametrize(
    "found",
    [
        torch.zeros(2, BINS, dtype=torch.float64),
        torch.stack([torch.zeros(BINS), torch.ones(BINS)]).double(),
        torch.full((2, BINS), math.inf, dtype=torch.float64),
    ],
    ids=["nothing is measured", "nothing is left to learn", "too large for numbers"],
)
def test_a_fitted_density_is_uniform_where(found: Tensor) -> None:
    assert torch.equal(Fitted().density(found), torch.ones(BINS, dtype=torch.float64))
    torch.testing.assert_close(times(Fitted(), GRID, found), Uniform().from_uniform(GRID))


@pytest.mark.parametrize("smoothing", [1e-3, 0.5, 32.0])
def test_stretches_that_were_not_looked_at_are_filled_in(smoothing: float) -> None:
    found = torch.zeros(2, BINS, dtype=torch.float64)
    found[:, 3], found[:, 20] = torch.tensor([6.0, 3.0]), torch.tensor([4.0, 1.0])  # means 2 and 4
    density = Fitted(smoothing=smoothing, floor=1e-9).density(found)
    assert bool((density > 0).all()) and float(density.mean()) == pytest.approx(1.0)
    if smoothing == 0.5:  # the nearer of the two decides
        assert float(density[22] / density[1]) == pytest.approx(2.0, rel=1e-6)
    if smoothing == 1e-3:  # too far from both: the mean of all, 10 / 4
        assert float(density[20] / density[10]) == pytest.approx(4 / 2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fitted_times_invert_the_cumulated_density(dtype: torch.dtype) -> None:
    fitted, found = Fitted(smoothing=0.5), measured()
    t = outer(fitted.from_uniform(GRID.to(dtype), found))
    assert t.dtype == dtype and bool((t.diff() > 0).all())
    ends = torch.cat([torch.zeros(1), fitted.density(found).cumsum(0) / BINS]).double()
    cdf = np.interp(t.double().numpy(), np.arange(BINS + 1) / BINS, ends.numpy())
    np.testing.assert_allclose(cdf, GRID.numpy(), atol=2e-6 if dtype == torch.float32 else 1e-12)
    inside = fitted.from_uniform(GRID.to(dtype), found)
    assert inside.min() > 0 and inside.max() < 1


def test_what_is_measured_matters_to_fitted_times_alone() -> None:
    found = measured(1000)
    assert torch.equal(times(UShaped(), GRID, found), UShaped().from_uniform(GRID))
    assert torch.equal(times(Fitted(), GRID, found), Fitted().from_uniform(GRID, found))


# Recipes


def test_a_mixture_needs_a_weight_for_each_part() -> None:
    with pytest.raises(ValidationError, match="2 numbers for 1 parts"):
        Mixture(parts=[Uniform()], weights=[1.0, 2.0])


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ({"name": "u-shaped", "a": 4}, UShaped()),
        ({"name": "u-shaped"}, UShaped(a=4.0)),
        ({"name": "uniform"}, Uniform()),
        ({"name": "logit-normal", "mean": -1, "std": 0.5}, LogitNormal(mean=-1.0, std=0.5)),
        ({"name": "logit-normal", "mean": -20, "std": 20}, LogitNormal(mean=-20.0, std=20.0)),
        ({"name": "logit-normal", "mean": 20}, LogitNormal(mean=20.0)),
        ({"name": "fitted"}, Fitted(smoothing=1.0, floor=0.2)),
        ({"name": "native", "interpolant": {"name": "ddpm"}}, Native(interpolant=DDPM())),
    ],
)
def test_recipes_of_times(recipe: dict[str, Any], expected: object) -> None:
    assert TypeAdapter(Timesteps).validate_python(recipe) == expected


@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "u-shape"},
        {"a": 4.0},
        {"name": "u-shaped", "a": -0.1},
        {"name": "u-shaped", "a": 100.1},
        {"name": "u-shaped", "a": float("nan")},
        {"name": "u-shaped", "a": "4"},
        {"name": "u-shaped", "b": 4.0},
        {"name": "logit-normal", "std": 0.0},
        {"name": "logit-normal", "std": 20.1},
        {"name": "logit-normal", "mean": 20.1},
        {"name": "logit-normal", "mean": -20.1},
        {"name": "uniform", "a": 4.0},
        {"name": "native"},
        {"name": "native", "interpolant": {"name": "straight"}},
        {"name": "fitted", "smoothing": 0.0},
        {"name": "fitted", "smoothing": 32.1},
        {"name": "fitted", "floor": 0.0},
        {"name": "fitted", "floor": 1.1},
        {"name": "mixture", "parts": [{"name": "fitted"}]},
        {"name": "mixture", "parts": []},
    ],
)
def test_wrong_recipes_of_times_are_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Timesteps).validate_python(recipe)
