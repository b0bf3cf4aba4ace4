"""The fine trajectory and what is kept of it: against its definition in float64, and through kills."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline
from test_stages import GAUSSIAN, make, work
from torch import Tensor

from flowdistill import artifact
from flowdistill.analytic import gaussian
from flowdistill.errors import MissingInput
from flowdistill.evaluation import extractors
from flowdistill.randomness import noise
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.stages.boss import TENSORS, Boss, file_name
from flowdistill.teachers import Card, open_model
from flowdistill.tuning import calibrating
from flowdistill.tuning.calibrating import Calibration, Follower, Frame, Parts, pushed
from flowdistill.tuning.trials import Meter, Noises

Floats = NDArray[np.float64]
EPS = noise(0, range(16), (2,)).double()


def exact(eps: Tensor, t: float) -> Tensor:
    """Where the Gaussian's flow is at t."""
    flow = gaussian((2,))
    return (1 - t) * flow.means[0] + (((1 - t) * flow.stds[0]) ** 2 + t**2).sqrt() * eps


def trajectory(frame: Frame, start: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """States [M + 1, B, *shape] and velocities [M, B, *shape] of the fine grid, as the basis has them."""
    basis = torch.tensordot(torch.from_numpy(frame.spread), turns.double(), 1)
    increments, speeds = basis.chunk(2)
    return start + torch.cat([torch.zeros_like(increments[:1]), increments.cumsum(0)]), speeds


def walked(frame: Frame, field: Any, start: Tensor) -> tuple[Tensor, Tensor]:
    return trajectory(frame, start, frame.walk(field, start, None)[1].transpose(0, 1))


# The fine trajectory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 10, 11])
def test_between_heuns_steps_lie_hermites_cubics(steps: int) -> None:
    """As many evaluations as Euler's steps take, all of them at the nodes."""
    asked: list[float] = []

    def field(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        asked.append(round(float(t[0]), 9))
        found: Tensor = gaussian((2,))(x, t)
        return found

    fine = uniform(steps)
    states, speeds = walked(Frame(fine, "heun"), field, EPS)
    assert states.shape == (steps + 1, 16, 2) and speeds.shape == (steps, 16, 2)
    nodes = [i for i in range(steps + 1) if i % 2 == 0 or i == steps]
    assert len(asked) == steps and set(asked) <= {round(fine.times[i], 9) for i in nodes}
    seen: list[Tensor] = []
    coarse = Schedule(tuple(fine.times[i] for i in nodes), "nodes")
    seen.append(integrate(field, EPS, coarse, SOLVERS["heun"], None, lambda i, t, x, v: seen.append(x)))
    torch.testing.assert_close(states[nodes], torch.stack(seen), rtol=0, atol=1e-13)
    slopes = torch.stack([field(states[i], EPS.new_full((16,), fine.times[i]), None) for i in nodes])
    torch.testing.assert_close(speeds[nodes[:-1]], slopes[:-1], rtol=0, atol=1e-12)
    upwards = [fine.times[i] for i in nodes][::-1]
    cubic = CubicHermiteSpline(upwards, states[nodes].flip(0), slopes.flip(0))
    for i in range(1, steps, 2):
        assert torch.from_numpy(cubic(fine.times[i])).sub(states[i]).abs().max() < 1e-12
        assert torch.from_numpy(cubic(fine.times[i], 1)).sub(speeds[i]).abs().max() < 1e-11


def test_the_cubics_are_of_fourth_order() -> None:
    """Between exact nodes; half the distance makes a sixteenth of the error, of states and velocities."""
    flow, errors = gaussian((2,)), []
    for steps in (20, 40):
        frame = Frame(uniform(steps), "heun")
        times = frame.nodes.times
        nodes = [exact(EPS, t) for t in times]
        speeds = [flow(x, x.new_full((16,), t)) for x, t in zip(nodes, times, strict=True)]
        seen = []
        for k, (t, s) in enumerate(frame.nodes.intervals[:-1]):  # Heun's step that leads to the next node
            seen += [speeds[k], 2 * (nodes[k + 1] - nodes[k]) / (s - t) - speeds[k]]
        seen += speeds[-2:]
        turns = torch.stack(seen).diff(dim=0, prepend=torch.zeros_like(seen[0])[None])
        states, slopes = trajectory(frame, EPS, turns)
        fine = uniform(steps).times[: steps - 1]  # the last step is Euler's
        truth = torch.stack([exact(EPS, t) for t in fine])
        moving = torch.stack([flow(exact(EPS, t), EPS.new_full((16,), t)) for t in fine])
        found = (states[: steps - 1] - truth, slopes[: steps - 1] - moving)
        errors.append(torch.tensor([float(each.abs().max()) for each in found]))
    assert ((errors[0] / errors[1] > 12) & (errors[0] / errors[1] < 20)).all()
    assert errors[1].max() < 1e-3


def test_heuns_trajectory_is_nearer_to_the_flow_than_eulers() -> None:
    flow, fine = gaussian((2,)), uniform(20)
    truth = torch.stack([exact(EPS, t) for t in fine.times])
    heun, euler = (
        float((walked(Frame(fine, name), flow, EPS)[0] - truth).square().mean().sqrt())
        for name in ("heun", "euler")
    )
    assert heun < euler / 4


# The cost --------------------------------------------------------------------------------------------------


def costs_by_definition(frame: Frame, start: Tensor, turns: Tensor) -> Floats:
    """c[n, i, j] = ||x_j - x_i - (t_j - t_i) v_i||^2 of every jump and trajectory, in float64 (Eq. 5)."""
    x, v = trajectory(frame, start.double(), turns)
    t, knots = frame.fine.times, frame.fine.steps + 1
    found = np.zeros((len(start), knots, knots))
    for i, j in itertools.combinations(range(knots), 2):
        found[:, i, j] = (x[j] - x[i] - (t[j] - t[i]) * v[i]).square().flatten(1).sum(1)
    return found


def rough(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """A field with the roughness of a network's."""
    found: Tensor = torch.sin(3 * x) + (40 * t[:, None]).cos() * 0.05 + x.roll(1, 1)
    return found


@pytest.mark.parametrize("reference", ["heun", "euler"])
@pytest.mark.parametrize("field", ["mixture", "rough"])
def test_every_cost_is_right_to_six_digits_in_float32(field: str, reference: Any) -> None:
    """Of jumps that cost nothing to speak of too: c_ij spans ten orders of magnitude and more."""
    model = open_model({"name": "analytic:mixture", "dim": 300})
    flow = model.field if field == "mixture" else rough
    frame = Frame(uniform(100), reference)
    start = noise(1, range(4), (300,))
    found = Calibration(frame, "l2", Follower(frame, flow)(start, None)).mean_cost
    turns = frame.walk(flow, start, None)[1].transpose(0, 1)
    expected = costs_by_definition(frame, start, turns).mean(axis=0)
    upper = np.triu_indices(101, 1)
    there = expected[upper] > 1e-15 * expected.max()  # the others are 0: an Euler step of Euler's trajectory
    assert there.sum() > 4800 and expected[upper][there].min() < 1e-6 * expected.max()
    np.testing.assert_allclose(found[upper][there], expected[upper][there], rtol=1e-6)
    assert found[upper][~there].max(initial=0.0) < 1e-14 * expected.max()


@pytest.mark.parametrize("cost", ["l2", "rms"])
def test_the_mean_of_squares_or_of_their_roots(cost: Any, tmp_path: Path) -> None:
    settings = {"grid": 6, "trajectories": 5, "nfe": [2], "held_out": 16, "batch_size": 2}
    stage = make(Boss, cost=cost, **settings)
    given = work(tmp_path, stage, {"model": {"name": "analytic:mixture", "dim": 2}})
    noises = Noises(given.model(), Meter(given, 1), 2)
    found = stage.calibrate(noises)
    start, labels = noises.drawn(range(5))
    turns = found.frame.walk(noises.model.field, start, labels)[1].transpose(0, 1)
    each = costs_by_definition(found.frame, start, turns) ** (0.5 if cost == "rms" else 1.0)
    np.testing.assert_allclose(found.mean_cost, each.mean(axis=0), rtol=1e-5, atol=1e-7)


def test_equal_trajectories_leave_nothing_to_regret() -> None:
    frame = Frame(uniform(4), "euler")
    for cost in ("l2", "rms"):
        same = Calibration(frame, cost, np.eye(4)[None].repeat(5, axis=0))
        assert same.regret([1, 2], 0) == {1: pytest.approx(0.0, abs=1e-12), 2: pytest.approx(0.0, abs=1e-12)}


# Through a distance ----------------------------------------------------------------------------------------


def test_through_a_linear_map_it_is_the_cost_there() -> None:
    """Of the map of the trajectory: the same jumps, each mapped."""
    frame = Frame(uniform(9), "heun")
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 7)) / 17).float()
    start = noise(2, range(3), (300,))
    push = pushed(lambda x: x @ matrix)
    found = Calibration(frame, "perceptual", Follower(frame, rough, push)(start, None)).mean_cost
    turns = frame.walk(rough, start, None)[1].transpose(0, 1).double() @ matrix.double()
    expected = costs_by_definition(frame, start.double() @ matrix.double(), turns)
    np.testing.assert_allclose(found, expected.mean(axis=0), rtol=1e-5, atol=1e-12)


