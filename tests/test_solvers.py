"""Solvers: measured orders, exactness where theory promises it, and the count of evaluations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from test_adaptive import full_covariances
from test_edm_networks import CASES, denoiser
from torch import Tensor

from flowdistill.analytic import Mixture, gaussian, mixture
from flowdistill.errors import UsageError, listed
from flowdistill.evaluation.metrics import deviations
from flowdistill.flow import expand
from flowdistill.randomness import noise
from flowdistill.schedule import Schedule, bellman, edm, shifted, uniform
from flowdistill.solvers import (
    SOLVERS,
    OdeSolver,
    Solver,
    SolverName,
    integrate,
    multistep,
    nfe,
    steps_for,
)

FIXTURES = Path(__file__).parent / "fixtures"
ALIASES: dict[SolverName, SolverName] = {"rf-solver": "midpoint", "fireflow": "midpoint-cached"}
every_solver = pytest.mark.parametrize(
    "solver", dict.fromkeys(SOLVERS.values()), ids=lambda solver: solver.name
)
ode_solver = pytest.mark.parametrize(
    "solver", dict.fromkeys(SOLVERS[name] for name in get_args(OdeSolver)), ids=lambda solver: solver.name
)
in_time = pytest.mark.parametrize(
    "solver",
    [each for each in dict.fromkeys(SOLVERS.values()) if each.order and each.name != "dpm++2m"],
    ids=lambda solver: solver.name,
)
"""Those whose order is one in steps of t; dpm++2m has its own tests."""
only_down = pytest.mark.parametrize("name", ["reinterpolate", "reinterpolate-heun"])


class Counting:
    """A field that keeps what it was asked."""

    def __init__(self, field: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        self.field = field
        self.asked: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        self.asked.append((x, t, labels))
        return self.field(x, t, labels)


def test_the_registry_is_the_recipes_choice() -> None:
    assert get_args(SolverName) == tuple(SOLVERS)
    assert all(ALIASES.get(name, name) == solver.name for name, solver in SOLVERS.items())
    assert all((solver.order > 0) == (name in get_args(OdeSolver)) for name, solver in SOLVERS.items())


def test_an_alias_is_the_very_rule() -> None:
    """RF-Solver is the midpoint rule: test_identities derives it from the paper's update.

    FireFlow is the one whose first velocity is cached.
    """
    for alias, name in ALIASES.items():
        assert SOLVERS[alias] is SOLVERS[name]


STABILITY: dict[str, Callable[[float], float]] = {
    "euler": lambda z: 1 + z,
    "heun": lambda z: 1 + z + z**2 / 2,
    "midpoint": lambda z: 1 + z + z**2 / 2,
    "rk4": lambda z: 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24,
    "ab2": lambda z: 1 + z,
    "midpoint-cached": lambda z: 1 + z + z**2 / 2,
    "pec": lambda z: 1 + z + z**2 / 2,
    "dpm++2m": lambda z: 1 + z,
}
"""Of the first step; that of a rule with a memory is one without."""


@ode_solver
def test_one_step_of_a_linear_flow_is_the_stability_polynomial(solver: Solver) -> None:
    x = torch.tensor([[2.0, -3.0]], dtype=torch.float64)
    after = solver.begin(x)(lambda x, t: 1.5 * x, x, 1.5 * x, 0.8, 0.4)
    torch.testing.assert_close(after, x * STABILITY[solver.name](1.5 * (0.4 - 0.8)))


QUADRATURE: dict[str, Callable[[Callable[[float], float], float, float], float]] = {
    "euler": lambda f, t, s: f(t),
    "heun": lambda f, t, s: (f(t) + f(s)) / 2,
    "midpoint": lambda f, t, s: f((t + s) / 2),
    "rk4": lambda f, t, s: (f(t) + 4 * f((t + s) / 2) + f(s)) / 6,
    "ab2": lambda f, t, s: f(t),
    "midpoint-cached": lambda f, t, s: f((t + s) / 2),
    "pec": lambda f, t, s: (f(t) + f(s)) / 2,
    "dpm++2m": lambda f, t, s: f(t),
}


@ode_solver
def test_one_step_of_a_field_of_time_is_the_rules_quadrature(solver: Solver) -> None:
    x = torch.tensor([[2.0, -3.0]], dtype=torch.float64)
    after = solver.begin(x)(
        lambda x, t: torch.full_like(x, math.exp(t)), x, torch.full_like(x, math.exp(0.8)), 0.8, 0.5
    )
    average = QUADRATURE[solver.name](math.exp, 0.8, 0.5)
    torch.testing.assert_close(after, x + (0.5 - 0.8) * average)


@pytest.fixture(scope="module")
def bent() -> tuple[Mixture, Tensor, Tensor]:
    """A field whose flow bends, noise, and where the flow carries it."""
    field, eps = mixture((2,)), noise(0, range(65), (2,)).double()
    return field, eps, integrate(field, eps, uniform(512), SOLVERS["rk4"])


@in_time
def test_order_is_measured_on_a_bent_mixture(solver: Solver, bent: tuple[Mixture, Tensor, Tensor]) -> None:
    """log2(error(n) / error(2n)); on a single Gaussian, which is linear, midpoint would show 3.

    Of the median sample: those few that end in another component have no order.
    """
    field, eps, truth = bent
    coarse, fine = (
        (integrate(field, eps, uniform(steps), solver) - truth).norm(dim=1).median() for steps in (64, 128)
    )
    assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.25)


def test_heuns_last_step_is_eulers() -> None:
    x = torch.tensor([[2.0]], dtype=torch.float64)
    after = SOLVERS["heun"].begin(x)(lambda x, t: x / t, x, 3 * x, 0.25, 0.0)
    assert after.tolist() == [[2.0 - 0.25 * 6.0]]


@every_solver
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluations_are_counted(solver: Solver, steps: int) -> None:
    for schedule in (uniform(steps), shifted(steps, 3.0), edm(steps)):
        field = Counting(mixture((1,)))
        integrate(field, torch.zeros(3, 1), schedule, solver)
        assert len(field.asked) == nfe(solver, schedule)


def test_evaluations_by_hand() -> None:
    spent = {name: [nfe(solver, uniform(n)) for n in (1, 2, 18)] for name, solver in SOLVERS.items()}
    assert spent["euler"] == [1, 2, 18]
    assert spent["heun"] == [1, 3, 35]
    assert spent["midpoint"] == [2, 4, 36]
    assert spent["rk4"] == [4, 8, 72]
    assert spent["ab2"] == spent["dpm++2m"] == [1, 2, 18]
    assert spent["midpoint-cached"] == spent["pec"] == [2, 3, 19]
    assert spent["reinterpolate"] == [1, 2, 18]
    assert spent["reinterpolate-heun"] == [1, 3, 35]


@every_solver
def test_steps_for_a_budget_undo_nfe(solver: Solver) -> None:
    for steps in (1, 2, 3, 9):
        assert steps_for(solver, nfe(solver, uniform(steps))) == steps


@pytest.mark.parametrize(
    "name, budget, advice",
    [
        ("euler", 0, "1 would do"),
        ("euler", -7, "1 would do"),
        ("heun", 0, "1 would do"),
        ("heun", 2, "1 or 3 would do"),
        ("heun", 8, "7 or 9 would do"),
        ("midpoint", 1, "2 would do"),
        ("midpoint", 3, "2 or 4 would do"),
        ("rk4", 3, "4 would do"),
        ("rk4", 6, "4 or 8 would do"),
        ("rk4", 7, "4 or 8 would do"),
        ("reinterpolate-heun", 4, "3 or 5 would do"),
        ("ab2", 0, "1 would do"),
        ("midpoint-cached", 1, "2 would do"),
        ("pec", 0, "2 would do"),
        ("pec", -3, "2 would do"),
    ],
)
def test_budgets_that_no_number_of_steps_meets_are_refused(
    name: SolverName, budget: int, advice: str
) -> None:
    with pytest.raises(UsageError, match=f"solver {name} cannot make exactly {budget} .*: {advice}$"):
        steps_for(SOLVERS[name], budget)


@every_solver
def test_the_field_is_asked_in_its_own_terms(solver: Solver) -> None:
    """t is [B] in the state's dtype, from 1 down, within the step; labels are passed on."""
    labels = torch.tensor([2, 0, 1])
    field = Counting(mixture((2, 2)))
    integrate(field, torch.zeros(3, 2, 2), uniform(3), solver, labels)
    for x, t, given in field.asked:
        assert x.shape == (3, 2, 2) and t.shape == (3,)
        assert x.dtype == t.dtype == torch.float32
        assert given is labels
    times = [float(t[0]) for _, t, _ in field.asked]
    assert times[0] == 1.0 and min(times) >= 0.0
    assert times == sorted(times, reverse=True)


