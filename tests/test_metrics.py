"""Metrics against closed forms, other people's arithmetic and simulated coverage."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from flowdistill import foreign
from flowdistill.analytic import Mixture, gaussian, ring
from flowdistill.evaluation import metrics
from flowdistill.randomness import noise
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate


def spread(dimensions: int) -> Tensor:
    """Standard deviations that fall over two decades, as those of real features do."""
    return torch.logspace(0, -1, dimensions, dtype=torch.float64)


def rotation(dimensions: int, seed: int) -> Tensor:
    matrix = noise(seed, range(dimensions), (dimensions,)).double()
    return torch.linalg.qr(matrix).Q


# --- Fréchet distance -----------------------------------------------------------------------------


def test_frechet_of_commuting_gaussians_is_the_closed_form() -> None:
    stds1, stds2 = spread(7), spread(7).flip(0) * 1.5
    mean1, mean2 = torch.zeros(7), torch.arange(7).double() / 10
    turn = rotation(7, 1)
    covariances = [turn @ torch.diag(stds**2) @ turn.T for stds in (stds1, stds2)]
    expected = float(((mean1 - mean2) ** 2).sum() + ((stds1 - stds2) ** 2).sum())
    found = metrics.frechet(mean1, covariances[0], mean2, covariances[1])
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_of_gaussians_that_do_not_commute() -> None:
    # For 2 x 2 matrices tr (A)^(1/2) = (tr A + 2 det(A)^(1/2))^(1/2).
    first = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    second = torch.tensor([[0.5, -0.2], [-0.2, 3.0]]).double()
    product = first @ second
    cross = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = float(first.trace() + second.trace() - 2 * cross)
    zero = torch.zeros(2)
    assert metrics.frechet(zero, first, zero, second) == pytest.approx(expected, rel=1e-12)
    assert metrics.frechet(zero, second, zero, first) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "dimensions"), [(2000, 64), (400, 128), (60, 64)])
def test_frechet_equals_the_arithmetic_of_torch_fidelity(count: int, dimensions: int) -> None:
    """torch-fidelity 0.4 takes the eigenvalues of the product itself."""
    mixing = noise(0, range(dimensions), (dimensions,)) / 8
    real = noise(1, range(count), (dimensions,)) @ mixing
    made = (noise(2, range(count), (dimensions,)) + 0.3).relu()
    means = [x.double().numpy().mean(axis=0) for x in (real, made)]
    covariances = [np.cov(x.double().numpy(), rowvar=False) for x in (real, made)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real
    shift = means[0] - means[1]
    expected = shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots.sum()
    found = metrics.frechet(*metrics.moments(real), *metrics.moments(made))
    assert found == pytest.approx(expected, rel=1e-6)
    assert metrics.Reference(*metrics.moments(real)).estimate(made).value == pytest.approx(found)


def test_frechet_of_a_distribution_from_itself_is_nothing() -> None:
    features = noise(0, range(500), (16,))
    reference = metrics.Reference(*metrics.moments(features))
    assert reference.distance(*metrics.moments(features)) == pytest.approx(0.0, abs=1e-10)
    found = reference.estimate(features)
    assert 0.0 <= found.low <= found.value <= found.high < 1e-5


def test_features_that_never_fire_do_not_disturb() -> None:
    """Dead units have variance 0, in the reference or in the samples or in both; so have mixtures."""
    live, turn = noise(0, range(800), (6,)).double(), rotation(9, 4)
    reference = metrics.Reference(torch.zeros(6), torch.eye(6))
    variances = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0, 2]).double()
    padded = metrics.Reference(torch.zeros(9), turn @ torch.diag(variances) @ turn.T)
    plain = reference.estimate(live)
    found = padded.estimate(torch.cat([live, torch.zeros(800, 3)], dim=1) @ turn.T)
    # The unit that fires in the reference alone adds a constant, which has no error of its own.
    assert found.value == pytest.approx(plain.value + 2.0)
    reach = [(each.high**0.5 - each.low**0.5) * each.value**0.5 for each in (plain, found)]
    assert reach[1] == pytest.approx(reach[0], rel=1e-5)


def test_the_interval_is_that_of_a_jackknife() -> None:
    """The influence function is the limit of leaving out one sample at a time."""
    stds = spread(5)
    features = 0.3 + 1.2 * stds * noise(3, range(300), (5,))
    reference = metrics.Reference(torch.zeros(5), torch.diag(stds**2))
    keep = ~torch.eye(300, dtype=torch.bool)
    values = torch.tensor([reference.distance(*metrics.moments(features[row])) for row in keep])
    error = float((299 / 300 * ((values - values.mean()) ** 2).sum()).sqrt())
    found = reference.estimate(features)
    reach = (found.high**0.5 - found.low**0.5) / 2
    assert reach * 2 * found.value**0.5 == pytest.approx(1.96 * error, rel=0.03)


@pytest.mark.parametrize(
    ("dimensions", "count", "shift", "scale"),
    [(2, 300, 0.8, 0.7), (2, 300, 0.1, 1.05), (16, 300, 0.3, 1.0), (16, 300, 0.0, 1.0)],
)
def test_the_interval_covers_the_expectation_at_its_own_n(
    dimensions: int, count: int, shift: float, scale: float
) -> None:
    """95 % nominal; at the null the interval is too wide by design, never too narrow."""
    repeats, stds = 400, spread(dimensions)
    reference = metrics.Reference(torch.zeros(dimensions), torch.diag(stds**2))
    draws = noise(7, range(repeats), (count, dimensions)).double()
    estimates = [reference.estimate(part) for part in (shift + scale * draws) * stds]
    expected = sum(each.value for each in estimates) / repeats
    covered = sum(each.low <= expected <= each.high for each in estimates) / repeats
    assert covered >= 0.92
    if shift > 0.1:
        assert covered <= 0.985
    # A bootstrap around the plug-in value would miss: the bias is not small.
    truth = float(((shift * stds) ** 2).sum() + ((1 - scale) ** 2 * stds**2).sum())
    assert expected > truth


# --- means, shares, ratios ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [40, 2500])
def test_intervals_of_a_skewed_mean_cover_it(count: int) -> None:
    repeats = 300
    uniforms = torch.special.ndtr(noise(5, range(repeats), (count,)).double())
    values = -(-uniforms).log1p()  # exponential, mean 1
    estimates = [metrics.mean_interval(row, seed) for seed, row in enumerate(values)]
    covered = sum(each.low <= 1.0 <= each.high for each in estimates) / repeats
    assert 0.90 <= covered <= 0.985
    assert {each.method for each in estimates} == {"bootstrap (BCa)" if count == 40 else "normal"}


def test_the_bootstrap_leans_towards_the_long_tail() -> None:
    values = torch.special.ndtr(noise(5, [0], (60,)).double())[0].neg().log1p().neg()
    found = metrics.mean_interval(values)
    normal = 1.96 * float(values.std()) / 60**0.5
    assert found.high - found.value > 1.05 * (found.value - found.low)
    assert (found.high - found.low) / 2 == pytest.approx(normal, rel=0.15)
    assert found == metrics.mean_interval(values), "the draws are keyed"
    assert found != metrics.mean_interval(values, seed=1)


def test_the_bootstrap_is_scipys() -> None:
    """Ends in standard errors, averaged over 20 data sets: what is left is the draws' own noise."""
    off = []
    for values in torch.special.ndtr(noise(5, range(20), (30,)).double()).neg().log1p().neg():
        found = metrics.mean_interval(values)
        other = scipy.stats.bootstrap(
            (values.numpy(),), np.mean, n_resamples=4000, method="BCa", rng=np.random.default_rng(0)
        ).confidence_interval
        error = float(values.std()) / 30**0.5
        off.append([(found.low - other.low) / error, (found.high - other.high) / error])
    assert np.abs(np.mean(off, axis=0)).max() < 0.035


