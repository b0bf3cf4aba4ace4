"""The methods against closed forms: pairs, reflow and BOSS on flows whose answers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowdistill import artifact, randomness
from flowdistill.analytic import Mixture, gaussian
from flowdistill.errors import UsageError
from flowdistill.pairstore import PairStore
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.sources import Draws
from flowdistill.stages import Stage, Training, verbs
from flowdistill.stages.boss import TENSORS, Boss, Meter, file_name
from flowdistill.stages.pairs import Pairs
from flowdistill.stages.reflow import Reflow
from flowdistill.teachers import open_model
from flowdistill.training import MODEL, Batch
from flowdistill.work import Stop, Work


def work(folder: Path, stage: Stage, inputs: dict[str, Any]) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    plain = stage.model_dump(mode="json")
    return Work(stage.verb, folder, 5, "cpu", inputs, {}, plain, lambda _: None, Stop())


def make(kind: type[Stage], **settings: Any) -> Any:
    return kind.model_validate_json(json.dumps(settings))


# --- pairs ----------------------------------------------------------------------------------------

GAUSSIAN = {"name": "analytic:gaussian", "dim": 3}


def test_pairs_of_a_gaussian_lie_on_its_flow_map(tmp_path: Path) -> None:
    stage = make(Pairs, count=300, solver="rk4", steps=24, batch_size=64, shard_size=128, dtype="float32")
    done = stage.run(work(tmp_path, stage, {"model": GAUSSIAN}))
    pairs = PairStore.open(tmp_path)
    eps, x0, labels = pairs.batch(torch.arange(300))
    assert labels is None
    assert torch.equal(eps, randomness.noise(5, range(300), (3,)))
    assert torch.allclose(x0, gaussian((3,)).flow_map(eps), atol=2e-4)
    assert done.figures["nfe"] == 96
    assert sorted(done.outputs) == sorted(
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != ".lock"
    )


def test_pairs_follow_their_labels(tmp_path: Path) -> None:
    stage = make(Pairs, count=256, solver="rk4", steps=24, dtype="float32", store_noise=True)
    stage.run(work(tmp_path, stage, {"model": {"name": "analytic:ring"}}))
    eps, x0, labels = PairStore.open(tmp_path).batch(torch.arange(256))
    flow = open_model({"name": "analytic:ring"}).network
    assert isinstance(flow, Mixture) and labels is not None
    assert len(labels.unique()) == 8
    assert torch.allclose(x0, flow.flow_map(eps, labels), atol=2e-3)


def test_pairs_do_not_depend_on_how_often_they_were_interrupted(tmp_path: Path) -> None:
    stage = make(Pairs, count=200, steps=4, batch_size=32, shard_size=64)
    stage.run(work(tmp_path / "whole", stage, {"model": GAUSSIAN}))
    broken = replace(work(tmp_path / "broken", stage, {"model": GAUSSIAN}), report=_raise_after(3))
    with pytest.raises(KeyboardInterrupt):
        stage.run(broken)
    done = stage.run(work(tmp_path / "broken", stage, {"model": GAUSSIAN}))
    for name in done.outputs:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _raise_after(calls: int) -> Any:
    left = iter(range(calls))

    def report(_: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return report


# --- reflow ---------------------------------------------------------------------------------------


class Straight(nn.Module):
    """The reflow optimum of a Gaussian, mu - x0 and eps jointly linear, plus parameters at zero.

    x_t = (1-t)(mu + s eps) + t eps, so eps = (x_t - (1-t) mu) / ((1-t) s + t) and v = (1 - s) eps - mu.
    """

    def __init__(self, flow: Mixture) -> None:
        super().__init__()
        self.mean, self.std = flow.means[0].float(), flow.stds[0].float()
        self.offset = nn.Parameter(torch.zeros(flow.shape))
        self.slope = nn.Parameter(torch.zeros(flow.shape))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        t = t[:, None]
        eps = (x - (1 - t) * self.mean) / ((1 - t) * self.std + t)
        return (1 - self.std) * eps - self.mean + self.offset + self.slope * x


def exact_pairs(flow: Mixture, count: int) -> Batch:
    eps = randomness.noise(1, range(count), flow.shape)
    draw = Draws(1, 0, slice(0, count), count, torch.device("cpu"))
    return Batch(flow.flow_map(eps), eps, None, 0, draw, 0.0)


@pytest.mark.parametrize("loss", ["squared-l2", "pseudo-huber"])
def test_the_reflow_of_a_gaussian_has_no_loss_and_one_step_is_exact(loss: str) -> None:
    flow = gaussian((2,))
    student = Straight(flow)
    found, _ = make(Reflow, steps=1, loss={"name": loss}).per_sample(student, exact_pairs(flow, 2000))
    assert found.max().item() < 1e-8
    noise = randomness.noise(9, range(100), (2,))
    one_step = integrate(student, noise, uniform(1), SOLVERS["euler"])
    assert torch.allclose(one_step, flow.flow_map(noise), atol=1e-5)


def test_a_wrong_velocity_has_a_loss_that_points_back() -> None:
    flow = gaussian((2,))
    student = Straight(flow)
    nn.init.constant_(student.offset, 0.1)
    loss, _ = make(Reflow, steps=1, loss={"name": "squared-l2"}).per_sample(student, exact_pairs(flow, 500))
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(0.01, rel=1e-3)
    assert student.offset.grad is not None
    assert torch.allclose(student.offset.grad, torch.full((2,), 0.1), atol=1e-4)


def test_reflow_draws_its_times_from_the_recipe(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Spy(Straight):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            seen.append(t)
            return super().forward(x, t, labels)

    flow = gaussian((2,))
    for timesteps in ({"name": "u-shaped", "a": 4.0}, {"name": "uniform"}):
        stage = make(Reflow, steps=1, loss={"name": "squared-l2"}, timesteps=timesteps)
        stage.per_sample(Spy(flow), exact_pairs(flow, 4000))
    u_shaped, even = ((t < 0.1).double().mean().item() for t in seen)
    assert u_shaped == pytest.approx(0.1725, abs=0.02)
    assert even == pytest.approx(0.1, abs=0.02)


def test_reflow_trains_a_one_step_student(tmp_path: Path) -> None:
    pairs = make(Pairs, count=2048, solver="rk4", steps=8, dtype="float32")
    pairs.run(work(tmp_path / "pairs", pairs, {"model": GAUSSIAN}))
    stage = make(
        Reflow,
        steps=250,
        batch_size=128,
        network={"name": "mlp", "width": 32, "depth": 2},
        loss={"name": "squared-l2"},
        optimizer={"name": "adam", "lr": 1e-2, "decay": "cosine"},
        ema={"decay": 0.98},
    )
    inputs = {"pairs": str(tmp_path / "pairs"), "init": GAUSSIAN}
    stage.run(work(tmp_path / "reflow", stage, inputs))
    student, flow = open_model(str(tmp_path / "reflow" / MODEL)), gaussian((3,))
    noise = randomness.noise(77, range(1000), (3,))
    exact = flow.flow_map(noise)
    after = (integrate(student.field, noise, uniform(1), SOLVERS["euler"]) - exact).square().mean().sqrt()
    before = (integrate(flow, noise, uniform(1), SOLVERS["euler"]) - exact).square().mean().sqrt()
    assert float(after) < 0.15 * float(before)
    assert student.card.data == "analytic:gaussian"


def test_a_student_starts_as_its_teacher(tmp_path: Path) -> None:
    teacher = _tiny_teacher(tmp_path / "teacher.safetensors")
    stage = make(Reflow, steps=1)
    given = work(tmp_path / "reflow", stage, {"init": str(teacher), "pairs": ""})
    student = stage.student(given)
    original = open_model(str(teacher))
    assert student.network is not original.network
    for name, value in original.network.state_dict().items():
        assert torch.equal(student.network.state_dict()[name], value)
    assert all(parameter.requires_grad for parameter in student.network.parameters())


def test_a_teacher_without_weights_needs_a_described_student(tmp_path: Path) -> None:
    stage = make(Reflow, steps=1)
    with pytest.raises(UsageError, match="reflow.network: 'analytic:gaussian' has no weights"):
        stage.student(work(tmp_path, stage, {"init": GAUSSIAN}))


def _tiny_teacher(path: Path) -> Path:
    from flowdistill import networks
    from flowdistill.teachers import Card

    arguments = {"shape": [1, 8, 8], "classes": 2, "channels": 8, "multipliers": [1], "attention": []}
    card = Card(architecture="unet", arguments=arguments, shape=(1, 8, 8), classes=2)
    card.write(path, networks.build("unet", arguments).state_dict())
    return path


# --- boss -----------------------------------------------------------------------------------------


def test_the_cost_from_the_gram_matrix_is_the_direct_one(tmp_path: Path) -> None:
    """Streaming in batches of 7, and against the definition of Eq. 5 from the stored trajectory."""
    stage = make(Boss, grid=12, trajectories=20, batch_size=7, nfe=[3], held_out=8)
    given = work(tmp_path, stage, {"model": {"name": "analytic:mixture", "dim": 2}})
    stage.run(given)
    tensors, header = artifact.load_tensors(tmp_path / TENSORS)
    model = given.model()
    noise = randomness.noise(5, range(20), (2,))
    labels = model.labels(5, range(20))
    states: list[Tensor] = []
    speeds: list[Tensor] = []
    fine = uniform(12)

    def keep(i: int, t: float, x: Tensor, v: Tensor) -> None:
        states.append(x)
        speeds.append(v)

    states.append(integrate(model.field, noise, fine, SOLVERS["euler"], labels, keep))
    for i in range(12):
        for j in range(i + 1, 13):
            jump = states[i] + (fine.times[j] - fine.times[i]) * speeds[i]
            direct = (states[j] - jump).double().square().sum(1).mean()
            assert float(tensors["cost"][i, j]) == pytest.approx(float(direct), rel=1e-3, abs=1e-9)
    assert header["model"] == model.digest
    assert tensors["gram"].dtype is torch.float64


def test_schedule_files_hold_the_optimal_path_and_its_measurement(tmp_path: Path) -> None:
    stage = make(Boss, grid=20, trajectories=32, nfe=[1, 4, 20], held_out=64)
    done = stage.run(work(tmp_path, stage, {"model": {"name": "analytic:ring"}}))
    tensors, _ = artifact.load_tensors(tmp_path / TENSORS)
    cost = tensors["cost"].numpy()
    for nfe in (1, 4, 20):
        content = artifact.load_json(tmp_path / file_name(nfe))
        path = tensors[f"path.{nfe}"].tolist()
        assert content["times"] == [uniform(20).times[i] for i in path]
        assert content["sigmas"] == content["times"][:-1]
        assert Schedule(tuple(content["times"]), "boss").steps == nfe
        total = sum(cost[i, j] for i, j in zip(path, path[1:], strict=False))
        assert content["local_cost"]["boss"] == pytest.approx(total)
        assert content["local_cost"]["boss"] <= content["local_cost"]["uniform"] * (1 + 1e-9)
    assert artifact.load_json(tmp_path / file_name(20))["local_cost"]["boss"] == pytest.approx(0.0, abs=1e-9)
    assert artifact.load_json(tmp_path / file_name(4))["held_out"]["verdict"] == "better"
    assert set(done.outputs) == {TENSORS, *map(file_name, (1, 4, 20))}
    assert np.isfinite(cost).all()


def test_the_measurement_is_on_noises_that_calibration_has_not_seen(tmp_path: Path) -> None:
    stage = make(Boss, grid=5, trajectories=10, nfe=[2], held_out=8, batch_size=4)
    model = open_model(GAUSSIAN)
    meter = Meter(work(tmp_path, stage, {"model": GAUSSIAN}), 1)
    calibrated = torch.cat([noise for noise, _ in stage._noises(model, meter, 0, 10)])
    held_out = torch.cat([noise for noise, _ in stage._noises(model, meter, 10, 8)])
    assert torch.equal(calibrated, randomness.noise(5, range(10), (3,)))
    assert torch.equal(held_out, randomness.noise(5, range(10, 18), (3,)))


def test_the_endpoint_error_is_that_of_the_exact_flow(tmp_path: Path) -> None:
    """On a Gaussian the accurate solution is the flow map, so the measured error can be recomputed."""
    stage = make(Boss, grid=10, trajectories=8, nfe=[2], held_out=16)
    stage.run(work(tmp_path, stage, {"model": GAUSSIAN}))
    content = artifact.load_json(tmp_path / file_name(2))
    flow, noise = gaussian((3,)), randomness.noise(5, range(8, 24), (3,))
    for name, schedule in (("boss", Schedule(tuple(content["times"]), "boss")), ("uniform", uniform(2))):
        end = integrate(flow, noise, schedule, SOLVERS["euler"])
        error = (end - flow.flow_map(noise)).square().mean(1).sqrt().mean()
        assert content["held_out"][name]["value"] == pytest.approx(float(error), rel=0.02)


# --- the registry ---------------------------------------------------------------------------------


def test_the_folder_is_the_registry() -> None:
    folder = Path(__file__).parents[1] / "flowdistill" / "stages"
    assert sorted(verbs()) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    for verb, kind in verbs().items():
        assert kind.verb == verb
        assert kind.produces in ("model", "pairs", "schedule", "evaluation")
        assert kind.__doc__
        assert not issubclass(kind, Training) or kind.produces == "model"
