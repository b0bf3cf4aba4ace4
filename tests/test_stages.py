"""The methods against closed forms: pairs, reflow and BOSS on flows whose answers are known."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import content
from safetensors.torch import load_file
from test_cli import Shell
from torch import Tensor, nn

from flowdistill import artifact, networks, randomness
from flowdistill.analytic import Mixture, gaussian
from flowdistill.conventions import Convention
from flowdistill.errors import UsageError
from flowdistill.flow import interpolate, velocity
from flowdistill.pairstore import PairStore
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.sources import Draws
from flowdistill.stages import Stage, Training, verbs
from flowdistill.stages.boss import TENSORS, Boss, file_name, picture_name
from flowdistill.stages.pairs import Pairs
from flowdistill.stages.reflow import Reflow
from flowdistill.teachers import Card, open_model
from flowdistill.teachers.canonical import Canonical
from flowdistill.teachers.cards import Latent
from flowdistill.training import MODEL, Batch
from flowdistill.tuning.trials import Meter, Noises
from flowdistill.work import Stop, Work


def work(folder: Path, stage: Stage, inputs: dict[str, Any]) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    plain = stage.model_dump(mode="json")
    return Work(stage.verb, folder, 5, "cpu", inputs, {}, plain, lambda _: None, Stop())


def make(kind: type[Stage], **settings: Any) -> Any:
    return kind.model_validate_json(json.dumps(settings))


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


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
    student = stage.new_student(given)
    original = open_model(str(teacher))
    assert student.network is not original.network
    for name, value in original.network.state_dict().items():
        assert torch.equal(student.network.state_dict()[name], value)
    assert all(parameter.requires_grad for parameter in student.network.parameters())


def test_a_teacher_without_weights_needs_a_described_student(tmp_path: Path) -> None:
    stage = make(Reflow, steps=1)
    with pytest.raises(UsageError, match="reflow.network: 'analytic:gaussian' has no weights"):
        stage.new_student(work(tmp_path, stage, {"init": GAUSSIAN}))


def _tiny_teacher(path: Path) -> Path:
    from flowdistill import networks
    from flowdistill.teachers import Card

    arguments = {"shape": [1, 8, 8], "classes": 2, "channels": 8, "multipliers": [1], "attention": []}
    card = Card(architecture="unet", arguments=arguments, shape=(1, 8, 8), classes=2)
    card.write(path, networks.build("unet", arguments).state_dict())
    return path


# --- reflow: what the network predicts ------------------------------------------------------------


class ExactHead(nn.Module):
    """What a network with this convention has to return for the reflow of a Gaussian."""

    def __init__(self, flow: Mixture, convention: Convention) -> None:
        super().__init__()
        self.mean, self.std, self.convention = flow.means[0], flow.stds[0], convention

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        path = self.convention.interpolant
        alpha, sigma = (each[:, None] for each in path.alpha_sigma(time))
        t = path.t_at(time)[:, None]
        eps = (x / (alpha + sigma) - (1 - t) * self.mean) / ((1 - t) * self.std + t)
        x0 = self.mean + self.std * eps
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[self.convention.prediction]


HEADS: list[dict[str, Any]] = [
    {"prediction": "x0"},
    {"prediction": "eps"},
    {"prediction": "v", "interpolant": {"name": "cosine"}},
    {"prediction": "eps", "interpolant": {"name": "ddpm"}},
]


@pytest.mark.parametrize("described", HEADS, ids=str)
@pytest.mark.parametrize("on", ["velocity", "x0", "eps"])
def test_a_head_that_is_exact_has_the_exact_velocity_and_no_loss(described: dict[str, Any], on: str) -> None:
    flow, convention = gaussian((2,)), Convention.model_validate(described)
    student = Canonical(ExactHead(flow, convention), convention)
    pairs = exact_pairs(flow, 2000)
    eps = pairs.eps.double()
    pairs = replace(pairs, x0=flow.flow_map(eps), eps=eps)
    stage = make(Reflow, steps=1, loss={"name": "squared-l2", "on": on})
    loss, terms = stage.per_sample(student, pairs)
    low, high = convention.span
    inside = (terms["t"] >= low) & (terms["t"] <= high)  # where such a network says something of v
    assert inside.double().mean() > 0.95 and float(loss[inside].max()) < 1e-18
    assert float(loss.max()) < 1e-3
    for t in (0.1, 0.5, 0.9):
        at = torch.full((2000,), t, dtype=torch.float64)
        z = interpolate(pairs.x0, pairs.eps, at)
        torch.testing.assert_close(student(z, at), velocity(pairs.x0, pairs.eps))


HEAD = """
teacher: {name: analytic:gaussian, dim: 3}
stages:
  - pairs: {count: 2048, solver: rk4, steps: 8, dtype: float32, check: 0}
  - reflow:
      steps: 250
      batch_size: 128
      network: {name: mlp, width: 32, depth: 2}
      convention: {prediction: x0}
      loss: {name: squared-l2, on: x0}
      optimizer: {name: adam, lr: 1.0e-2, decay: cosine}
      ema: {decay: 0.98}
      post_hoc: {every: 50}
