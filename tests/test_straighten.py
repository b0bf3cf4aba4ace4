"""Straightening against sums by hand, a flow's own accurate solutions, and command lines."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_chords import kept
from test_cli import Shell
from test_processes import gloo
from test_sources import CPU
from test_stages import make, work
from torch import Tensor, nn

from flowdistill import artifact, networks, randomness
from flowdistill.analytic import gaussian
from flowdistill.chords import ChordSource, Drawn
from flowdistill.cli import execute
from flowdistill.conventions import Convention
from flowdistill.flow import VelocityField
from flowdistill.pairstore import PairStore
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.sources import Draws, PairSource
from flowdistill.stages import Feed
from flowdistill.stages.boss import Boss
from flowdistill.stages.pairs import Pairs
from flowdistill.stages.straighten import Straighten
from flowdistill.teachers import Card, open_model
from flowdistill.training import Batch


@cache
def learnt() -> dict[str, Tensor]:
    """Weights of a small network that has learnt the velocity of a Gaussian, whose paths are curved."""
    torch.manual_seed(0)
    network, flow = networks.build("mlp", ARGUMENTS), gaussian((2,)).float()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        t = torch.rand(256)
        x = 1.2 * torch.randn(256, 2)
        loss = (network(x, t, None) - flow(x, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return network.state_dict()


ARGUMENTS = {"shape": [2], "classes": 0, "width": 32, "depth": 2}


def flow_file(path: Path, convention: dict[str, Any] | None = None) -> Path:
    """The network as a model file."""
    described = None if convention is None else Convention.model_validate(convention)
    card = Card(architecture="mlp", arguments=ARGUMENTS, shape=(2,), convention=described)
    card.write(path, learnt())
    return path


RECIPE = """\
teacher: {name: ./flow.safetensors, probe: false}
stages:
  - boss: {model: teacher, nfe: [2, 3], grid: 12, trajectories: 16, held_out: 16, choose: boss}
  - pairs:
      count: 256
      solver: heun
      steps: 12
      dtype: float32
      batch_size: 64
      shard_size: 64
      check: 0
      path: {schedule: boss, uniform: [2, 3]}
  - straighten:
      pairs: pairs
      schedule: boss
      nfe: [3, 2]
      steps: 60
      batch_size: 32
      optimizer: {lr: 1.0e-3}
      checkpoint_every: 20
      log_every: 10
"""


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    flow_file(Path("flow.safetensors"))
    Path("r.yaml").write_text(RECIPE)
    return Shell(capsys)


# The loss --------------------------------------------------------------------------------------------------

SCHEDULES = (Schedule((1.0, 0.5, 0.0), "two"), Schedule((1.0, 0.75, 0.5, 0.125, 0.0), "four"))


class Small(nn.Module):
    """A network with labels that writes down how it is asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.label = nn.Linear(4, 3), nn.Embedding(3, 3)
        self.asked: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.asked.append((self.training, torch.is_grad_enabled()))
        assert labels is not None
        return self.layer(torch.cat([x, t[:, None]], 1)).sin() + self.label(labels)


def shown(folder: Path, own: float, total: int = 60, step: int = 2, **more: Any) -> Batch:
    """The batch of a step, from a store with three classes."""
    there = PairStore.open(folder) if folder.exists() else kept(folder, 1, 29, classes=3)
    drawn, draw = Drawn(SCHEDULES, own), Draws(9, step, slice(0, total), total, CPU)
    x0, eps, labels = ChordSource(PairSource([there], Feed()), drawn, "s.pairs").batch(draw)
    return Batch(x0, eps, labels, 0, draw, 0.0, equipment=drawn, **more)


def knots_of(field: VelocityField, x: Tensor, schedule: Schedule, label: Tensor) -> list[Tensor]:
    """The states at which Euler steps begin."""
    seen: list[Tensor] = []
    integrate(field, x, schedule, SOLVERS["euler"], label, lambda i, t, x, v: seen.append(x))
    return seen


