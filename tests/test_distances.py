"""Kernel distance, precision and recall: torch-fidelity's own functions, brute force, simulated coverage."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowdistill import foreign
from flowdistill.evaluation import kernels, metrics, neighbours, targets
from flowdistill.evaluation.kinds import KINDS, distances
from flowdistill.evaluation.targets import Target
from flowdistill.randomness import noise


@pytest.fixture(scope="module")
def fidelity() -> Any:
    """Modules of torch-fidelity by their names."""
    foreign.load("torch_fidelity")
    return lambda name: importlib.import_module(f"torch_fidelity.{name}")


def features(count: int, dimensions: int = 24, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Not negative, and correlated, as those of networks are."""
    mixing = noise(90, range(dimensions), (dimensions,)) / dimensions**0.5
    return ((noise(seed, range(count), (dimensions,)) + shift) @ mixing).relu()


# --- kernel distance --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_kernel_distance_is_that_of_torch_fidelity(fidelity: Any, scale: float) -> None:
    """On one subset that holds everything, where nothing is left to chance."""
    made, real = scale * features(300, seed=1, shift=0.3), scale * features(300, seed=2)
    expected = fidelity("metric_kid").kid_features_to_metric(
        made.double(), real.double(), kid_subsets=1, kid_subset_size=300, verbose=False
    )["kernel_inception_distance_mean"]
    found, _ = kernels.kernel_distance(made, real)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.n == 300 and found.low < found.value < found.high


def test_the_average_over_subsets_is_the_distance_of_all(fidelity: Any) -> None:
    made, real = features(500, seed=1, shift=0.3), features(400, seed=2)
    subsets = fidelity("metric_kid").kid_features_to_metric(
        made.double(), real.double(), kid_subsets=400, kid_subset_size=100, verbose=False
    )
    found, _ = kernels.kernel_distance(made, real)
    noise_of_subsets = subsets["kernel_inception_distance_std"] / math.sqrt(400)
    assert abs(found.value - subsets["kernel_inception_distance_mean"]) < 4 * noise_of_subsets


def test_the_influence_on_the_kernel_distance_is_that_of_leaving_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = features(120, seed=1, shift=0.3), features(80, seed=2)
    found, influence = kernels.kernel_distance(made, real)
    keep = ~torch.eye(120, dtype=torch.bool)
    without = torch.tensor([kernels.kernel_distance(made[row], real)[0].value for row in keep]).double()
    pseudo = 119 * (found.value - without)
    assert float(torch.corrcoef(torch.stack([influence, pseudo]))[0, 1]) > 0.999
    assert float(influence.std() / pseudo.std()) == pytest.approx(1.0, rel=0.03)
    assert float(influence.mean()) == pytest.approx(0.0, abs=1e-12)
    monkeypatch.setattr(kernels, "_KERNELS_AT_ONCE", 7 * 80)
    again, _ = kernels.kernel_distance(made, real)
    assert again.value == pytest.approx(found.value, rel=1e-12), "in parts"


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_the_interval_covers_the_kernel_distance(shift: float) -> None:
    """95 % nominal; where there is no difference half the values are negative, and stay so."""
    draws = [(features(150, seed=100 + k, shift=shift), features(300, seed=900 + k)) for k in range(120)]
    estimates = [kernels.kernel_distance(*draw)[0] for draw in draws]
    expected = sum(each.value for each in estimates) / len(estimates)
    covered = sum(each.low <= expected <= each.high for each in estimates) / len(estimates)
    assert 0.9 <= covered <= 0.995
    if shift == 0.0:
        assert abs(expected) < 0.1 * max(each.high for each in estimates)
        assert sum(each.value < 0 for each in estimates) > 40
        assert sum(each.low <= 0 <= each.high for each in estimates) >= 0.93 * len(estimates)


# --- precision and recall ---------------------------------------------------------------------------


def covered(points: Tensor, members: Tensor) -> Tensor:
    return neighbours.covered(points, members, neighbours.radii(members))


