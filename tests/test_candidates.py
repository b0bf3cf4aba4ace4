"""Many ways to sample cost the same; the best is chosen by one half of the noises and judged by the other."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_multistep import random_one
from torch import Tensor

from flowdistill.evaluation import metrics
from flowdistill.schedule import uniform
from flowdistill.solvers import integrate, nfe
from flowdistill.tuning.candidates import (
    LOST,
    Candidate,
    Criterion,
    Judge,
    Outcome,
    Verdict,
    calibrated,
    choose,
    closed,
)

FEW = list(closed(4))[:4]
NAMES = [each.name for each in FEW]
EVEN = NAMES[0]


def candidates(evaluations: int) -> list[Candidate]:
    """All that are tried, as of a trajectory at random."""
    gram, fine = random_one(12).gram, uniform(12)
    path = (*range(evaluations), 12)
    return [*closed(evaluations), *calibrated(gram, fine, {"boss": path, "ab2-boss": path})]


@pytest.mark.parametrize("evaluations", range(1, 10))
def test_every_candidate_takes_as_many_evaluations(evaluations: int) -> None:
    calls = 0

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    tried = candidates(evaluations)
    assert tried[0].name == EVEN and tried[0].schedule.times == uniform(evaluations).times
    assert len({each.name for each in tried}) == len(tried)
    for each in tried:
        calls = 0
        assert integrate(field, torch.ones(2, 3), each.schedule, each.solver).isfinite().all()
        assert calls == nfe(each.solver, each.schedule) == evaluations, each.name
        assert (each.coefficients is not None) == (each.solver.name == "multistep")


def test_a_rule_of_two_evaluations_is_tried_where_it_comes_out_even() -> None:
    names = {k: {each.solver.name for each in closed(k)} for k in (1, 2, 3, 4)}
    assert all(found >= {"euler", "ab2", "dpm++2m"} for found in names.values())
    assert ["midpoint" in names[k] for k in (1, 2, 3, 4)] == [False, True, False, True]
    assert ["heun" in names[k] for k in (1, 2, 3, 4)] == [True, False, True, False]


# The choice ------------------------------------------------------------------------------------------------

Errors = Mapping[str, Tensor]


def verdict(choosing: Errors, judging: Errors) -> Verdict:
    """Of planted errors; nothing else is asked for than what the choice needs."""
    asked: list[str] = []

    def judge(each: Candidate) -> Outcome:
        asked.append(each.name)
        return Outcome(judging[each.name])

    found = choose(FEW, lambda each: Outcome(choosing[each.name]), judge, Judge(1))
    assert asked == [EVEN, found.facts["best"]]
    return found


def around(*means: float, seed: int = 0) -> Errors:
    """Errors of 32 noises about so large, alike for all candidates but for their means."""
    noise = torch.rand(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {name: mean + 0.1 * noise for name, mean in zip(NAMES, means, strict=True)}


def test_the_least_error_wins() -> None:
    found = verdict(around(1.0, 0.8, 0.5, 0.9), around(1.0, 0.3, 0.6, 0.9, seed=1))
    assert found.improved and found.chosen is FEW[2]
    facts = found.facts
    assert facts["best"] == NAMES[2] and facts["improved"] is True
    assert [row["name"] for row in facts["candidates"]] == [NAMES[i] for i in (2, 1, 3, 0)]
    assert facts["difference"]["value"] == pytest.approx(-0.4) and facts["difference"]["high"] < 0
    assert set(facts["held_out"]) == {"uniform", "chosen"}
    assert set(facts["candidates"][0]) > {"name", "value", "low", "high", "n"}
    judged = around(1.0, 0.3, 0.6, 0.9, seed=1)
    assert facts["held_out"]["chosen"]["value"] == pytest.approx(float(judged[NAMES[2]].mean()))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


@pytest.mark.parametrize("judged", [1.0, 1.3])
def test_what_was_only_lucky_is_not_written(judged: float) -> None:
    found = verdict(around(1.0, 0.8, 0.5, 0.9), around(1.0, 0.3, judged, 0.3))
    assert not found.improved and found.chosen is FEW[0]
    assert found.facts["best"] == NAMES[2] and found.facts["improved"] is False


def test_a_gain_that_noise_explains_is_none() -> None:
    judging = around(1.0, 1.0, 1.0, 1.0)
    draw = torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    judging = {**judging, NAMES[2]: judging[EVEN] + draw - draw.mean() - 0.05}
    assert not verdict(around(1.0, 0.8, 0.5, 0.9), judging).improved


def test_of_equals_the_first_is_taken() -> None:
    same = verdict(around(1.0, 1.0, 1.0, 1.0), around(1.0, 0.5, 0.5, 0.5))
    assert not same.improved and same.chosen is FEW[0] and same.facts["best"] == EVEN
    assert same.facts["difference"]["value"] == 0.0
    assert verdict(around(1.0, 0.5, 0.9, 0.5), around(1.0, 0.5, 0.5, 0.5)).chosen is FEW[1]


@settings(max_examples=30)
@given(st.lists(st.floats(0.5, 1.5), min_size=4, max_size=4), st.integers(0, 2**32), st.floats(0, 1))
def test_what_is_written_is_not_worse_than_uniform_steps(
    means: list[float], seed: int, spread: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    halves = [
        {
            name: mean + spread * torch.rand(16, generator=draw, dtype=torch.float64)
            for name, mean in zip(NAMES, means, strict=True)
        }
        for _ in range(2)
    ]
    found = verdict(*halves)
    written, even = halves[1][found.chosen.name], halves[1][EVEN]
    difference = metrics.paired_difference(written, even, seed=1)
    assert difference.high < 0 if found.improved else difference.value == 0


# By the distribution ---------------------------------------------------------------------------------------

DATA = metrics.Reference(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))


def outcomes(shifts: Mapping[str, float], seed: int, count: int = 200) -> dict[str, Outcome]:
    """Features of the same noises, shifted from the data's; the errors say the opposite."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 3, generator=draw, dtype=torch.float64)
    errors = torch.rand(count, generator=draw, dtype=torch.float64)
    return {name: Outcome(errors - shift, rows + shift) for name, shift in shifts.items()}