def test_the_mean_of_one_value_has_no_interval_and_equal_values_have_none_to_speak_of() -> None:
    with pytest.raises(ValueError, match="no interval"):
        metrics.mean_interval(torch.ones(1))
    found = metrics.mean_interval(torch.full((5,), 0.25))
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)


def test_pairing_removes_what_the_samples_share() -> None:
    difficulty, jitter, other = noise(0, range(3), (256,))
    a = difficulty + 0.01 * jitter
    b = difficulty + 0.01 * other + 0.02
    paired = metrics.paired_difference(a, b)
    assert paired.high < 0 < -paired.low
    assert paired.value == pytest.approx(float((a - b).mean()), rel=1e-4)
    assert metrics.paired_difference(b, a).low > 0
    alone = [metrics.mean_interval(each) for each in (a, b)]
    assert alone[0].high > alone[1].low, "unpaired, the two cannot be told apart"
    with pytest.raises(ValueError, match="paired"):
        metrics.paired_difference(a, b[:-1])


def test_wilson_interval_of_a_share() -> None:
    labels = torch.zeros(10, dtype=torch.int64)
    found = metrics.accuracy(torch.tensor([0] * 9 + [1]), labels)
    # Newcombe 1998, method 3: 9 of 10.
    assert (found.value, found.n) == (0.9, 10)
    assert found.low == pytest.approx(0.5958, abs=1e-4)
    assert found.high == pytest.approx(0.9821, abs=1e-4)
    perfect = metrics.accuracy(labels, labels)
    assert perfect.high == pytest.approx(1.0)
    assert perfect.low == pytest.approx(10 / (10 + 1.959964**2))


