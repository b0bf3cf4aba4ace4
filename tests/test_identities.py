"""Identities of flows that tie the modules together; closed forms on both sides, over random inputs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp

from flowdistill import data, flow, randomness, teachers
from flowdistill.analytic import Mixture, gaussian, mixture
from flowdistill.conventions import Convention, Linear
from flowdistill.schedule import Schedule, shifted, uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.teachers.canonical import Canonical

TEACHERS = Path(__file__).parent / "fixtures" / "teachers"
TYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spread(t: float, s: float) -> float:
    """Standard deviation of x_t for data of standard deviation s."""
    return math.hypot((1 - t) * s, t)


def flow_map(x: Tensor, start: float, stop: float, mean: float, s: float) -> Tensor:
    """Where the flow of N(mean, s^2) carries x from time `start` to `stop`."""
    return (1 - stop) * mean + spread(stop, s) / spread(start, s) * (x - (1 - start) * mean)


def quantile_map(flow_: Mixture, x: Tensor, start: float, stop: float) -> Tensor:
    """The same of a mixture in one dimension, where the flow keeps quantiles; by bisection."""
    weights, means, stds = flow_.log_weights.exp(), flow_.means.flatten(), flow_.stds.flatten()

    def share(y: Tensor, t: float) -> Tensor:
        width = ((1 - t) ** 2 * stds**2 + t**2).sqrt()
        return (weights * torch.special.ndtr((y[:, None] - (1 - t) * means) / width)).sum(1)

    wanted = share(x, start)
    low, high = torch.full_like(x, -20), torch.full_like(x, 20)
    for _ in range(80):
        middle = (low + high) / 2
        below = share(middle, stop) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


times = st.lists(st.floats(0.02, 1.0), min_size=3, max_size=3, unique=True).map(sorted)


@settings(max_examples=20, deadline=None)
@given(times)
def test_flow_maps_compose_and_invert(rst: list[float]) -> None:
    r, s, t = rst
    x, field = normal(1, 9), mixture((1,))
    whole = quantile_map(field, x, t, r)
    parts = quantile_map(field, quantile_map(field, x, t, s), s, r)
    torch.testing.assert_close(parts, whole, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(quantile_map(field, whole, r, t), x, atol=1e-6, rtol=1e-6)


def test_a_fine_solver_ends_at_the_quantile_map() -> None:
    field, eps = mixture((1,)), normal(2, 50, 1)
    found = integrate(field, eps, uniform(200), SOLVERS["rk4"])
    torch.testing.assert_close(found, field.flow_map(eps), atol=1e-5, rtol=1e-5)


@TYPES
@settings(max_examples=25, deadline=None)
@given(rst=times, mean=st.floats(-2, 2), s=st.floats(0.1, 3))
def test_one_step_with_the_average_velocity_is_exact(
    dtype: torch.dtype, rst: list[float], mean: float, s: float
) -> None:
    """u(x, r, t) = (x_t - x_r) / (t - r); averages split as (t - r) u = (s - r) u' + (t - s) u''."""
    r, m, t = rst
    x = normal(3, 7, dtype=dtype)

    def average(y: Tensor, low: float, high: float) -> Tensor:
        return (y - flow_map(y, high, low, mean, s)) / (high - low)

    at_m = flow_map(x, t, m, mean, s)
    whole, upper, lower = average(x, r, t), average(x, m, t), average(at_m, r, m)
    close = 1e-10 if dtype is torch.float64 else 1e-4
    size = 1 + float(x.abs().max()) + abs(mean)
    error = ((t - r) * whole - (m - r) * lower - (t - m) * upper).abs().max()
    assert float(error) < close * size
    torch.testing.assert_close(x - (t - r) * whole, flow_map(x, t, r, mean, s), atol=close * size, rtol=0)


@settings(max_examples=25, deadline=None)
@given(times, st.floats(-2, 2), st.floats(0.2, 3))
def test_the_average_velocity_obeys_meanflows_identity(rst: list[float], mean: float, s: float) -> None:
    """u = v - (t - r) (v du/dx + du/dt) (arXiv 2505.13447, eq. 6), and u tends to v as r tends to t."""
    r, _, t = rst
    parameters = torch.tensor([mean, s], dtype=torch.float64)
    field = Mixture(torch.ones(1), *parameters.reshape(2, 1, 1).expand(2, 1, 3))
    x = normal(4, 5, 3)
    low = torch.tensor(r, dtype=torch.float64)

    def average(y: Tensor, high: Tensor) -> Tensor:
        width = lambda at: (((1 - at) * s) ** 2 + at**2).sqrt()  # noqa: E731
        end = (1 - low) * mean + width(low) / width(high) * (y - (1 - high) * mean)
        return (y - end) / (high - low)

    v = field(x, torch.full((5,), t, dtype=torch.float64))
    now = torch.tensor(t, dtype=torch.float64)
    u, along = jvp(average, (x, now), (v, torch.ones_like(now)))
    torch.testing.assert_close(u, v - (t - r) * along, atol=1e-8, rtol=1e-8)
    near = (x - flow_map(x, t, t - 1e-6, mean, s)) / 1e-6
    torch.testing.assert_close(near, v, atol=1e-3, rtol=1e-3)


