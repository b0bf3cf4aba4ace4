"""Annealing reflow against what SlimFlow's own code computed, closed forms and command lines.

That code has noise at t = 0, data at t = 1, a mean over t in [0.001, 1], and weights of t besides the uniform
one ('1mt', 'snr+1', 'karras', 'truncated-snr'), which no published configuration uses and which we do not
offer: the fixture's cases 6 to 9 serve for the noise alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import content
from safetensors.torch import load_file
from test_cli import Shell
from test_stages import exact_pairs, make, work
from torch import Tensor, nn

from flowdistill import artifact, randomness, students
from flowdistill.analytic import gaussian
from flowdistill.flow import expand
from flowdistill.optimization import Ema
from flowdistill.pairstore import PairStore
from flowdistill.recipe import json_schema, load
from flowdistill.sources import Draws, PairSource
from flowdistill.stages import Feed, verbs
from flowdistill.stages.pairs import Pairs
from flowdistill.stages.slimflow import SlimFlow, annealed
from flowdistill.teachers import Card, new, open_model
from flowdistill.teachers.canonical import Canonical
from flowdistill.training import Batch
from flowdistill.training.averages import exponential_decay, gamma_of, power_decay

FOLDER = Path(__file__).parent / "fixtures" / "slimflow"
THEIRS: dict[str, Any] = json.loads((FOLDER / "slimflow.json").read_text())
TENSORS = load_file(FOLDER / "slimflow.safetensors")
CASES = {case["tag"]: case for case in THEIRS["train_step_cases"]}
UNIFORM = [tag for tag, case in CASES.items() if case["weight_schedule"] == "uniform"]
TOTAL = 800_000


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


class Affine(nn.Module):
    """The fixture's network, fed 999 t: v = a x + b t + c in its convention."""

    def __init__(self, a: float, b: float, c: float) -> None:
        super().__init__()
        self.abc = nn.Parameter(torch.tensor([a, b, c]))

    def forward(self, x: Tensor, label: Tensor, labels: Tensor | None = None) -> Tensor:
        a, b, c = self.abc
        return a * x + b * expand(label.to(x.dtype) / 999, x) + c


def theirs(a: float, b: float, c: float) -> Canonical:
    return Canonical(Affine(a, b, c), students._SLIMFLOW)


@dataclass(frozen=True)
class Given(Draws):
    """Draws whose numbers are given by purpose."""

    numbers_of: Any = None

    def uniform(self, purpose: str) -> Tensor:
        found: Tensor = self.numbers_of[purpose]
        return found.double()

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        found: Tensor = self.numbers_of[purpose]
        assert found.shape[1:] == shape
        return found


def batch_of(x0: Tensor, eps: Tensor, progress: float = 0.0, **numbers: Tensor) -> Batch:
    named = {name.replace("_", " "): value for name, value in numbers.items()}
    draw = Given(0, 0, slice(0, len(x0)), len(x0), torch.device("cpu"), named)
    return Batch(x0, eps, None, 0, draw, progress)


# --- beta -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("warmup_300000", {"name": "linear", "steps": 300_000}),
        ("warmup_300000", {"name": "linear", "share": 0.375}),
        ("warmup_exp_300000", {"name": "exp", "steps": 300_000}),
        ("warmup_exp_300000", {"name": "exp"}),
        ("warmup_cos_300000", {"name": "cosine", "steps": 300_000}),
        ("warmup_cos_300000", {"name": "cosine"}),
        ("fix_0", {"name": "fixed"}),
        ("fix_0.5", {"name": "fixed", "value": 0.5}),
    ],
    ids=str,
)
def test_beta_is_that_of_slimflows_code(theirs: str, ours: dict[str, Any]) -> None:
    annealing = make(SlimFlow, steps=TOTAL, annealing=ours).annealing
    for step, beta in THEIRS["beta_schedules"][theirs].items():
        assert annealing.beta(int(step), TOTAL) == pytest.approx(beta, rel=1e-9, abs=1e-12)


def test_by_default_beta_falls_linearly_over_three_eighths() -> None:
    stage = make(SlimFlow, steps=800)
    assert [stage.annealing.beta(k, 800) for k in (0, 150, 299, 300, 799)] == pytest.approx(
        [1, 0.5, 1 / 300, 0, 0]
    )