"""


def test_a_student_that_predicts_x0_learns_opens_again_and_is_exported(shell: Shell) -> None:
    Path("head.yaml").write_text(HEAD)
    assert shell("reflow", "head.yaml", "-q").code == 0
    stage = Path("runs/head/reflow")
    student, flow = open_model(str(stage)), gaussian((3,))
    assert student.card.convention == Convention(prediction="x0")
    noise = randomness.noise(77, range(1000), (3,))
    exact = flow.flow_map(noise)
    after = (integrate(student.field, noise, uniform(1), SOLVERS["euler"]) - exact).square().mean().sqrt()
    before = (integrate(flow, noise, uniform(1), SOLVERS["euler"]) - exact).square().mean().sqrt()
    assert float(after) < 0.15 * float(before)  # as for the velocity
    # The shipped file has the names of the network itself, and so have the averages.
    state, _ = artifact.load_tensors(stage / "checkpoints" / "last.safetensors")
    for name, value in load_file(stage / MODEL).items():
        assert torch.equal(value, state[f"average.network.{name}"])
    assert shell("export", stage, "new.safetensors", "--ema", "0.07").code == 0
    made = open_model("new.safetensors")
    assert made.card.convention == student.card.convention
    x = integrate(made.field, noise, uniform(1), SOLVERS["euler"])
    assert 0 < float((x - exact).square().mean().sqrt()) < 0.3 * float(before)
    assert shell("sample", "new.safetensors", "--nfe", "1", "--count", "4", "-q").code == 0


@pytest.mark.parametrize("convention", [None, {"sign": -1, "clock": {"name": "linear", "scale": 0.5}}])
def test_weights_may_be_a_start_for_another_convention(
    tmp_path: Path, convention: dict[str, Any] | None
) -> None:
    """InstaFlow takes Stable Diffusion's network, which predicted noise, for one of x0 - eps at 1000 t."""
    settings = {} if convention is None else {"convention": convention}
    stage = make(Reflow, steps=1, loss={"name": "squared-l2"}, **settings)
    student = stage.new_student(work(tmp_path, stage, {"init": "builtin:shapes"}))
    teacher = open_model("builtin:shapes")
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([1, 3])
    with torch.no_grad():
        found = student.network(x, t, labels)
        its = teacher.network(x, t, labels) if convention is None else -teacher.network(x, 0.5 * t, labels)
    torch.testing.assert_close(found, its)


# --- reflow: labels that are withheld --------------------------------------------------------------


