"""The data sets against what they promise: pure samples, balance, range, and figures drawn right."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from flowdistill.data import DATASETS, DIGITS, SHAPES, Dataset, counter_uniforms, dataset
from flowdistill.errors import UsageError

EVERY = pytest.mark.parametrize("data", DATASETS.values(), ids=DATASETS.keys())
_WORD = 2**64


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % _WORD
    return z ^ (z >> 31)


def _uniform(seed: int, index: int, column: int) -> float:
    """`counter_uniforms` in Python's own integers."""
    golden = 0x9E3779B97F4A7C15
    row = _mix((index * golden + _mix((seed + golden) % _WORD)) % _WORD)
    return (_mix((row + (column + 1) * golden) % _WORD) >> 40) / 2**24


@given(
    seed=st.integers(0, 2**64 - 1),
    indices=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_uniforms_are_those_of_exact_integers(seed: int, indices: list[int]) -> None:
    drawn = counter_uniforms(seed, torch.tensor(indices), 3)
    assert drawn.tolist() == [[_uniform(seed, i, column) for column in range(3)] for i in indices]


def test_mix_is_splitmix64() -> None:
    # First outputs of the published generator from state 0 are finalised multiples of its increment.
    golden = 0x9E3779B97F4A7C15
    assert [_mix(k * golden % _WORD) for k in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    drawn = counter_uniforms(3, torch.arange(20_000), 4).double()
    assert drawn.min() >= 0 and drawn.max() < 1
    error = (12 * 20_000) ** -0.5
    assert (drawn.mean(0) - 0.5).abs().max() < 5 * error
    counts = torch.stack([torch.histc(column, 20, 0, 1) for column in drawn.unbind(1)])
    assert ((counts - 1000) ** 2 / 1000).sum(1).max() < 50  # chi-squared, 19 degrees of freedom
    assert (torch.corrcoef(drawn.T) - torch.eye(4)).abs().max() < 5 / 20_000**0.5
    shifted = torch.corrcoef(torch.stack([drawn[1:, 0], drawn[:-1, 0]]))
    assert shifted[0, 1].abs() < 5 / 20_000**0.5


@EVERY
@pytest.mark.parametrize("size", [1, 3, 7, 16, 64])
def test_samples_do_not_depend_on_the_batch(data: Dataset, size: int) -> None:
    indices = torch.arange(100) * 37
    whole, labels = data.batch(indices, seed=5)
    parts = [data.batch(part, seed=5) for part in indices.split(size)]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole)
    assert torch.equal(torch.cat([y for _, y in parts]), labels)
    backwards, _ = data.batch(indices.flip(0), seed=5)
    assert torch.equal(backwards.flip(0), whole)


@EVERY
def test_shape_type_and_range(data: Dataset) -> None:
    images, labels = data.batch(torch.arange(500))
    assert images.shape == (500, *data.shape) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(len(data.classes)))
    assert images.min() >= -1 and images.max() <= 1 and images.max() > 0.9
    assert data.batch(torch.empty(0, dtype=torch.int64))[0].shape == (0, *data.shape)


