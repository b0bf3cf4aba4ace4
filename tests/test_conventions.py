"""Conversions between foreign conventions and canonical velocity, against closed forms and the originals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from flowdistill import flow
from flowdistill.analytic import Mixture, mixture
from flowdistill.conventions import Convention, Linear, Logarithmic, Nearest, Prediction
from flowdistill.interpolants import (
    DDPM,
    EDM,
    LFM,
    VE,
    VP,
    AffinePath,
    Cosine,
    Rectified,
    SubVP,
)
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate

PATHS: list[Any] = [
    Rectified(),
    LFM(sigma_min=1e-3),
    Cosine(),
    VE(sigma_min=0.002, sigma_max=80.0),
    EDM(),
    VP(),
    SubVP(),
    DDPM(),
    DDPM(betas="scaled_linear", beta_start=0.00085, beta_end=0.012),
    DDPM(betas="squaredcos_cap_v2"),
    DDPM(betas="scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True),
]
PREDICTIONS: list[Prediction] = ["velocity", "x0", "eps", "score", "v"]
KEPT = [path for path in PATHS if path.deviation is not None]
EACH_PATH = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


def conventions() -> list[Convention]:
    return [
        Convention(interpolant=path, prediction=prediction, sign=sign)
        for path in PATHS
        for prediction in PREDICTIONS
        if prediction != "v" or path.deviation is not None
        for sign in (1, -1)
    ]


EACH = pytest.mark.parametrize(
    "convention", conventions(), ids=lambda each: f"{each.interpolant.name}-{each.prediction}{each.sign:+d}"
)


def inside(convention: Convention, count: int = 40) -> Tensor:
    """Times from one end of the span to the other, crowded at both."""
    low, high = convention.span
    odds = torch.linspace(math.log(max(low, 1e-7)), math.log(0.5), count, dtype=torch.float64).exp()
    t = torch.cat([odds, 1 - odds])
    return t[(t >= low) & (t <= high)]


def draw(seed: int, count: int, width: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return x0, eps


def predicted(convention: Convention, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a perfect network of this convention returns, from its definition."""
    path = convention.interpolant
    time = path.time_at(t)
    alpha, sigma = (part[:, None] for part in path.alpha_sigma(time))
    d_alpha, d_sigma = (part[:, None] for part in path.rates(time))
    deviation = path.deviation or 1.0
    means = {
        "velocity": d_alpha * x0 + d_sigma * eps,
        "x0": x0,
        "eps": eps,
        "score": -eps / sigma,
        "v": deviation * alpha * eps - sigma * x0 / deviation,
    }
    return convention.sign * means[convention.prediction]


@EACH
def test_a_perfect_network_is_the_velocity_and_back(convention: Convention) -> None:
    t = inside(convention)
    x0, eps = draw(1, len(t))
    z, v = flow.interpolate(x0, eps, t), eps - x0
    out = predicted(convention, x0, eps, t)
    found = convention.canonical(lambda x, label: out, z, t)
    # eps says of v what is left after division by 1 - t, x0 after division by t.
    near = {"x0": 1 / t, "eps": 1 / (1 - t), "score": 1 / (1 - t)}.get(convention.prediction, torch.ones(1))
    assert float(((found - v).abs().amax(1) / near).max()) < 1e-11
    back = convention.output(v, z, t)
    torch.testing.assert_close(back, out, rtol=1e-9, atol=1e-9)


@EACH
def test_single_precision_keeps_six_digits_of_the_velocity(convention: Convention) -> None:
    t = inside(convention)
    x0, eps = draw(2, len(t))
    out = predicted(convention, x0, eps, t).float()
    z = flow.interpolate(x0, eps, t).float()
    found = convention.canonical(lambda x, label: out, z, t).double()
    near = {"x0": 1 / t, "eps": 1 / (1 - t), "score": 1 / (1 - t)}.get(convention.prediction, torch.ones(1))
    size = (out.abs().amax(1) if convention.prediction == "velocity" else torch.ones(1)).clamp(min=1)
    assert float(((found - (eps - x0)).abs().amax(1) / near / size).max()) < 1e-5