def test_a_share_of_the_labels_is_withheld() -> None:
    seen: list[Tensor] = []

    class Spy(Straight):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            assert labels is not None
            seen.append(labels)
            return super().forward(x, t, labels)

    flow = gaussian((2,))
    pairs = replace(exact_pairs(flow, 4000), labels=torch.arange(4000) % 3, null=7)
    make(Reflow, steps=1, loss={"name": "squared-l2"}).per_sample(Spy(flow), pairs)
    make(Reflow, steps=1, loss={"name": "squared-l2"}, label_dropout=0.25).per_sample(Spy(flow), pairs)
    assert torch.equal(seen[0], torch.arange(4000) % 3)
    withheld = seen[1] == 7
    assert float(withheld.double().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(seen[1][~withheld], seen[0][~withheld])


@pytest.mark.parametrize(("given", "null"), [(None, 3), (1, 1)])
def test_the_label_for_none_is_the_one_of_the_card(given: int | None, null: int) -> None:
    assert Card(architecture="unet", shape=(1, 8, 8), classes=3, null_label=given).null == null


@pytest.mark.parametrize("name", ["songunet", "dhariwalunet"])
def test_networks_of_edm_take_the_label_after_the_last_for_none(name: str) -> None:
    sizes = {"img_resolution": 8, "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    network = networks.build(name, {**sizes, "label_dim": 3, "attn_resolutions": []}).eval()
    drawn = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=drawn)
    x, time = torch.randn(4, 3, 8, 8, generator=drawn), torch.rand(4, generator=drawn)
    none, mixed = network(x, time, None), network(x, time, torch.tensor([3, 0, 3, 2]))
    torch.testing.assert_close(mixed[[0, 2]], none[[0, 2]])
    assert (mixed - none).flatten(1).abs().amax(1)[[1, 3]].min() > 1e-3
    with pytest.raises(RuntimeError):
        network(x, time, torch.tensor([4, 0, 0, 0]))


def adm(path: Path, **arguments: Any) -> None:
    given = {"image_size": 8, "model_channels": 32, "channel_mult": [1], "attention_resolutions": []}
    card = Card(
        architecture="admunet",
        arguments={**given, "num_classes": 3, **arguments},
        shape=(3, 8, 8),
        classes=3,
        null_label=arguments.get("null_label"),
    )
    card.write(path, networks.build("admunet", card.arguments).state_dict())


IMAGES = """
teacher: {name: ./adm.safetensors, probe: false}
stages:
  - pairs: {count: 8, solver: euler, steps: 1, check: 0, dtype: float32}
  - reflow: {steps: 1, batch_size: 8, loss: {name: squared-l2}, label_dropout: 0.1}
"""


def test_labels_are_withheld_from_networks_that_know_none(shell: Shell) -> None:
    Path("adm.yaml").write_text(IMAGES)
    adm(Path("adm.safetensors"))
    answer = shell("reflow", "adm.yaml", "-q")
    assert answer.code == 2 and len(answer.err.splitlines()) == 1
    assert "reflow.label_dropout: admunet with 3 classes has no label for none" in answer.err
    assert not Path("runs/adm/reflow").exists()
    adm(Path("adm.safetensors"), null_label=2)
    assert shell("reflow", "adm.yaml", "-q", "--out", "again").code == 0


# --- reflow: pairs and settings that do not fit ---------------------------------------------------

GAUSSIANS = """
teacher: {name: analytic:gaussian, dim: 2}
stages:
  - pairs: {count: 32, solver: euler, steps: 1, check: 0, dtype: float32}
  - reflow: {steps: 2, batch_size: 8, network: {name: mlp, width: 8, depth: 1}, loss: {name: squared-l2}}
"""


def stores(shell: Shell, **teachers: str) -> None:
    """Pairs of other teachers, in runs/NAME/pairs."""
    for name, teacher in teachers.items():
        recipe = GAUSSIANS.replace("{name: analytic:gaussian, dim: 2}", teacher)
        Path(f"{name}.yaml").write_text(recipe)
        assert shell("pairs", f"{name}.yaml", "-q").code == 0


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{name: analytic:gaussian, dim: 3}", "are not for this student: shape [3], not [2]"),
        ("{name: analytic:ring, components: 3}", "are not for this student: classes 3, not 0"),
        (
            "{name: analytic:mixture, dim: 5}",
            "are not for this student: shape [5], not [2]; classes 3, not 0",
        ),
    ],
)
def test_pairs_of_other_samples_are_refused(shell: Shell, teacher: str, message: str) -> None:
    stores(shell, other=teacher)
    Path("mine.yaml").write_text(GAUSSIANS)
    before = content(Path())
    answer = shell("reflow", "mine.yaml", "-q", "-s", "reflow.pairs=./runs/other/pairs/")
    assert (answer.code, answer.out) == (2, "") and len(answer.err.splitlines()) == 1
    assert f"error: reflow.pairs: those in runs/other/pairs {message}" in answer.err
    assert content(Path()) == before