@ode_solver
def test_labels_choose_the_flow(solver: Solver) -> None:
    field, eps = mixture((2,)), noise(0, range(3), (2,)).double()
    labels = torch.tensor([0, 1, 2])
    found = integrate(field, eps, uniform(300), solver, labels)
    torch.testing.assert_close(found, field.flow_map(eps, labels), rtol=0, atol=0.02)


@every_solver
@pytest.mark.parametrize(
    "given, state",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_the_state_is_float32_or_better(solver: Solver, given: torch.dtype, state: torch.dtype) -> None:
    field = Counting(lambda x, t, labels: (x * t[:, None]).bfloat16())
    seen: list[Tensor] = []
    x = torch.ones(2, 1, dtype=given)
    end = integrate(field, x, uniform(4), solver, on_step=lambda i, t, x, v: seen.extend((x, v)))
    assert {x.dtype for x in (end, *seen)} == {state}
    assert {x.dtype for x, _, _ in field.asked} == {state}


@every_solver
def test_each_knots_state_and_velocity_are_seen_once(solver: Solver) -> None:
    field, schedule = mixture((2,)), Schedule((1.0, 0.8, 0.3, 0.0), "test")
    eps = noise(0, range(4), (2,)).double()
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    counting = Counting(field)
    end = integrate(counting, eps, schedule, solver, on_step=lambda *knot: seen.append(knot))
    assert len(counting.asked) == nfe(solver, schedule)
    assert [(i, t) for i, t, _, _ in seen] == [(0, 1.0), (1, 0.8), (2, 0.3)]
    assert torch.equal(seen[0][2], eps)
    for _, t, x, v in seen[:1] if solver.reuses else seen:
        torch.testing.assert_close(v, field(x, torch.full((4,), t, dtype=torch.float64)))
    assert torch.equal(end, integrate(field, eps, schedule, solver))
    assert not torch.equal(end, seen[-1][2])


def reflowed_gaussian(mean: float, std: float) -> Callable[..., Tensor]:
    """The optimum of a reflow on pairs x0 = mean + std eps: v = E[eps - x0 | x_t], eps known from x_t."""

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        t = t[:, None]
        eps = (x - (1 - t) * mean) / ((1 - t) * std + t)
        return eps - (mean + std * eps)

    return field


@every_solver
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_steps_is_exact_on_a_straight_flow(solver: Solver, steps: int) -> None:
    eps = noise(0, range(50), (1,)).double()
    velocities: list[Tensor] = []
    end = integrate(
        reflowed_gaussian(-0.4, 0.2),
        eps,
        uniform(steps),
        solver,
        on_step=lambda i, t, x, v: velocities.append(v),
    )
    torch.testing.assert_close(end, -0.4 + 0.2 * eps)
    for v in velocities:  # straightness is zero: the velocity never changes along a path
        torch.testing.assert_close(v, velocities[0])


def test_one_euler_step_of_the_teacher_is_not_exact() -> None:
    teacher = Mixture(torch.ones(1), torch.full((1, 1), -0.4), torch.full((1, 1), 0.2))
    eps = noise(0, range(50), (1,)).double()
    end = integrate(teacher, eps, uniform(1), SOLVERS["euler"])
    # From noise that is independent of the data, one step can only reach the data's mean.
    torch.testing.assert_close(end, torch.full_like(end, -0.4))


@every_solver
def test_gradients_flow_through(solver: Solver) -> None:
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = torch.ones(1, 1, dtype=torch.float64)
    end = integrate(lambda x, t, labels: scale * x, x, uniform(1), solver)
    (gradient,) = torch.autograd.grad(end.sum(), scale)
    assert float(gradient) == pytest.approx(-1.0, abs=0.5)


@every_solver
def test_samples_do_not_see_each_other(solver: Solver) -> None:
    field, eps = mixture((2,)), noise(0, range(6), (2,)).double()
    whole = integrate(field, eps, uniform(3), solver)
    torch.testing.assert_close(integrate(field, eps[4:5], uniform(3), solver), whole[4:5])


@in_time
def test_the_way_up_ends_at_the_noise_that_a_closed_form_names(solver: Solver) -> None:
    """Of the median sample; the quantile map of a bent flow, whose noise is where it came from."""
    field, eps = mixture((1,)), noise(0, range(65), (1,)).double()
    data = field.flow_map(eps)
    coarse, fine = (
        (integrate(field, data, uniform(steps), solver, inverse=True) - eps).abs().median()
        for steps in (64, 128)
    )
    assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.25)