@EACH
def test_the_network_sees_its_own_state_and_time(convention: Convention) -> None:
    t = inside(convention)
    x0, eps = draw(3, len(t))
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(x: Tensor, label: Tensor) -> Tensor:
        seen.append((x, label))
        return x

    convention.canonical(spy, flow.interpolate(x0, eps, t), t)
    ((x, label),) = seen
    alpha, sigma = convention.interpolant.alpha_sigma(label)
    torch.testing.assert_close(x, alpha[:, None] * x0 + sigma[:, None] * eps, rtol=1e-9, atol=1e-9)


@EACH_PATH
@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.001, 0.999))
def test_rates_are_derivatives_and_noise_grows(path: AffinePath, share: float) -> None:
    low, high = (float(path.time_at(torch.tensor(end, dtype=torch.float64))) for end in path.span)
    high = min(high, 1e4)
    time = torch.tensor([low + share * (high - low)], dtype=torch.float64)
    if isinstance(path, DDPM):
        time = time.floor().clamp(max=path.steps - 3) + 0.5  # the slope jumps at whole numbers
    step = 1e-5 * max(float(time), 1e-3)
    after, before = path.alpha_sigma(time + step), path.alpha_sigma(time - step)
    for rate, up, down in zip(path.rates(time), after, before, strict=True):
        torch.testing.assert_close(rate, (up - down) / (2 * step), rtol=2e-5, atol=1e-7)
    slope = (path.t_at(time + step) - path.t_at(time - step)) / (2 * step)
    torch.testing.assert_close(path.canonical_rate(time), slope, rtol=2e-5, atol=1e-12)
    assert float(path.wronskian(time)) > 0


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("steps", [2, 50, 1000, 4000])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_every_table_falls(betas: Any, steps: int, zero: bool) -> None:
    path = DDPM(betas=betas, steps=steps, zero_terminal_snr=zero)
    table = path.log_ratios()
    assert bool(table.isfinite().all()) and bool((table.diff() < 0).all())
    t = torch.linspace(*path.span, 301, dtype=torch.float64)
    torch.testing.assert_close(path.t_at(path.time_at(t)), t, rtol=1e-9, atol=1e-9)
    ends = path.time_at(torch.tensor(path.span, dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, steps - 1.0]).double(), rtol=0, atol=1e-3)


