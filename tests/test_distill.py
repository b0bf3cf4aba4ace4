"""One-step distillation against what SlimFlow's own code computed, closed forms and command lines.

That code shows its student x = 0.999 z0 + 0.001 z1 at the label of t = 0.001 where it has pairs, and z0 at
the same label where it has fresh noise; the step begins at z0 and has the length 1. Ours is asked for the
velocity at z0 and t = 1 both times: the test's network looks it up where theirs does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faults import content
from safetensors.torch import load_file
from test_cli import Shell
from test_processes import command, environment, gloo
from test_slimflow import TENSORS, THEIRS, Affine, batch_of, theirs
from test_stages import exact_pairs, make, work
from torch import Tensor, nn

from flowdistill import artifact, networks, randomness
from flowdistill.analytic import gaussian
from flowdistill.conventions import Convention
from flowdistill.errors import UsageError
from flowdistill.flow import expand
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.stages.distill import Distill, Equipment, TwoStep
from flowdistill.teachers import Card, new, open_model
from flowdistill.teachers.canonical import Canonical
from flowdistill.training import Batch

CASES = {case["tag"]: case for case in THEIRS["distill_cases"]}
LOSSES = {"distill0": ["squared-l2"], "distill1": ["perceptual"], "distill2": ["perceptual-l2"]} | {
    "distill3": ["perceptual", "l1"]  # their sum; gradients add up
}
STUDENT, FLOW = (0.4, -0.3, 0.1), (0.7, 0.2, -0.15)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


def surrogate(x_hat: Tensor, x: Tensor) -> Tensor:
    """What stands for LPIPS in the fixture."""
    a, b = (F.interpolate(each, size=64, mode="bilinear", align_corners=True) for each in (x_hat, x))
    return (a - b).square().flatten(1).mean(1)


class Theirs(Affine):
    """The fixture's network, asked in our coordinates; of pairs, it is shown a share of the data `x0`."""

    def __init__(self, abc: tuple[float, float, float], x0: Tensor | None = None) -> None:
        super().__init__(*abc)
        self.x0 = x0

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.x0 is not None:
            assert (t == 1).all()
            own, noise = x[: len(self.x0)], x[len(self.x0) :]
            x = torch.cat([0.999 * own + 0.001 * self.x0, noise])
        return -super().forward(x, 999 * (1 - t).clamp(min=0.001))


# --- the fixture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["student", "flow"])
@pytest.mark.parametrize("tag", CASES)
def test_losses_and_gradients_are_those_of_slimflows_code(tag: str, first: str) -> None:
    case, name = CASES[tag], "teacher_loss_new" if first == "student" else "teacher_loss"
    network, flow = Theirs(STUDENT, TENSORS["data"]), Theirs(FLOW)
    numbers = {
        "timesteps": torch.zeros(6),
        "two-step_noise": TENSORS[f"{tag}.noise2"],
        "two-step_times": (1 - TENSORS[f"{tag}.t_mid"] - 0.2) / 0.6,
    }
    batch = replace(
        batch_of(TENSORS["data"], TENSORS["noise"], **numbers),
        perceptual=surrogate,
        equipment=Equipment(uniform(1).times[:-1], flow),
    )
    ones, twos, gradients = 0.0, 0.0, torch.zeros(3)
    for loss in LOSSES[tag]:
        stage = make(Distill, steps=1, loss={"name": loss}, two_step={"first": first})
        total, terms = stage.per_sample(network, batch)
        torch.testing.assert_close(total, terms["one_step"] + terms["two_step"])
        ones, twos = ones + terms["one_step"].mean().item(), twos + terms["two_step"].mean().item()
        (gradient,) = torch.autograd.grad(terms["two_step"].mean(), [*network.parameters()])
        gradients = gradients + gradient
    assert ones == pytest.approx(case["distill_loss"], rel=1e-5)
    assert twos == pytest.approx(case[name], rel=1e-5)
    torch.testing.assert_close(gradients, torch.tensor(case[f"{name}_grad"]), atol=2e-6, rtol=1e-5)


# --- closed forms ---------------------------------------------------------------------------------