def by_hand(points: Tensor, members: Tensor) -> list[bool]:
    """Point by point, in Python's own arithmetic."""
    radii = []
    for member in members.tolist():
        apart = sorted(math.dist(member, other) for other in members.tolist())
        radii.append(apart[3])
    return [
        any(math.dist(point, member) <= r for member, r in zip(members.tolist(), radii, strict=True))
        for point in points.tolist()
    ]


def test_covered_is_brute_force_and_torch_fidelity(fidelity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = features(150, 5, seed=1, shift=0.4).double(), features(120, 5, seed=2).double()
    precise, recalled = covered(made, real), covered(real, made)
    assert precise.tolist() == by_hand(made, real)
    assert recalled.tolist() == by_hand(real, made)
    theirs = fidelity("metric_prc").prc_features_to_metric(made, real, verbose=False, save_cpu_ram=True)
    assert 0 < theirs["recall"] < theirs["precision"] < 1
    assert float(precise.double().mean()) == pytest.approx(theirs["precision"], abs=1e-7)
    assert float(recalled.double().mean()) == pytest.approx(theirs["recall"], abs=1e-7)
    monkeypatch.setattr(neighbours, "_DISTANCES_AT_ONCE", 7 * 120)
    assert torch.equal(covered(made, real), precise), "in parts"


def test_the_same_samples_are_covered_and_far_ones_are_not() -> None:
    real = features(60, 4)
    assert covered(real, real).all()
    assert not covered(real + 100, real).any()
    # Samples at one place are precise and recall next to nothing.
    one = real[:1].expand(60, -1)
    assert covered(one, real).all()
    assert int(covered(real, one).sum()) == 1


def test_the_benchmark_finds_the_same_in_all_ways() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "frechet.py"
    command = [sys.executable, str(script), "--dimensions", "48"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    apart = {row[1].strip(): float(row[5]) for row in rows if row[5].strip() not in ("", "from ours")}
    assert len(apart) == 4 and max(apart.values()) < 1e-9


# --- all together -----------------------------------------------------------------------------------


def target(real: Tensor) -> Target:
    return Target(metrics.Reference(*metrics.moments(real)), real, "real ones")


def test_figures_have_the_names_of_their_extractor_and_their_tensors_the_mean_that_is_told() -> None:
    made, real = features(200, 6, seed=1, shift=0.3), features(150, 6, seed=2)
    plain = targets.compare("shipped", made, target(real))
    assert list(plain.figures) == ["fd", "kd", "precision", "recall"] and not plain.skipped
    for key in ("inception", "dinov2", "clip"):
        found = targets.compare(key, made, target(real))
        assert list(found.figures.values()) == list(plain.figures.values())
        assert list(found.figures) == list(distances(key)) and set(found.figures) <= KINDS.keys()
    assert list(targets.compare("inception", made, target(real)).figures)[:2] == ["fid", "kid"]
    for kind in ("precision", "recall"):
        assert float(plain.tensors[kind].double().mean()) == plain.figures[kind].value
    for kind in ("fd", "kd"):
        influence = plain.tensors[f"{kind}.influence"]
        assert influence.dtype == torch.float32 and abs(float(influence.mean())) < 1e-6


def test_what_cannot_be_compared_is_left_out_with_its_reason() -> None:
    made, real = features(5, 6), features(150, 6, seed=2)
    few = targets.compare("inception", made, target(real))
    assert few.skipped == {"fid": "5 samples are too few for 6 features"}
    fewer = targets.compare("shipped", made[:3], target(real))
    assert list(fewer.figures) == []
    assert fewer.skipped["kd"] == fewer.skipped["recall"] == "3 samples are too few, 4 are enough"
    moments = Target(target(real).moments, None, "statistics.npz")
    alone = targets.compare("shipped", features(50, 6), moments)
    assert list(alone.figures) == ["fd"] and set(alone.skipped) == {"kd", "precision", "recall"}
    assert alone.skipped["kd"].startswith("statistics.npz: has moments only; give real samples")


def test_only_so_many_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "KEPT_SHIPPED", 40)
    made, real = features(90, 6, seed=1), features(30, 6, seed=2)
    found = targets.compare("shipped", made, target(real))
    assert {kind: each.n for kind, each in found.figures.items()} == {
        "fd": 90,
        "kd": 40,
        "precision": 40,
        "recall": 30,
    }