@in_time
def test_the_way_up_undoes_a_gaussians_linear_map(solver: Solver) -> None:
    """On a linear flow a rule may be of a higher order than its own, never of a lower one."""
    field, data = gaussian((2,)), noise(0, range(65), (2,)).double()
    shift = field.flow_map(torch.zeros_like(data))
    exact = (data - shift) / (field.flow_map(torch.ones_like(data)) - shift)
    coarse, fine = (
        float((integrate(field, data, uniform(steps), solver, inverse=True) - exact).abs().max())
        for steps in (32, 64)
    )
    assert math.log2(coarse / fine) > solver.order - 0.25
    assert fine < 0.03 * float(exact.abs().max())


@in_time
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_there_and_back_converges_with_the_order(solver: Solver, shift: float) -> None:
    """Noise to data to noise, and data to noise to data, each of the median sample."""
    field, eps = mixture((2,)), noise(0, range(65), (2,)).double()

    def round_trip(steps: int, inverse_first: bool) -> Tensor:
        x = eps
        for inverse in (inverse_first, not inverse_first):
            x = integrate(field, x, shifted(steps, shift), solver, inverse=inverse)
        return (x - eps).norm(dim=1).median()

    for first in (False, True):
        coarse, fine = round_trip(64, first), round_trip(128, first)
        assert math.log2(coarse / fine) > solver.order - 0.3