SHIFTS = dict(zip(NAMES, (0.8, 0.5, 0.2, 0.6), strict=True))


@pytest.mark.parametrize("criterion", ["endpoint", "fd"])
def test_either_criterion_chooses_by_its_own(criterion: Criterion) -> None:
    halves = [outcomes(SHIFTS, seed) for seed in (0, 1)]
    solve = [lambda each, half=half: half[each.name] for half in halves]
    found = choose(FEW, *solve, Judge(1, criterion, DATA))
    assert found.facts["best"] == NAMES[2 if criterion == "fd" else 0]
    assert found.improved == (criterion == "fd")
    facts = found.facts
    for name in NAMES:
        (row,) = (row for row in facts["candidates"] if row["name"] == name)
        assert row["fd"] == DATA.estimate(halves[0][name].features).as_dict()
        assert row["value"] == pytest.approx(float(halves[0][name].errors.mean()))
    if criterion == "fd":
        gain = facts["fd_difference"]
        values = [facts["held_out"][name]["fd"]["value"] for name in ("chosen", "uniform")]
        assert gain["value"] == pytest.approx(values[0] - values[1]) and gain["high"] < 0


def test_the_interval_of_a_difference_of_distances_holds_it() -> None:
    """Of 300 repetitions it misses the mean of all about 15 times, and it is as wide as they spread."""
    found = [outcomes({"a": 0.5, "b": 0.3}, seed, count=120) for seed in range(300)]
    judge = Judge(0, "fd", DATA)
    differences = [judge.differences(each["b"], each["a"])["fd"] for each in found]
    values = torch.tensor([each.value for each in differences], dtype=torch.float64)
    widths = torch.tensor([each.high - each.low for each in differences], dtype=torch.float64)
    assert float(widths.mean() / 2 / 1.96) == pytest.approx(float(values.std()), rel=0.12)
    missed = sum(not each.low <= float(values.mean()) <= each.high for each in differences)
    assert 4 <= missed <= 32
    apart = [DATA.estimate(each["a"].features) for each in found]  # pairing is what makes it sharp
    assert float(widths.mean()) < 0.5 * sum(each.high - each.low for each in apart) / len(apart)


def test_features_that_are_not_finite_only_lose() -> None:
    half = outcomes(SHIFTS, 0)
    half[NAMES[2]] = Outcome(half[NAMES[2]].errors, half[NAMES[2]].features * torch.nan)
    found = choose(FEW, lambda each: half[each.name], lambda each: half[each.name], Judge(1, "fd", DATA))
    assert found.facts["best"] == NAMES[1] and found.improved
    assert found.facts["candidates"][-1]["fd"]["value"] == LOST
    lost = Judge(1, "fd", DATA).differences(half[NAMES[2]], half[NAMES[0]])["fd"]
    assert (lost.value, lost.high) == (LOST, LOST)
