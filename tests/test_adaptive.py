"""Adaptive integration: its error, scipy's steps, and that samples neither see nor pay for each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from flowdistill.adaptive import integrate_adaptive
from flowdistill.analytic import Mixture, gaussian, mixture, ring
from flowdistill.errors import Diverged, UsageError
from flowdistill.flow import VelocityField, expand
from flowdistill.randomness import noise

FIXTURES = Path(__file__).parent / "fixtures"
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["down", "up"])


class Counting:
    """A field whose labels are the samples' numbers; it counts the evaluations of each."""

    def __init__(self, field: VelocityField, count: int, labels: Tensor | None = None) -> None:
        self.field, self.labels = field, labels
        self.numbers = torch.arange(count)
        self.evaluations = torch.zeros(count, dtype=torch.int64)
        self.asked: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, numbers: Tensor | None) -> Tensor:
        assert numbers is not None and len(x) == len(t) == len(numbers)
        self.evaluations[numbers] += 1
        self.asked.append((x, t))
        return self.field(x, t, None if self.labels is None else self.labels[numbers])


def full_covariances(weights: Tensor, means: Tensor, covariances: Tensor) -> VelocityField:
    """The velocity of a mixture of K Gaussians in d dimensions: [K], [K, d], [K, d, d]."""
    eye = torch.eye(means.shape[1], dtype=means.dtype)

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        t = t[:, None]
        spread = t[..., None, None] ** 2 * eye + (1 - t[..., None, None]) ** 2 * covariances
        offset = x[:, None] - (1 - t[..., None]) * means
        score = -torch.linalg.solve(spread, offset[..., None])[..., 0]
        density = weights.log() - spread.logdet() / 2 + (offset * score).sum(2) / 2
        x0 = means - (1 - t[..., None]) * (covariances @ score[..., None])[..., 0]
        eps = -t[..., None] * score
        return (density.softmax(1)[..., None] * (eps - x0)).sum(1)

    return field


def narrow() -> Mixture:
    """Stiff towards the first component, easy towards the second."""
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    return Mixture(torch.ones(2), means, torch.tensor([[0.004, 0.004], [0.9, 0.9]]))


# The error ------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("field", [gaussian((1,)), mixture((1,))], ids=["gaussian", "mixture"])
def test_the_error_is_proportional_to_the_tolerance(field: Mixture, inverse: bool) -> None:
    """Against the closed form; the way up starts where it says that the noise goes."""
    eps = noise(0, range(128), (1,)).double()
    start, exact = (field.flow_map(eps), eps) if inverse else (eps, field.flow_map(eps))

    def error(tolerance: float) -> float:
        found, _ = integrate_adaptive(field, start, tolerance, tolerance, inverse=inverse)
        return float((found - exact).abs().mean())

    tolerances = (1e-3, 1e-5, 1e-7, 1e-8, 1e-9, 1e-10)
    errors = [error(tolerance) for tolerance in tolerances]
    assert all(0.03 * at < found < 30 * at for at, found in zip(tolerances, errors, strict=True))
    assert math.log10(errors[2] / errors[5]) / 3 == pytest.approx(1, abs=0.35)


def test_rtol_and_atol_share_the_work() -> None:
    """On dx/dt = x from 1000, whose size rtol is a share of and atol is not."""
    x = torch.full((1, 1), 1000.0, dtype=torch.float64)

    def error(rtol: float, atol: float) -> float:
        found, _ = integrate_adaptive(lambda x, t, labels: x, x, rtol, atol)
        return abs(float(found) - 1000 / math.e)

    assert 1e-5 < error(1e-6, 1e-12) < 1e-2
    assert 1e-8 < error(1e-9, 1e-12) < 1e-5
    assert 1e-5 < error(0.0, 1e-3) < 1e-2
    assert 1e-8 < error(0.0, 1e-6) < 1e-5


@both_ways
def test_a_narrow_components_labels_follow_it(inverse: bool) -> None:
    """Samples of the wide component arrive long before; labels that stayed behind would mix them up."""
    field, eps = narrow(), noise(3, range(20), (2,)).double()
    labels = torch.arange(20) % 2
    start, exact = eps, field.flow_map(eps, labels)
    if inverse:
        start, exact = exact, start
    found, nfe = integrate_adaptive(field, start, 1e-8, 1e-8, labels, inverse=inverse)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4 if inverse else 1e-7)
    stiff, easy = nfe[::2], nfe[1::2]
    assert stiff.double().mean() > easy.double().mean() + 12
    assert max(stiff.tolist()) > max(easy.tolist())