def test_as_a_squared_error_two_steps_are_a_match_of_velocities() -> None:
    """The residual is t (v - w): no image is made, and nothing flows back through the target."""
    z = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 0.9, 5)
    student, flow = Theirs(STUDENT), Theirs(FLOW)
    v = student(z, torch.ones(5))
    target = TwoStep().target(flow, z, v, t, None)
    w = flow(z - expand(1 - t, z) * v, t)
    assert not target.requires_grad and v.requires_grad
    torch.testing.assert_close((v - target).square(), (expand(t, z) * (v - w)).square(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("first", ["student", "flow"])
def test_two_steps_of_a_straight_flow_are_one(first: str) -> None:
    """A flow whose paths are straight is left as it is, wherever the step is cut in two."""
    flow = gaussian((2,))

    def straight(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        mean, std = flow.means[0].float(), flow.stds[0].float()
        at = t[:, None]
        eps = (x - (1 - at) * mean) / ((1 - at) * std + at)
        return (1 - std) * eps - mean

    z = randomness.noise(1, range(1000), (2,))
    v = straight(z, torch.ones(1000), None)
    t = torch.linspace(0, 1, 1000)
    target = TwoStep.model_validate({"first": first}).target(straight, z, v, t, None)
    torch.testing.assert_close(target, v, atol=1e-5, rtol=1e-5)


def test_the_loss_is_asked_at_pure_noise_alone_and_the_second_step_within_its_interval() -> None:
    asked, middles = [], []

    def student(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        asked.append((x, t))
        return 0 * x + torch.zeros(1, requires_grad=True)

    def flow(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        middles.append(t)
        return torch.ones_like(x)

    pairs = replace(exact_pairs(gaussian((2,)), 4000), equipment=Equipment((1.0,), flow))
    stage = make(Distill, steps=1, two_step={"weight": 0.5, "interval": [0.25, 0.5]})
    loss, terms = stage.per_sample(student, pairs)
    assert len(asked) == 1  # both at once
    x, t = asked[0]
    assert (t == 1).all() and torch.equal(x[:4000], pairs.eps)
    fresh = x[4000:]
    assert abs(float((fresh * pairs.eps).mean())) < 0.05 and float(fresh.std()) == pytest.approx(1, abs=0.05)
    assert len(middles) == 1  # the first step is the student's own
    assert float(middles[0].min()) == pytest.approx(0.25, abs=1e-3)
    assert float(middles[0].max()) == pytest.approx(0.5, abs=1e-3)
    torch.testing.assert_close(terms["two_step"], middles[0].square())
    torch.testing.assert_close(loss, terms["one_step"] + 0.5 * terms["two_step"])


def test_labels_go_to_the_student_twice_and_to_the_flow() -> None:
    seen = []

    def student(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return x

    pairs = exact_pairs(gaussian((2,)), 6)
    labels = torch.arange(6)
    batch = replace(pairs, labels=labels, equipment=Equipment((1.0,), student))
    make(Distill, steps=1, two_step={"first": "flow"}).per_sample(student, batch)
    assert [each.tolist() for each in seen] == [[*range(6)] * 2, [*range(6)], [*range(6)]]


def test_a_share_of_the_perceptual_term_keeps_the_mean_of_both_steps() -> None:
    network, flow = Theirs(STUDENT), Theirs(FLOW)
    pairs = exact_pairs(gaussian((2,)), 1)
    batch = replace(
        pairs,
        x0=TENSORS["data"],
        eps=TENSORS["noise"],
        draw=replace(pairs.draw, part=slice(0, 6), total=6),
        perceptual=surrogate,
        equipment=Equipment((1.0,), flow),
    )
    found = []
    for share in (1.0, 0.5):
        stage = make(Distill, steps=1, loss={"name": "perceptual", "share": share}, two_step={})
        found.append(stage.per_sample(network, batch)[1])
    whole, half = found
    for term in ("one_step", "two_step"):
        chosen = half[term] > 0
        assert chosen.sum() == 3
        torch.testing.assert_close(half[term][chosen], 2 * whole[term][chosen])


# --- several steps --------------------------------------------------------------------------------

RECIPE = """\
teacher: {name: analytic:ring, components: 3}
stages:
  - pairs: {count: 256, solver: euler, steps: 2, batch_size: 64, shard_size: 64, dtype: float32, check: 0}
  - reflow:
      network: {name: mlp, width: 16, depth: 2}
      loss: {name: squared-l2}
      steps: 60
      batch_size: 32
      optimizer: {lr: 1.0e-2}
      checkpoint_every: 20
  - boss: {model: reflow, nfe: [2, 4], grid: 8, trajectories: 16, held_out: 16, choose: boss}
  - distill:
      pairs: pairs
      model: reflow
      steps: 60
      batch_size: 32
      optimizer: {lr: 1.0e-3, clip: 1.0}
      checkpoint_every: 20
      log_every: 10
"""
OUT = Path("runs/few")


def times_of(stage: Distill, inputs: dict[str, Any], folder: Path) -> set[float]:
    given = work(folder, stage, inputs)
    pairs = replace(exact_pairs(gaussian((2,)), 4000), equipment=stage.equipment(given))
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(t)
        torch.testing.assert_close(x, (1 - t[:, None]) * pairs.x0 + t[:, None] * pairs.eps)
        return x

    loss, _ = stage.per_sample(network, pairs)
    v = pairs.eps - pairs.x0  # the target is that of the whole way at every step
    at = seen[0][:, None]
    torch.testing.assert_close(loss, ((1 - at) * pairs.x0 + at * pairs.eps - v).square().mean(1))
    found, counts = seen[0].unique(return_counts=True)
    assert (counts.double() / 4000 * len(found)).tolist() == pytest.approx([1] * len(found), abs=0.15)
    return set(found.tolist())


@pytest.mark.parametrize(("nfe", "times"), [(1, {1.0}), (2, {0.5, 1.0}), (4, {0.25, 0.5, 0.75, 1.0})])
def test_the_times_are_those_at_which_a_step_begins(nfe: int, times: set[float], tmp_path: Path) -> None:
    assert times_of(make(Distill, steps=1, nfe=nfe), {}, tmp_path) == times


def test_a_schedule_of_the_flow_gives_the_times(shell: Shell) -> None:
    Path("few.yaml").write_text(RECIPE)
    given = ("-s", "distill.nfe=4", "-s", "distill.schedule=boss")
    answer = shell("distill", "few.yaml", "-q", *given)
    assert answer.code == 0, answer.err
    schedule = Schedule(tuple(artifact.load_json(OUT / "boss" / "schedule-nfe4.json")["times"]), "boss")
    inputs = {"model": str(OUT / "reflow"), "schedule": str(OUT / "boss")}
    found = times_of(make(Distill, steps=1, nfe=4), inputs, Path("other"))
    assert found == set(torch.tensor(schedule.times[:-1]).tolist()) != {0.25, 0.5, 0.75, 1.0}
    assert "boss" in artifact.Manifest.read(OUT / "distill").inputs
    for key, value, message in (
        ("solver", "ab2", "is for the solver ab2, and the student takes Euler steps"),
        ("model", "another", "was made for another model"),
    ):
        described = artifact.load_json(OUT / "boss" / "schedule-nfe4.json") | {key: value}
        artifact.save_json(Path("schedule-nfe4.json"), described)
        with pytest.raises(UsageError, match=message):
            times_of(make(Distill, steps=1, nfe=4), inputs | {"schedule": "."}, Path("other"))
    # Made for four, which `sample` says of another number.
    assert open_model(str(OUT / "distill")).card.nfe == 4
    said = shell("sample", OUT / "distill", "--nfe", "1", "--count", "4", "-q", "--out", "one")
    assert said.code == 0 and "distill was made for 4 evaluations, not 1" in said.err
    assert "warning" not in shell("sample", OUT / "distill", "--count", "4", "-q", "--out", "four").err


def test_a_schedule_for_other_numbers_of_steps_is_missing(shell: Shell) -> None:
    Path("few.yaml").write_text(RECIPE)
    answer = shell("distill", "few.yaml", "-q", "-s", "distill.nfe=3", "-s", "distill.schedule=boss")
    assert answer.code == 3 and len(answer.err.splitlines()) == 1
    assert "no schedule for 3 evaluations, only schedule-nfe2.json, schedule-nfe4.json" in answer.err
    assert not (OUT / "distill").exists()


def test_a_schedule_of_another_model_is_refused(shell: Shell) -> None:
    Path("few.yaml").write_text(RECIPE.replace("boss: {model: reflow", "boss: {model: teacher"))
    answer = shell("distill", "few.yaml", "-q", "-s", "distill.nfe=2", "-s", "distill.schedule=boss")
    assert answer.code == 2 and len(answer.err.splitlines()) == 1
    assert "distill.schedule: runs/few/boss/schedule-nfe2.json was made for another model" in answer.err
    assert not (OUT / "distill").exists()


# --- what it starts as ----------------------------------------------------------------------------


def test_the_student_begins_as_the_average_or_as_the_raw_weights(shell: Shell) -> None:
    Path("few.yaml").write_text(RECIPE)
    assert shell("reflow", "few.yaml", "-q").code == 0
    state, _ = artifact.load_tensors(OUT / "reflow" / "checkpoints" / "last.safetensors")
    for start, group in (("average", "average"), ("raw", "network")):
        stage = make(Distill, steps=1, start=start)
        for place in (OUT / "reflow", OUT / "reflow" / "model.safetensors"):
            student = stage.new_student(work(Path("s"), stage, {"model": str(place)}))
            for name, value in student.network.state_dict().items():
                assert torch.equal(value, state[f"{group}.{name}"])
    assert any(
        not torch.equal(state[f"average.{name}"], state[f"network.{name}"])
        for name in student.network.state_dict()
    )


def test_raw_weights_of_a_network_in_its_own_convention_are_found(shell: Shell) -> None:
    Path("few.yaml").write_text(
        RECIPE.replace("      loss:", "      convention: {prediction: x0}\n      loss:")
    )
    answer = shell("distill", "few.yaml", "-q", "-s", "distill.start=raw", "-s", "distill.two_step={}")
    assert answer.code == 0, answer.err
    card = open_model(str(OUT / "distill")).card
    assert card.convention == Convention(prediction="x0") and card.nfe == 1


FROM_FILE = """\
teacher: %s
stages:
  - pairs: {count: 32, solver: euler, steps: 1, check: 0, dtype: float32}
  - distill: {pairs: pairs, model: teacher, steps: 2, batch_size: 8, two_step: {}}
"""


def teacher(path: Path) -> None:
    arguments = {"shape": [2], "classes": 0, "width": 8, "depth": 1}
    torch.manual_seed(0)
    network = networks.build("mlp", arguments)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    Card(architecture="mlp", arguments=arguments, shape=(2,)).write(path, network.state_dict())


@pytest.mark.parametrize(
    "name", ["builtin:digits", "./t.safetensors", "{name: ./t.safetensors, probe: false}"]
)
def test_a_teacher_is_distilled_from_its_average_and_has_no_raw_weights(shell: Shell, name: str) -> None:
    teacher(Path("t.safetensors"))
    Path("checkpoints").mkdir()  # somebody else's
    artifact.save_tensors(Path("checkpoints/last.safetensors"), {"network.x": torch.zeros(1)}, {"step": 1})
    if "builtin" not in name:
        Path("checkpoints/last.safetensors").unlink()
    Path("t.yaml").write_text(FROM_FILE % name)
    refused = shell("distill", "t.yaml", "-q", "-s", "distill.start=raw")
    assert (refused.code, refused.out) == (2, "") and len(refused.err.splitlines()) == 1
    assert "distill.start: raw weights are only there of a model that a stage has trained" in refused.err
    assert not Path("runs/t/distill").exists()
    answer = shell("distill", "t.yaml", "-q")
    assert answer.code == 0, answer.err


def test_a_flow_without_weights_is_refused(shell: Shell) -> None:
    Path("t.yaml").write_text(FROM_FILE % "{name: analytic:gaussian}")
    answer = shell("distill", "t.yaml", "-q")
    assert (answer.code, answer.out) == (2, "") and len(answer.err.splitlines()) == 1
    assert "distill.model: 'analytic:gaussian' has no weights that a student could begin with" in answer.err
    assert not Path("runs/t/distill").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("two_step={interval: [0.8, 0.2]}", "interval: expected 0 <= low < high <= 1, found 0.8 to 0.2"),
        ("two_step={interval: [0.5, 1.5]}", "interval: expected 0 <= low < high <= 1, found 0.5 to 1.5"),
        ("two_step={first: teacher}", "unknown first 'teacher' (student, flow)"),
        ("two_step={weight: 0}", "weight: expected a number > 0"),
        ("nfe=0", "nfe: expected a number > 0, found 0"),
        ("start=ema", "unknown start 'ema' (average, raw)"),
        ("schedule=reflow", "distill.schedule"),
        ("pairs=[]", "distill: pairs: expected one or more, each once"),
    ],
)
def test_recipes_that_cannot_be_are_refused(shell: Shell, setting: str, message: str) -> None:
    Path("few.yaml").write_text(RECIPE)
    answer = shell("distill", "few.yaml", "-q", "-s", f"distill.{setting}")
    assert (answer.code, answer.out) == (2, "") and message in answer.err, answer.err
    assert len(answer.err.splitlines()) == 1 and not Path("runs").exists()


# --- what it learns -------------------------------------------------------------------------------


def test_a_distilled_flow_goes_in_one_step_where_it_went_in_many(shell: Shell) -> None:
    recipe = """\
teacher: {name: analytic:gaussian, dim: 3}
stages:
  - pairs: {count: 2048, solver: rk4, steps: 8, dtype: float32, check: 0}
  - slimflow:
      student: {name: mlp, width: 32, depth: 2}
      annealing: {name: fixed, value: 1.0}
      steps: 250
      batch_size: 128
      optimizer: {lr: 1.0e-2, decay: cosine}
      ema: {decay: 0.98}
  - pairs: {name: own, model: slimflow, count: 2048, solver: rk4, steps: 8, dtype: float32, check: 0}
  - distill:
      pairs: own
      model: slimflow
      two_step: {}
      steps: 250
      batch_size: 128
      optimizer: {lr: 5.0e-3, decay: cosine}
      ema: {decay: 0.98}
"""
    Path("one.yaml").write_text(recipe)
    assert shell("distill", "one.yaml", "-q").code == 0
    flow, student = (open_model(f"runs/one/{name}") for name in ("slimflow", "distill"))
    noise = randomness.noise(77, range(1000), (3,))
    accurate = integrate(flow.field, noise, uniform(16), SOLVERS["rk4"])
    errors = [
        (integrate(model.field, noise, uniform(1), SOLVERS["euler"]) - accurate).square().mean().sqrt()
        for model in (flow, student)
    ]
    assert float(errors[1]) < 0.4 * float(errors[0])


# --- interruptions and processes ------------------------------------------------------------------


class Killed(BaseException):
    pass


TWO = ("-s", "distill.two_step={}", "-s", "distill.ema={decay: 0.9}")


def test_a_distillation_that_is_killed_ends_in_the_same_bytes(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("few.yaml").write_text(RECIPE)
    assert shell("distill", "few.yaml", "-q", "--out", "whole", *TWO).code == 0
    original = Distill.per_sample

    def killed(self: Distill, network: nn.Module, batch: Batch) -> Any:
        if batch.draw.step == 33:
            raise Killed
        return original(self, network, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Distill, "per_sample", killed)
        assert shell("distill", "few.yaml", "-q", "--out", "broken", *TWO).code == 1
    assert artifact.read_header(Path("broken/distill/checkpoints/last.safetensors"))["step"] == 20
    assert shell("distill", "few.yaml", "-q", "--out", "broken", *TWO).code == 0
    whole, broken = (content(Path(out) / "distill") for out in ("whole", "broken"))
    for name in ("model.safetensors", "log.jsonl", "checkpoints/last.safetensors"):
        assert whole[name] == broken[name]


def test_two_processes_distil_as_one_does(tmp_path: Path, shell: Shell) -> None:
    """The student is called once for both terms, so its gradient is exchanged once."""
    recipe = tmp_path / "few.yaml"
    text = RECIPE.replace("      log_every: 10\n", "      log_every: 5\n      two_step: {}\n")
    recipe.write_text(text)
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        assert shell("reflow", recipe, "--out", out, "-q").code == 0
    assert shell("distill", recipe, "--out", one, "-q").code == 0
    with gloo(recipe, two, 2, "distill") as ranks:
        answers = [rank.communicate(timeout=180) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], answers
    alone, together = (
        [json.loads(line) for line in (out / "distill" / "log.jsonl").read_text().splitlines()]
        for out in (one, two)
    )
    assert [line["step"] for line in together] == [*range(5, 65, 5)]
    for mine, other in zip(alone, together, strict=True):
        assert mine["two_step"] > 0
        for each in (mine, other):
            each.pop("loss_by_t", None)
        assert other == pytest.approx(mine, rel=1e-5, abs=1e-6)
    for name, value in load_file(one / "distill" / "model.safetensors").items():
        other_value = load_file(two / "distill" / "model.safetensors")[name]
        torch.testing.assert_close(other_value, value, atol=1e-5, rtol=1e-5)


CHAIN = """\
teacher: {name: analytic:ring, components: 3}
stages:
  - pairs: {count: 256, solver: euler, steps: 4, batch_size: 32, shard_size: 32, dtype: float32, check: 0}
  - slimflow:
      student: {name: mlp, width: 16, depth: 2}
      steps: 150
      batch_size: 32
      checkpoint_every: 10
  - pairs: {name: own, model: slimflow, count: 256, solver: heun, steps: 4, batch_size: 32, shard_size: 32}
  - distill: {pairs: own, model: slimflow, two_step: {}, steps: 150, batch_size: 32, checkpoint_every: 10}
  - eval: {models: [teacher, slimflow, distill], samples: 64, nfe: [1, 2], latency: false}
"""
RUNNING = ("slimflow", "own", "distill", "eval")


def test_the_whole_chain_that_is_stopped_again_and_again_ends_in_the_same_bytes(
    tmp_path: Path, shell: Shell
) -> None:
    Path("chain.yaml").write_text(CHAIN)
    assert shell("run", "chain.yaml", "--out", "whole", "-q").code == 0
    codes, out = [], tmp_path / "broken"
    for stage in RUNNING:
        process = subprocess.Popen(
            command(Path("chain.yaml"), out, verb="run"), env=environment(), stderr=subprocess.PIPE, text=True
        )
        until = time.monotonic() + 120
        while process.poll() is None and not (out / stage / "started.json").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=120)
        assert process.returncode in (0, 143), said
        codes.append(process.returncode)
    assert 143 in codes
    assert shell("run", "chain.yaml", "--out", "broken", "-q").code == 0
    whole, broken = content(Path("whole")), content(Path("broken"))
    assert whole.keys() == broken.keys()
    made_each_time = ("manifest.json", "started.json", "own/info.json")
    different = [name for name in whole if whole[name] != broken[name] and not name.endswith(made_each_time)]
    assert different == []
    rows = artifact.load_json(Path("whole/eval/eval.json"))["rows"]
    assert {row["model"] for row in rows} == {"teacher", "slimflow", "distill"}


def test_a_student_in_slimflows_convention_sees_the_label_of_0_001() -> None:
    network = theirs(*STUDENT)
    assert isinstance(network, Canonical)
    seen: list[Tensor] = []
    network.network.register_forward_hook(lambda _, given, __: seen.append(given[1]))
    pairs = replace(exact_pairs(gaussian((2,)), 3), equipment=Equipment((1.0,), None))
    make(Distill, steps=1).per_sample(network, pairs)
    assert seen[0].tolist() == pytest.approx([0.999] * 3)


def test_the_card_of_a_distilled_model_says_what_it_comes_from(tmp_path: Path) -> None:
    arguments = {"shape": [2], "classes": 0, "width": 8, "depth": 1}
    new(Card(architecture="mlp", arguments=arguments, shape=(2,), data="x")).write(tmp_path / "t.safetensors")
    stage = make(Distill, steps=1, nfe=3)
    student = stage.new_student(work(tmp_path / "d", stage, {"model": str(tmp_path / "t.safetensors")}))
    assert (student.card.nfe, student.card.distilled, student.card.data) == (3, True, "x")
    assert student.card.settings["nfe"] == 3