def test_a_ratio_of_means_is_covered() -> None:
    repeats, count = 300, 40
    size = 1 + noise(0, range(repeats), (count,)).double() ** 2
    part = 0.25 * size + 0.1 * noise(1, range(repeats), (count,)).double()
    estimates = [metrics.ratio_interval(p, s) for p, s in zip(part, size, strict=True)]
    covered = sum(each.low <= 0.25 <= each.high for each in estimates) / repeats
    assert 0.90 <= covered <= 0.985
    assert estimates[0].value == pytest.approx(float(part[0].mean() / size[0].mean()))


# --- per sample -----------------------------------------------------------------------------------


def test_endpoint_error_is_a_root_mean_square_over_the_dimensions() -> None:
    x, reference = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    x[1] = 0.5
    x[1, 0, 0, 0] = -0.5
    assert metrics.endpoint_error(x, reference).tolist() == [0.0, 0.5]


def path(flow: Mixture, steps: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations from the straight line along Euler's paths of a flow, and ||Z1 - Z0||^2."""
    velocities: list[Tensor] = []
    schedule, start = uniform(steps), noise(0, range(count), flow.shape).double()
    end = integrate(flow, start, schedule, SOLVERS["euler"], on_step=lambda i, t, x, v: velocities.append(v))
    return metrics.deviations(schedule.times, velocities, start, end)


def test_a_straight_coupling_has_straightness_0() -> None:
    """To a point mass all paths are straight: v = (x - mu) / t."""
    point = Mixture(torch.ones(1), torch.tensor([[0.5, -1.0]]), torch.zeros(1, 2))
    squared, plain, displacement = path(point, 16, 64)
    assert float((squared / displacement).max()) < 1e-20
    assert float((plain / displacement.sqrt()).max()) < 1e-10


def bends(flow: Mixture) -> tuple[Tensor, Tensor]:
    """Times [T] and c' - (1 - s), where x_t = (1 - t) mu + c(t) eps with c^2 = (1 - t)^2 s^2 + t^2."""
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    u, s = t.reshape(-1, *[1] * len(flow.shape)), flow.stds[0]
    return t, (u - (1 - u) * s**2) / ((1 - u) ** 2 * s**2 + u**2).sqrt() - (1 - s)


def test_deviations_of_a_gaussian_are_the_closed_form() -> None:
    flow, eps = gaussian((2,)), noise(0, range(32), (2,)).double()
    squared, plain, displacement = path(flow, 400, 32)
    t, off = bends(flow)
    squares = (off[:, None] * eps).square().sum(2)  # [T, 32]
    assert torch.allclose(squared, torch.trapezoid(squares, t, dim=0), rtol=0.02)
    assert torch.allclose(plain, torch.trapezoid(squares.sqrt(), t, dim=0), rtol=0.02)
    exact = ((eps - flow.flow_map(eps)) ** 2).sum(1)
    assert torch.allclose(displacement, exact, rtol=0.02, atol=1e-3)


def test_every_definition_of_straightness_is_the_closed_form() -> None:
    """Of a Gaussian whose deviations all are s, each splits into an integral and a moment of the noise."""
    s, n = 0.3, 400
    mean = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 2, 2)
    flow = Mixture(torch.ones(1), mean, torch.full_like(mean, s))
    found = metrics.straightness(*path(flow, 1000, n), 12)
    eps, (t, off) = noise(0, range(n), flow.shape).double().flatten(1), bends(flow)
    off, squares = off[:, 0, 0, 0], eps.square().sum(1)
    total = float(torch.trapezoid(off.square(), t) * squares.mean())
    expected = {
        "straightness": total,
        "straightness_per_dim": total / 12,
        "straightness_norm": float(torch.trapezoid(off.abs(), t) * squares.sqrt().mean()),
        "curvature": total / float(((1 - s) * eps - mean.flatten()).square().sum(1).mean()),
    }
    assert {name: each.value for name, each in found.items()} == pytest.approx(expected, rel=0.005)
    for each in found.values():
        assert each.n == n and each.low < each.value < each.high