def test_every_step_sees_the_beta_of_its_number() -> None:
    """The step comes back from the share of the training that is done, for any number of steps."""
    for steps in (7, 300, 799, 99_991):
        stage = make(SlimFlow, steps=steps, annealing={"name": "linear", "share": 1.0})
        pairs = exact_pairs(gaussian((2,)), 2)
        for step in {0, 1, steps // 3, steps - 1}:
            found = stage.per_sample(lambda x, t, labels: x, replace(pairs, progress=step / steps))[1]
            assert found["beta"].tolist() == pytest.approx([1 - step / steps] * 2, abs=1e-7)


# --- the noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", CASES)
def test_the_noise_is_mixed_as_in_slimflows_code(tag: str) -> None:
    """Its coin falls once for a batch, and behind the mixing: it mirrors the fresh noise as well."""
    case = CASES[tag]
    mixed = annealed(TENSORS["noise"], TENSORS[f"{tag}.x0_prime"], case["beta"])
    seen = mixed.flip(-1) if case["flipped"] else mixed
    torch.testing.assert_close(seen, TENSORS[f"{tag}.noise_beta"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 2**-0.5, 1.0])
def test_annealed_noise_stays_normal(beta: float) -> None:
    eps, fresh = (randomness.noise(key, range(20_000), (3,)) for key in (1, 2))
    noise = annealed(eps, fresh, beta).double()
    assert noise.mean(0).abs().max() < 0.03
    assert np.cov(noise.T.numpy()) == pytest.approx(np.eye(3), abs=0.04)
    assert (noise**4).mean(0).tolist() == pytest.approx([3.0] * 3, abs=0.2)
    assert (noise * eps).mean().item() == pytest.approx(math.sqrt(1 - beta**2), abs=0.02)


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", UNIFORM)
def test_loss_and_gradient_are_those_of_slimflows_code(tag: str) -> None:
    """With mirrored pairs and mirrored fresh noise where its coin fell so; and 0.5 * sum is a constant."""
    case = CASES[tag]
    mirrored: Callable[[Tensor], Tensor] = (lambda x: x.flip(-1)) if case["flipped"] else (lambda x: x)
    warm = case["x0_randomness"].startswith("warmup")
    stage = make(
        SlimFlow,
        steps=TOTAL,
        annealing={"name": "linear", "steps": 300_000} if warm else {"name": "fixed"},
        loss={"name": {"l2": "squared-l2", "l1": "l1"}[case["loss_type"]]},
        timesteps={"name": "uniform"},
    )
    data, noise = mirrored(TENSORS["data"]), mirrored(TENSORS["noise"])
    numbers = {"timesteps": 1 - TENSORS[f"{tag}.t"], "fresh_noise": mirrored(TENSORS[f"{tag}.x0_prime"])}
    network = theirs(0.4, -0.3, 0.1)
    loss, terms = stage.per_sample(network, batch_of(data, noise, case["step"] / TOTAL, **numbers))
    loss.mean().backward()
    gradient = network.network.get_parameter("abc").grad
    assert gradient is not None
    factor = 1 if case["reduce_mean"] else 0.5 * data[0].numel()
    assert terms["beta"].tolist() == pytest.approx([case["beta"]] * 6)
    assert factor * loss.mean().item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(gradient, TENSORS[f"{tag}.grad"] / factor, atol=1e-5, rtol=2e-5)


def test_a_loss_that_they_sum_is_a_constant_multiple_of_ours() -> None:
    assert [tag for tag in UNIFORM if not CASES[tag]["reduce_mean"]] == ["case5"]
    assert 0.5 * TENSORS["data"][0].numel() == 96


def test_without_annealing_it_is_a_reflow_and_with_beta_1_the_noise_is_independent() -> None:
    pairs, seen = exact_pairs(gaussian((2,)), 4000), []

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.append((x - expand(1 - t, x) * pairs.x0) / expand(t, x))  # the noise that was used
        return torch.zeros_like(x)

    for value in (0.0, 1.0):
        make(SlimFlow, steps=1, annealing={"name": "fixed", "value": value}).per_sample(network, pairs)
    far = (pairs.eps - seen[0]).abs() < 1e-2
    assert far.double().mean() > 0.99  # but for t near 0, where it cannot be told from x
    correlation = np.corrcoef(seen[1][:, 0].clamp(-5, 5), pairs.eps[:, 0])[0, 1]
    assert abs(correlation) < 0.05


# --- when beta is 0 -------------------------------------------------------------------------------


def test_what_is_settled_takes_over_exactly_when_beta_is_0() -> None:
    stage = make(
        SlimFlow,
        steps=8,
        annealing={"name": "linear", "steps": 4},
        settled={"loss": {"name": "l1"}},
    )
    pairs = exact_pairs(gaussian((2,)), 4000)
    for step in range(8):
        batch = replace(pairs, progress=step / 8)
        loss, terms = stage.per_sample(lambda x, t, labels: torch.zeros_like(x), batch)
        settled = step >= 4
        assert (terms["beta"][0] == 0) == settled
        ends = ((terms["t"] < 0.1) | (terms["t"] > 0.9)).double().mean().item()
        assert ends == pytest.approx(0.345 if settled else 0.2, abs=0.03)  # U-shaped with a = 4, or uniform
        fresh = batch.draw.normal("fresh noise", (2,))
        v = annealed(pairs.eps, fresh, float(terms["beta"][0])) - pairs.x0
        expected = v.abs().mean(1) if settled else v.square().mean(1)
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


# --- mirrored pairs -------------------------------------------------------------------------------


def images(folder: Path, count: int = 64) -> Path:
    arguments = {"shape": [1, 8, 8], "classes": 0, "channels": 8, "multipliers": [1], "attention": []}
    torch.manual_seed(0)
    new(Card(architecture="unet", arguments=arguments, shape=(1, 8, 8))).write(folder / "t.safetensors")
    stage = make(Pairs, count=count, solver="euler", steps=1, dtype="float32", check=0)
    stage.run(work(folder / "pairs", stage, {"model": str(folder / "t.safetensors")}))
    return folder / "pairs"


def test_half_of_the_pairs_are_mirrored_by_coins_of_the_step_in_any_number_of_processes(
    tmp_path: Path,
) -> None:
    store = PairStore.open(images(tmp_path))
    plain, flipping = (PairSource([store], Feed(flip=flip)) for flip in (False, True))
    coins = []
    for step in (0, 1, 9):

        def draw(first: int, end: int, step: int = step) -> Draws:
            return Draws(3, step, slice(first, end), 64, torch.device("cpu"))

        x0, eps, _ = plain.batch(draw(0, 64))
        x0_seen, eps_seen, _ = flipping.batch(draw(0, 64))
        mirrored = (eps_seen == eps.flip(-1)).flatten(1).all(1)
        assert torch.equal(mirrored, draw(0, 64).uniform("flip") < 0.5)
        coin = mirrored[:, None, None, None]
        torch.testing.assert_close(x0_seen, torch.where(coin, x0.flip(-1), x0))
        torch.testing.assert_close(eps_seen, torch.where(coin, eps.flip(-1), eps))
        for part in (slice(0, 32), slice(32, 64)):  # of two processes
            here = flipping.batch(draw(part.start, part.stop))
            assert torch.equal(here[0], x0_seen[part]) and torch.equal(here[1], eps_seen[part])
        coins.append(mirrored)
    assert 70 < sum(int(coin.sum()) for coin in coins) < 122
    assert not torch.equal(coins[0], coins[1])


# --- the average ----------------------------------------------------------------------------------


def test_the_average_is_a_power_law_for_longer_than_anyone_trains() -> None:
    """(1 + n) / (10 + n) weighs step k by about k^8: EDM2's gamma = 8, whose width is 0.09."""
    ema = make(SlimFlow, steps=TOTAL).ema
    assert ema == Ema(decay=0.999999, ramp=True)
    assert gamma_of(0.0905) == pytest.approx(8, rel=0.02)
    n = 3000
    decays = [exponential_decay(ema.decay, ema.ramp, k) for k in range(1, n + 1)]
    kept = np.cumprod([1.0, *reversed(decays[1:])])[::-1]  # of what update k added, at the end
    shares = kept * (1 - np.array(decays))
    k = np.arange(1, n + 1)
    assert shares[1000:] == pytest.approx((9 / n) * (k[1000:] / n) ** 8, rel=0.04)
    power = [power_decay(8, k) for k in range(1, n + 1)]
    assert decays[100:] == pytest.approx(power[100:], rel=6e-3)
    start = math.prod(decays)
    exact = math.prod(range(2, 11)) / math.prod(range(n + 2, n + 11))
    assert start == pytest.approx(exact, rel=1e-9) and start < 1e-24
    assert 0.999999**TOTAL > 0.4  # what a constant decay would have kept of the random weights
    assert (1 + 8_000_000) / (10 + 8_000_000) < 0.999999


# --- the networks ---------------------------------------------------------------------------------


def test_a_published_network_is_fed_and_read_as_slimflows_code_does() -> None:
    """999 t with t = 0 at the noise; its v = data - noise; at pure noise its label is 0.999."""
    network, seen = theirs(0.4, -0.3, 0.1), []
    network.network.register_forward_hook(lambda _, given, __: seen.append(given[1]))
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 0.25, 1.0])
    v = network(x, t)
    torch.testing.assert_close(seen[0].float(), torch.tensor([999.0, 749.25, 0.999]))
    expected = -(0.4 * x - 0.3 * torch.tensor([[1.0], [0.75], [0.001]]) + 0.1)
    torch.testing.assert_close(v[:2], expected[:2])