def test_the_reference_of_an_eighth_order_method() -> None:
    """DOP853 at 1e-12, by scipy, of a mixture with full covariances."""
    case = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in json.loads((FIXTURES / "mixture_flow_2d.json").read_text()).items()
    }
    field = full_covariances(case["weights"], case["means"], case["covariances"])
    found, _ = integrate_adaptive(field, case["noise"], 1e-10, 1e-11)
    torch.testing.assert_close(found, case["reference"], rtol=0, atol=2e-9)
    rough, _ = integrate_adaptive(field, case["noise"].float(), 1e-4, 1e-5)
    torch.testing.assert_close(rough.double(), case["reference"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("tolerance, dtype", [(1e-9, torch.float64), (1e-6, torch.float32)], ids=str)
def test_there_and_back(shape: tuple[int, ...], tolerance: float, dtype: torch.dtype) -> None:
    """Both ends of both ways, of samples of any number of dimensions, none included."""
    flow = mixture(shape or (1,))

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return flow(x.reshape(len(x), *flow.shape), t, labels).reshape(x.shape)

    eps = noise(4, range(30), shape or (1,)).reshape(30, *shape).to(dtype)
    x0, _ = integrate_adaptive(field, eps, tolerance, tolerance)
    back, _ = integrate_adaptive(field, x0, tolerance, tolerance, inverse=True)
    assert x0.shape == eps.shape and x0.dtype == dtype
    torch.testing.assert_close(back, eps, rtol=0, atol=300 * tolerance)


@both_ways
def test_a_jump_in_time_is_stepped_over(inverse: bool) -> None:
    """As of guidance that begins at some t; the steps shrink at the jump and grow again."""
    x = torch.zeros(2, 1, dtype=torch.float64)
    found, nfe = integrate_adaptive(
        lambda x, t, labels: torch.where(t > 0.37, 1.0, 3.0)[:, None].to(x), x, 1e-6, 1e-6, inverse=inverse
    )
    exact = 0.63 * 1 + 0.37 * 3
    torch.testing.assert_close(found, x + (exact if inverse else -exact), rtol=0, atol=1e-4)
    assert int(nfe.max()) < 300


# The steps ------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
@pytest.mark.parametrize("field", [mixture((2,)), ring(), mixture((2, 2))], ids=["mixture", "ring", "square"])
def test_one_sample_takes_scipys_steps(field: Mixture, tolerance: float, inverse: bool) -> None:
    """Evaluation for evaluation, but for a last step that ends so close to the end that ours goes there."""
    eps = noise(1, range(8), field.shape).double()
    found, nfe = integrate_adaptive(field, eps, tolerance, tolerance, inverse=inverse)
    same = 0
    for x, end, spent in zip(eps, found, nfe.tolist(), strict=True):

        def slope(t: float, y: Any) -> Any:
            state = torch.from_numpy(y).reshape(1, *field.shape)
            return field(state, torch.tensor([t], dtype=torch.float64)).numpy().ravel()

        span = (0.0, 1.0) if inverse else (1.0, 0.0)
        theirs = solve_ivp(slope, span, x.ravel().numpy(), method="RK45", rtol=tolerance, atol=tolerance)
        last = torch.from_numpy(theirs.y[:, -1]).reshape(x.shape)
        same += theirs.nfev == spent
        assert abs(theirs.nfev - spent) <= 6
        torch.testing.assert_close(end, last, rtol=0, atol=10 * tolerance)
    assert same >= 7


@both_ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_evaluations_are_counted_for_each_sample(dtype: torch.dtype, inverse: bool) -> None:
    """The truth is in the field's hands; t is in the dtype of the state and in [0, 1]."""
    field = Counting(ring(), 33)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = noise(5, range(33), (2,)).to(dtype)
    found, nfe = integrate_adaptive(field, x, 1e-4, 1e-5, field.numbers, inverse=inverse)
    assert found.dtype == dtype and found.shape == x.shape
    assert nfe.dtype == torch.int64 and nfe.device.type == "cpu"
    assert nfe.tolist() == field.evaluations.tolist()
    assert len(set(nfe.tolist())) > 3
    assert {x.dtype for x, _ in field.asked} == {t.dtype for _, t in field.asked} == {state}
    times = torch.cat([t for _, t in field.asked])
    assert float(times.min()) == 0.0 and float(times.max()) == 1.0
    first, last = field.asked[0][1], field.asked[-1][1]
    assert first.unique().tolist() == [float(not inverse)] and float(inverse) in last.tolist()


def test_rejected_steps_are_counted() -> None:
    """A rule of six evaluations a step that begins anew where the last one ended, and two at first."""
    field = Counting(lambda x, t, labels: torch.where(t > 0.37, 1.0, 3.0)[:, None].to(x), 1)
    _, nfe = integrate_adaptive(field, torch.zeros(1, 1), 1e-5, 1e-5, field.numbers)
    ends = [float(t) for _, t in field.asked][7::6]  # the sixth of every step; a rejected one goes back
    assert nfe.tolist() == [2 + 6 * len(ends)] == [len(field.asked)]
    assert ends != sorted(ends, reverse=True)


def test_a_stiff_sample_is_evaluated_more_often_than_an_easy_one() -> None:
    eps = noise(6, range(40), (2,)).double()
    x0, nfe = integrate_adaptive(narrow(), eps, 1e-5, 1e-5)
    stiff = x0[:, 0] < -1.9
    assert 5 < int(stiff.sum()) < 35
    assert nfe[stiff].double().mean() > 1.5 * nfe[~stiff].double().mean()


@both_ways
def test_a_straight_flow_costs_next_to_nothing(inverse: bool) -> None:
    """Paths x0 = mean + std eps of constant velocity: only the growth of the first step limits it."""

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        t = expand(t, x)
        eps = (x + 0.4 * (1 - t)) / ((1 - t) * 0.2 + t)
        return eps + 0.4 - 0.2 * eps

    eps = noise(0, range(50), (3,)).double()
    start, exact = (eps * 0.2 - 0.4, eps) if inverse else (eps, eps * 0.2 - 0.4)
    found, nfe = integrate_adaptive(field, start, 1e-8, 1e-8, inverse=inverse)
    torch.testing.assert_close(found, exact)
    assert int(nfe.max()) <= 2 + 6 * 4


@pytest.mark.parametrize(
    "x, ends",
    [
        (1000.0, [1 - 0.0903, 0.0]),  # ten times the first step would leave 0.0067 of the way
        (1.0, [1 - c / 1665 for c in (1, 11, 111, 1111)] + [0.0]),  # as far as moves by the size of x
    ],
)
def test_the_first_steps_by_hand(x: float, ends: list[float]) -> None:
    """The first is (0.01 / |v|)^(1/5) = 0.0903 or |x| / |v|; a constant velocity lets it grow tenfold."""
    field = Counting(lambda x, t, labels: torch.full_like(x, 1665.0), 1)
    start = torch.full((1, 1), x, dtype=torch.float64)
    integrate_adaptive(field, start, 0.0, 1.0, field.numbers)
    assert [float(t) for _, t in field.asked][7::6] == pytest.approx(ends, abs=1e-4)


def test_a_field_that_stands_still_is_crossed() -> None:
    x = torch.zeros(2, 3)
    found, nfe = integrate_adaptive(lambda x, t, labels: torch.zeros_like(x), x, 1e-6, 1e-6)
    assert torch.equal(found, x) and int(nfe.max()) <= 2 + 6 * 8


# The batch ------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_samples_do_not_see_each_other(dtype: torch.dtype, atol: float, inverse: bool) -> None:
    field, labels = narrow(), torch.arange(12) % 2
    x = noise(7, range(12), (2,)).to(dtype)
    if inverse:
        x = field.flow_map(x, labels)
    for named in (None, labels):
        whole, spent = integrate_adaptive(field, x, 1e-5, 1e-6, named, inverse=inverse)
        for i in range(12):
            own = None if named is None else named[i : i + 1]
            alone, nfe = integrate_adaptive(field, x[i : i + 1], 1e-5, 1e-6, own, inverse=inverse)
            torch.testing.assert_close(alone, whole[i : i + 1], rtol=atol, atol=atol)
            if dtype == torch.float64:
                assert int(nfe) == int(spent[i])


def test_the_same_input_gives_the_same_bits() -> None:
    x = noise(8, range(40), (2,))
    before = x.clone()
    first, second = (integrate_adaptive(ring(), x, 1e-5, 1e-6) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 2), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_nothing_to_integrate_is_not_evaluated(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        raise AssertionError("no sample asks for this")

    found, nfe = integrate_adaptive(field, torch.zeros(shape, dtype=dtype), 1e-5, 1e-6)
    assert found.shape == shape and found.dtype == dtype
    assert nfe.tolist() == [0] * shape[0] and nfe.dtype == torch.int64


def test_the_field_may_answer_in_any_dtype_and_keeps_no_graph() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    found, _ = integrate_adaptive(
        lambda x, t, labels: (scale * x).bfloat16(), torch.ones(2, 1), 1e-2, 1e-2, most=500
    )
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, torch.full((2, 1), math.exp(-0.5)), rtol=0.02, atol=0)


# What is refused ------------------------------------------------------------------------------------------


def test_too_many_evaluations_are_refused() -> None:
    """Exactly so many are allowed; the sample is named by its place in the whole batch."""
    field, x = narrow(), noise(9, range(20), (2,)).double()
    _, nfe = integrate_adaptive(field, x, 1e-6, 1e-6)
    slowest, needed = int(nfe.argmax()), int(nfe.max())
    assert int((nfe == needed).sum()) == 1 and slowest > 0
    integrate_adaptive(field, x, 1e-6, 1e-6, most=needed)
    with pytest.raises(
        Diverged, match=rf"^sample {slowest}: has come to t = \S+ only and needs more than {needed - 1} "
    ):
        integrate_adaptive(field, x, 1e-6, 1e-6, most=needed - 1)
    with pytest.raises(Diverged, match=r"raise rtol \(1e-06\) or atol \(1e-07\), or allow more$"):
        integrate_adaptive(field, x, 1e-6, 1e-7, most=1)


def test_a_field_without_a_solution_is_refused() -> None:
    """Steps that no step size makes good enough end by the number of evaluations."""
    with pytest.raises(Diverged, match="sample 0: has come to t = "):
        integrate_adaptive(lambda x, t, labels: 1e12 * x.sign(), torch.ones(1, 1), 1e-9, 1e-9, most=2000)


@both_ways
def test_a_velocity_that_is_not_finite_is_refused(inverse: bool) -> None:
    """Of sample 3, when samples 0 and 1 have long arrived and have left their places."""
    bad = torch.tensor([False, False, False, True])
    speed = torch.tensor([0.0, 0.0, 40.0, 40.0])
    limit = 0.99 if inverse else 0.01

    def field(x: Tensor, t: Tensor, numbers: Tensor | None) -> Tensor:
        assert numbers is not None
        v = (speed[numbers] * t).sin()[:, None].to(x)
        passed = t > limit if inverse else t < limit
        return v.where(~(bad[numbers] & passed)[:, None], torch.nan)

    x, numbers = torch.zeros(4, 1, dtype=torch.float64), torch.arange(4)
    with pytest.raises(Diverged, match="^sample 3: the velocity is not finite at t = (.*); evaluate") as info:
        integrate_adaptive(field, x, 1e-9, 1e-9, numbers, inverse=inverse)
    t = float(str(info.value).partition("t = ")[2].partition(";")[0])
    assert t > limit if inverse else t < limit


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("call", range(9))
def test_no_stage_may_answer_what_is_not_finite(call: int, value: float) -> None:
    """Not even the second, which neither the end of a step nor its error weighs."""
    calls = iter(range(10_000))

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        v = torch.full_like(x, 2.0)
        if next(calls) == call:
            v[1, 2] = value
        return v

    with pytest.raises(Diverged, match="^sample 1: "):
        integrate_adaptive(field, torch.zeros(2, 3), 1e-6, 1e-6)


def test_the_ends_are_evaluated() -> None:
    field: Callable[..., Tensor] = lambda x, t, labels: x / t[:, None]  # noqa: E731
    with pytest.raises(Diverged, match=r"^sample 0: the velocity is not finite at t = 0;"):
        integrate_adaptive(field, torch.zeros(2, 1), 1e-3, 1e-3)
    with pytest.raises(Diverged, match=r"^sample 0: the velocity is not finite at t = 0;"):
        integrate_adaptive(field, torch.zeros(2, 1), 1e-3, 1e-3, inverse=True)


@pytest.mark.parametrize(
    "rtol, atol", [(-1e-3, 1e-3), (1e-3, 0.0), (1e-3, -1.0), (math.nan, 1e-3), (1e-3, math.inf)]
)
def test_tolerances_that_mean_nothing_are_refused(rtol: float, atol: float) -> None:
    with pytest.raises(UsageError, match="tolerances must be finite, rtol >= 0 and atol > 0, found"):
        integrate_adaptive(mixture((1,)), torch.zeros(1, 1), rtol, atol)