def test_straightness_per_dimension_is_rf_plus_pluss() -> None:
    """mean_i ||(z_i - z_{i+1}) / (1/N) - (z_first - z_last)||^2, a mean over pixels, of uniform steps."""
    flow, steps, count = gaussian((3, 2, 2)), 5, 40
    z = [noise(0, range(count), flow.shape).double()]
    for i in range(steps):
        t = torch.full((count,), 1 - i / steps, dtype=torch.float64)
        z.append(z[-1] - flow(z[-1], t) / steps)
    off = [(z[i] - z[i + 1]) / (1 / steps) - (z[0] - z[-1]) for i in range(steps)]
    theirs = torch.stack([each.square().mean((1, 2, 3)) for each in off]).mean(0)
    squared, plain, displacement = path(flow, steps, count)
    torch.testing.assert_close(squared / 12, theirs)
    found = metrics.straightness(squared, plain, displacement, 12)
    assert found["straightness_per_dim"].value == pytest.approx(float(theirs.mean()))
    norms = torch.stack([each.flatten(1).norm(dim=1) for each in off]).mean(0)  # SlimFlow's
    assert found["straightness_norm"].value == pytest.approx(float(norms.mean()))


def test_samples_that_are_their_noise_have_no_curvature() -> None:
    nothing = torch.zeros(4, dtype=torch.float64)
    found = metrics.straightness(nothing, nothing, nothing, 2)
    assert list(found) == ["straightness", "straightness_per_dim", "straightness_norm"]


def test_one_step_is_straight_and_a_curved_flow_is_not() -> None:
    one, many = (path(ring(), steps, 128)[0] for steps in (1, 32))
    assert float(one.max()) < 1e-20
    assert float(many.min()) >= 0.0
    assert float(many.mean()) > 0.1


# --- quantiles, PSNR, moments in parts ------------------------------------------------------------