@EACH_PATH
def test_own_time_and_canonical_time_are_inverse(path: AffinePath) -> None:
    t = inside(Convention(interpolant=path))
    torch.testing.assert_close(path.t_at(path.time_at(t)), t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_the_variance_is_kept(path: AffinePath) -> None:
    time = path.time_at(inside(Convention(interpolant=path)))
    alpha, sigma = path.alpha_sigma(time)
    assert path.deviation is not None
    torch.testing.assert_close((path.deviation * alpha).square() + sigma.square(), torch.ones_like(time))


@pytest.mark.parametrize(
    "case", json.loads((Path(__file__).parent / "fixtures/interpolant_conversions.json").read_text())
)
def test_recorded_conversions(case: dict[str, Any]) -> None:
    names = {"rectified": Rectified(), "vp(beta 0.1..20)": VP(), "cosine/GVP": Cosine()}
    if case["interpolant"] not in names:
        path: Any = VE(sigma_min=1e-4, sigma_max=1e4)
    else:
        path = names[case["interpolant"]]
    tensor = {
        key: torch.tensor(value, dtype=torch.float64).reshape(-1)
        for key, value in case.items()
        if key != "interpolant"
    }
    time, close = tensor["t"], {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.stack(path.alpha_sigma(time)).flatten()[0], tensor["alpha"][0], **close)
    torch.testing.assert_close(torch.stack(path.alpha_sigma(time)).flatten()[1], tensor["sigma"][0], **close)
    torch.testing.assert_close(torch.stack(path.rates(time)).flatten()[0], tensor["dalpha"][0], **close)
    torch.testing.assert_close(torch.stack(path.rates(time)).flatten()[1], tensor["dsigma"][0], **close)
    torch.testing.assert_close(path.t_at(time), tensor["tau"], **close)
    outputs = {"velocity": "v", "x0": "x0", "eps": "eps", "score": "score"}
    outputs |= {"v": "v_salimans"} if path.deviation else {}
    for prediction, key in outputs.items():
        convention = Convention(interpolant=path, prediction=prediction)  # type: ignore[arg-type]
        out = tensor[key][None]
        found = convention.canonical(lambda x, label, out=out: out, tensor["z"][None], tensor["tau"])
        torch.testing.assert_close(found[0], tensor["v_rect"], rtol=1e-9, atol=1e-9)


def test_edm_is_the_published_preconditioning() -> None:
    """D = c_skip x + c_out F(c_in x; ln(sigma)/4), v = (z - D) / t (arXiv 2405.20320, Prop. 1)."""
    convention = Convention(
        interpolant=EDM(), prediction="v", sign=-1, clock=Logarithmic(scale=0.25), t_min=None, t_max=None
    )
    t = inside(convention)
    z, _ = draw(4, len(t))
    sigma, sd = t / (1 - t), 0.5
    weight = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network(x: Tensor, label: Tensor) -> Tensor:
        return (x @ weight).tanh() * label[:, None].cos()

    norm = (sigma.square() + sd**2).sqrt()[:, None]
    x = z * (1 + sigma)[:, None]
    denoised = sd**2 / norm**2 * x + (sigma[:, None] * sd / norm) * network(x / norm, sigma.log() / 4)
    expected = (z - denoised) / t[:, None]
    torch.testing.assert_close(convention.canonical(network, z, t), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_euler_steps_are_ddim_steps(path: Any) -> None:
    """x' = alpha' x0 + sigma' eps from the predictions at x, for any network."""
    convention = Convention(interpolant=path, prediction="eps")
    low, high = convention.span
    t = torch.linspace(high * 0.999, max(low, 1e-3) * 1.01, 9, dtype=torch.float64)
    s = torch.cat([t[1:], t.new_tensor([max(low, 1e-4)])])
    z, _ = draw(5, len(t))
    v = convention.canonical(lambda x, label: (3 * x).sin(), z, t)
    (alpha, sigma), (alpha_s, sigma_s) = (
        [part[:, None] for part in path.alpha_sigma(path.time_at(each))] for each in (t, s)
    )
    x = z * (alpha + sigma)
    eps = (3 * x).sin()
    stepped = alpha_s * (x - sigma * eps) / alpha + sigma_s * eps
    found = (z + (s - t)[:, None] * v) * (alpha_s + sigma_s)
    torch.testing.assert_close(found, stepped, rtol=1e-8, atol=1e-8)


@EACH
def test_a_mixture_through_any_convention_is_the_mixture(convention: Convention) -> None:
    """A closed-form network of each convention gives the closed-form velocity."""
    truth, t = mixture((2,)), inside(convention)
    z = flow.interpolate(*draw(6, len(t), 2), t)
    v = truth(z, t)

    def network(x: Tensor, label: Tensor) -> Tensor:
        assert label.shape == t.shape
        return convention.output(v, z, t)

    torch.testing.assert_close(convention.canonical(network, z, t), v, rtol=1e-7, atol=1e-7)
    # Tweedie: the score of the canonical marginal is -eps / t.
    score = -flow.eps_from_velocity(z, v, t) / t[:, None]
    torch.testing.assert_close(score, truth.score(z, t), rtol=1e-6, atol=1e-6)


@EACH
def test_the_ends_are_finite_and_continuous(convention: Convention) -> None:
    """Beyond its span the network is asked at the end of it, and the velocity does not jump there."""
    low, high = convention.span
    t = torch.tensor([0.0, low, low + 1e-9, high - 1e-9, high, min(1.0, high + 1e-9), 1.0])
    t = t.double()
    z = draw(7, 1)[0].expand(len(t), 3)
    labels: list[Tensor] = []

    def network(x: Tensor, label: Tensor) -> Tensor:
        labels.append(label)
        return torch.full_like(x, 0.3)

    v = convention.canonical(network, z, t)
    assert bool(v.isfinite().all())
    ends = convention.interpolant.time_at(torch.tensor([low, high], dtype=torch.float64))
    assert float(labels[0].min()) >= float(ends[0]) - 1e-9
    assert float(labels[0].max()) <= float(ends[1]) + 1e-6 * abs(float(ends[1]))
    scale = float(v.abs().max())
    torch.testing.assert_close(v[1], v[2], rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(v[3], v[4], rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(v[4], v[5], rtol=0, atol=1e-4 * scale)


def test_the_start_is_edms() -> None:
    """At t = 1 the denoiser sees sigma_max eps, as the EDM sampler begins."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x, sigma))
        return torch.zeros_like(x)

    convention = Convention(interpolant=VE(sigma_min=0.01, sigma_max=50.0), prediction="x0")
    t = torch.tensor([1.0, 0.999, 0.0], dtype=torch.float64)
    v = convention.canonical(spy, torch.ones(3, 2, dtype=torch.float64), t)
    ((x, sigma),) = seen
    torch.testing.assert_close(sigma, torch.tensor([50.0, 50.0, 0.01]).double())
    torch.testing.assert_close(x[:, 0], torch.tensor([50.0, 50 / 0.999, 1.01]).double())
    torch.testing.assert_close(v[:, 0], torch.tensor([1.0, 1 / 0.999, 101.0]).double())


def test_loss_weights_are_those_of_the_errors() -> None:
    """|de| = (1-t) |dv|, |dx0| = t |dv|, |d vs| = n |dv| (notes on the loss in one currency)."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    norm = (t.square() + (1 - t).square()).sqrt()
    for prediction, expected in (("eps", 1 - t), ("x0", t), ("v", norm), ("velocity", norm / norm)):
        path = VP(time_min=1e-9, beta_max=60.0) if prediction == "v" else Rectified()
        weight = Convention(interpolant=path, prediction=prediction).loss_weight(t)  # type: ignore[arg-type]
        torch.testing.assert_close(weight, expected.square(), rtol=1e-9, atol=1e-12)


@EACH
def test_gradients_of_equal_losses_are_equal(convention: Convention) -> None:
    """weight(t) |dv|^2 has the gradient of the squared error of the output."""
    t = inside(convention, 12)
    x0, eps = draw(8, len(t))
    z, out = flow.interpolate(x0, eps, t), predicted(convention, x0, eps, t)
    found = (out + 0.1 * draw(9, len(t))[0]).requires_grad_()
    native = (found - out).square().sum()
    v = convention.canonical(lambda x, label: found, z, t)
    # The difference to the velocity of the exact output, so that no cancellation hides in v itself.
    exact = convention.canonical(lambda x, label: out, z, t)
    canonical = (convention.loss_weight(t)[:, None] * (v - exact).square()).sum()
    (a,), (b,) = torch.autograd.grad(native, found), torch.autograd.grad(canonical, found)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@EACH_PATH
def test_densities_of_time_convert(path: AffinePath) -> None:
    """A native density becomes one of t that integrates to the same."""
    low, high = path.span
    low, high = low + 0.1 * (high - low), low + 0.9 * (high - low)
    ends = path.time_at(torch.tensor([low, high], dtype=torch.float64))
    native = torch.linspace(float(ends[0]), float(ends[1]), 20_001, dtype=torch.float64)
    t = torch.linspace(low, high, 20_001, dtype=torch.float64)
    width = float(ends[1] - ends[0])

    def density(time: Tensor) -> Tensor:
        return (1 + ((time - ends[0]) / width)) / width

    found = Convention(interpolant=path).density(density, t)  # type: ignore[arg-type]
    left = torch.trapezoid(found * t.square(), t)
    right = torch.trapezoid(density(native) * path.t_at(native).square(), native)
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-6)


def test_guidance_commutes_with_every_conversion() -> None:
    """Guided outputs converted are converted outputs guided, in each channel by its own scale."""
    scale = torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64)
    for convention in conventions():
        t = inside(convention, 9)
        z, _ = draw(10, len(t))
        conditional, null = draw(11, len(t))
        mixed = null + scale * (conditional - null)
        v, v_null, v_mixed = (
            convention.canonical(lambda x, label, out=out: out, z, t) for out in (conditional, null, mixed)
        )
        guided = v_null + scale * (v - v_null)
        size = float(v_mixed.abs().max())
        torch.testing.assert_close(guided, v_mixed, rtol=1e-9, atol=1e-12 * size)


def test_straight_couplings_take_one_step() -> None:
    """x0 = A eps + b with A symmetric positive definite: v = (I - A) eps - b, one Euler step is exact."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    a, b = root @ root.T + 0.1 * torch.eye(4), torch.randn(4, generator=generator, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        tau = float(t[0])
        eps = torch.linalg.solve((1 - tau) * a + tau * eye, (x - (1 - tau) * b).T).T
        return eps @ (eye - a) - b

    eps = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    for steps in (1, 3, 10):
        found = integrate(field, eps, uniform(steps), SOLVERS["euler"])
        torch.testing.assert_close(found, eps @ a + b, rtol=1e-10, atol=1e-10)


def test_labels_of_the_clocks() -> None:
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    path = Rectified()
    torch.testing.assert_close(Linear(scale=999.0).label(t, path), 999 * t)
    torch.testing.assert_close(Linear(scale=999.0, reversed=True).label(t, path), 999 * (1 - t))
    torch.testing.assert_close(Logarithmic(scale=0.25).label(t, path), t.log() / 4)
    torch.testing.assert_close(Logarithmic(over=2.0).label(t, path), (t / 2).log())


def test_the_nearest_entry_is_edms_choice() -> None:
    """argmin_j |sigma - u_j| over the noise levels u of the iDDPM table, by brute force."""
    path = DDPM(betas="squaredcos_cap_v2")
    levels = (-path.log_ratios()).exp()
    assert float(levels[0]) == pytest.approx(0.006422, rel=1e-3)
    assert float(levels[-1]) == pytest.approx(20291.2, rel=1e-3)
    low, high = path.span
    generator = torch.Generator().manual_seed(1)
    t = low + (high - low) * torch.rand(500, generator=generator, dtype=torch.float64)
    sigma = t / (1 - t)
    expected = (sigma[:, None] - levels).abs().argmin(1)
    torch.testing.assert_close(Nearest().label(path.time_at(t), path), expected.double())


def test_a_gaussian_table_has_the_closed_form_velocity() -> None:
    """The eps-prediction of N(m, s^2) on a DDPM table, at fractional times, against the closed form."""
    truth = Mixture(torch.ones(1), torch.full((1, 3), 0.4), torch.full((1, 3), 0.5))
    path = DDPM(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
    convention = Convention(interpolant=path, prediction="eps")
    t = torch.linspace(*convention.span, 57, dtype=torch.float64)
    z = flow.interpolate(*draw(12, len(t)), t)

    def network(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = (part[:, None] for part in path.alpha_sigma(time))
        return sigma * (x - alpha * 0.4) / (alpha.square() * 0.25 + sigma.square())

    torch.testing.assert_close(convention.canonical(network, z, t), truth(z, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "v"}, "constant variance"),
        ({"clock": {"name": "nearest"}}, "needs interpolant 'ddpm'"),
        ({"clock": {"name": "logarithmic"}}, "needs noise levels"),
        ({"interpolant": {"name": "ddpm"}, "clock": {"name": "linear", "reversed": True}}, "no end"),
        ({"t_min": 0.5, "t_max": 0.4}, "less than"),
        ({"sign": 0}, "1"),
    ],
)
def test_impossible_conventions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Convention.model_validate_json(json.dumps(change))