@ode_solver
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluations_of_the_way_up_are_counted(solver: Solver, steps: int) -> None:
    for schedule in (uniform(steps), shifted(steps, 3.0), edm(steps)):
        field = Counting(mixture((1,)))
        integrate(field, torch.zeros(3, 1), schedule, solver, inverse=True)
        spent = solver.reuses + solver.evaluations * steps
        assert len(field.asked) == nfe(solver, schedule, inverse=True) == spent
        times = [float(t[0]) for _, t, _ in field.asked]
        assert times[0] == 0.0 and max(times) <= 1.0
        assert times == sorted(times)


def test_heuns_steps_up_are_all_heuns() -> None:
    """Also the one from t = 0; of dx/dt = x each multiplies by 1 + h + h^2 / 2."""
    x = torch.tensor([[2.0]], dtype=torch.float64)
    schedule = Schedule((1.0, 0.4, 0.0), "test")
    end = integrate(lambda x, t, labels: x, x, schedule, SOLVERS["heun"], inverse=True)
    assert float(end) == pytest.approx(2 * (1 + 0.4 + 0.08) * (1 + 0.6 + 0.18))


@ode_solver
def test_the_knots_of_the_way_up_are_seen_once(solver: Solver) -> None:
    field, schedule = mixture((2,)), Schedule((1.0, 0.8, 0.3, 0.0), "test")
    data, labels = noise(0, range(4), (2,)).double(), torch.tensor([0, 1, 2, 0])
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    integrate(field, data, schedule, solver, labels, lambda *knot: seen.append(knot), inverse=True)
    assert [(i, t) for i, t, _, _ in seen] == [(0, 0.0), (1, 0.3), (2, 0.8)]
    assert torch.equal(seen[0][2], data)
    for _, t, x, v in seen[:1] if solver.reuses else seen:
        torch.testing.assert_close(v, field(x, torch.full((4,), t, dtype=torch.float64), labels))


@pytest.mark.parametrize("name", ["gaussian", "mixture3"])
def test_boss_itself_arrives_at_the_same_samples(name: str) -> None:
    """Its own field, Euler sampler and optimal schedules; its time runs from noise to data."""
    fixture = load_file(FIXTURES / f"cost_{name}_K10.safetensors")
    components = len(fixture["w"])
    stds = fixture["sd"].reshape(-1, 1, 1, 1).expand(components, 1, 2, 2)
    teacher = Mixture(fixture["w"], fixture["mu"].reshape(components, 1, 2, 2), stds)

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return teacher(x, 0.999 * t)  # its clock starts at 0.001 instead of 0

    best = bellman(fixture["cost_matrix"].numpy())
    for steps in (1, 2, 3, 4, 5, 6, 8, 10):
        schedule = Schedule(tuple(1 - i / 10 for i in best.path(steps)), "boss")
        found = integrate(field, fixture["z0"], schedule, SOLVERS["euler"])
        torch.testing.assert_close(found, fixture[f"euler_out.nfe{steps}"], rtol=0, atol=1e-5)


# rf++'s samplers -------------------------------------------------------------------------------------------

NEARLY_1 = 1 - 1e-5


