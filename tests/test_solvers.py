"""Solvers: measured orders, exactness where theory promises it, and the count of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from test_edm_networks import CASES, denoiser
from torch import Tensor

from flowdistill.analytic import Mixture, gaussian, mixture
from flowdistill.errors import UsageError
from flowdistill.evaluation.metrics import deviations
from flowdistill.flow import expand
from flowdistill.randomness import noise
from flowdistill.schedule import Schedule, bellman, edm, shifted, uniform
from flowdistill.solvers import SOLVERS, OdeSolver, Solver, SolverName, integrate, nfe, steps_for

FIXTURES = Path(__file__).parent / "fixtures"
ALIASES: dict[SolverName, SolverName] = {"rf-solver": "midpoint"}
every_solver = pytest.mark.parametrize(
    "solver", dict.fromkeys(SOLVERS.values()), ids=lambda solver: solver.name
)
ode_solver = pytest.mark.parametrize(
    "solver", dict.fromkeys(SOLVERS[name] for name in get_args(OdeSolver)), ids=lambda solver: solver.name
)
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
    """RF-Solver is the midpoint rule; test_identities derives it from the paper's update."""
    for alias, name in ALIASES.items():
        assert SOLVERS[alias] is SOLVERS[name]


STABILITY: dict[SolverName, Callable[[float], float]] = {
    "euler": lambda z: 1 + z,
    "heun": lambda z: 1 + z + z**2 / 2,
    "midpoint": lambda z: 1 + z + z**2 / 2,
    "rk4": lambda z: 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24,
}


@ode_solver
def test_one_step_of_a_linear_flow_is_the_stability_polynomial(solver: Solver) -> None:
    x = torch.tensor([[2.0, -3.0]], dtype=torch.float64)
    after = solver.begin(x)(lambda x, t: 1.5 * x, x, 1.5 * x, 0.8, 0.4)
    torch.testing.assert_close(after, x * STABILITY[solver.name](1.5 * (0.4 - 0.8)))


QUADRATURE: dict[SolverName, Callable[[Callable[[float], float], float, float], float]] = {
    "euler": lambda f, t, s: f(t),
    "heun": lambda f, t, s: (f(t) + f(s)) / 2,
    "midpoint": lambda f, t, s: f((t + s) / 2),
    "rk4": lambda f, t, s: (f(t) + 4 * f((t + s) / 2) + f(s)) / 6,
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


@ode_solver
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
    for _, t, x, v in seen:
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


@ode_solver
def test_the_way_up_ends_at_the_noise_that_a_closed_form_names(solver: Solver) -> None:
    """Of the median sample; the quantile map of a bent flow, whose noise is where it came from."""
    field, eps = mixture((1,)), noise(0, range(65), (1,)).double()
    data = field.flow_map(eps)
    coarse, fine = (
        (integrate(field, data, uniform(steps), solver, inverse=True) - eps).abs().median()
        for steps in (64, 128)
    )
    assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.25)


@ode_solver
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


@ode_solver
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
        assert len(field.asked) == nfe(solver, schedule, inverse=True) == solver.evaluations * steps
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
    for _, t, x, v in seen:
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
        "euler, heun, midpoint, rk4, rf-solver"
    )


def test_each_walk_remembers_its_own_start() -> None:
    solver, field, eps = SOLVERS["reinterpolate"], mixture((2,)), noise(0, range(8), (2,)).double()
    one, other = solver.begin(eps), solver.begin(2 * eps)
    v = field(eps, torch.full((8,), 0.5, dtype=torch.float64))
    ends = [step(lambda x, t: x, eps, v, 0.5, 0.25) for step in (one, other)]
    torch.testing.assert_close(ends[1] - ends[0], 0.25 * eps)