def test_pairs_of_another_teacher_of_the_same_data_are_learnt(shell: Shell) -> None:
    """A student may start from another student, or learn from two teachers: nothing is wrong there."""
    stores(shell, other="{name: analytic:ring, components: 3}", mine="{name: analytic:mixture, dim: 2}")
    given = "reflow.pairs=[pairs, ./runs/other/pairs/]"
    assert shell("reflow", "mine.yaml", "-q", "-s", given).code == 0


def latent(path: Path, scale: float | None) -> None:
    arguments = {"shape": [2], "classes": 0, "width": 8, "depth": 1}
    card = Card(architecture="mlp", arguments=arguments, shape=(2,))
    if scale is not None:
        card = card.model_copy(update={"latent": Latent(scale=(scale,), vae="some/vae")})
    card.write(path, networks.build("mlp", arguments).state_dict())


@pytest.mark.parametrize(("scale", "code"), [(0.18215, 0), (0.5, 2), (None, 2)])
def test_pairs_of_latents_at_another_scale_are_refused(shell: Shell, scale: float | None, code: int) -> None:
    latent(Path("other.safetensors"), 0.18215)
    latent(Path("mine.safetensors"), scale)
    stores(shell, other="other.safetensors", mine="mine.safetensors")
    answer = shell("reflow", "mine.yaml", "-q", "-s", "reflow.pairs=./runs/other/pairs/")
    assert answer.code == code
    if code:
        assert "are not for this student: latent {'scale': [0.18215], 'shift': [0.0]}, not" in answer.err
        assert len(answer.err.splitlines()) == 1 and not Path("runs/mine/reflow").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["pairs.count=0"], "pairs.count: expected a number > 0, found 0"),
        (["reflow.feed={subset: [3, 3]}"], "expected a subset [first, end] with first < end, found [3, 3]"),
        (["reflow.feed={subset: [3, 40]}"], "feed.subset: [3, 40], but mine/pairs has 32 pairs"),
        (["reflow.loss={name: l3}"], "reflow.loss.name: unknown loss 'l3' (squared-l2, l2, pseudo-huber"),
        (["reflow.loss={name: l2, 'on': v}"], "reflow.loss.on: unknown on 'v' (velocity, x0, eps)"),
        (
            ["reflow.loss={name: perceptual, distance: {weights: mine.yaml}}"],
            "loss.distance: lpips compares images [1 or 3, H, W], found data of shape [2]",
        ),
        (
            ["reflow.previews={}", "teacher={name: analytic:gaussian, dim: 3}"],
            "reflow.previews: nothing can be",
        ),
        (["reflow.channels_last=true"], "reflow.channels_last: expected images, found shape [2]"),
        (["reflow.label_dropout=0.1"], "reflow.label_dropout: the student has no classes; leave it out"),
        (["reflow.precision=fp16"], "reflow.precision: fp16 is for GPUs"),
        (["reflow.ema={decay: 0.9, also: [0.9]}"], "also: expected decays that differ from each other"),
        (["reflow.post_hoc={every: 2, stds: [0.1, 0.1]}"], "stds: expected widths that differ"),
        (["reflow.post_hoc={every: 2, stds: [0.1]}"], "reflow.post_hoc.stds"),
        (["reflow.non_finite={policy: ignore}"], "unknown policy 'ignore' (abort, skip, roll-back)"),
        (["reflow.trackers=[wandb]"], "reflow.trackers[0]: unknown trackers 'wandb' (tensorboard)"),
        (["reflow.convention={prediction: v}"], "prediction 'v' needs a path of constant variance"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_cannot_be_are_refused(shell: Shell, settings: list[str], message: str) -> None:
    Path("mine.yaml").write_text(GAUSSIANS)
    given = [argument for each in settings for argument in ("-s", each)]
    answer = shell("reflow", "mine.yaml", "-q", "--device", "cpu", "--out", "mine", *given)
    assert (answer.code, answer.out) == (2, "") and message in answer.err
    assert len(answer.err.splitlines()) <= 2 and not Path("mine/reflow").exists()


def test_a_training_that_is_continued_with_another_recipe_is_refused_with_what_changed(shell: Shell) -> None:
    Path("mine.yaml").write_text(GAUSSIANS)
    assert shell("reflow", "mine.yaml", "-q").code == 0
    (Path("runs/mine/reflow") / artifact.MANIFEST).unlink()  # as if it were not done
    before = content(Path())
    changed = ("-s", "reflow.optimizer.lr=0.5", "-s", "reflow.loss.on=x0")
    answer = shell("reflow", "mine.yaml", "-q", *changed)
    assert answer.code == 2 and content(Path()) == before
    assert "(loss.on: velocity -> x0; optimizer.lr: 0.0002 -> 0.5)" in answer.err


def test_a_tracker_that_is_not_installed_is_missing_before_anything_is_made(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.yaml").write_text(GAUSSIANS)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a)
    )
    answer = shell("reflow", "mine.yaml", "-q", "-s", "reflow.trackers=[tensorboard]")
    assert answer.code == 3 and len(answer.err.splitlines()) == 1
    assert "pip install 'flowdistill[tensorboard]'" in answer.err and not Path("runs").exists()


def test_the_log_goes_to_tensorboard_where_it_is_installed(shell: Shell) -> None:
    Path("mine.yaml").write_text(GAUSSIANS)
    answer = shell("reflow", "mine.yaml", "-q", "-s", "reflow.trackers=[tensorboard]")
    if importlib.util.find_spec("tensorboard") is None:
        assert answer.code == 3
    else:
        assert answer.code == 0 and list(Path("runs/mine/reflow/tensorboard").rglob("events.out.*"))


def test_bf16_trains(shell: Shell) -> None:
    Path("mine.yaml").write_text(HEAD)
    given = ("-s", "reflow.precision=bf16", "-s", "reflow.steps=100")
    assert shell("reflow", "mine.yaml", "-q", *given).code == 0
    first, last = ((Path("runs/mine/reflow/log.jsonl").read_text().splitlines())[n] for n in (0, -1))
    assert json.loads(last)["loss"] < 0.5 * json.loads(first)["loss"]
    assert artifact.Manifest.read(Path("runs/mine/reflow")).dtype == "bfloat16"


# --- plan -----------------------------------------------------------------------------------------

PLANNED = """
teacher: {name: analytic:gaussian, dim: 2}
stages:
  - pairs: {count: 32, solver: euler, steps: 1, check: 0, dtype: float32}
  - reflow:
      steps: 25
      batch_size: 8
      network: {name: mlp, width: 256, depth: 3}
      loss: {name: squared-l2}
      ema: {also: [0.9]}
      post_hoc: {every: 10}
  - eval: {models: [reflow], samples: 64, nfe: [1], latency: false}
"""


def test_a_training_is_planned_without_its_pairs(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowdistill.training.loop._TRIAL_S", 0.05)
    monkeypatch.setattr("flowdistill.stages.pairs._TRIAL_S", 0.0)
    Path("plan.yaml").write_text(PLANNED)
    _, planned, judged = shell("plan", "plan.yaml", "--json").json["stages"]
    assert not Path("runs").exists()
    assert judged["remark"] == "needs pairs, reflow" and judged["cost"] is None
    cost = planned["cost"]
    assert (cost["units"], cost["unit"]) == (25, "step") and cost["per_second"] > 0
    assert cost["seconds"] == pytest.approx(25 / cost["per_second"])
    assert shell("reflow", "plan.yaml", "-q").code == 0
    kept = sum(path.stat().st_size for path in Path("runs/plan/reflow").rglob("*.safetensors"))
    assert cost["size_bytes"] == pytest.approx(kept, rel=0.02)
    shared = shell("plan", "plan.yaml", "--json", "-s", "reflow.sharded=true", "--out", "two").json["stages"][
        1
    ]
    assert shared["cost"] is None and "only one is measured" in shared["remark"]


def test_a_training_without_its_lpips_is_planned_with_a_remark(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowdistill.stages.pairs._TRIAL_S", 0.0)
    monkeypatch.setenv("TORCH_HOME", "nowhere")
    loss = "{name: lpips-huber, distance: {name: lpips}}"
    recipe = (
        f"teacher: builtin:digits\nstages:\n  - pairs: {{count: 8}}\n  - reflow: {{steps: 1, loss: {loss}}}\n"
    )
    Path("plan.yaml").write_text(recipe)
    answer = shell("plan", "plan.yaml", "--json")
    _, planned = answer.json["stages"]
    assert answer.code == 0 and planned["cost"] is None
    assert planned["remark"].startswith("nowhere/hub/checkpoints/vgg16-397923af.pth: no such file")
    assert "\n" not in planned["remark"]


# --- boss -----------------------------------------------------------------------------------------

PAPER = {"choose": "boss", "reference": "euler"}


def test_the_cost_from_the_gram_matrix_is_the_direct_one(tmp_path: Path) -> None:
    """Streaming in batches of 7, and against the definition of Eq. 5 from the stored trajectory."""
    stage = make(Boss, **PAPER, grid=12, trajectories=20, batch_size=7, nfe=[3], held_out=16)
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
    stage = make(Boss, **PAPER, grid=20, trajectories=32, nfe=[1, 4, 20], held_out=64)
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
    assert done.figures["pictures"] == ", ".join(map(picture_name, (1, 4, 20)))
    assert np.isfinite(cost).all()


def test_the_measurement_is_on_noises_that_calibration_has_not_seen(tmp_path: Path) -> None:
    stage = make(Boss, grid=5, trajectories=10, nfe=[2], held_out=17, batch_size=4)
    model = open_model(GAUSSIAN)
    noises = Noises(model, Meter(work(tmp_path, stage, {"model": GAUSSIAN}), 1), 4)
    calibrated = torch.cat([noise for _, noise, _ in noises(0, 10)])
    choosing, judging = (torch.cat([noise for noise, _, _ in half.batches]) for half in stage.halves(noises))
    assert torch.equal(calibrated, randomness.noise(5, range(10), (3,)))
    assert torch.equal(choosing, randomness.noise(5, range(10, 18), (3,)))
    assert torch.equal(judging, randomness.noise(5, range(18, 27), (3,)))


def test_the_endpoint_error_is_that_of_the_exact_flow(tmp_path: Path) -> None:
    """On a Gaussian the accurate solution is the flow map, so the measured error can be recomputed."""
    stage = make(Boss, **PAPER, grid=10, trajectories=8, nfe=[2], held_out=16)
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