def by_hand(network: Small, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v_hat, v, x_t, t and s of each sample, one at a time."""
    chord = batch.equipment.at(batch.draw)
    assert batch.labels is not None
    rows = []
    for row, (number, knots) in enumerate(zip(chord.number.tolist(), chord.grid.tolist(), strict=True)):
        (schedule,) = [each for each in SCHEDULES if [*each.times, 0.0, 0.0][:5] == knots]
        t, s = schedule.intervals[number]
        label, x = batch.labels[row : row + 1], batch.eps[row : row + 1]
        if chord.own:
            with torch.no_grad():
                x = knots_of(network, x, schedule, label)[number]
        v_hat = network(x, torch.tensor([t]), label)
        rows.append((v_hat[0], (x[0] - batch.x0[row]) / (t - s), x[0], torch.tensor(t), torch.tensor(s)))
    v_hat, v, x_t, t, s = (torch.stack(column) for column in zip(*rows, strict=True))
    return v_hat, v, x_t, t, s


@pytest.mark.parametrize("own", [0.0, 1.0], ids=["forced", "own"])
def test_the_loss_is_the_distance_from_the_velocity_that_leads_to_the_end_of_the_chord(
    tmp_path: Path, own: float
) -> None:
    network, batch = Small().train(), shown(tmp_path / "kept", own)
    loss, terms = make(Straighten, steps=1).per_sample(network, batch)
    asked = list(network.asked)
    v_hat, v, _, t, s = by_hand(network, batch)
    torch.testing.assert_close(loss, (v_hat - v).square().mean(1), atol=1e-6, rtol=1e-5)
    assert terms.keys() == {"t"} and torch.equal(terms["t"], t.float())
    assert {(a, b) for each in SCHEDULES for a, b in each.intervals} == set(
        zip(t.tolist(), s.tolist(), strict=True)
    )
    # Nothing flows back through the states or the target.
    weights = list(network.parameters())
    found = torch.autograd.grad(loss.mean(), weights)
    expected = torch.autograd.grad((v_hat - v.detach()).square().mean(), weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    # Walking is sampling: no dropout, no gradient. As many calls whatever the chords.
    walk = [(False, False)] * 3 if own else []
    assert asked == [*walk, (True, True)] and network.training


def test_own_states_of_a_flow_that_goes_there_are_those_of_its_path(tmp_path: Path) -> None:
    """A constant field is its own chord everywhere, so both kinds of steps have no loss."""
    speed = torch.tensor([1.0, -2.0, 0.5])

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return speed + 0 * x

    network.training, network.eval, network.train = True, lambda: None, lambda on: None  # type: ignore
    for own in (0.0, 1.0):
        batch = shown(tmp_path / "kept", own)
        chord = batch.equipment.at(batch.draw)
        noise = batch.draw.normal("noise", (3,))
        start, end = (noise - (1 - t)[:, None] * speed for t in (chord.start.float(), chord.end.float()))
        batch = replace(batch, x0=end, eps=noise if own else start)
        loss, _ = make(Straighten, steps=1).per_sample(network, batch)  # type: ignore[arg-type]
        assert float(loss.max()) < 1e-10


def surrogate(x_hat: Tensor, x: Tensor) -> Tensor:
    """What stands for a perceptual distance; it counts what it is shown."""
    SHOWN.append(len(x))
    return (x_hat - x).abs().sum(1)


SHOWN: list[int] = []


@pytest.mark.parametrize("own", [0.0, 1.0], ids=["forced", "own"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_last_interval_may_have_a_loss_of_its_own(tmp_path: Path, own: float, share: float) -> None:
    network, batch = Small(), shown(tmp_path / "kept", own, perceptual=surrogate)
    SHOWN.clear()
    last = {"name": "perceptual-l2", "share": share}
    loss, terms = make(Straighten, steps=1, last=last).per_sample(network, batch)
    v_hat, v, x_t, t, s = by_hand(network, batch)
    squares = (v_hat - v).square().mean(1)
    at_end = s == 0
    assert 0 < int(at_end.sum()) < 60 and terms.keys() == {"t"}
    # x_t - t v_hat against the data themselves
    distance = (x_t - t[:, None].float() * v_hat - batch.x0).abs().sum(1)
    chosen = at_end if share == 1 else at_end & batch.draw.chosen("perceptual", 30)
    assert 0 < sum(SHOWN) == int(chosen.sum())
    torch.testing.assert_close(loss, squares + chosen * distance / share, atol=1e-5, rtol=1e-5)
    # The gradient is that of the same sum.
    expected = (squares + chosen * distance / share).mean()
    for one, other in zip(
        torch.autograd.grad(loss.mean(), [*network.parameters()]),
        torch.autograd.grad(expected, [*network.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_batch_without_a_last_interval_has_the_other_loss(tmp_path: Path) -> None:
    network, found = Small(), []
    for step in range(12):
        batch = shown(tmp_path / "kept", 0.0, total=2, step=step, perceptual=surrogate)
        if (batch.equipment.at(batch.draw).end > 0).all():
            plain, _ = make(Straighten, steps=1).per_sample(network, batch)
            loss, _ = make(Straighten, steps=1, last={"name": "perceptual-l2"}).per_sample(network, batch)
            assert torch.equal(loss, plain)
            found.append(step)
    assert found


@pytest.mark.parametrize("prediction", ["x0", "eps", "velocity"])
def test_walks_are_finite_where_a_shorter_schedule_has_ended(tmp_path: Path, prediction: str) -> None:
    """The network is asked at t = 0 there, where some conventions divide by it."""
    path = flow_file(tmp_path / "flow.safetensors", {"prediction": prediction})
    network = open_model(str(path)).network
    there = kept(tmp_path / "kept", 1, 29, shape=(2,))
    drawn, draw = Drawn([uniform(1), Schedule((1.0, 0.5, 0.125, 0.0), "b")], 1.0), Draws(9, 0, ALL, 40, CPU)
    x0, eps, _ = ChordSource(PairSource([there], Feed()), drawn, "s.pairs").batch(draw)
    batch = Batch(x0, eps, None, 0, draw, 0.0, equipment=drawn)
    loss, _ = make(Straighten, steps=1).per_sample(network, batch)
    one = drawn.at(draw).grid[:, 1] == 0
    expected = (network(eps, torch.ones(40), None) - (eps - x0)).square().mean(1)
    torch.testing.assert_close(loss[one], expected[one])
    assert loss.isfinite().all() and one.any() and not one.all()


ALL = slice(0, 40)


# What it learns --------------------------------------------------------------------------------------------


def rmse(model: Any, schedule: Schedule, noise: Tensor, accurate: Tensor) -> float:
    end = integrate(model.field, noise, schedule, SOLVERS["euler"])
    return float((end - accurate).square().mean().sqrt())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a flow, its schedules and its paths are; tests leave them as they are."""
    folder = tmp_path_factory.mktemp("straighten")
    flow_file(folder / "flow.safetensors")
    model = str(folder / "flow.safetensors")
    stage = make(Boss, nfe=[2, 3], grid=24, trajectories=32, held_out=16, choose="boss")
    stage.run(work(folder / "boss", stage, {"model": model}))
    path = {"schedule": "boss", "uniform": [2, 3]}
    stage = make(Pairs, count=2048, solver="heun", steps=24, dtype="float32", check=0, path=path)
    stage.run(work(folder / "pairs", stage, {"model": model, "path.schedule": str(folder / "boss")}))
    return folder


@pytest.mark.parametrize(
    ("schedule", "nfe", "own", "lora", "gain"),
    [
        ("boss", [2], 0.0, None, 5),
        ("uniform", [2], 0.5, None, 5),
        ("boss", [3, 2], 0.25, None, 2.5),
        ("uniform", [2], 0.0, {"rank": 4}, 3),
    ],
)
def test_euler_steps_lead_where_the_flow_leads(
    tmp_path: Path, pairs: Path, schedule: str, nfe: list[int], own: float, lora: Any, gain: float
) -> None:
    """Several times as near as before, on noises that it has not seen, by all schedules of one network."""
    stage = make(
        Straighten,
        nfe=nfe,
        own_states=own,
        lora=lora,
        steps=250,
        batch_size=128,
        optimizer={"lr": 1e-2 if lora else 5e-3, "decay": "cosine"},
        ema={"decay": 0.97},
    )
    inputs = {"init": str(pairs / "flow.safetensors"), "pairs": str(pairs / "pairs")}
    inputs |= {"schedule": str(pairs / "boss")} if schedule == "boss" else {}
    stage.run(work(tmp_path / "straighten", stage, inputs))
    flow, student = open_model(inputs["init"]), open_model(str(tmp_path / "straighten"))
    noise = randomness.noise(777, range(1000), (2,))
    accurate = integrate(flow.field, noise, uniform(32), SOLVERS["rk4"])
    for steps in nfe:
        carried = student.carried(steps)
        assert carried is not None
        solver, its = carried
        assert solver.name == "euler" and its.name == schedule and its.steps == steps
        assert rmse(flow, its, noise, accurate) > gain * rmse(student, its, noise, accurate)


# Through the command line ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the recipe was run, with an evaluation; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flow_file(Path("flow.safetensors"))
        Path("r.yaml").write_text(
            RECIPE
            + "  - eval: {models: [teacher, straighten], samples: 64, nfe: [2, 3, 4], latency: false}\n"
        )
        assert execute(["run", "r.yaml", "-q"]) == 0
    return folder


@pytest.fixture
def there(shell: Shell, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(finished)
    return shell


def test_the_card_says_what_the_student_is_made_for(there: Shell) -> None:
    card = open_model("runs/r/straighten").card
    assert (card.nfe, card.distilled, card.guidance) == (3, True, None)
    assert card.settings["nfe"] == [3, 2] and card.schedules.keys() == {"2", "3"}
    for nfe in (2, 3):
        written = artifact.load_json(Path(f"runs/r/boss/schedule-nfe{nfe}.json"))
        assert card.schedules[str(nfe)] == {
            "solver": "euler",
            "schedule": "boss",
            "times": written["times"],
        }
        assert written["times"] != list(uniform(nfe).times)


@pytest.mark.parametrize(("asked", "nfe"), [((), 3), (("--nfe", 2), 2), (("--nfe", 3), 3), (("--nfe", 4), 4)])
def test_samples_are_drawn_by_the_schedule_that_was_learnt(
    there: Shell, asked: tuple[Any, ...], nfe: int, tmp_path: Path
) -> None:
    answer = there("sample", "runs/r/straighten", *asked, "--count", 9, "-q", "--json", "--out", tmp_path)
    assert answer.json["nfe"] == nfe and answer.json["solver"] == "euler"
    student = open_model("runs/r/straighten")
    times = student.card.schedules[str(nfe)]["times"] if nfe < 4 else uniform(4).times
    tensors, header = artifact.load_tensors(tmp_path / "samples.safetensors")
    assert header["times"] == list(times)
    noise = randomness.noise(0, range(9), (2,))
    expected = integrate(student.field, noise, Schedule(tuple(times), "carried"), SOLVERS["euler"])
    assert torch.equal(tensors["samples"], expected)


def test_it_is_evaluated_by_the_schedules_that_it_carries_beside_uniform_steps(there: Shell) -> None:
    rows = artifact.load_json(Path("runs/r/eval/eval.json"))["rows"]
    card = open_model("runs/r/straighten").card
    found = {(row["model"], row["nfe"], row["schedule"]): row for row in rows}
    its = {key[1:] for key in found if key[0] == "straighten"}
    assert its == {(2, "uniform"), (2, "boss"), (3, "uniform"), (3, "boss"), (4, "uniform")}
    assert {key[1:] for key in found if key[0] == "teacher"} == {(nfe, "uniform") for nfe in (2, 3, 4)}
    for nfe in (2, 3):
        assert found["straighten", nfe, "boss"]["times"] == card.schedules[str(nfe)]["times"]


SHAPES = """\
teacher: builtin:shapes
stages:
  - pairs: {count: 16, solver: euler, steps: 2, batch_size: 16, check: 0, path: {uniform: [2]}}
  - straighten:
      pairs: pairs
      nfe: [2]
      steps: 2
      batch_size: 8
      log_every: 1
      last: {name: perceptual-l2}
"""


def test_pictures_are_compared_as_seen_on_their_last_step(shell: Shell) -> None:
    Path("s.yaml").write_text(SHAPES)
    logs = []
    for out, more in (("a", ()), ("b", ("-s", "straighten.last=null"))):
        answer = shell("straighten", "s.yaml", "-q", "--out", out, *more)
        assert answer.code == 0, answer.err
        lines = Path(out, "straighten/log.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines])
    assert logs[0][0] > logs[1][0] > 0
    figures = [artifact.Manifest.read(Path(out, "straighten")).figures for out in "ab"]
    assert str(figures[0]["perceptual_distance"]).startswith("shapes-classifier@")
    assert "perceptual_distance" not in figures[1]


def test_two_processes_straighten_as_one_does(shell: Shell, tmp_path: Path) -> None:
    """Walks to own states take as many calls in both, and what is added is exchanged as weights are."""
    recipe = tmp_path / "r.yaml"
    text = RECIPE.replace("schedule: boss, ", "").replace("      schedule: boss\n", "")
    recipe.write_text(text + "      own_states: 0.5\n      lora: {rank: 2}\n")
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        assert shell("pairs", recipe, "--out", out, "-q").code == 0
    assert shell("straighten", recipe, "--out", one, "-q").code == 0
    with gloo(recipe, two, 2, "straighten") as ranks:
        answers = [rank.communicate(timeout=180) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], answers
    alone, together = (
        [json.loads(line) for line in (out / "straighten" / "log.jsonl").read_text().splitlines()]
        for out in (one, two)
    )
    assert [line["step"] for line in together] == [*range(10, 70, 10)]
    for mine, other in zip(alone, together, strict=True):
        for each in (mine, other):
            each.pop("loss_by_t")
        assert other == pytest.approx(mine, rel=1e-5, abs=1e-6)
    for name, value in load_file(one / "straighten" / "model.safetensors").items():
        other_value = load_file(two / "straighten" / "model.safetensors")[name]
        torch.testing.assert_close(other_value, value, atol=1e-5, rtol=1e-5)


# What cannot be --------------------------------------------------------------------------------------------

TWICE = """\
teacher: {name: ./flow.safetensors, probe: false}
stages:
  - boss: {model: teacher, nfe: [2, 3], grid: 12, trajectories: 4, held_out: 16, choose: boss}
  - pairs: {count: 16, solver: euler, steps: 4, check: 0, path: {uniform: [2]}}
  - straighten: {name: once, pairs: pairs, nfe: [2], steps: 2, batch_size: 8}
  - pairs: {name: own, model: once, count: 16, solver: euler, steps: 4, check: 0, path: {uniform: [2]}}
  - pairs: {name: ends, count: 16, solver: euler, steps: 4, check: 0}
  - straighten: {pairs: own, init: once, nfe: [2], steps: 2, batch_size: 8}
"""


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ("pairs=pairs",),
            "straighten.pairs: runs/t/pairs has paths of another model than `init`; a flow is straightened "
            "on its own",
        ),
        (
            ("pairs=[own, pairs]",),
            "straighten.pairs: runs/t/pairs has paths of another model than `init`",
        ),
        (
            ("schedule=boss",),
            "straighten.schedule: runs/t/boss/boss.safetensors was made for another model; name the boss "
            "stage of the model itself",
        ),
        (
            ("init=teacher", "pairs=pairs", "schedule=boss", "nfe=[2, 4, 5]"),
            "straighten.schedule: runs/t/boss has schedules for 2, 3 evaluations, not for 4; add it to that "
            "stage's nfe",
        ),
        (
            ("init=teacher", "pairs=pairs", "schedule=boss", "nfe=[3]"),
            "straighten.pairs: runs/t/pairs has kept no states at t = ",
        ),
        (
            ("nfe=[2, 5]",),
            "straighten.pairs: runs/t/own has kept no states at t = 0.8, 0.6, 0.4, 0.2 of 5 steps 'uniform'; "
            "make the pairs with path: {schedule: STAGE} or {uniform: [5]}",
        ),
        (
            ("init=teacher", "pairs=ends"),
            "straighten.pairs: runs/t/ends has kept no states at t = 0.5 of 2 steps 'uniform'; make the "
            "pairs with path: {schedule: STAGE} or {uniform: [2]}",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(shell: Shell, settings: tuple[str, ...], says: str) -> None:
    Path("t.yaml").write_text(TWICE)
    given = [part for each in settings for part in ("-s", f"straighten.{each}")]
    answer = shell("straighten", "t.yaml", "-q", "--stage", "straighten", *given)
    assert (answer.code, answer.out) == (2, "") and says in answer.err, answer.err
    assert len(answer.err.splitlines()) == 1 and not Path("runs/t/straighten").exists()


def test_one_step_needs_no_path(shell: Shell) -> None:
    Path("t.yaml").write_text(TWICE)
    given = ("-s", "straighten.init=teacher", "-s", "straighten.pairs=ends", "-s", "straighten.nfe=[1]")
    answer = shell("straighten", "t.yaml", "-q", "--stage", "straighten", *given)
    assert answer.code == 0, answer.err
    assert open_model("runs/t/straighten").card.schedules["1"]["times"] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("nfe=[]", "straighten.nfe: expected 1 or more values"),
        ("nfe=[0]", "straighten.nfe[0]: expected a number >= 1, found 0"),
        ("own_states=1.5", "straighten.own_states: expected a number <= 1"),
        ("last={name: perceptua}", "unknown last 'perceptua', did you mean 'perceptual'?"),
        ("schedule=pairs", "straighten.schedule"),
        ("pairs=[]", "straighten: pairs: expected one or more, each once"),
    ],
)
def test_recipes_that_cannot_be_are_refused(shell: Shell, settings: str, says: str) -> None:
    answer = shell("straighten", "r.yaml", "-q", "-s", f"straighten.{settings}")
    assert (answer.code, answer.out) == (2, "") and says in answer.err, answer.err
    assert len(answer.err.splitlines()) == 1 and not Path("runs").exists()


def test_a_flow_without_weights_is_refused(shell: Shell) -> None:
    text = SHAPES.replace("builtin:shapes", "analytic:gaussian").replace("      last:", "      # last:")
    Path("g.yaml").write_text(text)
    answer = shell("straighten", "g.yaml", "-q")
    assert (answer.code, answer.out) == (2, "") and len(answer.err.splitlines()) == 1
    assert "straighten.init: 'analytic:gaussian' has no weights that a student could begin with" in answer.err
    assert not Path("runs/g").exists()  # it costs nothing