def test_through_the_classifier_it_is_the_perceptual_distance_of_small_errors() -> None:
    """To first order: a tenth of the error, a tenth of what is missed."""
    card = open_model("builtin:shapes").card
    distance = extractors.perceptual(card)
    assert distance is not None
    x, _ = extractors.DATASETS["shapes"].batch(torch.arange(1))
    features = distance.features(torch.cat([x, x + 0.1]))
    torch.testing.assert_close((features[0] - features[1]).square().sum()[None], distance(x, x + 0.1))
    errors = noise(3, range(4), card.shape)
    priced = pushed(distance.features)(x[0], errors).square().sum(1)
    off = []
    for small in (1e-2, 1e-3):
        true = distance(x + small * errors, x.expand_as(errors)).double() / small**2
        off.append(float((true / priced - 1).abs().max()))
    assert off[0] < 0.1 and off[1] < off[0] / 3


def test_perceptual_costs_choose_a_schedule_of_the_images_model(tmp_path: Path) -> None:
    settings = {"grid": 6, "trajectories": 2, "nfe": [2], "held_out": 16, "batch_size": 8}
    stage = make(Boss, cost="perceptual", choose="boss", **settings)
    given = work(tmp_path, stage, {"model": "builtin:shapes"})
    stage.run(given)
    gram = artifact.load_tensors(tmp_path / TENSORS)[0]["gram"]
    frame, model = Frame(uniform(6), "heun"), given.model()
    distance = extractors.perceptual(model.card)
    assert distance is not None
    noises = Noises(model, Meter(given, 1), 8)
    grams = Follower(frame, model.field, pushed(distance.features))(*noises.drawn(range(2)))
    expected = frame.spread @ grams.mean(axis=0) @ frame.spread.T
    torch.testing.assert_close(gram, torch.from_numpy(expected), rtol=1e-5, atol=1e-9)


