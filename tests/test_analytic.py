"""The oracles themselves: against samples, against autograd, and against each other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from flowdistill.analytic import Mixture, gaussian, mixture, ring
from flowdistill.errors import UsageError
from flowdistill.flow import interpolate, velocity
from flowdistill.randomness import noise
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate

FIXTURES = Path(__file__).parent / "fixtures"
FLOWS = {
    "gaussian-2": gaussian(),
    "gaussian-1": gaussian((1,)),
    "gaussian-image": gaussian((1, 2, 2)),
    "mixture-1": mixture((1,)),
    "mixture-2": mixture(),
    "mixture-image": mixture((2, 1, 2)),
    "ring": ring(),
}
every_flow = pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS.keys())


def times(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(0.02, 0.98, count, dtype=dtype)


@every_flow
def test_velocity_is_the_conditional_mean_of_the_target(flow: Mixture) -> None:
    """E[(eps - x0 - v(x_t, t)) (1, x_t, x_t^2)] = 0 within 5 standard errors."""
    count = 20_000
    x0, components = flow.data(range(count), seed=1)
    x0, eps = x0.double(), noise(2, range(count), flow.shape).double()
    t = times(count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    x_t = interpolate(x0, eps, t)
    for labels in (None, components):
        residual = velocity(x0, eps) - flow(x_t, t, labels)
        for power in range(3):
            terms = (residual * x_t**power).flatten(1)
            error = terms.mean(0).abs() / (terms.std(0) / math.sqrt(count))
            assert float(error.max()) < 5, f"x^{power}"


def log_density(flow: Mixture, x: Tensor, t: Tensor) -> Tensor:
    """log p_t(x) [B] by torch.distributions, sample by sample."""
    rows = []
    for point, time in zip(x, t, strict=True):
        scale = (((1 - time) * flow.stds) ** 2 + time**2).sqrt()
        parts = Independent(Normal((1 - time) * flow.means, scale), point.ndim)
        rows.append(MixtureSameFamily(Categorical(logits=flow.log_weights), parts).log_prob(point))
    return torch.stack(rows)


@every_flow
def test_score_is_the_gradient_of_the_log_density(flow: Mixture) -> None:
    x = (1.5 * noise(0, range(12), flow.shape)).double().requires_grad_()
    t = times(12)
    (gradient,) = torch.autograd.grad(log_density(flow, x, t).sum(), x)
    torch.testing.assert_close(flow.score(x.detach(), t), gradient)


@every_flow
@pytest.mark.parametrize("labelled", [False, True])
def test_velocity_and_score_say_the_same(flow: Mixture, labelled: bool) -> None:
    """score = -E[eps | x_t] / t = -(x + (1 - t) v) / t."""
    x, t = noise(0, range(50), flow.shape).double(), times(50)
    labels = torch.arange(50) % len(flow.means) if labelled else None
    time = t.reshape(-1, *[1] * len(flow.shape))
    expected = -(x + (1 - time) * flow(x, t, labels)) / time
    torch.testing.assert_close(flow.score(x, t, labels), expected)


@every_flow
def test_float32_is_as_good_as_its_digits(flow: Mixture) -> None:
    x, t = noise(0, range(100), flow.shape), times(100, torch.float32)
    v = flow(x, t)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v.double(), flow(x.double(), t.double()), rtol=1e-3, atol=1e-3)


@every_flow
def test_at_the_ends_the_velocity_is_known(flow: Mixture) -> None:
    x = noise(0, range(30), flow.shape).double()
    mean = (flow.log_weights.exp().reshape(-1, *[1] * len(flow.shape)) * flow.means).sum(0)
    torch.testing.assert_close(flow(x, torch.ones(30)), x - mean)  # all that is known is the mean
    x0 = flow.data(range(30), 0)[0].double()
    torch.testing.assert_close(flow(x0, torch.zeros(30)), -x0)  # noise of mean 0, and the data


@pytest.mark.parametrize("name", ["gaussian-2", "gaussian-image", "mixture-1"])
def test_flow_map_is_the_end_of_the_ode(name: str) -> None:
    flow = FLOWS[name]
    eps = noise(0, range(64), flow.shape).double()
    end = integrate(flow, eps, uniform(200), SOLVERS["rk4"])
    torch.testing.assert_close(flow.flow_map(eps), end, rtol=0, atol=1e-6)


def test_flow_map_with_labels_is_the_end_of_the_labelled_ode() -> None:
    flow, labels = ring(), torch.arange(16) % 8
    eps = noise(0, range(16), (2,)).double()
    end = integrate(flow, eps, uniform(200), SOLVERS["rk4"], labels)
    torch.testing.assert_close(flow.flow_map(eps, labels), end, rtol=0, atol=1e-4)


def test_flow_map_of_a_mixture_agrees_with_an_independent_one() -> None:
    case = json.loads((FIXTURES / "mixture_flow_1d.json").read_text())
    columns = [torch.tensor(case[name], dtype=torch.float64) for name in ("weights", "means", "stds")]
    flow = Mixture(columns[0], columns[1][:, None], columns[2][:, None])
    eps = torch.tensor(case["noise"], dtype=torch.float64)[:, None]
    expected = torch.tensor(case["data"], dtype=torch.float64)[:, None]
    torch.testing.assert_close(flow.flow_map(eps), expected, rtol=0, atol=1e-13)


def test_flow_map_of_a_mixture_reaches_far_into_both_tails() -> None:
    flow = mixture((1,))
    eps = torch.tensor([-30.0, -9.0, -1e-9, 0.0, 1e-9, 9.0, 30.0], dtype=torch.float64)[:, None]
    x0 = flow.flow_map(eps)
    assert bool((x0.diff(dim=0) > 0).all())
    # Far out only the widest component is left.
    assert float(x0[0]) == pytest.approx(0.7 - 0.5 * 30, abs=0.1)
    assert float(x0[-1]) == pytest.approx(0.7 + 0.5 * 30, abs=0.1)
    torch.testing.assert_close(flow.flow_map(eps.float()), x0.float())


def test_flow_map_of_a_mixture_in_more_dimensions_is_refused() -> None:
    with pytest.raises(UsageError, match="one dimension"):
        mixture((2,)).flow_map(torch.zeros(1, 2))


@every_flow
def test_data_have_the_moments_and_shares_of_the_mixture(flow: Mixture) -> None:
    count = 20_000
    x0, labels = flow.data(range(count), seed=0)
    assert x0.shape == (count, *flow.shape) and x0.dtype == torch.float32
    weights = flow.log_weights.exp()
    shares = labels.bincount(minlength=len(weights)) / count
    assert float((shares - weights).abs().max()) < 5 / (2 * math.sqrt(count))
    for k in range(len(weights)):
        own = x0[labels == k].double()
        gap = (own.mean(0) - flow.means[k]).abs() / (flow.stds[k] / math.sqrt(len(own)))
        assert float(gap.max()) < 5
        ratio = own.std(0) / flow.stds[k]
        assert float((ratio - 1).abs().max()) < 5 / math.sqrt(2 * len(own))


@every_flow
def test_data_depend_on_seed_and_index_alone(flow: Mixture) -> None:
    x0, labels = flow.data(range(40), seed=0)
    some, their = flow.data(torch.tensor([30, 4]), seed=0)
    assert torch.equal(some, x0[[30, 4]]) and torch.equal(their, labels[[30, 4]])
    assert not torch.equal(flow.data(range(40), seed=1)[0], x0)


@every_flow
def test_data_are_independent_of_the_noise_of_the_same_seed(flow: Mixture) -> None:
    count = 4000
    x0, labels = flow.data(range(count), seed=0)
    standard = ((x0 - flow.means[labels]) / flow.stds[labels]).flatten(1)
    products = standard * noise(0, range(count), flow.shape).flatten(1)
    assert float(products.mean(0).abs().max()) < 5 / math.sqrt(count)


def test_shapes_and_classes() -> None:
    assert gaussian((3, 4)).shape == (3, 4) and gaussian((3, 4)).classes == 0
    assert mixture((5,)).shape == (5,) and mixture((5,)).classes == 3
    assert ring().shape == (2,) and ring().classes == 8
    assert ring(5).classes == 5


def test_defaults_are_unequal_so_that_mistakes_show() -> None:
    assert len(set(gaussian((3,)).means.flatten().tolist())) == 3
    assert len(set(gaussian((3,)).stds.flatten().tolist())) == 3
    for flow in (mixture(), ring()):
        assert len(set(flow.log_weights.tolist())) == len(flow.means)
        assert len(set(flow.stds.flatten().tolist())) > 1
    torch.testing.assert_close(ring().means.norm(dim=1), torch.ones(8, dtype=torch.float64))
    assert mixture((1,)).means.flatten().tolist() == [-1.5, 0.7, 2.2]


def test_weights_are_normalised() -> None:
    flow = Mixture(torch.tensor([1.0, 3.0]), torch.zeros(2, 1), torch.ones(2, 1))
    torch.testing.assert_close(flow.log_weights.exp(), torch.tensor([0.25, 0.75]).double())
