"""Averages of weights: their profiles in closed form, and others that are made of those that were kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import content
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from flowdistill import artifact
from flowdistill.cli import execute
from flowdistill.optimization import Ema, PostHoc
from flowdistill.teachers import open_model
from flowdistill.training import MODEL, State, averages
from flowdistill.training.averages import Average, combination, gamma_of, power_decay
from flowdistill.training.batches import nothing_measured

RECIPE = """
teacher: {name: analytic:ring}
stages:
  - pairs: {count: 64, solver: euler, steps: 2, dtype: float32, check: 0}
  - reflow:
      network: {name: mlp, width: 16, depth: 1}
      steps: 200
      batch_size: 8
      loss: {name: squared-l2}
      optimizer: {lr: 5.0e-3}
      log_every: 100
      checkpoint_every: 60
      post_hoc: {stds: [0.05, 0.07, 0.1], every: 20}
"""


# Profiles


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.2, 0.24])
def test_a_profile_has_the_width_that_it_is_named_by(std: float) -> None:
    g = gamma_of(std)
    variance = (g + 1) / (g + 3) - ((g + 1) / (g + 2)) ** 2  # of t under (g + 1) t^g on [0, 1]
    assert math.sqrt(variance) == pytest.approx(std)


def test_profiles_of_edm2() -> None:
    """The exponents that EDM2 prints for its two widths."""
    assert (gamma_of(0.05), gamma_of(0.10)) == pytest.approx((16.97, 6.94), abs=0.005)


def run_along(values: Sequence[float], rule: Average) -> float:
    """The average that a training keeps, where the one weight takes these values."""
    network = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    state = State(network, torch.optim.Adam(network.parameters()), [rule])
    for value in values:
        nn.init.constant_(network.weight, value)
        state.advance({}, nothing_measured())
    return float(state.averages[0]["weight"])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.sampled_from([0.05, 0.1, 0.2]))
@settings(deadline=None)
def test_a_power_average_is_the_sum_that_its_profile_says(values: list[float], std: float) -> None:
    """The share of step n of N is the integral of the profile over it, and the weights before have none."""
    n, power = len(values), gamma_of(std) + 1
    shares = np.diff((np.arange(n + 1) / n) ** power)
    assert shares.sum() == pytest.approx(1.0)
    found = run_along(values, Average(partial(power_decay, gamma_of(std)), std=std))
    assert found == pytest.approx(float(shares @ np.array(values)), abs=1e-12)


def test_inner_products_are_those_of_the_profiles() -> None:
    times = (np.arange(400_000) + 0.5) / 400_000 * 30.0

    def profile(step: float, gamma: float) -> np.ndarray:
        return np.where(times < step, (gamma + 1) * times**gamma / step ** (gamma + 1), 0.0)

    for mine, other in (((10.0, 5.0), (30.0, 17.0)), ((30.0, 7.0), (20.0, 17.0)), ((30.0, 7.0), (30.0, 7.0))):
        expected = (profile(*mine) * profile(*other)).mean() * 30.0
        found = averages._overlap([mine[0]], [mine[1]], [other[0]], [other[1]])
        assert found.item() == pytest.approx(expected, rel=1e-3)


# Made of others


@pytest.mark.parametrize("number", [0, 3, 9])
def test_one_that_was_kept_is_made_of_itself_alone(number: int) -> None:
    kept = [(step, std) for step in (20, 40, 60, 80, 100) for std in (0.05, 0.1)]
    shares = combination(kept, *kept[number])
    np.testing.assert_allclose(shares, np.eye(10)[number], atol=1e-6)


@given(
    st.lists(st.integers(1, 2000), min_size=2, max_size=12, unique=True),
    st.floats(0.05, 0.2),
)
@settings(deadline=None)
def test_the_shares_have_sum_1(steps: list[int], std: float) -> None:
    kept = [(step, width) for step in steps for width in (0.05, 0.1)]
    assert combination(kept, max(steps), std).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("std", [0.06, 0.07, 0.09, 0.15])
def test_any_width_is_made_of_two_along_a_random_walk(std: float) -> None:
    """1000 weights on a walk of 4000 steps, of which 20 are kept."""
    walk = np.random.default_rng(0).normal(size=(4000, 1000)).cumsum(0)

    def average(step: int, width: float) -> np.ndarray:
        return np.diff((np.arange(step + 1) / step) ** (gamma_of(width) + 1)) @ walk[:step]

    kept = [(step, width) for step in range(200, 4001, 200) for width in (0.05, 0.1)]
    all_kept = np.stack([average(*each) for each in kept])
    wanted = average(4000, std)

    def error(found: np.ndarray) -> float:
        """As a share of how far the wanted average is from the last weights."""
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(walk[-1] - wanted))

    made = error(combination(kept, 4000, std) @ all_kept)
    nearest = min(error(each) for each in all_kept)
    assert made < 1e-3 and made < nearest / 100


# In a training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage of a training that has kept three widths; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert execute(["reflow", str(folder / "recipe.yaml"), "--out", str(folder / "out"), "-q"]) == 0
    return folder / "out" / "reflow"


def test_averages_are_kept_at_intervals_and_at_the_end(trained: Path) -> None:
    found = sorted(path.name for path in (trained / averages.SNAPSHOTS).iterdir())
    steps, stds = range(20, 201, 20), ("0.05", "0.07", "0.1")
    assert found == [f"{step:08d}-{std}.safetensors" for step in steps for std in stds]
    outputs = artifact.Manifest.read(trained).outputs
    assert {f"{averages.SNAPSHOTS}/{name}" for name in found} < set(outputs)


def test_export_makes_the_average_of_another_width(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, new = tmp_path / "stage", tmp_path / "new.safetensors"
    shutil.copytree(trained, stage)
    direct = {path: load_file(path) for path in (stage / averages.SNAPSHOTS).glob("*-0.07.*")}
    for path in direct:
        path.unlink()
    wanted = direct[max(direct)]
    assert execute(["export", str(stage), str(new), "--ema", "0.07", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(new),
        "ema": 0.07,
        "sha256": artifact.sha256(new),
    }

    def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([weights[name].double().flatten() for name in sorted(wanted)])

    nearest = min(
        float((flat(load_file(path)) - flat(wanted)).norm())
        for path in (stage / averages.SNAPSHOTS).iterdir()
    )
    error = float((flat(load_file(new)) - flat(wanted)).norm())
    assert error < nearest / 20
    made, shipped = open_model(str(new)), open_model(str(trained / MODEL))
    assert made.card.figures == {"ema_std": 0.07}
    changed = {"figures": shipped.card.figures}
    assert made.card.model_copy(update=changed) == shipped.card
    x, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.5)
    assert not torch.equal(made.field(x, t, None), shipped.field(x, t, None))


def test_export_of_a_kept_width_is_that_one(trained: Path, tmp_path: Path) -> None:
    assert execute(["export", str(trained), str(tmp_path / "new.safetensors"), "--ema", "0.05"]) == 0
    kept = load_file(trained / averages.snapshot_file(200, 0.05))
    for name, value in load_file(tmp_path / "new.safetensors").items():
        torch.testing.assert_close(value, kept[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            "stage new.safetensors",
            2,
            "expected --as FORMAT for pairs or a schedule, --ema STD for a training",
        ),
        (
            "stage new.safetensors --as npy --ema 0.07",
            2,
            "expected --as FORMAT for pairs or a schedule, --ema STD",
        ),
        (
            "stage new.safetensors --ema 0.049",
            2,
            "--ema 0.049: of what is kept in stage/snapshots",
        ),
        ("stage new.safetensors --ema 0.25", 2, "widths from 0.05 to 0.25 can be made"),
        ("stage new.safetensors --ema nan", 2, "--ema nan: "),
        ("stage there.safetensors --ema 0.07", 2, "there.safetensors: is there already"),
        ("bare new.safetensors --ema 0.07", 3, "bare/snapshots: no averages are kept there"),
        ("nowhere new.safetensors --ema 0.07", 3, "nowhere/model.safetensors: no such model"),
        ("stage nowhere/new.safetensors --ema 0.07", 2, "nowhere: no such folder"),
    ],
)
def test_exports_that_cannot_be_made(
    arguments: str,
    code: int,
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stage").symlink_to(trained)
    Path("bare").mkdir()
    shutil.copy(trained / MODEL, "bare")
    Path("there.safetensors").write_bytes(b"mine")
    before = content(tmp_path)
    assert execute(["export", *arguments.split()]) == code
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and len(said.err.splitlines()) <= 3
    assert content(tmp_path) == before


def test_files_of_averages_have_the_names_of_their_decays() -> None:
    rules = averages.chosen(Ema(also=[0.9, 0.99999995]), PostHoc(every=5), MODEL)
    names = [MODEL, "model-ema-0.9.safetensors", "model-ema-0.99999995.safetensors", None, None]
    assert [rule.file for rule in rules] == names
    assert [rule.std for rule in rules] == [None, None, None, 0.05, 0.1]
