"""Candidates made better by rollouts: against brute force, and against being fitted to few noises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stages import GAUSSIAN, Straight, make, work
from torch import Tensor

from flowdistill import artifact
from flowdistill.analytic import gaussian
from flowdistill.randomness import noise
from flowdistill.schedule import Schedule, edm, shifted, uniform
from flowdistill.solvers import SOLVERS, integrate, multistep
from flowdistill.stages.boss import TENSORS, Boss, file_name
from flowdistill.teachers import Model, open_model
from flowdistill.tuning.candidates import Candidate
from flowdistill.tuning.refining import Refiner, Rule, as_table, refinable
from flowdistill.tuning.trials import Meter, Noises
from flowdistill.work import Progress

MIXTURE = {"name": "analytic:mixture", "dim": 2}
ONE_CALL = ("euler", "ab2", "dpm++2m")


def refiner(
    folder: Path, model: Model, rollouts: int, fit: int = 48, seen: list[Progress] | None = None
) -> Refiner:
    given = work(folder, make(Boss), {"model": GAUSSIAN})
    given = replace(given, report=(lambda _: None) if seen is None else seen.append)
    noises = Noises(model, Meter(given, 1), 16)
    return Refiner(noises.solved(0, fit), noises.solved(fit, 16), rollouts, 5, model.velocity)


def error(each: Candidate, model: Model, first: int = 1000, count: int = 512) -> float:
    """Mean endpoint error on noises that nothing has seen."""
    indices = range(first, first + count)
    eps, labels = noise(5, indices, model.card.shape), model.labels(5, indices)
    found = integrate(model.field, eps, each.schedule, each.solver, labels)
    accurate = integrate(model.field, eps, uniform(64), SOLVERS["heun"], labels)
    return float((found - accurate).flatten(1).square().mean(1).sqrt().mean())


# Rules as tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ONE_CALL)
@pytest.mark.parametrize("grid", [uniform(1), uniform(4), shifted(5, 2.0), edm(6)], ids=lambda g: g.name)
def test_every_rule_of_one_evaluation_is_a_table(solver: Any, grid: Schedule) -> None:
    table = as_table(SOLVERS[solver], grid)
    assert [len(row) for row in table] == list(range(1, grid.steps + 1))
    flow, eps = gaussian((3,)), noise(0, range(8), (3,)).double()
    found = integrate(flow, eps, grid, multistep(table))
    torch.testing.assert_close(found, integrate(flow, eps, grid, SOLVERS[solver]), rtol=0, atol=1e-12)


def test_eulers_table_is_its_steps() -> None:
    grid = Schedule((1.0, 0.7, 0.0), "mine")
    (first,), (before, second) = as_table(SOLVERS["euler"], grid)
    assert (first, before, second) == pytest.approx((-0.3, 0.0, -0.7))


@pytest.mark.parametrize("solver", ONE_CALL)
def test_a_rule_that_is_learnt_begins_as_its_start(solver: Any) -> None:
    start = Candidate(SOLVERS[solver], edm(4))
    flow, eps = gaussian((3,)), noise(0, range(8), (3,)).double()
    rule = Rule.of(start)
    end = rule(flow, eps, None)
    torch.testing.assert_close(end, integrate(flow, eps, edm(4), SOLVERS[solver]), rtol=0, atol=1e-9)
    same = rule.candidate()
    assert same is not None and same.schedule.times == pytest.approx(edm(4).times, abs=1e-12)
    assert integrate(flow, eps, same.schedule, same.solver).sub(end).abs().max() < 1e-9


def test_its_gradients_are_those_of_finite_differences() -> None:
    """With respect to times and coefficients alike, through all steps, nothing kept between them."""
    flow, eps = gaussian((3,)), noise(0, range(8), (3,)).double()
    rule = Rule.of(Candidate(SOLVERS["ab2"], uniform(3)))

    def loss() -> Tensor:
        return rule(flow, eps, None).square().mean()

    slopes = torch.autograd.grad(loss(), rule.parts)
    with torch.no_grad():
        for part, slope in zip(rule.parts, slopes, strict=True):
            for place in range(len(part)):
                values = []
                for small in (1e-5, -1e-5):
                    part[place] += small
                    values.append(float(loss()))
                    part[place] -= small
                assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(slope[place]), abs=1e-7)


def test_what_can_be_the_start() -> None:
    table = Candidate(multistep([[-1.0]]), uniform(1), ((-1.0,),))
    assert refinable(table, "coefficients") and not refinable(table, "knots")
    for solver in ONE_CALL:
        assert refinable(Candidate(SOLVERS[solver], uniform(2)), "knots")
    for two_calls in ("heun", "midpoint", "pec"):
        assert not refinable(Candidate(SOLVERS[two_calls], uniform(2)), "coefficients")


# The search ------------------------------------------------------------------------------------------------


def test_a_single_knot_ends_where_brute_force_has_it(tmp_path: Path) -> None:
    model = open_model(GAUSSIAN)
    made = refiner(tmp_path, model, rollouts=60)
    found = made.better(Candidate(SOLVERS["euler"], uniform(2)), "knots")
    assert found is not None and found.name == "euler, refined-knots"
    eps = torch.cat([each for each, _, _ in made.fit.batches])
    truth = torch.cat([each for _, _, each in made.fit.batches])

    def missed(knot: float) -> float:
        end = integrate(model.field, eps, Schedule((1.0, knot, 0.0), "tried"), SOLVERS["euler"])
        return float((end - truth).square().mean(1).sqrt().mean())

    best = min((k / 200 for k in range(1, 200)), key=missed)
    assert found.schedule.times[1] == pytest.approx(best, abs=0.02)
    assert missed(found.schedule.times[1]) < missed(best) * 1.003 < missed(0.5)


@pytest.mark.parametrize("solver", ONE_CALL)
def test_knots_are_better_on_other_noises_too(solver: Any, tmp_path: Path) -> None:
    model = open_model(MIXTURE)
    start = Candidate(SOLVERS[solver], uniform(4))
    found = refiner(tmp_path, model, rollouts=80).better(start, "knots")
    assert found is not None and found.solver is start.solver
    assert error(found, model) < 0.9 * error(start, model)


def test_coefficients_gain_threefold_on_a_mixture(tmp_path: Path) -> None:
    """From AB2 at uniform times, on noises that neither fitted nor validated."""
    model = open_model(MIXTURE)
    start = Candidate(SOLVERS["ab2"], uniform(4))
    found = refiner(tmp_path, model, rollouts=400, fit=192).better(start, "coefficients")
    assert found is not None and found.name == "multistep, refined-coefficients"
    assert found.coefficients is not None and len(found.coefficients) == 4
    assert error(found, model) < error(start, model) / 3


@pytest.mark.parametrize("how", ["knots", "coefficients"])
def test_nothing_is_refined_where_paths_are_straight(how: Any, tmp_path: Path) -> None:
    model = replace(open_model(GAUSSIAN), network=Straight(gaussian((3,))), digest="0" * 64)
    found = refiner(tmp_path, model, rollouts=20).better(Candidate(SOLVERS["euler"], uniform(2)), how)
    assert found is None or error(found, model) < 1e-6


@pytest.mark.parametrize("how", ["knots", "coefficients"])
@pytest.mark.parametrize("rollouts", [1, 2, 5, 6, 30])
@pytest.mark.parametrize("steps", [1, 3])
def test_it_takes_no_more_than_it_may_and_counts_all_of_it(
    how: Any, rollouts: int, steps: int, tmp_path: Path
) -> None:
    model, calls = open_model(GAUSSIAN), 0
    flow = model.network

    def counted(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal calls
        calls += len(x)
        found: Tensor = flow(x, t, labels)
        return found

    seen: list[Progress] = []
    made = refiner(tmp_path, model, rollouts, seen=seen)
    before = seen[-1].done
    made.velocity = counted
    for trial in (made.fit, made.validate):
        object.__setattr__(trial, "field", counted)
    made.better(Candidate(SOLVERS["euler"], uniform(steps)), how)
    assert seen[-1].done - before == rollouts * 64 * steps
    assert calls <= rollouts * 64 * steps


# The stage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["knots", "coefficients"])
def test_the_stage_tries_what_was_refined_and_writes_the_same_again(how: str, tmp_path: Path) -> None:
    settings = {"grid": 20, "trajectories": 16, "held_out": 64, "nfe": [4], "refine_rollouts": 60}
    stage = make(Boss, refine=how, **settings)
    for name in ("one", "other"):
        stage.run(work(tmp_path / name / "boss", stage, {"model": MIXTURE}))
        (path,) = (tmp_path / name).rglob(file_name(4))
        content = artifact.load_json(path)
        names = [row["name"] for row in content["choice"]["candidates"]]
        (refined,) = [each for each in names if each.endswith(f"refined-{how}")]
        assert content["choice"]["best"] == refined == f"{content['solver']}, {content['schedule']}"
    for name in (TENSORS, file_name(4)):
        one, other = (tmp_path / each / "boss" / name for each in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_euler_alone_is_refined_for_programs_that_know_no_other(tmp_path: Path) -> None:
    settings = {"grid": 20, "trajectories": 16, "held_out": 32, "nfe": [3], "refine_trajectories": 32}
    stage = make(Boss, refine="knots", choose="euler", refine_rollouts=40, **settings)
    stage.run(work(tmp_path, stage, {"model": MIXTURE}))
    content = artifact.load_json(tmp_path / file_name(3))
    assert content["solver"] == "euler" and content["sigmas"] == content["times"][:-1]
    assert "euler, refined-knots" in {row["name"] for row in content["choice"]["candidates"]}