class Knots(Schedule):
    """Times as rf++ has them: they begin below 1 or, upwards, above 0."""

    def __post_init__(self) -> None:
        pass


def knots(steps: int) -> Knots:
    return Knots((NEARLY_1, *uniform(steps).times[1:]), "rf++")


def rfpp(name: str) -> tuple[Callable[..., Tensor], Tensor | None, dict[str, Tensor]]:
    """A network of EDM's as the velocity that rf++ makes of it, its labels, and what rf++'s samplers gave."""
    denoise = denoiser(name)

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return (x - denoise(x / (1 - expand(t, x)), t / (1 - t), labels)) / expand(t, x)

    found = load_file(FIXTURES / "edm" / "rfpp_samplers.safetensors")
    own = {key.removeprefix(f"{name}/"): tensor for key, tensor in found.items() if key.startswith(name)}
    return field, torch.arange(3) if CASES[name]["arguments"]["label_dim"] else None, own


rfpp_case = pytest.mark.parametrize("case", ["song_ncsnpp_uncond_aug9", "dhariwal_cond3_noheads"])


@rfpp_case
@pytest.mark.parametrize(("key", "name", "schedule"), [
    *((f"euler_default_N{n}", "euler", knots(n)) for n in (1, 2, 4)),
    *((f"euler_new_N{n}", "reinterpolate", knots(n)) for n in (1, 2, 4)),
    *((f"heun_default_NFE{2 * n - 1}", "heun", knots(n)) for n in (2, 3)),
    *((f"heun_new_NFE{2 * n - 1}", "reinterpolate-heun", knots(n)) for n in (2, 3)),
    ("euler_new_tsteps_1_0.6_0.2", "reinterpolate", Knots((NEARLY_1, 0.6, 0.2, 0.0), "rf++")),
])  # fmt: skip
@torch.no_grad()
def test_rf_plus_plus_itself_arrives_at_the_same_samples(
    case: str, key: str, name: SolverName, schedule: Schedule
) -> None:
    """From its own start, (1 - 1e-5) z at t = 1 - 1e-5, and nearly so from z at t = 1."""
    field, labels, recorded = rfpp(case)
    z, expected = recorded["in.z"], recorded[f"out.{key}"]
    found = integrate(field, NEARLY_1 * z, schedule, SOLVERS[name], labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    ours = Schedule((1.0, *schedule.times[1:]), "ours")
    at_most = lambda x, t, labels: field(x, t.clamp(max=NEARLY_1), labels)  # noqa: E731
    torch.testing.assert_close(
        integrate(at_most, z, ours, SOLVERS[name], labels), expected, rtol=0, atol=1e-4
    )


@rfpp_case
@torch.no_grad()
def test_rf_plus_plus_itself_arrives_at_the_same_noise(case: str) -> None:
    """Its inversion; at t = 0.001 it divides a rounded difference by 0.001."""
    field, labels, recorded = rfpp(case)
    schedule = Knots((1.0, 0.75, 0.5, 0.25, 0.001), "rf++")
    start = recorded["in.img_for_inversion"]
    found = integrate(field, start, schedule, SOLVERS["euler"], labels, inverse=True)
    torch.testing.assert_close(found, recorded["out.inversion_euler4_noise"], rtol=0, atol=2e-4)


@rfpp_case
@torch.no_grad()
def test_rf_plus_plus_finds_the_same_straightness(case: str) -> None:
    """Of its Euler path of four steps: S divided by the dimension."""
    field, labels, recorded = rfpp(case)
    schedule, start, velocities = knots(4), NEARLY_1 * recorded["in.z"], list[Tensor]()
    keep = lambda i, t, x, v: velocities.append(v)  # noqa: E731
    end = integrate(field, start, schedule, SOLVERS["euler"], labels, keep)
    squared, _, _ = deviations(uniform(4).times, velocities, start, end)
    torch.testing.assert_close(
        squared / start[0].numel(), recorded["out.straightness_euler4"], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_re_interpolation_by_hand(steps: int) -> None:
    field, eps = mixture((2,)), noise(0, range(20), (2,)).double()
    for name, heun in (("reinterpolate", False), ("reinterpolate-heun", True)):
        z = eps
        for t, s in uniform(steps).intervals:
            v = field(z, torch.full((20,), t, dtype=torch.float64))
            if heun and s > 0:
                ahead = (1 - s) * (z - t * v) + s * eps
                v = (v + field(ahead, torch.full((20,), s, dtype=torch.float64))) / 2
            z = (1 - s) * (z - t * v) + s * eps
        torch.testing.assert_close(integrate(field, eps, uniform(steps), SOLVERS[name]), z)


@only_down
def test_re_interpolation_is_euler_in_one_step_and_in_the_last(name: SolverName) -> None:
    field, eps = mixture((2,)), noise(0, range(20), (2,)).double()
    euler = integrate(field, eps, uniform(1), SOLVERS["euler"])
    torch.testing.assert_close(integrate(field, eps, uniform(1), SOLVERS[name]), euler)
    x, v = field(eps, torch.ones(20).double()), eps.roll(1, 0)
    last = SOLVERS[name].begin(eps)(lambda x, t: x, x, v, 0.3, 0.0)
    torch.testing.assert_close(last, x - 0.3 * v)


@only_down
def test_re_interpolation_of_a_bent_flow_ends_elsewhere_however_many_the_steps(
    name: SolverName, bent: tuple[Mixture, Tensor, Tensor]
) -> None:
    field, eps, truth = bent
    coarse, fine = (
        float((integrate(field, eps, uniform(steps), SOLVERS[name]) - truth).norm(dim=1).median())
        for steps in (64, 512)
    )
    assert fine > 0.02 and fine > 0.5 * coarse


@only_down
def test_re_interpolation_has_no_way_up(name: SolverName) -> None:
    with pytest.raises(UsageError) as refused:
        integrate(mixture((2,)), torch.zeros(1, 2), uniform(2), SOLVERS[name], inverse=True)
    assert str(refused.value) == (
        f"solver {name} has no way from data to noise; those that have one are "
        "euler, heun, midpoint, rk4, rf-solver, ab2, midpoint-cached, fireflow, pec, dpm++2m"
    )


def test_each_walk_remembers_its_own_start() -> None:
    solver, field, eps = SOLVERS["reinterpolate"], mixture((2,)), noise(0, range(8), (2,)).double()
    one, other = solver.begin(eps), solver.begin(2 * eps)
    v = field(eps, torch.full((8,), 0.5, dtype=torch.float64))
    ends = [step(lambda x, t: x, eps, v, 0.5, 0.25) for step in (one, other)]
    torch.testing.assert_close(ends[1] - ends[0], 0.25 * eps)


# Rules of one evaluation a step ----------------------------------------------------------------------------

UNEVEN = Schedule((1.0, 0.9, 0.5, 0.3, 0.0), "uneven")
both_grids = pytest.mark.parametrize("shift", [1, 3])


def published() -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The field of the recorded samples, and these."""
    found = load_file(FIXTURES / "mixture_solvers.safetensors")
    return full_covariances(found["weights"], found["means"], found["covariances"]), found


def errors(name: SolverName, schedule: Schedule, inverse: bool) -> Tensor:
    """Distance [64] from where an eighth order method arrives, at 1e-12, in that field."""
    field, found = published()
    start, end = ("reference", "noise") if inverse else ("noise", "reference")
    return (integrate(field, found[start], schedule, SOLVERS[name], inverse=inverse) - found[end]).norm(dim=1)


@both_grids
@pytest.mark.parametrize("steps", [4, 8, 16])
@pytest.mark.parametrize("name", ["ab2", "midpoint-cached", "pec", "dpm++2m"])
def test_published_rules_arrive_at_the_same_samples(name: SolverName, steps: int, shift: int) -> None:
    """FireFlow's are its own code's, both ways; the others are from the published formulas."""
    field, found = published()
    key, exact = f"{name}/shift{shift}/{steps}", {"rtol": 0, "atol": 1e-13}
    x0 = integrate(field, found["noise"], shifted(steps, shift), SOLVERS[name])
    torch.testing.assert_close(x0, found[key], **exact)
    if name == "midpoint-cached":
        eps = integrate(field, found["reference"], shifted(steps, shift), SOLVERS[name], inverse=True)
        torch.testing.assert_close(eps, found[f"{key}/up"], **exact)


def test_flowturbo_itself_arrives_at_the_same_samples() -> None:
    """Its blocks as released, a Heun block and seven pseudo-corrector blocks: our first step is Heun's."""
    field, found = published()
    x0 = integrate(field, found["noise"], uniform(8), SOLVERS["pec"])
    torch.testing.assert_close(x0, found["flowturbo/H1P7"], rtol=0, atol=1e-13)


@both_grids
@pytest.mark.parametrize(("name", "order"), [
    ("euler", 1), ("heun", 2), ("ab2", 2), ("midpoint-cached", 2), ("pec", 2),
])  # fmt: skip
def test_order_is_measured_against_an_eighth_order_method(name: SolverName, order: int, shift: int) -> None:
    """Both ways, root mean square of all samples: none of these paths is near the edge of a component."""
    for inverse in (False, True):
        coarse, fine = (errors(name, shifted(steps, shift), inverse).norm() for steps in (128, 256))
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_two_steps_of_adams_bashforth_by_hand() -> None:
    """dx/dt = x at uneven steps, whose weights integrate the line through two velocities."""
    x, before = 1.0, (0.0, 0.0)
    for k, (t, s) in enumerate(UNEVEN.intervals):
        h, v = s - t, x
        r = h / (t - before[0])
        x, before = x + h * ((1 + r / 2) * v - r / 2 * before[1] if k else v), (t, v)
    one = torch.ones(1, 1, dtype=torch.float64)
    found = integrate(lambda x, t, labels: x, one, UNEVEN, SOLVERS["ab2"])
    assert float(found) == pytest.approx(x, abs=1e-15)


def test_velocities_are_reused_as_published() -> None:
    """Which times are asked for, at which states, and what a step begins with."""
    flow, eps = mixture((2,)), noise(0, range(5), (2,)).double()
    at: dict[str, Callable[[float, float], float]] = {
        "midpoint-cached": lambda t, s: (t + s) / 2,
        "pec": lambda t, s: s,
    }
    for name, place in at.items():
        field, begun = Counting(flow), list[Tensor]()
        keep = lambda i, t, x, v: begun.append(v)  # noqa: B023, E731
        integrate(field, eps, UNEVEN, SOLVERS[name], on_step=keep)  # type: ignore[index]
        asked = [float(t[0]) for _, t, _ in field.asked]
        assert asked == pytest.approx([1.0, *(place(t, s) for t, s in UNEVEN.intervals)])
        for v, (x, t, _) in zip(begun, field.asked, strict=False):
            assert torch.equal(v, flow(x, t))


def test_dpm_solvers_order_is_one_in_log_snr() -> None:
    """Both ways between t = 0.95 and 0.05, by equal steps of lambda, against rk4."""

    def schedule(steps: int) -> Knots:
        last = math.log(0.95 / 0.05)
        return Knots(
            tuple(1 / (1 + math.exp(last * (2 * i / steps - 1))) for i in range(steps + 1)), "lambda"
        )

    field, eps = mixture((2,)), noise(0, range(65), (2,)).double()
    for inverse in (False, True):
        truth = integrate(field, eps, schedule(1024), SOLVERS["rk4"], inverse=inverse)
        coarse, fine = (
            (integrate(field, eps, schedule(n), SOLVERS["dpm++2m"], inverse=inverse) - truth)
            .norm(dim=1)
            .median()
            for n in (64, 128)
        )
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.05)


@both_grids
@pytest.mark.parametrize("inverse", [False, True])
def test_dpm_solvers_error_over_the_whole_way(inverse: bool, shift: int) -> None:
    """log(N) / N^2, since steps in lambda do not get short where it is infinite.

    So N^2 times the error grows by as much with each doubling of N.
    """
    counts = (128, 256, 512, 1024)
    scaled = [n**2 * errors("dpm++2m", shifted(n, shift), inverse).median() for n in counts]
    growth = torch.stack(scaled).diff()
    torch.testing.assert_close(growth, growth.mean().expand(3), rtol=0.15, atol=0)


@pytest.mark.parametrize("inverse", [False, True])
def test_dpm_solvers_steps_at_both_ends_are_eulers(inverse: bool) -> None:
    """The first, the second, since that begins where lambda is infinite, and the last, which ends there."""
    field, eps = mixture((2,)), noise(0, range(9), (2,)).double()
    knots: list[tuple[float, Tensor, Tensor]] = []
    keep = lambda i, t, x, v: knots.append((t, x, v))  # noqa: E731
    end = integrate(field, eps, UNEVEN, SOLVERS["dpm++2m"], on_step=keep, inverse=inverse)
    knots.append((float(inverse), end, end))
    eulers = [torch.equal(x.add(v, alpha=s - t), y) for (t, x, v), (s, y, _) in pairwise(knots)]
    assert eulers == [True, True, False, True]


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
@both_grids
@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")
def test_diffusers_dpm_solver_arrives_at_the_same_samples(steps: int, shift: int) -> None:
    """Its scheduler with our times in place of its own, which begin a little below 1; it steps in float32."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    field, eps, schedule = mixture((2,)), noise(0, range(20), (2,)).double(), shifted(steps, shift)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.tensor(schedule.times, dtype=torch.float64)
    x = eps
    for t, name in zip(schedule.times, scheduler.timesteps, strict=False):
        x = scheduler.step(field(x, torch.full((20,), t, dtype=torch.float64)), name, x).prev_sample
    torch.testing.assert_close(integrate(field, eps, schedule, SOLVERS["dpm++2m"]), x, rtol=0, atol=2e-5)


def ab2_table(schedule: Schedule) -> list[list[float]]:
    """Adams-Bashforth's two steps as coefficients."""
    rows: list[list[float]] = []
    lengths = [s - t for t, s in schedule.intervals]
    for k, h in enumerate(lengths):
        share = h / lengths[k - 1] / 2 if k else 0.0
        rows.append([0.0] * max(0, k - 1) + ([-h * share] if k else []) + [h * (1 + share)])
    return rows


@pytest.mark.parametrize("schedule", [uniform(1), uniform(2), uniform(6), shifted(5, 3.0), UNEVEN])
def test_coefficients_that_are_a_known_rules_give_its_samples(schedule: Schedule) -> None:
    field, eps = Counting(mixture((2,))), noise(0, range(20), (2,)).double()
    euler = [[0.0] * k + [s - t] for k, (t, s) in enumerate(schedule.intervals)]
    for name, table in (("euler", euler), ("ab2", ab2_table(schedule))):
        solver, known = multistep(table), integrate(field, eps, schedule, SOLVERS[name])  # type: ignore[index]
        field.asked.clear()
        torch.testing.assert_close(integrate(field, eps, schedule, solver), known, rtol=0, atol=1e-14)
        assert len(field.asked) == nfe(solver, schedule) == schedule.steps
        assert steps_for(solver, schedule.steps) == schedule.steps
        # A second walk begins with an empty memory.
        torch.testing.assert_close(integrate(field, eps, schedule, solver), known, rtol=0, atol=1e-14)


def test_coefficients_weigh_the_velocities_of_all_knots() -> None:
    """dx/dt = t: three steps by hand."""
    table = [[-0.5], [0.25, -0.5], [2.0, -1.0, 0.5]]
    schedule = Schedule((1.0, 0.6, 0.2, 0.0), "by hand")
    field: Callable[..., Tensor] = lambda x, t, labels: t[:, None]  # noqa: E731
    found = integrate(field, torch.zeros(1, 1, dtype=torch.float64), schedule, multistep(table))
    assert float(found) == pytest.approx(-0.5 + 0.25 - 0.5 * 0.6 + 2.0 - 0.6 + 0.5 * 0.2)


def test_coefficients_are_for_one_number_of_steps() -> None:
    solver, field, x = multistep([[-0.5], [0.0, -0.5]]), mixture((2,)), torch.zeros(1, 2)
    wrong = r"^solver multistep: its coefficients are for 2 steps, schedule 'uniform' has 3$"
    for call in (lambda: integrate(field, x, uniform(3), solver), lambda: nfe(solver, uniform(3))):
        with pytest.raises(UsageError, match=wrong):
            call()
    for budget in (1, 3, 0):
        with pytest.raises(UsageError, match=rf"cannot make exactly {budget} evaluations: 2 would do$"):
            steps_for(solver, budget)


def test_coefficients_have_no_way_up() -> None:
    with pytest.raises(UsageError) as refused:
        integrate(mixture((2,)), torch.zeros(1, 2), uniform(1), multistep([[-1.0]]), inverse=True)
    assert str(refused.value) == (
        "solver multistep has no way from data to noise; those that have one are "
        f"{listed(get_args(OdeSolver))}"
    )


@pytest.mark.parametrize(("table", "message"), [
    ([], "rows must have 1, 2, 3, ... numbers, found none"),
    ([[-0.5, 0.0], [0.0, -0.5]], "rows must have 1, 2, 3, ... numbers, found 2, 2"),
    ([[-0.5], [-0.5]], "rows must have 1, 2, 3, ... numbers, found 1, 1"),
    ([[-0.5], [0.0, math.nan]], "must be finite"),
    ([[-math.inf]], "must be finite"),
])  # fmt: skip
def test_tables_that_are_none_are_refused(table: list[list[float]], message: str) -> None:
    with pytest.raises(UsageError, match=f"^coefficients of a multistep rule:? {re.escape(message)}$"):
        multistep(table)
