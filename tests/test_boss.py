"""The stage that tries many ways to sample: its choice, its files and their readers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Shell
from test_evaluate import evaluate, noises
from test_stages import GAUSSIAN, Straight, make, work
from torch import Tensor

from flowdistill import artifact, networks, plots
from flowdistill.analytic import gaussian
from flowdistill.errors import ArtifactError, Diverged
from flowdistill.evaluation import metrics
from flowdistill.flow import VelocityField
from flowdistill.multistep import fitted
from flowdistill.randomness import noise
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, integrate, multistep
from flowdistill.stages.boss import TENSORS, Boss, file_name, picture_name
from flowdistill.teachers import Card, Model, open_model
from flowdistill.tuning import candidates
from flowdistill.tuning.trials import Meter, Noises
from flowdistill.work import Progress, Work

SMALL = {"grid": 20, "trajectories": 32, "held_out": 32}
TINY = ("-s", "boss.grid=8", "-s", "boss.trajectories=4", "-s", "boss.held_out=16")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


# What is not finite ----------------------------------------------------------------------------------------


def broken(path: Path) -> str:
    """A network whose answers are too large for numbers; NaN itself no file would hold."""
    network = networks.build("mlp", {"shape": [2], "width": 8})
    weights = {name: torch.full_like(value, 1e30) for name, value in network.state_dict().items()}
    Card(architecture="mlp", arguments={"shape": [2], "width": 8}, shape=(2,)).write(path, weights)
    return str(path)


@pytest.mark.parametrize("choice", ["best", "boss"])
def test_a_model_without_numbers_ends_in_one_line_and_without_files(shell: Shell, choice: str) -> None:
    answer = shell(
        "boss", "--model", broken(Path("large.safetensors")), "-q", *TINY, "-s", f"boss.choose={choice}"
    )
    assert answer.code == 6 and len(answer.err.splitlines()) == 1
    assert "velocity is not finite along its trajectory" in answer.err
    assert not [path for path in Path("runs").rglob("*") if path.name in (TENSORS, "manifest.json")]
    assert not list(Path("runs").rglob("schedule-*"))


def at_times(*lost: float) -> VelocityField:
    """The Gaussian's field, NaN near some times."""
    flow = gaussian((3,))

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        found: Tensor = flow(x, t)
        return found * torch.nan if any(abs(float(t[0]) - each) < 1e-6 for each in lost) else found

    return field


def test_a_solution_that_is_not_finite_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibration's knots are others than the accurate solution's."""
    stage = make(Boss, grid=5, nfe=[2], held_out=16)
    monkeypatch.setattr(Model, "field", property(lambda self: at_times(31 / 32)))
    given = work(tmp_path, stage, {"model": GAUSSIAN})
    noises = Noises(given.model(), Meter(given, 1), 8)
    stage.calibrate(noises)
    with pytest.raises(Diverged, match="accurate solution is not finite"):
        stage.halves(noises)


def test_a_candidate_that_is_lost_only_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps meet the time at which this model answers with NaN where they are uniform or shifted so."""
    shifted = 2 * 1.25 / (1.25 * 2 + 1)
    monkeypatch.setattr(Model, "field", property(lambda self: at_times(shifted)))
    stage = make(Boss, grid=20, nfe=[3], trajectories=8, held_out=32)
    stage.run(work(tmp_path, stage, {"model": GAUSSIAN}))
    table = artifact.load_json(tmp_path / file_name(3))["choice"]["candidates"]
    values = {row["name"]: row["value"] for row in table}
    assert {name for name, value in values.items() if value == candidates.LOST} == {
        f"{solver}, shifted-1.25" for solver in ("euler", "ab2", "dpm++2m")
    }


# The choice and its file -----------------------------------------------------------------------------------


def run(folder: Path, model: Any, **settings: Any) -> tuple[dict[int, dict[str, Any]], list[Progress]]:
    stage = make(Boss, **{**SMALL, **settings})
    seen: list[Progress] = []
    done = stage.run(replace(work(folder, stage, {"model": model}), report=seen.append))
    made = {TENSORS, *map(file_name, stage.nfe)}
    assert made == set(done.outputs)
    assert {path.name for path in folder.iterdir() if path.is_file()} - made == {
        *map(picture_name, stage.nfe)
    }
    found = {k: artifact.load_json(folder / file_name(k)) for k in stage.nfe}
    for k, content in found.items():
        figures = done.figures["schedules"][str(k)]
        assert json.loads(json.dumps(figures)).items() <= content.items()
    return found, seen


