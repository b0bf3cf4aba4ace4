"""The stage `pairs` against closed forms, hand-made solvers and numpy; the figures that judge its work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import Shell
from test_stages import GAUSSIAN, make, work
from torch import Tensor

from flowdistill import artifact, data, networks, randomness
from flowdistill.adaptive import integrate_adaptive
from flowdistill.analytic import gaussian, ring
from flowdistill.errors import Diverged, Interrupted, MissingInput, RecipeError, UsageError
from flowdistill.evaluation.metrics import normality
from flowdistill.pairstore import PairStore
from flowdistill.recipe import parse
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.stages import verbs
from flowdistill.stages.pairs import CHECK, Maker, Pairs
from flowdistill.teachers import Card, open_model
from flowdistill.work import Done

RING = {"name": "analytic:ring"}
SEED = 5  # of `work`
FLOW = gaussian((3,))

Field = Callable[[Tensor, float], Tensor]


def made(folder: Path, model: Any = GAUSSIAN, inputs: dict[str, str] | None = None, **stage: Any) -> Done:
    """Run the stage; the pairs are in `folder`, exact unless a type is asked for."""
    chosen: Pairs = make(Pairs, **({"dtype": "float32"} | stage))
    return chosen.run(work(folder, chosen, {"model": model, **(inputs or {})}))


def stored(folder: Path) -> tuple[Tensor, Tensor, Tensor | None]:
    """All pairs: noise, samples and labels."""
    store = PairStore.open(folder)
    return store.batch(range(len(store)))


def rms(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).double().flatten(1).square().mean(1).sqrt()


def contents(folder: Path, done: Done) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in done.outputs}


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


def recipe(stage: str, teacher: str = "analytic:gaussian") -> bytes:
    return f"teacher: {teacher}\nstages:\n  - pairs: {{{stage}}}\n".encode()


# Solvers ---------------------------------------------------------------------------------------------------


def exact_velocity(x: Tensor, t: float) -> Tensor:
    """E[eps - x0 | x_t] of the Gaussian, as the docstring of `analytic` derives it."""
    mean, std = FLOW.means[0], FLOW.stds[0]
    slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
    return slope * (x - (1 - t) * mean) - mean


def euler(v: Field, x: Tensor, t: float, s: float) -> Tensor:
    return x + (s - t) * v(x, t)


def heun(v: Field, x: Tensor, t: float, s: float) -> Tensor:
    end = euler(v, x, t, s)
    return end if s == 0 else x + (s - t) / 2 * (v(x, t) + v(end, s))


def midpoint(v: Field, x: Tensor, t: float, s: float) -> Tensor:
    return x + (s - t) * v(euler(v, x, t, (t + s) / 2), (t + s) / 2)


def rk4(v: Field, x: Tensor, t: float, s: float) -> Tensor:
    h, middle = s - t, (t + s) / 2
    k1 = v(x, t)
    k2 = v(x + h / 2 * k1, middle)
    k3 = v(x + h / 2 * k2, middle)
    k4 = v(x + h * k3, s)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def walked(rule: Callable[..., Tensor], v: Field, eps: Tensor, times: Sequence[float]) -> Tensor:
    x = eps.double()
    for t, s in pairwise(times):
        x = rule(v, x, t, s)
    return x.float()


@pytest.mark.parametrize(("rule", "evaluations", "off"), [
    (euler, 20, 0.04), (heun, 39, 0.004), (midpoint, 40, 1e-4), (rk4, 80, 2e-6),
])  # fmt: skip
def test_solvers_land_where_their_rules_say_and_near_the_flow_map(
    tmp_path: Path, rule: Callable[..., Tensor], evaluations: int, off: float
) -> None:
    done = made(tmp_path, count=100, solver=rule.__name__, steps=20, batch_size=32)
    eps, x0, _ = stored(tmp_path)
    times = [1 - i / 20 for i in range(21)]
    torch.testing.assert_close(x0, walked(rule, exact_velocity, eps, [*times[:-1], 0.0]), atol=2e-6, rtol=0)
    assert rms(x0, FLOW.flow_map(eps)).mean() < off
    assert done.figures["nfe"] == evaluations and "forward_passes" not in done.figures


def test_rf_solver_is_midpoint_to_the_last_byte(tmp_path: Path) -> None:
    one, other = (
        contents(tmp_path / name, made(tmp_path / name, count=20, solver=name, steps=3))
        for name in ("midpoint", "rf-solver")
    )
    assert one == other
    assert one != contents(tmp_path / "h", made(tmp_path / "h", count=20, solver="heun", steps=3))


def test_rk45_keeps_its_tolerance_and_counts_each_pair(tmp_path: Path) -> None:
    """The evaluations are those of each pair alone, whatever batch it was in."""
    done = made(tmp_path, RING, count=60, solver="rk45", rtol=1e-4, atol=1e-4, batch_size=25, shard_size=40)
    eps, x0, labels = stored(tmp_path)
    assert labels is not None
    flow = ring()
    nfe = PairStore.open(tmp_path).column("nfe")
    alone, calls = integrate_adaptive(flow, eps, 1e-4, 1e-4, labels)
    torch.testing.assert_close(x0, alone, atol=1e-5, rtol=0)
    assert torch.equal(nfe.long(), calls)
    assert rms(x0, flow.flow_map(eps, labels)).max() < 1e-3
    values = nfe.double()
    expected = {"mean": values.mean().item(), "least": values.min().item(), "most": values.max().item()}
    assert done.figures["nfe"] == pytest.approx(expected)
    assert expected["least"] < expected["mean"] < expected["most"]


def test_rk45_is_as_exact_as_it_is_told(tmp_path: Path) -> None:
    off = []
    for exponent in (2, 4, 6):
        folder = tmp_path / str(exponent)
        made(folder, count=40, solver="rk45", rtol=10.0**-exponent, atol=10.0**-exponent, check=0)
        eps, x0, _ = stored(folder)
        off.append(rms(x0, FLOW.flow_map(eps)).mean().item())
    assert off[0] < 0.05 and off[1] < off[0] / 10 and off[2] < off[1] / 10


# Schedules -------------------------------------------------------------------------------------------------


def karras(steps: int, low: float, high: float, rho: float) -> list[float]:
    a, b = high ** (1 / rho), low ** (1 / rho)
    sigmas = [(a + i / (steps - 1) * (b - a)) ** rho for i in range(1, steps)]
    return [1.0, *(sigma / (1 + sigma) for sigma in sigmas), 0.0]


SCHEDULES: list[tuple[Any, list[float]]] = [
    ("uniform", [1, 0.75, 0.5, 0.25, 0]),
    ("edm", karras(4, 0.002, 80.0, 7.0)),
    ({"name": "edm"}, karras(4, 0.002, 80.0, 7.0)),
    ({"name": "edm", "sigma_min": 0.1, "sigma_max": 20, "rho": 3}, karras(4, 0.1, 20.0, 3.0)),
    ({"name": "shifted", "shift": 3}, [1, 0.9, 0.75, 0.5, 0]),
    ({"name": "shifted", "shift": 1}, [1, 0.75, 0.5, 0.25, 0]),
    ({"name": "times", "times": [1, 0.8, 0.3, 0.1, 0]}, [1, 0.8, 0.3, 0.1, 0]),
]


@pytest.mark.parametrize(("schedule", "times"), SCHEDULES)
def test_schedules_are_the_times_of_the_steps(tmp_path: Path, schedule: Any, times: list[float]) -> None:
    made(tmp_path, count=20, solver="euler", steps=4, schedule=schedule)
    eps, x0, _ = stored(tmp_path)
    torch.testing.assert_close(x0, walked(euler, exact_velocity, eps, times), atol=2e-6, rtol=0)


BAD_SCHEDULES = [
    ("steps: 3, schedule: {name: times, times: [1, 0.5, 0]}", "the schedule has 2 steps, `steps` says 3"),
    ("schedule: {name: times, times: [1, 0.5, 0]}", "the schedule has 2 steps, `steps` says 18"),
    ("steps: 3, schedule: {name: times, times: [1, 0.5, 0.7, 0]}", "from 1 to 0, found 1, 0.5, 0.7, 0"),
    ("steps: 2, schedule: {name: times, times: [1, 1, 0]}", "must fall strictly from 1 to 0, found 1, 1, 0"),
    ("steps: 1, schedule: {name: times, times: [0.9, 0]}", "must fall strictly from 1 to 0, found 0.9, 0"),
    ("steps: 1, schedule: {name: times, times: [1, 0.1]}", "must fall strictly from 1 to 0, found 1, 0.1"),
    ("schedule: {name: times, times: [1]}", "pairs.schedule.times: expected 2 or more values"),
    ("schedule: {name: times, times: [1, x, 0]}", "pairs.schedule.times[1]: expected a number, found 'x'"),
    ("schedule: {name: edm, sigma_min: 2, sigma_max: 1}", "expected sigma_min < sigma_max, found 2 and 1"),
    ("schedule: {name: edm, sigma_max: 1.0e+30}", "must fall strictly from 1 to 0, found 1, 1, 1"),
    ("schedule: {name: edm, rho: 0.001}", "pairs.schedule.rho: expected a number >= 1.0, found 0.001"),
    ("schedule: {name: shifted}", "pairs.schedule.shift: is required but missing"),
    ("schedule: {name: shifted, shift: 0}", "pairs.schedule.shift: expected a number > 0.0, found 0"),
    ("schedule: {name: shifted, shift: 1.0e+300}", "must fall strictly from 1 to 0, found 1, 1, 1"),
    ("schedule: {shift: 3}", "pairs.schedule.name: is required but missing (edm, shifted, times)"),
    ("schedule: {name: shfted, shift: 3}", "unknown schedule 'shfted', did you mean 'shifted'?"),
    ("schedule: edn", "pairs.schedule: expected 'uniform' or 'edm' or a mapping, found 'edn'"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "says"), BAD_SCHEDULES)
def test_schedules_that_are_none_are_refused_at_their_line(stage: str, says: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse(recipe(stage), Path("r.yaml"), verbs())
    assert says in str(refused.value) and str(refused.value).startswith("r.yaml:3:")


def test_a_wrong_schedule_is_told_in_the_words_of_the_one_that_was_chosen() -> None:
    with pytest.raises(RecipeError) as refused:
        parse(recipe("schedule: {name: edm, sigma_min: 2, sigma_max: 1}"), Path("r.yaml"), verbs())
    assert "something else" not in str(refused.value)


def test_rk45_needs_no_steps(tmp_path: Path) -> None:
    found = parse(recipe("solver: rk45, steps: 3, schedule: {name: times, times: [1, 0]}"), tmp_path, verbs())
    assert isinstance(found.stages[0], Pairs)


@given(st.sets(st.integers(1, 9999), max_size=12))
def test_halved_is_every_step_in_two_of_equal_length(inner: set[int]) -> None:
    times = (1.0, *sorted((knot / 10_000 for knot in inner), reverse=True), 0.0)
    coarse = Schedule(times, "coarse")
    fine = coarse.halved()
    assert fine.times[::2] == times and fine.steps == 2 * coarse.steps
    halves = [t - s for t, s in fine.intervals]
    for (t, s), first, second in zip(coarse.intervals, halves[::2], halves[1::2], strict=True):
        assert first == pytest.approx((t - s) / 2) and second == pytest.approx((t - s) / 2)
    assert uniform(6).halved().times == pytest.approx(uniform(12).times)


# The solver's error ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "steps", "within"), [
    ("euler", 40, 0.05), ("heun", 40, 0.1), ("midpoint", 10, 0.25),
])  # fmt: skip
def test_the_figure_is_the_true_error_but_for_what_halving_leaves(
    tmp_path: Path, solver: Any, steps: int, within: float
) -> None:
    """x_h - x_(h/2) is (1 - 2^-p) of the error of an order p, as far as that order has set in."""
    done = made(tmp_path, count=128, solver=solver, steps=steps, check=128)
    eps, x0, _ = stored(tmp_path)
    true, distance = rms(x0, FLOW.flow_map(eps)).mean(), rms(eps, x0).mean()
    figure, power = done.figures["solver_error"], 2 ** SOLVERS[solver].order
    assert figure["mean"] * power / (power - 1) == pytest.approx(true.item(), rel=within)
    assert figure["relative"] == pytest.approx(figure["mean"] / distance.item(), rel=1e-4)
    assert done.figures["distance"] == pytest.approx(distance.item(), rel=1e-5)
    assert figure["median"] < figure["p95"] and figure["pairs"] == 128


def test_the_figure_is_of_the_first_pairs_only(tmp_path: Path) -> None:
    few = made(tmp_path / "few", count=50, solver="euler", steps=4, check=16, batch_size=10)
    error = made(tmp_path / "all", count=50, solver="euler", steps=4, check=16, estimate_error=True)
    each = PairStore.open(tmp_path / "all").column("error")[:16]
    for done in (few, error):
        figure = done.figures["solver_error"]
        assert figure["mean"] == pytest.approx(each.mean().item(), rel=1e-5)
        assert figure["median"] == pytest.approx(each.quantile(0.5).item(), rel=1e-5)
        assert figure["p95"] == pytest.approx(each.quantile(0.95).item(), rel=1e-5)
    assert artifact.load_tensors(tmp_path / "few" / CHECK)[0]["error"].shape == (16,)


def test_check_0_measures_nothing(tmp_path: Path) -> None:
    done = made(tmp_path, count=8, solver="euler", steps=2, check=0)
    assert not {"solver_error", "distance"} & set(done.figures)
    assert CHECK not in done.outputs and not (tmp_path / CHECK).exists()
    assert made(tmp_path / "more", count=8, steps=2, check=500).figures["solver_error"]["pairs"] == 8


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_estimated_errors_are_those_of_each_pair(tmp_path: Path, solver: Any) -> None:
    stage = {"count": 40, "solver": solver, "steps": 3, "batch_size": 16}
    made(tmp_path / "plain", **stage)
    made(tmp_path / "errors", estimate_error=True, **stage)
    store = PairStore.open(tmp_path / "errors")
    eps, x0, _ = stored(tmp_path / "errors")
    finer = integrate(FLOW, eps, uniform(6), SOLVERS[solver])
    torch.testing.assert_close(store.column("error").double(), rms(x0, finer), atol=1e-6, rtol=1e-5)
    assert torch.equal(x0, stored(tmp_path / "plain")[1])
    with pytest.raises(KeyError):
        PairStore.open(tmp_path / "plain").column("error")


@pytest.mark.parametrize("where", ["pairs", "run"])
def test_what_is_not_exact_enough_is_refused_and_leaves_nothing(shell: Shell, where: str) -> None:
    Path("r.yaml").write_bytes(recipe("count: 64, steps: 12, solver: heun, tolerance: 0.001"))
    answer = shell(where, "r.yaml", "-q", "--json")
    assert (answer.code, answer.out) == (2, "")
    found = re.search(r"pairs.tolerance: the solver's error is ([\d.e-]+) of the distance", answer.err)
    steps = re.search(r"(\d+) steps would do", answer.err)
    assert found and steps and "more than 0.001; nothing was made" in answer.err
    assert [path.name for path in Path("runs/r").iterdir() if path.is_dir()] == []
    [standing] = shell("status", "r.yaml", "--json").json["stages"]
    assert standing["state"] == "missing"

    measured = shell("pairs", "r.yaml", "-q", "--json", "--out", "m", "-s", "pairs.tolerance=1").json
    assert measured["stages"][0]["figures"]["solver_error"]["relative"] == pytest.approx(
        float(found[1]), 0.01
    )

    enough = shell(where, "r.yaml", "-q", "--json", "-s", f"pairs.steps={steps[1]}")
    assert enough.code == 0, "no folder is in the way, and the steps do"
    assert enough.json["stages"][0]["figures"]["solver_error"]["relative"] <= 0.001


def advice(folder: Path, **stage: Any) -> dict[str, Any]:
    """The settings that the refusal recommends, nothing where it was not refused."""
    try:
        made(folder, count=32, check=32, **stage)
    except UsageError as refused:
        assert refused.exit_code == 2 and f"more than {stage['tolerance']:.3g}" in str(refused)
        if steps := re.search(r"(\d+) steps would do", str(refused)):
            return {"steps": int(steps[1])}
        lower = re.search(r"lower rtol and atol to (\S+) and \S+, or", str(refused))
        assert lower
        return {"rtol": float(lower[1]), "atol": float(lower[1])}
    return {}


@pytest.mark.parametrize(("model", "stage"), [
    (GAUSSIAN, {"solver": "heun", "steps": 12, "tolerance": 0.001}),
    (GAUSSIAN, {"solver": "midpoint", "steps": 5, "tolerance": 2e-4}),
    (GAUSSIAN, {"solver": "rk4", "steps": 4, "tolerance": 4e-5}),
    (GAUSSIAN, {"solver": "rk45", "rtol": 1e-2, "atol": 1e-2, "tolerance": 1e-4}),
    (GAUSSIAN, {"solver": "euler", "steps": 12, "tolerance": 0.004}),
    (RING, {"solver": "heun", "steps": 8, "tolerance": 0.012}),
])  # fmt: skip
def test_what_is_recommended_suffices(tmp_path: Path, model: Any, stage: dict[str, Any]) -> None:
    change = advice(tmp_path / "first", model=model, **stage)
    assert change and not advice(tmp_path / "second", model=model, **(stage | change))


@pytest.mark.parametrize(("model", "stage"), [
    (GAUSSIAN, {"solver": "euler", "steps": 6, "tolerance": 0.01}),
    (RING, {"solver": "heun", "steps": 4, "tolerance": 0.01}),
    (RING, {"solver": "rk45", "rtol": 0.1, "atol": 0.1, "tolerance": 1e-3}),
])  # fmt: skip
def test_to_follow_the_recommendations_leads_to_the_tolerance(
    tmp_path: Path, model: Any, stage: dict[str, Any]
) -> None:
    """Each one asks for more work, and the tolerance is met in the end."""
    for attempt in range(8):
        change = advice(tmp_path / str(attempt), model=model, **stage)
        if not change:
            break
        assert change.get("steps", math.inf) > stage.get("steps", 0)
        assert change.get("rtol", 0.0) < stage.get("rtol", 1.0)
        stage = stage | change
    else:
        pytest.fail(f"still refused with {stage}")
    assert attempt > 0


def test_what_is_not_finite_is_said_to_be_so(tmp_path: Path) -> None:
    """A network whose output is beyond what fp16 holds."""
    arguments = {"shape": [1, 8, 8], "classes": 2, "channels": 8, "multipliers": [1], "attention": []}
    weights = networks.build("unet", arguments).state_dict()
    weights["out.bias"] = torch.full_like(weights["out.bias"], 1e5)
    teacher = tmp_path / "teacher.safetensors"
    Card(architecture="unet", arguments=arguments, shape=(1, 8, 8), classes=2).write(teacher, weights)
    for number, tolerance in enumerate((None, 0.1)):
        stage = {"count": 4, "steps": 2, "precision": "fp16", "tolerance": tolerance}
        with pytest.raises(Diverged, match="pairs made in fp16 are not finite, nothing was made"):
            made(tmp_path / str(number), str(teacher), **stage)
        assert not (tmp_path / str(number) / "store.json").exists()
    made(tmp_path / "fine", str(teacher), count=4, steps=2)


# Labels ----------------------------------------------------------------------------------------------------


def test_only_the_classes_that_are_listed_occur_equally_often(tmp_path: Path) -> None:
    made(tmp_path, RING, count=1200, classes=[6, 1, 3], solver="euler", steps=1, check=0)
    eps, x0, labels = stored(tmp_path)
    assert labels is not None and set(labels.tolist()) == {1, 3, 6}
    counts = torch.bincount(labels)[[1, 3, 6]].numpy()
    assert scipy.stats.chisquare(counts).pvalue > 0.01
    expected = eps - ring()(eps, torch.ones(1200), labels)
    torch.testing.assert_close(x0, expected, atol=1e-5, rtol=0)


def test_all_classes_listed_are_all_classes(tmp_path: Path) -> None:
    stage = {"count": 60, "solver": "euler", "steps": 1, "check": 0}
    made(tmp_path / "all", RING, **stage)
    made(tmp_path / "listed", RING, classes=list(range(8)), **stage)
    for one, other in zip(stored(tmp_path / "all"), stored(tmp_path / "listed"), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_a_class_that_is_listed_twice_is_drawn_twice_as_often(tmp_path: Path) -> None:
    made(tmp_path, RING, count=900, classes=[2, 5, 5], solver="euler", steps=1, check=0)
    labels = stored(tmp_path)[2]
    assert labels is not None
    assert abs((labels == 5).double().mean().item() - 2 / 3) < 0.05  # 3 standard deviations


@pytest.mark.parametrize(
    "text", ["3\n0\n7\n7\n1\n", "3\n0\n7\n7\n1", "\ufeff3\r\n0\r\n 7\r\n7 \r\n1\r\n\r\n"]
)
def test_labels_of_a_file_go_round(tmp_path: Path, text: str) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(text.encode())
    made(tmp_path / "pairs", RING, {"labels": str(file)}, labels="x", count=23, steps=20, batch_size=4)
    eps, x0, labels = stored(tmp_path / "pairs")
    assert labels is not None and labels.tolist() == [[3, 0, 7, 7, 1][i % 5] for i in range(23)]
    assert rms(x0, ring().flow_map(eps, labels)).mean() < 0.05


@pytest.mark.parametrize(("text", "says"), [
    ("1\n\n2\nx\n", "labels.txt:2: expected a label, a whole number, found ''"),
    ("1\n2\nx\n", "labels.txt:3: expected a label, a whole number, found 'x'"),
    ("1\n2 3\n", "labels.txt:2: expected a label, a whole number, found '2 3'"),
    ("1\n-2\n", "labels.txt:2: expected a label, a whole number, found '-2'"),
    ("1\n2.0\n", "labels.txt:2: expected a label, a whole number, found '2.0'"),
    ("1\n٣\n", "labels.txt:2: expected a label, a whole number"),
    ("1\n" + "9" * 5000, "labels.txt:2: expected a label, a whole number, found '999"),
    ("7\n8\n", "labels.txt:2: 8 is no class of the model, which has 0 to 7"),
    ("", "labels.txt: is empty, expected a label in each line"),
    (" \n\n", "labels.txt: is empty, expected a label in each line"),
])  # fmt: skip
def test_labels_that_are_none_are_named_by_their_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "labels.txt").write_bytes(text.encode())
    with pytest.raises(UsageError) as refused:
        made(tmp_path / "pairs", RING, {"labels": str(tmp_path / "labels.txt")}, labels="x", count=4, steps=1)
    assert says in str(refused.value) and len(str(refused.value)) < 300 + len(str(tmp_path))
    assert not list((tmp_path / "pairs").iterdir())


def test_classes_and_labels_need_a_model_that_has_some(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("0\n")
    with pytest.raises(UsageError, match="pairs.classes: 8 is no class of the model, which has 0 to 7"):
        made(tmp_path / "a", RING, count=4, classes=[0, 8])
    with pytest.raises(UsageError, match="pairs.classes: the model has no classes"):
        made(tmp_path / "b", count=4, classes=[0])
    with pytest.raises(UsageError, match="labels.txt: the model has no classes"):
        made(tmp_path / "c", GAUSSIAN, {"labels": str(tmp_path / "labels.txt")}, labels="x", count=4)


def test_labels_are_an_input_whose_content_counts(shell: Shell) -> None:
    Path("l.txt").write_text("1\n2\n")
    Path("r.yaml").write_bytes(recipe("count: 8, steps: 1, check: 0, labels: ./l.txt", "analytic:ring"))
    assert shell("pairs", "r.yaml", "-q").code == 0
    assert shell("pairs", "r.yaml", "-q").code == 0
    Path("l.txt").write_text("1\n3\n")
    refused = shell("pairs", "r.yaml", "-q")
    assert refused.code == 2 and "input l.txt" in refused.err


# Guidance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "low", "high"), [(3.0, 0.0, 1.0), (0.0, 0.0, 1.0), (2.0, 0.4, 0.6)])
def test_guidance_is_applied_as_its_formula_says(
    tmp_path: Path, scale: float, low: float, high: float
) -> None:
    """On the ring the velocity without a condition is that of the mixture."""
    guidance = {"scale": scale, "interval": [low, high]}
    done = made(tmp_path, RING, count=50, solver="euler", steps=4, guidance=guidance, check=0)
    eps, x0, labels = stored(tmp_path)
    flow = ring()

    def guided(x: Tensor, t: float) -> Tensor:
        times = torch.full((50,), t)
        conditional, null = flow(x, times, labels), flow(x, times)
        return null + scale * (conditional - null) if low <= t <= high else conditional

    torch.testing.assert_close(x0, walked(euler, guided, eps, uniform(4).times), atol=2e-5, rtol=0)
    assert done.figures["nfe"] == 4
    if (low, high) == (0.0, 1.0):
        assert done.figures["forward_passes"] == 8


def test_passes_are_counted_where_guidance_applies(tmp_path: Path) -> None:
    """Of the times 1, 0.75, 0.5, 0.25 one is in the interval."""
    guidance = {"scale": 2.0, "interval": [0.4, 0.6]}
    done = made(tmp_path, RING, count=5, solver="euler", steps=4, guidance=guidance, check=0)
    assert done.figures["forward_passes"] == 5


def test_guidance_of_a_network(tmp_path: Path) -> None:
    stage = {"count": 6, "solver": "euler", "steps": 4, "check": 0, "batch_size": 6}
    x0 = {}
    for name, guidance in {
        "none": None,
        "scale 1": {"scale": 1.0},
        "no step": {"scale": 2.0, "interval": [0.3, 0.45]},
        "one step": {"scale": 2.0, "interval": [0.45, 0.55]},
    }.items():
        made(tmp_path / name, "builtin:shapes", guidance=guidance, **stage)
        eps, x0[name], labels = stored(tmp_path / name)
    assert torch.equal(x0["none"], x0["scale 1"]) and torch.equal(x0["none"], x0["no step"])
    network = open_model("builtin:shapes").network
    x = eps
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            v = network(x, torch.full((6,), t), labels)
            if t == 0.5:
                v = 2 * v - network(x, torch.full((6,), t))
            x = x - 0.25 * v
    torch.testing.assert_close(x0["one step"], x, atol=1e-4, rtol=0)
    assert rms(x0["one step"], x0["none"]).min() > 0.001


def test_guidance_needs_classes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="guidance needs a model with classes or prompts"):
        made(tmp_path, count=4, guidance={"scale": 2.0})


# Arithmetic and storage ------------------------------------------------------------------------------------


def test_in_bf16_the_state_stays_float32(tmp_path: Path) -> None:
    stage = {"count": 8, "steps": 3, "batch_size": 8, "check": 0}
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        assert made(tmp_path / name, "builtin:shapes", precision=name, **stage).dtype == dtype
    exact, half = stored(tmp_path / "fp32"), stored(tmp_path / "bf16")
    assert torch.equal(exact[0], half[0])
    assert (half[1] == half[1].bfloat16().float()).double().mean() < 0.05
    away = rms(half[1], exact[1]) / rms(half[0], half[1])
    assert away.min() > 1e-5 and away.median() < 0.01 and away.max() < 0.1


def test_fp16_is_near_fp32_and_nearer_than_bf16(tmp_path: Path) -> None:
    stage = {"count": 8, "steps": 3, "batch_size": 8, "check": 0}
    x0 = {}
    for name in ("fp32", "bf16", "fp16"):
        made(tmp_path / name, "builtin:digits", precision=name, **stage)
        x0[name] = stored(tmp_path / name)[1]
    assert 0 < rms(x0["fp16"], x0["fp32"]).mean() < rms(x0["bf16"], x0["fp32"]).mean() / 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8"])
def test_samples_are_stored_as_they_are_rounded(tmp_path: Path, dtype: str) -> None:
    stage = {"count": 10, "steps": 2, "batch_size": 4, "shard_size": 8, "check": 0}
    made(tmp_path / "exact", "builtin:digits", **stage)
    made(tmp_path / "rounded", "builtin:digits", dtype=dtype, **stage)
    eps, exact, labels = stored(tmp_path / "exact")
    kept = stored(tmp_path / "rounded")
    bytes_ = ((exact + 1) * 127.5).round().clamp(0, 255)
    expected = bytes_ / 127.5 - 1 if dtype == "uint8" else exact.to(getattr(torch, dtype)).float()
    assert torch.equal(kept[0], eps) and labels is not None and torch.equal(kept[2], labels)
    torch.testing.assert_close(kept[1], expected, atol=1e-6, rtol=0)
    distance = PairStore.open(tmp_path / "rounded").column("distance")
    torch.testing.assert_close(distance.double(), rms(eps, kept[1]), atol=1e-6, rtol=0)


def test_pcg64_draws_what_numpy_draws_from_the_record(tmp_path: Path) -> None:
    made(tmp_path, count=12, steps=20, solver="rk4", noise="pcg64", batch_size=5, shard_size=8)
    eps, x0, _ = stored(tmp_path)
    records = PairStore.open(tmp_path).column("record")
    for record, row in zip(records.numpy(), eps, strict=True):
        generator = np.random.PCG64()
        state = {
            "state": int.from_bytes(record[:16].tobytes(), "big"),
            "inc": int.from_bytes(record[16:].tobytes(), "big"),
        }
        generator.state = {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}
        drawn = np.random.Generator(generator).standard_normal((3,))
        assert torch.equal(row, torch.from_numpy(drawn).float())
    assert len(records.unique(dim=0)) == 12
    assert rms(x0, FLOW.flow_map(eps)).max() < 1e-4
    assert not torch.equal(eps, randomness.noise(SEED, range(12), (3,)))


def test_stored_noise_is_the_noise_that_others_draw_anew(tmp_path: Path) -> None:
    stage = {"count": 12, "steps": 2}
    made(tmp_path / "drawn", **stage)
    made(tmp_path / "stored", store_noise=True, **stage)
    column = PairStore.open(tmp_path / "stored").column("eps")
    assert torch.equal(column, randomness.noise(SEED, range(12), (3,)))
    assert torch.equal(stored(tmp_path / "stored")[1], stored(tmp_path / "drawn")[1])
    assert "eps" not in PairStore.open(tmp_path / "drawn").spec.columns()


def test_batches_and_shards_change_nothing_but_the_rounding(tmp_path: Path) -> None:
    made(tmp_path / "one", RING, count=30, steps=4, batch_size=7, shard_size=9)
    made(tmp_path / "other", RING, count=30, steps=4, batch_size=30)
    one, other = stored(tmp_path / "one"), stored(tmp_path / "other")
    assert torch.equal(one[0], other[0]) and one[2] is not None and torch.equal(one[2], other[2])
    torch.testing.assert_close(one[1], other[1], atol=1e-5, rtol=0)


def test_another_seed_makes_other_pairs(shell: Shell) -> None:
    Path("r.yaml").write_bytes(recipe("count: 20, steps: 2, dtype: float32", "analytic:ring"))
    for seed in (1, 2):
        assert shell("pairs", "r.yaml", "-q", "--seed", seed, "--out", f"seed{seed}").code == 0
    assert shell("pairs", "r.yaml", "-q", "--seed", 1, "--out", "again").code == 0
    one, two, again = (stored(Path(name, "pairs")) for name in ("seed1", "seed2", "again"))
    for a, b, c in zip(one, two, again, strict=True):
        assert a is not None and b is not None and c is not None
        assert torch.equal(a, c) and not torch.equal(a, b)
    assert not {tuple(row) for row in one[0].tolist()} & {tuple(row) for row in two[0].tolist()}


# Data ------------------------------------------------------------------------------------------------------


def saved(path: Path, x0: Tensor, labels: Tensor | None = None) -> dict[str, str]:
    """Samples as a file, and the input that names it."""
    arrays = {"samples": x0.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
    np.savez(path, **arrays)
    return {"data": str(path)}


@pytest.mark.parametrize("start", [{"invert_from": 0.0}, {}, {"invert_from": 0.2}])
def test_samples_of_a_gaussian_are_inverted_to_their_noise(tmp_path: Path, start: dict[str, float]) -> None:
    """x_t has mean (1 - t) mu and variance (1 - t)^2 s^2 + t^2, and paths keep their quantile.

    The count is that of the data, and samples without labels are fine here.
    """
    x0, _ = FLOW.data(range(333), seed=8)
    stage = {"source": "data", "data": "x", "solver": "rk4", "steps": 40, "batch_size": 50, **start}
    done = made(tmp_path / "p", GAUSSIAN, saved(tmp_path / "d.npz", x0), **stage)
    eps, kept, labels = stored(tmp_path / "p")
    assert torch.equal(kept, x0) and labels is None
    t = start.get("invert_from", 0.001)  # of rf++'s code
    fresh = randomness.noise(randomness.key(SEED, "inversion"), range(333), (3,))
    mean, std = FLOW.means[0], FLOW.stds[0]
    expected = ((1 - t) * (x0 - mean) + t * fresh) / ((1 - t) ** 2 * std**2 + t**2).sqrt()
    torch.testing.assert_close(eps, expected.float(), atol=1e-4, rtol=0)
    assert done.figures["pairs"] == 333 and done.figures["nfe"] == 160
    noise = done.figures["noise"]
    assert noise["pairs"] == 333 and noise["chi_square_p"] > 0.01
    assert noise["norm_mean_ratio"] == pytest.approx(1, abs=4 * math.sqrt(2 / (333 * 3)))


def test_the_error_of_data_is_the_solvers_alone(tmp_path: Path) -> None:
    inputs = saved(tmp_path / "d.npz", FLOW.data(range(64), seed=8)[0])
    stage = {"source": "data", "data": "x", "solver": "rk4", "steps": 40, "invert_from": 0.03}
    done = made(tmp_path / "p", GAUSSIAN, inputs, **stage)
    assert done.figures["solver_error"]["relative"] < 1e-4


def test_another_seed_begins_the_way_up_at_other_noise(tmp_path: Path) -> None:
    inputs = {"model": RING, **saved(tmp_path / "d.npz", *ring().data(range(20), 3))}
    eps: list[Tensor] = []
    for start in (0.0, 0.1):
        chosen = make(Pairs, source="data", data="x", steps=3, check=0, invert_from=start)
        for seed in (1, 2):
            folder = tmp_path / f"{start} {seed}"
            chosen.run(replace(work(folder, chosen, inputs), seed=seed))
            eps.append(stored(folder)[0])
    assert torch.equal(eps[0], eps[1]) and not torch.equal(eps[2], eps[3])
    other = make(Pairs, source="data", data="x", steps=3, check=0, invert_from=0.05)
    with pytest.raises(UsageError, match=r"origin.invert_from 0.1 -> 0.05"):
        other.run(replace(work(folder, other, inputs), seed=2))


@pytest.mark.parametrize("solver", ["heun", "rk45"])
def test_samples_keep_their_labels_and_are_inverted_under_them(tmp_path: Path, solver: str) -> None:
    flow = ring()
    x0, components = flow.data(range(150), seed=8)
    inputs = saved(tmp_path / "d.npz", x0, components)
    stage = {
        "source": "data",
        "data": "x",
        "solver": solver,
        "steps": 200,
        "batch_size": 64,
        "invert_from": 0.0,
    }
    done = made(tmp_path / "p", RING, inputs, check=8, **stage)
    eps, _, labels = stored(tmp_path / "p")
    assert labels is not None and torch.equal(labels, components)
    expected = (x0 - flow.means[labels]) / flow.stds[labels]
    assert rms(eps, expected.float()).mean() < (0.02 if solver == "heun" else 0.002)
    if solver == "rk45":
        nfe = PairStore.open(tmp_path / "p").column("nfe")
        assert done.figures["nfe"]["most"] == nfe.max() > nfe.min() == done.figures["nfe"]["least"]
    else:
        assert done.figures["nfe"] == 400, "on the way up the last step is Heun's, too"


def test_the_way_there_and_back_is_shorter_with_more_steps(tmp_path: Path) -> None:
    """And is what is stored as the error of each pair."""
    off = []
    for steps in (4, 8, 16):
        folder = tmp_path / str(steps)
        stage = {"source": "data", "count": 24, "steps": steps, "estimate_error": True, "check": 24}
        done = made(folder, "builtin:digits", invert_from=0.0, **stage)
        off.append(done.figures["solver_error"]["relative"])
    eps, x0, labels = stored(folder)
    assert off[0] < 0.15 and off[1] < off[0] / 2 and off[2] < off[1] / 2
    back = integrate(open_model("builtin:digits").field, eps, uniform(16), SOLVERS["heun"], labels)
    error = PairStore.open(folder).column("error").double()
    torch.testing.assert_close(error, rms(back, x0), atol=1e-5, rtol=1e-3)


def test_digits_with_a_little_noise_are_inverted_to_nearly_normal_noise(tmp_path: Path) -> None:
    """48 images of 64 dimensions: the mean of their squares has a standard deviation of 0.026.

    As they are, the digits have pixels that are blank in every image, and grey values in steps: what they are
    inverted to is short of a normal's norm, and shortest where they are blank.
    """
    stage = {"source": "data", "count": 48, "steps": 12, "check": 0}
    bare = made(tmp_path / "bare", "builtin:digits", invert_from=0.0, **stage).figures["noise"]
    noised = made(tmp_path / "noised", "builtin:digits", invert_from=0.03, **stage).figures["noise"]
    images, digits = data.DIGITS.batch(torch.arange(48))
    for name, figures in (("bare", bare), ("noised", noised)):
        eps, x0, labels = stored(tmp_path / name)
        assert torch.equal(x0, images) and labels is not None and torch.equal(labels, digits)
        assert figures == pytest.approx(normality(eps))
    assert 0.3 < bare["norm_mean_ratio"] < 0.85 and bare["chi_square_p"] < 1e-6
    assert noised["norm_mean_ratio"] == pytest.approx(1, abs=0.1)
    assert noised["norm_spread_ratio"] == pytest.approx(1, abs=0.4)
    assert noised["chi_square_p"] > 0.01
    eps = stored(tmp_path / "bare")[0]
    blank = data.DIGITS.batch(torch.arange(1797))[0].std(0) < 0.05
    assert eps[:, blank].std() < 0.6 * eps[:, ~blank].std()


def test_what_a_model_made_is_inverted_to_the_noise_it_was_made_from(tmp_path: Path) -> None:
    """32 pairs of 64 dimensions: the mean of their squares has a standard deviation of 0.03.

    The network contracts blank pixels by a factor of 50 or so, hence the wide 0.15 for single noises.
    """
    exact = {"solver": "rk45", "rtol": 1e-5, "atol": 1e-5, "check": 0, "invert_from": 0.0}
    made(tmp_path / "made", "builtin:digits", count=32, **exact)
    eps, x0, labels = stored(tmp_path / "made")
    inputs = saved(tmp_path / "d.npz", x0, labels)
    done = made(tmp_path / "inverted", "builtin:digits", inputs, source="data", data="x", **exact)
    found, kept, same = stored(tmp_path / "inverted")
    assert torch.equal(kept, x0) and labels is not None and torch.equal(labels, same)
    assert rms(found, eps).max() < 0.15
    noise = done.figures["noise"]
    assert noise["chi_square_p"] > 0.01
    assert noise["norm_mean_ratio"] == pytest.approx(1, abs=0.13)
    assert noise["norm_spread_ratio"] == pytest.approx(1, abs=0.5)


def test_data_of_the_models_card_are_taken_where_none_are_named(tmp_path: Path) -> None:
    made(tmp_path / "card", "builtin:digits", source="data", count=5, steps=1, check=0)
    made(tmp_path / "named", "builtin:digits", {"data": "digits"}, source="data", count=5, steps=1, check=0)
    for one, other in zip(stored(tmp_path / "card"), stored(tmp_path / "named"), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    made(tmp_path / "endless", "builtin:shapes", source="data", count=3, steps=1, check=0)
    assert torch.equal(stored(tmp_path / "endless")[1], data.SHAPES.batch(torch.arange(3))[0])
    for stage in ({}, {"source": "data"}):  # endless, so the number is that of the documentation
        chosen = make(Pairs, **stage)
        given_to = work(tmp_path / "none", chosen, {"model": "builtin:shapes"})
        assert chosen.maker(given_to).spec.count == 20_000
    with pytest.raises(UsageError, match="pairs.data: the model's card names no data set at hand"):
        made(tmp_path / "none", source="data", count=5)


def test_a_folder_of_images_is_labelled_by_its_folders(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    for name, image in zip(("b/x", "a/y", "c/z", "a/x", "b/a", "c/a"), pixels, strict=True):
        file = tmp_path / "images" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    inputs = {"data": str(tmp_path / "images")}
    done = made(tmp_path / "p", "builtin:digits", inputs, source="data", data="x", steps=2, batch_size=4)
    _, x0, labels = stored(tmp_path / "p")
    ordered = torch.from_numpy(pixels[[3, 1, 4, 0, 5, 2]])[:, None].float() / 127.5 - 1
    assert torch.equal(x0, ordered)
    assert labels is not None and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert done.figures["pairs"] == 6


@pytest.mark.parametrize(("labels", "count", "says"), [
    (torch.arange(4), 5, "pairs.count: 5 pairs are asked for, the data have 4"),
    (None, None, "pairs.data: has no labels, and the model has 8 classes"),
    (torch.arange(4) + 5, None, "pairs.data: labels 5 to 8, the model has 0 to 7"),
    (torch.arange(4) - 1, None, "pairs.data: labels -1 to 2, the model has 0 to 7"),
    (torch.arange(3), None, "expected 4 labels, found 3"),
    (torch.arange(4) / 2, None, "expected 4 labels, found 4 of torch.float32"),
])  # fmt: skip
def test_data_that_do_not_fit_are_refused(
    tmp_path: Path, labels: Tensor | None, count: int | None, says: str
) -> None:
    inputs = saved(tmp_path / "d.npz", ring().data(range(4), 0)[0], labels)
    with pytest.raises(UsageError) as refused:
        made(tmp_path / "p", RING, inputs, source="data", data="x", count=count, steps=2)
    assert says in str(refused.value)
    assert not (tmp_path / "p" / "store.json").exists()


def test_data_of_another_shape_or_place_are_refused(tmp_path: Path, shell: Shell) -> None:
    with pytest.raises(UsageError, match=r"digits: has samples of shape \[1, 8, 8\], the model's have \[2\]"):
        made(tmp_path / "p", RING, {"data": "digits"}, source="data", data="digits")
    with pytest.raises(MissingInput, match="nowhere"):
        made(tmp_path / "p", RING, {"data": str(tmp_path / "nowhere")}, source="data", data="x")
    Path("r.yaml").write_bytes(recipe("source: data, data: ./nowhere"))
    answer = shell("pairs", "r.yaml", "-q")
    assert answer.code == 2 and "r.yaml:3:33: pairs.data: './nowhere' does not exist" in answer.err
    assert "shapes, digits" in answer.err


# Settings that go together, and those that do not ----------------------------------------------------------


@pytest.mark.parametrize(("stage", "says"), [
    ("classes: [1], labels: ./l.txt", "classes: cannot be given together with `labels`"),
    ("tolerance: 0.1, check: 0", "tolerance: needs `check`, pairs to measure the error on"),
    ("noise: pcg64, store_noise: true", "noise: pcg64 is for noise that is drawn and not stored"),
    ("noise: pcg64, source: data", "noise: pcg64 is for noise that is drawn and not stored"),
    ("data: digits", "data: is for `source: data`"),
    ("source: data, classes: [1]", "source: data have their own labels; leave `classes` and `labels` out"),
    ("source: data, labels: ./l.txt", "source: data have their own labels; leave `classes` and `labels` out"),
    ("classes: []", "pairs.classes: expected 1 or more values, found an empty list"),
    ("classes: [-1]", "pairs.classes[0]: expected a number >= 0, found -1"),
    ("solver: huen", "pairs.solver"),
    ("source: data, invert_from: 1", "pairs.invert_from: expected a number < 1.0, found 1"),
    ("source: data, invert_from: -0.1", "pairs.invert_from: expected a number >= 0.0, found -0.1"),
    ("count: 0", "pairs.count: expected a number > 0, found 0"),
    ("tolerance: 0", "pairs.tolerance: expected a number > 0.0, found 0"),
    ("solver: rk45, rtol: 0", "pairs.rtol: expected a number > 0.0, found 0"),
    ("guidance: {scale: 2, interval: [0.5, 0.2]}", "expected an interval 0 <= low < high <= 1"),
    ("precision: fp8", "pairs.precision: unknown precision 'fp8'"),
    ("sorce: data", "pairs.sorce: unknown key, did you mean 'source'?"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused_at_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("l.txt").write_text("1\n")
    with pytest.raises(RecipeError) as refused:
        parse(recipe(stage), Path("r.yaml"), verbs())
    assert says in str(refused.value) and str(refused.value).startswith("r.yaml:3:")


def test_pairs_of_other_settings_are_refused_by_recipe_and_store(shell: Shell) -> None:
    Path("r.yaml").write_bytes(recipe("count: 8, steps: 4, batch_size: 4, shard_size: 4"))
    assert shell("pairs", "r.yaml", "-q").code == 0
    before = {path: path.read_bytes() for path in Path("runs/r/pairs").rglob("*") if path.is_file()}
    for change, says in {
        "pairs.steps=5": "steps: 4 -> 5",
        "pairs.schedule={name: shifted, shift: 2}": "schedule: uniform -> ",
        "seed=1": "seed: 0 -> 1",
        "teacher={name: analytic:gaussian, dim: 3}": "input teacher: ",
    }.items():
        answer = shell("pairs", "r.yaml", "-q", "-s", change)
        assert answer.code == 2 and says in answer.err and "--fresh" in answer.err
    assert before == {path: path.read_bytes() for path in Path("runs/r/pairs").rglob("*") if path.is_file()}


@pytest.mark.parametrize(("change", "says"), [
    ({"steps": 5}, "origin.steps 4 -> 5"),
    ({"solver": "rk4"}, "origin.solver 'heun' -> 'rk4'"),
    ({"schedule": "edm"}, "origin.schedule 'uniform' -> 'edm'"),
    ({"precision": "bf16"}, "origin.precision 'fp32' -> 'bf16'"),
    ({"estimate_error": True}, "error False -> True"),
    ({"store_noise": True}, "noise 'seeded' -> 'stored'"),
    ({"solver": "rk45"}, "evaluations False -> True"),
    ({"classes": [1]}, "origin.classes None -> [1]"),
    ({"guidance": {"scale": 3.0}}, "origin.guidance"),
])  # fmt: skip
def test_a_store_names_what_is_not_the_same(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    stage = {"count": 4, "steps": 4, "check": 0}
    before = contents(tmp_path, done := made(tmp_path, RING, **stage))
    with pytest.raises(UsageError) as refused:
        made(tmp_path, RING, **(stage | change))
    assert says in str(refused.value) and "nothing was changed" in str(refused.value)
    assert contents(tmp_path, done) == before


# Interrupted and continued ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [
    {"solver": "rk45", "estimate_error": True},
    {"source": "data", "data": "x", "steps": 3},
    {"source": "data", "data": "x", "solver": "rk45", "dtype": "float16"},
    {"noise": "pcg64", "steps": 2, "classes": [1, 2]},
], ids=["rk45", "data", "data by rk45", "pcg64"])  # fmt: skip
def test_interrupted_and_continued_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: dict[str, Any]
) -> None:
    inputs = {"model": RING, **saved(tmp_path / "d.npz", *ring().data(range(40), 3))}
    chosen = make(Pairs, count=40, batch_size=4, shard_size=12, check=8, **stage)
    whole = contents(tmp_path / "a", chosen.run(work(tmp_path / "a", chosen, inputs)))
    judged: list[range] = []
    errors = Maker.errors

    def noted(maker: Maker, indices: range) -> tuple[Tensor, Tensor]:
        judged.append(indices)
        return errors(maker, indices)

    monkeypatch.setattr(Maker, "errors", noted)
    for calls in (2, 5, 1):
        broken = work(tmp_path / "b", chosen, inputs)
        with pytest.raises(Interrupted):
            chosen.run(replace(broken, report=stop_after(calls, broken.stop)))
    done = chosen.run(work(tmp_path / "b", chosen, inputs))
    assert contents(tmp_path / "b", done) == whole
    assert judged == [range(8)], "the error is measured once"
    assert done.figures["solver_error"]["pairs"] == 8


def stop_after(calls: int, stop: Any) -> Any:
    """A signal that arrives while the n-th batch is reported."""
    left = iter(range(calls - 1))

    def report(_: Any) -> None:
        if next(left, None) is None:
            stop.signum = 2

    return report


# How normal noise is ---------------------------------------------------------------------------------------


def test_normal_noise_passes_for_normal() -> None:
    found = [normality(randomness.noise(seed, range(120), (2, 4))) for seed in range(200)]
    p = np.array([each["chi_square_p"] for each in found])
    assert 0.02 <= (p < 0.05).mean() <= 0.1
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    for name, deviation in (
        ("norm_mean_ratio", math.sqrt(2 / (120 * 8))),  # of a mean of 960 squares
        ("norm_spread_ratio", math.sqrt((2 + 12 / 8) / (4 * 120))),  # a chi-square's kurtosis is 12 / d
        ("std", math.sqrt(1 / (2 * 120 * 8))),
    ):
        values = np.array([each[name] for each in found])
        assert values.mean() == pytest.approx(1, abs=4 * deviation / math.sqrt(200) + 0.002)
        assert values.std() == pytest.approx(deviation, rel=0.25)
    assert abs(np.mean([each["mean"] for each in found])) < 4 / math.sqrt(200 * 960)


@pytest.mark.parametrize(("change", "figure", "value"), [
    (lambda x: 0.9 * x, "norm_mean_ratio", 0.81),
    (lambda x: 1.1 * x, "std", 1.1),
    (lambda x: x + 0.3, "mean", 0.3),
    (lambda x: x / x.flatten(1).norm(dim=1)[:, None, None] * 32**0.5, "norm_spread_ratio", 0.0),
])  # fmt: skip
def test_noise_that_is_not_normal_is_noticed(
    change: Callable[[Tensor], Tensor], figure: str, value: float
) -> None:
    eps = randomness.noise(1, range(500), (4, 8))
    found = normality(change(eps))
    assert found["chi_square_p"] < 1e-3 < normality(eps)["chi_square_p"]
    assert found[figure] == pytest.approx(value, abs=0.02)


@given(
    st.integers(20, 300), st.integers(1, 400), st.sampled_from([1.0, 1.02, 0.97, 1.2]), st.integers(0, 999)
)
@settings(max_examples=40, deadline=None)
def test_distance_and_p_value_are_scipys(n: int, d: int, scale: float, seed: int) -> None:
    eps = scale * randomness.noise(seed, range(n), (d,))
    found = normality(eps)
    other = scipy.stats.kstest(eps.double().square().sum(1).numpy(), "chi2", args=(d,))
    assert found["chi_square_ks"] == pytest.approx(other.statistic, abs=1e-9)
    assert found["chi_square_p"] == pytest.approx(other.pvalue, abs=0.02)
    assert found["pairs"] == n


def test_few_noises_are_judged_too() -> None:
    found = normality(torch.tensor([[0.5, -1.0, 2.0]]))
    assert all(math.isfinite(value) for value in found.values())
    assert found["norm_mean_ratio"] == pytest.approx(5.25 / 3)
    chi = scipy.stats.chi2.cdf(5.25, 3)
    assert found["chi_square_ks"] == pytest.approx(max(chi, 1 - chi))