def test_without_a_perceptual_distance_it_is_refused(tmp_path: Path) -> None:
    stage = make(Boss, cost="perceptual", nfe=[2], grid=4)
    with pytest.raises(MissingInput, match=r"cost: perceptual .* none for data .*; choose l2 or rms"):
        stage.run(work(tmp_path, stage, {"model": GAUSSIAN}))


# What is kept ----------------------------------------------------------------------------------------------

SMALL = {"grid": 8, "trajectories": 24, "nfe": [2], "held_out": 16, "batch_size": 8}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches that are followed, each by its number of noises."""
    seen: list[int] = []

    follow = Follower.__call__

    def counted(self: Follower, start: Tensor, labels: Tensor | None) -> Floats:
        seen.append(len(start))
        return follow(self, start, labels)

    monkeypatch.setattr(Follower, "__call__", counted)
    return seen


def run(folder: Path, **changes: Any) -> dict[str, bytes]:
    stage = make(Boss, **{**SMALL, **changes})
    done = stage.run(work(folder, stage, {"model": GAUSSIAN}))
    return {name: (folder / name).read_bytes() for name in done.outputs}


def test_another_number_of_evaluations_takes_no_other_calibration(
    tmp_path: Path, computed: list[int]
) -> None:
    """Of the same stage made anew, or of a run beside it; what anything else depends on is computed."""
    run(tmp_path / "one" / "boss")
    assert computed == [8, 8, 8]
    alone = run(tmp_path / "far" / "away" / "boss", nfe=[3])
    del computed[:]
    for folder in (tmp_path / "one" / "boss", tmp_path / "one" / "boss.new", tmp_path / "other" / "boss"):
        assert run(folder, nfe=[3])[file_name(3)] == alone[file_name(3)]
    run(tmp_path / "other" / "boss", trajectories=16, cost="rms", choose="boss")
    assert computed == []
    run(tmp_path / "other" / "boss", trajectories=32)
    assert computed == [8]
    for change in ({"grid": 9}, {"reference": "euler"}, {"batch_size": 12}):
        del computed[:]
        run(tmp_path / "other" / "boss", **change)
        assert sum(computed) == 24


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_what_is_damaged_is_computed_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, computed: list[int]
) -> None:
    folder = tmp_path / "run" / "boss"
    whole = run(folder)
    part = sorted((folder / calibrating.PARTS).rglob("*.safetensors"))[1]
    kept = part.read_bytes()
    part.write_bytes(damage(kept))
    del computed[:]
    assert run(folder) == whole
    assert computed == [8] and part.read_bytes() == kept


def test_parts_are_of_what_their_name_says(tmp_path: Path) -> None:
    ours, others = Parts(tmp_path / "a" / "boss", {"seed": 1}), Parts(tmp_path / "a" / "boss", {"seed": 2})
    grams = np.arange(8.0).reshape(2, 2, 2)
    ours.write(range(2), grams)
    assert ours.read(range(3)) is None and others.read(range(2)) is None
    found = ours.read(range(2))
    assert found is not None and np.array_equal(found, grams)
    path = next(tmp_path.rglob("000000-000002.safetensors"))
    path.parent.rename(path.parent.with_name(f"calibration-{others.key[:16]}"))
    assert others.read(range(2)) is None


KILLED = """
import os, signal, sys
from flowdistill.tuning.calibrating import Parts
left, write = int(sys.argv.pop(1)), Parts.write
def then_die(self, *given):
    global left
    left -= 1
    if left >= 0:
        write(self, *given)
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
Parts.write = then_die
from flowdistill.cli import main
main()
"""


def test_after_kills_the_bytes_are_the_same(tmp_path: Path) -> None:
    small = ("grid=8", "trajectories=24", "held_out=16", "batch_size=8")
    options = [part for each in small for part in ("-s", f"boss.{each}")]
    command = ["boss", "--model", "analytic:ring", "--nfe", "3", "-q", *options]
    whole, killed = (["--out", str(tmp_path / name / "run")] for name in ("whole", "killed"))
    done = subprocess.run([sys.executable, "-m", "flowdistill", *command, *whole], capture_output=True)
    assert done.returncode == 0, done.stderr
    for parts in (1, 1):  # a second kill, one part later
        died = subprocess.run([sys.executable, "-c", KILLED, str(parts), *command, *killed])
        assert died.returncode == -signal.SIGKILL
    folder = tmp_path / "killed" / "run" / "boss"
    kept = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*.safetensors")}
    assert len(kept) == 2 and not list(folder.glob("schedule-*"))
    done = subprocess.run([sys.executable, "-m", "flowdistill", *command, *killed], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in (TENSORS, file_name(3)):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "run" / "boss" / name).read_bytes()


def test_of_what_has_no_data_set_nothing_is_known() -> None:
    assert extractors.perceptual(Card(architecture="mlp", arguments={}, shape=(2,))) is None