def test_rf_solver_is_the_midpoint_rule() -> None:
    """x + h v + h^2 / 2 (v_mid - v) / (h / 2), RF-Solver's second order step (arXiv 2411.04746)."""
    field, eps = mixture((2,)), normal(5, 20, 2)
    grid = uniform(8)
    x = eps
    for t, s in zip(grid.times, grid.times[1:], strict=False):
        h = s - t
        v = field(x, x.new_full((len(x),), t))
        middle = field(x + 0.5 * h * v, x.new_full((len(x),), t + 0.5 * h))
        x = x + h * v + 0.5 * h * h * (middle - v) / (0.5 * h)
    torch.testing.assert_close(integrate(field, eps, grid, SOLVERS["midpoint"]), x, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_there_and_back_converges_at_the_order_of_the_solver(name: str, order: int) -> None:
    """The same flow run in reverse time from data to noise; both ways err by O(h^order)."""
    field, eps = mixture((1,)), normal(6, 40, 1)

    def error(steps: int) -> float:
        solver, grid = SOLVERS[name], uniform(steps)
        x0 = integrate(field, eps, grid, solver)
        back = integrate(lambda x, s, y: -field(x, 1 - s, y), x0, grid, solver)
        return float((back - eps).abs().mean())

    coarse, fine = (64, 256) if order < 4 else (32, 128)
    slope = math.log(error(coarse) / error(fine)) / math.log(fine / coarse)
    assert slope > order - 0.35


@pytest.mark.parametrize("convention", [
    Convention(sign=-1),
    Convention(clock=Linear(reversed=True)),
    Convention(sign=-1, clock=Linear(scale=1000.0, reversed=True)),
])  # fmt: skip
def test_a_foreign_sign_and_clock_leave_the_samples_alone(convention: Convention) -> None:
    """A network with another sign and clock, and the card that says so, is the same field."""
    truth, eps = mixture((2,)), normal(7, 30, 2)

    class Theirs(torch.nn.Module):
        def forward(self, x: Tensor, label: Tensor, labels: Tensor | None) -> Tensor:
            clock = convention.clock
            assert isinstance(clock, Linear)
            time = label / clock.scale
            v: Tensor = truth(x, 1 - time if clock.reversed else time)
            return convention.sign * v

    grid = uniform(7)
    found = integrate(Canonical(Theirs(), convention), eps, grid, SOLVERS["heun"])
    torch.testing.assert_close(found, integrate(truth, eps, grid, SOLVERS["heun"]), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, math.exp(1.15)])
@settings(max_examples=25, deadline=None)
@given(inner=st.lists(st.floats(0.01, 0.99), max_size=6, unique=True))
def test_times_survive_a_scheduler_that_shifts_them(shift: float, inner: list[float]) -> None:
    """What diffusers makes of the sigmas it is given are the times that were meant."""
    grid = Schedule((1.0, *sorted(inner, reverse=True), 0.0), "any")
    again = [shift * s / (1 + (shift - 1) * s) for s in grid.sigmas(shift)]
    assert again == pytest.approx(grid.sigmas(), abs=1e-12)
    assert shifted(5, shift).sigmas(shift) == pytest.approx(uniform(5).sigmas(), abs=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_diffusers_reads_the_times_back(dynamic: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    options = {"use_dynamic_shifting": True} if dynamic else {"shift": 3.0}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    shift = math.exp(0.8) if dynamic else 3.0
    grid = Schedule((1.0, 0.83, 0.47, 0.12, 0.0), "any")
    scheduler.set_timesteps(sigmas=grid.sigmas(shift), mu=0.8 if dynamic else None)
    assert scheduler.sigmas.tolist() == pytest.approx(grid.times, abs=1e-6)


@pytest.mark.parametrize("name", ["edm", "sit", "ddpm"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    """Per-sample times and labels; noise of an index is the same in any company."""
    model = teachers.load(TEACHERS / f"{name}.safetensors")
    x = randomness.noise(1, range(6), (1, 8, 8))
    t = torch.tensor([0.0, 0.05, 0.4, 0.7, 0.97, 1.0])
    labels = torch.tensor([0, 9, 3, 4, 1, 7])
    together = model.network(x, t, labels)
    alone = torch.cat([model.network(x[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(randomness.noise(1, [4, 2], (1, 8, 8)), x[[4, 2]], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["edm", "sit", "ddpm"])
def test_the_state_keeps_its_type(name: str) -> None:
    model = teachers.load(TEACHERS / f"{name}.safetensors")
    x, t, labels = normal(8, 2, 1, 8, 8), torch.tensor([0.3, 0.8]).double(), torch.tensor([1, 2])
    v = model.network(x, t, labels)
    assert v.dtype is torch.float64
    torch.testing.assert_close(v.float(), model.network(x.float(), t.float(), labels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["edm", "sit", "ddpm"])
def test_foreign_teachers_denoise_the_digits(name: str) -> None:
    """|x - t v - x0| is less than |x - x0| at every t, and grows with it."""
    model = teachers.load(TEACHERS / f"{name}.safetensors")
    x0, labels = data.dataset("digits").batch(torch.arange(64))
    eps, errors = randomness.noise(9, range(64), (1, 8, 8)), []
    for level in (0.1, 0.3, 0.5, 0.7, 0.9):
        t = torch.full((64,), level)
        x = flow.interpolate(x0, eps, t)
        found = flow.x0_from_velocity(x, model.field(x, t, labels), t)
        errors.append(float((found - x0).square().mean()))
        assert errors[-1] < 0.5 * float((x - x0).square().mean())
    assert errors == sorted(errors)


def test_gaussian_samples_of_any_solver_have_the_data_s_moments() -> None:
    field, eps = gaussian((2,)), normal(10, 4000, 2)
    x0 = integrate(field, eps, uniform(64), SOLVERS["rk4"])
    torch.testing.assert_close(x0, field.flow_map(eps), atol=1e-6, rtol=1e-6)