@pytest.mark.parametrize("choice", [
    {}, {"choose": "boss"}, {"choose": "euler"}, {"refine": "knots", "refine_trajectories": 21},
    {"refine": "coefficients"}, {"choose": "euler", "refine": "knots", "refine_trajectories": 16},
], ids=lambda choice: "-".join(map(str, choice.values())))  # fmt: skip
@pytest.mark.parametrize("reference", ["heun", "euler"])
def test_the_evaluations_are_counted_beforehand(choice: Any, reference: str, tmp_path: Path) -> None:
    settings = {"nfe": [1, 2, 3], "grid": 9, "held_out": 17, "refine_rollouts": 20, **choice}
    _, seen = run(tmp_path, GAUSSIAN, reference=reference, **settings)
    assert seen[-1].done == seen[-1].total
    assert [each.done for each in seen] == sorted(each.done for each in seen)


def test_a_file_says_how_to_sample_and_why(tmp_path: Path) -> None:
    ring = {"name": "analytic:ring"}
    found, _ = run(tmp_path, ring, nfe=[1, 4])
    gram = artifact.load_tensors(tmp_path / TENSORS)[0]["gram"].numpy()
    for k, content in found.items():
        assert content["nfe"] == k and content["model"] == open_model(ring).digest
        assert content["guidance"] is None
        assert (content["grid"], content["trajectories"], content["seed"]) == (20, 32, 5)
        assert content["times"][0] == 1.0 and content["times"][-1] == 0.0
        assert content.get("sigmas") == (content["times"][:-1] if content["solver"] == "euler" else None)
        assert content["local_cost"]["boss"] <= content["local_cost"]["uniform"] * (1 + 1e-9)
        choice = content["choice"]
        assert len({row["name"] for row in choice["candidates"]}) == len(choice["candidates"]) > 8
        values = [row["value"] for row in choice["candidates"]]
        assert (
            values == sorted(values)
            and choice["candidates"][0]["value"] <= content["held_out"]["uniform"]["high"]
        )
        written = f"{content['solver']}, {content['schedule']}"
        assert written == (choice["best"] if choice["improved"] else "euler, uniform")
        table = content["coefficients"]
        assert (table is not None) == (content["solver"] == "multistep")
        if table is not None:
            knots = [uniform(20).times.index(t) for t in content["times"]]
            assert table == [list(row) for row in fitted(gram, uniform(20).times, knots)]
    assert found[4]["choice"]["improved"], "Euler's four steps are no match"
    judged = found[4]["choice"]["held_out"]
    assert judged["chosen"]["high"] < judged["uniform"]["low"]


def test_what_is_said_of_the_choice_is_so(tmp_path: Path) -> None:
    """The errors on the judging half can be recomputed, by the exact flow of a Gaussian."""
    found, _ = run(tmp_path, GAUSSIAN, nfe=[6])
    content, flow, eps = found[6], gaussian((3,)), noise(5, range(48, 64), (3,))
    grid = Schedule(tuple(content["times"]), "read")
    table = content["coefficients"]
    chosen = SOLVERS[content["solver"]] if table is None else multistep(table)
    for name, solver, schedule in (("uniform", SOLVERS["euler"], uniform(6)), ("chosen", chosen, grid)):
        error = metrics.endpoint_error(integrate(flow, eps, schedule, solver), flow.flow_map(eps)).mean()
        assert content["choice"]["held_out"][name]["value"] == pytest.approx(float(error), rel=0.05, abs=1e-3)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    settings = {"nfe": [2, 3], "held_out": 16, "trajectories": 8}
    for name in ("one", "other"):
        run(tmp_path / name, GAUSSIAN, **settings)
    for path in (each for each in (tmp_path / "one").iterdir() if each.is_file()):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    stage = make(Boss, **{**SMALL, **settings})
    stage.run(replace(work(tmp_path / "third", stage, {"model": GAUSSIAN}), seed=6))
    assert (tmp_path / "third" / TENSORS).read_bytes() != (tmp_path / "one" / TENSORS).read_bytes()