@EVERY
def test_a_linear_rule_learnt_on_one_part_tells_the_classes_of_the_other(data: Dataset) -> None:
    def rows(part: Dataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = part.batch(torch.arange(part.count or count))
        # How far each pixel is from the corner's colour: the figure without its hue.
        grey = (images - images[:, :, :1, :1]).abs().amax(1)
        return torch.cat([grey.flatten(1), torch.ones(len(grey), 1)], 1), labels

    features, labels = rows(data.training, 4000)
    target = torch.nn.functional.one_hot(labels).float()
    ridge = features.T @ features + torch.eye(features.shape[1])
    weights = torch.linalg.solve(ridge, features.T @ target)
    unseen, truth = rows(data.held_out, 1000)
    assert ((unseen @ weights).argmax(1) == truth).float().mean() > 0.85


def test_shapes_are_balanced_and_change_with_seed_and_part() -> None:
    images, labels = SHAPES.batch(torch.arange(8000))
    assert (torch.bincount(labels) - 1000).abs().max() < 150
    others = [SHAPES.batch(torch.arange(8000), seed=1), SHAPES.held_out.batch(torch.arange(8000))]
    for other, _ in others:
        assert not (other == images).flatten(1).all(1).any()
    seen = {row.numpy().tobytes() for row in torch.cat([images, *(x for x, _ in others)])}
    assert len(seen) == 3 * 8000


def test_shapes_edges_are_anti_aliased_and_figures_stand_out() -> None:
    images, _ = SHAPES.batch(torch.arange(400))
    ground = images[:, :, :1, :1]
    figure_at = (images - ground).abs().amax(1)
    strongest = figure_at.flatten(1).amax(1)
    # At least 0.6 of [0, 1] in some channel between figure and ground, in every image.
    assert strongest.min() > 1.2
    share = figure_at / strongest[:, None, None]
    between = ((share > 0.05) & (share < 0.95)).float().mean((1, 2))
    assert between.min() > 0.04 and between.max() < 0.4
    # The border stays ground but for a pixel that a figure may touch.
    assert (share[:, [0, -1], :].mean() + share[:, :, [0, -1]].mean()) < 0.05


def test_disc_and_ring_have_the_area_of_their_formula() -> None:
    images, labels = SHAPES.batch(torch.arange(4000))
    share = (images - images[:, :, :1, :1]).abs().amax(1)
    area = (share / share.flatten(1).amax(1)[:, None, None]).sum((1, 2))
    # E[r^2] for r uniform on [4.6, 6.2] times the area for r = 1.
    mean_square = (6.2**3 - 4.6**3) / 3 / 1.6
    for name, unit in (
        ("disc", 0.95**2 * torch.pi),
        ("ring", (0.98**2 - 0.52**2) * torch.pi),
        ("square", 1.6**2),
        ("plus", 4 * 0.66 - 0.66**2),
    ):
        measured = area[labels == SHAPES.classes.index(name)].mean().item()
        assert measured == pytest.approx(unit * mean_square, rel=0.04), name


def test_shapes_pinned() -> None:
    """The shipped teacher learnt these very images."""
    images, labels = SHAPES.batch(torch.arange(16))
    assert labels.tolist() == [2, 1, 1, 0, 6, 6, 1, 2, 5, 6, 0, 1, 6, 1, 3, 2]
    means = [-0.3972, -0.5046, -0.3518, -0.3619, -0.5581, -0.5509, -0.2836, -0.4641]
    assert images[:8].mean((1, 2, 3)).tolist() == pytest.approx(means, abs=2e-4)
    centres = [-0.56, 1.0, 0.3816, -0.701, -0.7913, -0.7207]
    assert images[:2, :, 8, 8].flatten().tolist() == pytest.approx(centres, abs=2e-4)


def test_digits_are_the_published_ones_with_attribution() -> None:
    assert DIGITS.count == 1797
    images, labels = DIGITS.batch(torch.arange(1797))
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert ((images + 1) * 8 % 1 == 0).all()
    assert images.mean().item() == pytest.approx(4.884164579855314 / 8 - 1, abs=1e-6)
    path = resources.files("flowdistill").joinpath("assets/digits-data.safetensors")
    with resources.as_file(path) as file, safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    assert list(metadata) == ["flowdistill"]
    header = json.loads(metadata["flowdistill"])
    assert header["licence"] == "CC BY 4.0" and "Alpaydin" in header["authors"]


def test_digits_parts_share_nothing_and_count_modulo_their_size() -> None:
    training, held_out = DIGITS.training, DIGITS.held_out
    assert training.count and held_out.count and training.count + held_out.count == 1797
    parts = [part.batch(torch.arange(part.count or 0)) for part in (training, held_out)]
    pixels = [{row.numpy().tobytes() for row in images} for images, _ in parts]
    assert not pixels[0] & pixels[1]
    assert torch.bincount(parts[1][1]).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    again, _ = held_out.batch(torch.arange(3) + held_out.count)
    assert torch.equal(again, parts[1][0][:3])


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown data set 'shape', did you mean 'shapes'"):
        dataset("shape")