@pytest.mark.parametrize(("count", "share"), [(40, 0.5), (41, 0.5), (200, 0.95), (73, 0.95), (512, 0.95)])
def test_the_interval_of_a_quantile_is_binomial_and_as_narrow_as_can_be(count: int, share: float) -> None:
    found = metrics.quantile_interval(torch.arange(count).flip(0), share)
    assert found is not None and found.method == "order statistics"
    below = scipy.stats.binom(count, share)
    low, high = int(found.low), int(found.high)  # each value is its own place
    assert below.cdf(low) <= 0.025 < below.cdf(low + 1)
    assert below.sf(high) <= 0.025 < below.sf(high - 1)
    assert found.value == pytest.approx(float(np.quantile(np.arange(count), share)))


def test_the_interval_of_a_quantile_covers_it_whatever_the_distribution() -> None:
    draws = noise(11, range(500), (100,)).double().exp()
    for share, truth in ((0.5, 1.0), (0.95, float(np.exp(1.6448536)))):
        estimates = [metrics.quantile_interval(row, share) for row in draws]
        covered = sum(each is not None and each.low <= truth <= each.high for each in estimates) / 500
        assert covered >= 0.94


def test_too_few_values_have_no_interval_of_a_quantile() -> None:
    assert metrics.quantile_interval(torch.arange(5), 0.5) is None
    assert metrics.quantile_interval(torch.arange(6), 0.5) is not None
    assert metrics.quantile_interval(torch.arange(71), 0.95) is None
    assert metrics.quantile_interval(torch.arange(72), 0.95) is not None


def test_psnr() -> None:
    """A constant error of 0.2 in a range of 2 is 20 dB; what is outside the range counts as its end."""
    x = torch.zeros(3, 1, 4, 4)
    other = torch.stack([x[0] + 0.2, x[1], x[2] + 0.02])
    assert metrics.psnr(x, other).tolist() == pytest.approx([20.0, 100.0, 40.0], abs=1e-4)
    assert metrics.psnr(x + 1, x + 3).tolist() == [100.0] * 3


@pytest.mark.parametrize("size", [1, 7, 64, 500])
def test_moments_are_the_same_in_parts_of_any_size(size: int) -> None:
    features = 100 + noise(0, range(500), (12,)) @ noise(1, range(12), (12,))
    seen = metrics.Moments()
    for part in features.split(size):
        seen.add(part)
    for found, expected in zip(seen.result(), metrics.moments(features), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


def test_frechet_is_torch_fidelitys_own() -> None:
    """Their function on the same features, the means in float64 as ours are."""
    foreign.load("torch_fidelity")
    theirs = importlib.import_module("torch_fidelity.metric_fid")
    real, made = noise(1, range(700), (96,)), (noise(2, range(600), (96,)) + 0.2).relu()
    statistics = [theirs.fid_features_to_statistics(each.double()) for each in (made, real)]
    expected = theirs.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    found = metrics.Reference(*metrics.moments(real)).estimate(made)
    assert found.value == pytest.approx(expected, rel=1e-6)


def test_the_influence_on_the_frechet_distance_is_that_of_leaving_out() -> None:
    reference = metrics.Reference(torch.zeros(4), torch.diag(spread(4) ** 2))
    features = 0.3 + 1.2 * spread(4) * noise(3, range(400), (4,))
    found, influence = reference.measure(features)
    keep = ~torch.eye(400, dtype=torch.bool)
    without = torch.tensor([reference.distance(*metrics.moments(features[row])) for row in keep]).double()
    pseudo = 399 * (found.value - without)
    assert float(torch.corrcoef(torch.stack([influence, pseudo]))[0, 1]) > 0.999
    assert float(influence.std() / pseudo.std()) == pytest.approx(1.0, rel=0.02)
    assert float(influence.mean()) == pytest.approx(0.0, abs=1e-12)