@pytest.mark.parametrize("kind", ["still", "reflowed"])
def test_nothing_beats_uniform_steps_where_paths_are_straight(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a student at rest, and of the reflow optimum, where one step is exact but for rounding."""
    network = Straight(gaussian((3,)))
    if kind == "still":
        network.std, network.mean = torch.ones(3), torch.zeros(3)
    model = replace(open_model(GAUSSIAN), network=network, digest=artifact.digest(kind))
    monkeypatch.setattr(Work, "model", lambda self: model)
    found, _ = run(tmp_path, GAUSSIAN, nfe=[1, 2, 4])
    for k, content in found.items():
        assert (content["solver"], content["schedule"]) == ("euler", "uniform")
        assert content["times"] == list(uniform(k).times) and content["coefficients"] is None
        assert not content["choice"]["improved"]


# Those who read it -----------------------------------------------------------------------------------------

TIMES = [1.0, 0.7, 0.3, 0.0]
TABLE = [[-0.25], [0.1, -0.5], [0.05, 0.1, -0.5]]
RULES: dict[str, dict[str, Any]] = {
    "ab2": {"solver": "ab2", "schedule": "ab2-boss", "times": TIMES, "coefficients": None},
    "heun": {"solver": "heun", "schedule": "uniform", "times": [1.0, 0.5, 0.0], "coefficients": None},
    "multistep": {"solver": "multistep", "schedule": "boss", "times": TIMES, "coefficients": TABLE},
}
SOLVER_OF = {**SOLVERS, "multistep": multistep(TABLE)}
TWO = {"name": "analytic:gaussian", "dim": 2}


def written(folder: Path, model: str, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / file_name(3)
    artifact.save_json(path, {"nfe": 3, "model": model, **changes})
    return path


@pytest.mark.parametrize("name", RULES)
def test_sample_and_eval_take_the_rule_of_the_file(name: Any, shell: Shell) -> None:
    model, solver = open_model(TWO), SOLVER_OF[name]
    path = written(Path("boss"), model.digest, **RULES[name])
    grid = Schedule(tuple(RULES[name]["times"]), "read")
    answer = shell("sample", "analytic:gaussian", "--schedule", path, "--count", "9", "--json", "-q")
    assert answer.code == 0 and (answer.json["solver"], answer.json["nfe"]) == (name, 3)
    found = artifact.load_tensors(Path("runs/samples/samples.safetensors"))[0]["samples"]
    assert torch.equal(found, integrate(model.field, noise(0, range(9), (2,)), grid, solver))
    assert not torch.equal(found, integrate(model.field, noise(0, range(9), (2,)), grid, SOLVERS["euler"]))

    measured = evaluate(Path("eval"), {"teacher": TWO}, Path("boss"), nfe=[3])
    label = {"ab2": "ab2-boss-ab2", "heun": "heun", "multistep": "boss-multistep"}[name]
    assert list(measured.rows) == ["teacher-3", f"teacher-3-{label}"]
    row = measured.rows[f"teacher-3-{label}"]
    assert (row["solver"], row["nfe"], row["times"]) == (name, 3, RULES[name]["times"])
    eps = noises(512).float()
    expected = metrics.endpoint_error(
        integrate(model.field, eps, grid, solver),
        integrate(model.field, eps, uniform(32), SOLVERS["heun"]),
    )
    torch.testing.assert_close(measured.tensors[f"teacher-3-{label}.endpoint_error"], expected)


def test_uniform_euler_steps_are_not_measured_twice(tmp_path: Path) -> None:
    even = {"solver": "euler", "schedule": "uniform", "times": list(uniform(3).times), "coefficients": None}
    written(tmp_path / "boss", open_model(TWO).digest, **even)
    assert list(evaluate(tmp_path / "eval", {"teacher": TWO}, tmp_path / "boss", nfe=[3]).rows) == [
        "teacher-3"
    ]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"coefficients": TABLE[:2]}, "its coefficients are for 2 steps, schedule '.*' has 3"),
    "shape": (
        {"coefficients": [[1.0], [1.0], [1.0]]},
        r"rows must have 1, 2, 3, \.\.\. numbers, found 1, 1, 1",
    ),
    "words": ({"coefficients": [["a"], ["b", "c"], ["d", "e", "f"]]}, "not a schedule, expected a file"),
    "number": ({"coefficients": 3}, "not a schedule, expected a file"),
    "none": ({"coefficients": None}, "not a schedule, expected a file"),
    "solver": ({"coefficients": None, "solver": "new"}, "not a schedule, expected a file"),
    "times": ({"times": [0.0, 0.3, 0.7, 1.0]}, "times must fall strictly from 1 to 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_is_no_rule_is_refused(what: str, shell: Shell) -> None:
    changes, message = WRONG[what]
    path = written(Path("boss"), open_model(TWO).digest, **{**RULES["multistep"], **changes})
    for force in ((), ("--force",)):
        answer = shell("sample", "analytic:gaussian", "--schedule", path, "-q", *force)
        assert answer.code == 4 and answer.err.startswith(f"error: {path}: ")
        with pytest.raises(ArtifactError, match=message) as refused:
            evaluate(Path("eval"), {"teacher": TWO}, Path("boss"), nfe=[3])
        assert str(refused.value).splitlines()[0] in answer.err or what == "rows" or what == "times"


def test_a_rule_serves_the_model_it_was_fitted_to(shell: Shell) -> None:
    path = written(Path("boss"), "0" * 64, **RULES["multistep"])
    refused = shell("sample", "analytic:gaussian", "--schedule", path, "-q")
    assert refused.code == 4 and "made for another model (000000000000" in refused.err
    with pytest.raises(ArtifactError, match="no schedule for teacher"):
        evaluate(Path("eval"), {"teacher": TWO}, Path("boss"), nfe=[3])
    forced = shell(
        "sample", "analytic:gaussian", "--schedule", path, "--count", "4", "-q", "--json", "--force"
    )
    assert (forced.code, forced.json["nfe"]) == (0, 3)
    for conflict in (("--nfe", "4"), ("--solver", "ab2")):
        answer = shell("sample", "analytic:gaussian", "--schedule", path, "-q", "--force", *conflict)
        assert answer.code == 2 and " ".join(conflict) in answer.err
    up = shell(
        "sample",
        "analytic:gaussian",
        "--schedule",
        path,
        "-q",
        "--force",
        "--invert",
        "runs/samples/samples.safetensors",
    )
    assert up.code == 2 and "multistep has no way from data to noise" in up.err


# The command -----------------------------------------------------------------------------------------------


def test_the_command_chooses_and_sample_follows(shell: Shell) -> None:
    answer = shell("boss", "--nfe", "4", "-q", *TINY)
    assert (answer.code, answer.err) == (0, "")
    (path,) = Path("runs/boss").rglob(file_name(4))
    content = artifact.load_json(path)
    choice = content["choice"]
    written = f"{content['solver']}, {content['schedule']}"
    (line,) = [line for line in answer.out.splitlines() if "uniform" in line and written in line]
    said = "better than uniform" if choice["improved"] else "nothing beat uniform"
    assert line.split()[:2] == ["4", str(len(choice["candidates"]))] and line.rstrip().endswith(said)
    shown = " ".join(f"{t:.4g}" for t in content["times"])
    assert re.search(rf"4 evaluations\n  times +{re.escape(shown)}\n", answer.out)
    assert choice["improved"], "four of Euler's steps are far from this teacher's solution"
    drawn = shell("sample", "--schedule", path, "--count", "2", "--json", "-q")
    assert drawn.code == 0 and (drawn.json["solver"], drawn.json["nfe"]) == (content["solver"], 4)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--nfe", "0"), "--nfe"),
    (("--nfe", "9"), "nfe 9 is more than the 8 steps of the grid; raise `grid`"),
    (("-s", "boss.held_out=15"), "boss.held_out"),
    (("-s", "boss.choose=worst"), "boss.choose"),
    (("-s", "boss.reference=rk4"), "boss.reference"),
    (("-s", "boss.cost=l1"), "boss.cost"),
    (("--refine", "all"), "boss.refine"),
    (("-s", "boss.criterion=fd", "-s", "boss.choose=boss"), "criterion: fd with choose: boss"),
    (("--refine", "knots", "-s", "boss.choose=boss"), "refine: knots with choose: boss"),
    (("--refine", "coefficients", "-s", "boss.choose=euler"), "coefficients are not Euler's; use knots"),
    (
        ("--refine", "coefficients", "-s", "boss.refine_trajectories=255"),
        "refine_trajectories: coefficients need 256 or more",
    ),
])  # fmt: skip
def test_the_command_refuses_in_one_line(arguments: tuple[str, ...], message: str, shell: Shell) -> None:
    answer = shell("boss", "-q", *TINY, *arguments)
    assert answer.code == 2 and message in answer.err and not Path("runs").exists()
    assert len(answer.err.splitlines()) == 1 or arguments == ("--nfe", "0")


# How many trajectories -------------------------------------------------------------------------------------


def test_trajectories_end_when_more_would_change_nothing(tmp_path: Path) -> None:
    given = {"name": "analytic:mixture", "dim": 2}
    used = {}
    for regret in (None, 0.05, 0.99):
        settings = {"grid": 10, "trajectories": 64, "nfe": [3], "held_out": 16, "batch_size": 8}
        stage = make(Boss, until_regret=regret, **settings)
        folder = tmp_path / str(regret)
        folder.mkdir()
        stage.run(work(folder, stage, {"model": given}))
        content = artifact.load_json(folder / file_name(3))
        used[regret] = content["trajectories"]
        assert content["regret"] >= 0
        if regret is not None and used[regret] < 64:
            assert content["regret"] < 2 * regret  # by other draws
    assert used[0.99] == 8 <= used[0.05] <= used[None] == 64


def test_for_programs_that_know_euler_alone_the_best_of_his_is_written(tmp_path: Path) -> None:
    ring = {"name": "analytic:ring"}
    found, seen = run(tmp_path, ring, nfe=[4], choose="euler")
    choice = found[4]["choice"]
    assert {row["name"].partition(",")[0] for row in choice["candidates"]} == {"euler"}
    assert {"euler, boss", "euler, uniform"} < {row["name"] for row in choice["candidates"]}
    assert found[4]["solver"] == "euler" and found[4]["sigmas"] == found[4]["times"][:-1]
    assert choice["best"] == choice["candidates"][0]["name"]


def test_refine_of_the_command_is_that_of_the_recipes_stage(shell: Shell) -> None:
    Path("r.yaml").write_text(
        "teacher: analytic:ring\nstages:\n  - boss: {name: b, nfe: [2], grid: 8, held_out: 16, "
        "trajectories: 4, refine_trajectories: 16, refine_rollouts: 6}\n"
    )
    assert shell("boss", "r.yaml", "--refine", "knots", "--nfe", "3", "-q").code == 0
    manifest = artifact.Manifest.read(Path("runs/r/b"))
    assert (manifest.settings["refine"], manifest.settings["nfe"]) == ("knots", [3])


def test_where_nothing_can_draw_it_is_said_how_to_get_it(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    answer = shell("boss", "--model", "analytic:ring", "--nfe", "2", "-q", *TINY)
    assert answer.code == 0 and "pip install 'flowdistill[plots]'" in answer.out
    assert not list(Path("runs").rglob("*.png"))


# By the distribution ---------------------------------------------------------------------------------------


def test_the_fréchet_distance_chooses_where_it_is_asked_to(tmp_path: Path) -> None:
    found, _ = run(tmp_path, {"name": "analytic:mixture"}, nfe=[2], criterion="fd", held_out=128)
    choice = found[2]["choice"]
    values = [row["fd"]["value"] for row in choice["candidates"]]
    assert choice["criterion"] == "fd" and values == sorted(values)
    assert choice["improved"] == (choice["fd_difference"]["high"] < 0)
    assert choice["candidates"][0]["name"] == choice["best"]
    assert {"fd", "value"} < set(choice["held_out"]["uniform"])


def test_both_columns_are_there_where_both_can_be_computed(shell: Shell) -> None:
    answer = shell("boss", "--model", "analytic:ring", "--nfe", "2", "-q", *TINY)
    assert answer.code == 0 and "Fréchet distance: uniform Euler" in answer.out
    none = shell("boss", "--nfe", "1", "-q", *TINY)  # 8 noises a half, 96 features
    assert none.code == 0 and "Fréchet" not in none.out


def test_the_fréchet_distance_needs_enough_noises_and_features(tmp_path: Path, shell: Shell) -> None:
    answer = shell("boss", "--nfe", "1", "-q", *TINY, "-s", "boss.criterion=fd")
    assert answer.code == 2 and "held_out: criterion fd needs 194 noises or more" in answer.err
    assert "the 96 features of shapes-classifier@" in answer.err and answer.err.endswith("found 16\n")
    Card(architecture="mlp", arguments={"shape": [2], "width": 8}, shape=(2,)).write(
        Path("own.safetensors"), networks.build("mlp", {"shape": [2], "width": 8}).state_dict()
    )
    answer = shell("boss", "--model", "own.safetensors", "-q", *TINY, "--nfe", "1", "-s", "boss.criterion=fd")
    assert answer.code == 3 and "criterion: fd needs features of the data" in answer.err


def test_adams_bashforth_has_the_same_times_whatever_an_euler_jump_costs(tmp_path: Path) -> None:
    """Its jumps cost squares; roots beside them would make a tiny first jump the best."""
    times = []
    for cost in ("l2", "rms"):
        (tmp_path / cost).mkdir()
        found, _ = run(tmp_path / cost, {"name": "analytic:ring"}, nfe=[4], cost=cost, grid=16)
        rows = {row["name"] for row in found[4]["choice"]["candidates"]}
        assert "ab2, ab2-boss" in rows
        times.append(
            next(r["value"] for r in found[4]["choice"]["candidates"] if r["name"] == "ab2, ab2-boss")
        )
    assert times[0] == times[1]