# --- command lines --------------------------------------------------------------------------------

RECIPE = """\
teacher: {name: analytic:gaussian, dim: 3}
stages:
  - pairs: {count: 2048, solver: rk4, steps: 8, dtype: float32, check: 0}
  - slimflow:
      student: {name: mlp, width: 32, depth: 2}
      steps: 300
      batch_size: 128
      optimizer: {lr: 1.0e-2, decay: cosine, clip: 1.0}
      ema: {decay: 0.98}
      checkpoint_every: 40
      log_every: 30
"""


def test_slimflow_trains_a_one_step_student(shell: Shell) -> None:
    Path("slim.yaml").write_text(RECIPE)
    assert shell("slimflow", "slim.yaml", "-q").code == 0
    from flowdistill.schedule import uniform
    from flowdistill.solvers import SOLVERS, integrate

    folder = Path("runs/slim/slimflow")
    student, flow = open_model(str(folder)), gaussian((3,))
    noise = randomness.noise(77, range(1000), (3,))
    exact = flow.flow_map(noise)
    after, before = (
        (integrate(field, noise, uniform(1), SOLVERS["euler"]) - exact).square().mean().sqrt()
        for field in (student.field, flow)
    )
    assert float(after) < 0.2 * float(before)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    betas = [line["beta"] for line in log]  # means of windows of 30 of the 112.5 steps that it takes
    assert betas[:3] == pytest.approx([1 - (start + 14.5) / 112.5 for start in (0, 30, 60)])
    assert betas[4:] == [0] * 6 and log[-1]["loss"] < 0.1 * log[0]["loss"]
    assert (student.card.data, student.card.distilled) == ("analytic:gaussian", True)
    assert shell("sample", folder, "--nfe", "1", "--count", "4", "-q").code == 0


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [55, 200], ids=["annealing", "settled"])
def test_a_training_that_is_killed_ends_in_the_same_bytes(
    shell: Shell, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("slim.yaml").write_text(RECIPE + "      settled: {loss: {name: pseudo-huber}}\n")
    assert shell("slimflow", "slim.yaml", "-q", "--out", "whole").code == 0
    assert shell("pairs", "slim.yaml", "-q", "--out", "broken").code == 0
    original = SlimFlow.per_sample

    def killed(self: SlimFlow, network: nn.Module, batch: Batch) -> Any:
        if batch.draw.step == at:
            raise Killed
        return original(self, network, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SlimFlow, "per_sample", killed)
        assert shell("slimflow", "slim.yaml", "-q", "--out", "broken").code == 1
    state = artifact.read_header(Path("broken/slimflow/checkpoints/last.safetensors"))
    assert state["step"] == at // 40 * 40
    assert shell("slimflow", "slim.yaml", "-q", "--out", "broken").code == 0
    whole, broken = (content(Path(out) / "slimflow") for out in ("whole", "broken"))
    for name in ("model.safetensors", "log.jsonl", "checkpoints/last.safetensors"):
        assert whole[name] == broken[name]


LPIPS = "{name: perceptual, distance: {name: lpips, net: %s}}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "annealing: {name: linear, steps: 301}",
            "annealing.steps: 301, but the training has 300 steps; it has to end before",
        ),
        (
            "annealing: {name: cosine, steps: 301}",
            "annealing.steps: 301, but the training has 300 steps; it has to end before",
        ),
        (
            "annealing: {name: exp}\n      settled: {}",
            "settled: with annealing 'exp' beta never is 0; choose linear or cosine",
        ),
        (
            f"loss: {LPIPS % 'vgg'}\n      settled: {{loss: {LPIPS % 'alex'}}}",
            "loss and settled.loss: expected the same perceptual distance in both",
        ),
        ("annealing: {name: linear, share: 1.5}", "share: expected a number <= 1.0, found 1.5"),
        ("annealing: {name: fixed, value: 2}", "value: expected a number <= 1.0, found 2"),
        ("annealing: {name: warmup}", "unknown annealing 'warmup' (linear, cosine, exp, fixed)"),
        ("student: {name: other}", "unknown student 'other' (unet, mlp, slimflow, scaled)"),
        ("student: {}", "expected a limit: params, macs or latency_ms"),
    ],
)
def test_recipes_that_cannot_be_are_refused_at_their_line(shell: Shell, lines: str, message: str) -> None:
    text = RECIPE
    if lines.startswith("student"):
        text = text.replace("student: {name: mlp, width: 32, depth: 2}", lines)
    else:
        text += f"      {lines}\n"
    Path("slim.yaml").write_text(text)
    answer = shell("slimflow", "slim.yaml", "-q")
    assert (answer.code, answer.out) == (2, "") and message in answer.err
    assert len(answer.err.splitlines()) == 1 and answer.err.startswith("slim.yaml:")
    assert not Path("runs").exists()


def test_lpips_of_the_settled_loss_is_looked_for_before_anything_is_made(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", "nowhere")
    Path("slim.yaml").write_text(RECIPE + f"      settled: {{loss: {LPIPS % 'vgg'}}}\n")
    answer = shell("slimflow", "slim.yaml", "-q")
    assert answer.code == 3 and "vgg16-397923af.pth: no such file" in answer.err
    assert not Path("runs").exists()


def test_one_file_of_lpips_serves_the_loss_and_what_is_settled(shell: Shell) -> None:
    Path("vgg.pth").write_bytes(b"")
    loss = "{name: %s, distance: {name: lpips, weights: vgg.pth}}"
    more = f"      loss: {loss % 'perceptual'}\n      settled: {{loss: {loss % 'lpips-huber'}}}\n"
    Path("slim.yaml").write_text(RECIPE + more)
    answer = shell("slimflow", "slim.yaml", "-q")
    assert answer.code != 0 and "lpips compares images [1 or 3, H, W], found data of shape [3]" in answer.err


def test_a_student_of_a_student_of_one_step_is_for_any_number_of_steps(tmp_path: Path) -> None:
    arguments = {"shape": [2], "classes": 0, "width": 8, "depth": 1}
    card = Card(architecture="mlp", arguments=arguments, shape=(2,), nfe=1, licence="MIT", notes="x")
    new(card).write(tmp_path / "one.safetensors")
    stage = make(SlimFlow, steps=1, student={"name": "mlp", "width": 8, "depth": 1})
    given = work(tmp_path / "slimflow", stage, {"like": str(tmp_path / "one.safetensors")})
    student = stage.new_student(given)
    assert (student.card.nfe, student.card.licence, student.card.notes) == (None, "MIT", "")


def test_every_example_of_the_recipes_passes_the_schema() -> None:
    import jsonschema

    from flowdistill import yaml_nodes

    validator = jsonschema.Draft202012Validator(json_schema(verbs()))
    paths = sorted((Path(__file__).parents[1] / "recipes" / "slimflow").glob("*.yaml"))
    assert paths
    for path in paths:
        load(path, verbs(), missing_ok=True)
        validator.validate(yaml_nodes.read(path.read_text(), path.name)[0].plain())
