"""Networks: what a velocity field promises, and clear refusals of wrong arguments."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowdistill import networks
from flowdistill.errors import ArtifactError, UsageError
from flowdistill.networks import architectures, build
from flowdistill.networks.classifier import Classifier
from flowdistill.networks.unet import time_features

SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "unet": ({"shape": [3, 8, 12], "classes": 4, "channels": 16, "multipliers": [1, 2]}, (3, 8, 12), 4),
    "mlp": ({"shape": [2], "classes": 4, "width": 16, "depth": 2}, (2,), 4),
}
FIELDS = pytest.mark.parametrize("name", SMALL)


def _perturbed(name: str, **changes: Any) -> nn.Module:
    """A network whose zero-initialised layers have weights too."""
    torch.manual_seed(0)
    network = build(name, SMALL[name][0] | changes)
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.1 * torch.randn(weights.shape))
    return network


def _inputs(name: str, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    _, shape, classes = SMALL[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *shape, generator=generator)
    return x, torch.linspace(0, 1, count), torch.arange(count) % classes


def test_every_file_builds_and_is_named_after_its_class() -> None:
    assert {"unet", "mlp", "classifier"} <= set(architectures())
    for name in architectures():
        member = networks.constructor(name)
        assert member.__name__.lower() == name
        # With nothing but defaults; on the meta device, since some defaults are published sizes.
        required = [
            each for each in inspect.signature(member).parameters.values() if each.default is each.empty
        ]
        if not required:
            with torch.device("meta"):
                build(name, {})


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("unet", {}, 873_923),
        ("unet", {"shape": [1, 8, 8], "classes": 10, "multipliers": [1, 2]}, 231_425),
        ("mlp", {}, 37_956),
        ("mlp", {"classes": 8}, 39_108),
        ("classifier", {}, 58_232),
        ("classifier", {"shape": [1, 8, 8], "classes": 10}, 58_074),
    ],
)
def test_parameter_counts(name: str, arguments: dict[str, Any], count: int) -> None:
    """Shipped weights fit these networks."""
    assert sum(weights.numel() for weights in build(name, arguments).parameters()) == count


@FIELDS
def test_velocity_is_finite_for_all_times_and_both_ends(name: str) -> None:
    x, t, labels = _inputs(name)
    network = _perturbed(name)
    for given in (labels, None):
        velocity = network(x, t, given)
        assert velocity.shape == x.shape and velocity.dtype == x.dtype and velocity.is_contiguous()
        assert velocity.isfinite().all()


@FIELDS
def test_velocity_starts_at_zero(name: str) -> None:
    x, t, labels = _inputs(name)
    assert build(name, SMALL[name][0])(x, t, labels).abs().max() == 0


@FIELDS
def test_rows_do_not_see_each_other(name: str) -> None:
    x, t, labels = _inputs(name)
    network = _perturbed(name)
    whole = network(x, t, labels)
    for row in range(len(x)):
        alone = network(x[row : row + 1], t[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(alone[0], whole[row], atol=2e-5, rtol=2e-5)


@FIELDS
def test_time_and_label_matter(name: str) -> None:
    x, t, labels = _inputs(name)
    network = _perturbed(name)
    whole = network(x, t, labels)
    for changed in (
        network(x, 0.5 * t + 0.2, labels),
        network(x, t, (labels + 1) % 4),
        network(x, t, None),
    ):
        assert ((changed - whole).flatten(1).abs().amax(1) > 1e-4).all()


@FIELDS
def test_no_label_is_the_last_embedding(name: str) -> None:
    x, t, labels = _inputs(name)
    network = _perturbed(name)
    assert torch.equal(network(x, t, None), network(x, t, torch.full_like(labels, 4)))


@pytest.mark.parametrize("changes", [{"attention": [0, -1]}, {"blocks": 2}, {"dropout": 0.1}])
def test_unet_gradient_reaches_every_parameter(changes: dict[str, Any]) -> None:
    _reaches_all(_perturbed("unet", **changes), "unet")


def test_mlp_gradient_reaches_every_parameter() -> None:
    _reaches_all(_perturbed("mlp"), "mlp")


def _reaches_all(network: nn.Module, name: str) -> None:
    x, t, labels = _inputs(name)
    (network(x, t, labels).square().sum() + network(x, t, None).square().sum()).backward()
    for key, weights in network.named_parameters():
        assert weights.grad is not None and weights.grad.abs().sum() > 0, key


def test_mlp_without_classes_ignores_labels() -> None:
    x, t, labels = _inputs("mlp")
    network = _perturbed("mlp", classes=0)
    assert torch.equal(network(x, t, labels), network(x, t, None))


def test_mlp_represents_a_velocity_that_is_linear_in_x() -> None:
    """Between Gaussians v(x, t) = g(t) x; g must be learnt to a thousandth from the time features."""
    t = torch.linspace(0, 1, 400, dtype=torch.float64)
    std = 0.3
    gain = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
    features = torch.cat([time_features(t), torch.ones(400, 1, dtype=torch.float64)], 1)
    fitted = features @ torch.linalg.lstsq(features, gain[:, None], driver="gelsd").solution
    assert (fitted[:, 0] - gain).abs().max() < 1e-3


def test_time_features_resolve_the_ends_and_are_smooth_there() -> None:
    t = torch.tensor([0.0, 1e-3, 1e-2, 0.5, 0.99, 0.999, 1.0], dtype=torch.float64)
    features = time_features(t)
    assert features.isfinite().all() and features.abs().max() <= 1
    assert torch.pdist(features).min() > 0.1
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    time_features(ends).square().sum().backward()
    (slope,) = torch.autograd.grad(time_features(ends).sum(), ends)
    assert slope.isfinite().all() and slope.abs().max() < 1e5


def test_classifier_parts_agree() -> None:
    torch.manual_seed(0)
    network = build("classifier", {})
    assert isinstance(network, Classifier)
    images = torch.randn(5, 3, 16, 16)
    maps = network.stages(images)
    assert [tuple(m.shape) for m in maps] == [(5, 16, 16, 16), (5, 32, 8, 8), (5, 48, 4, 4)]
    features, logits = network.describe(images)
    assert torch.equal(network(images), logits)
    means = [each.mean((2, 3)) for each in maps]
    assert torch.equal(features, torch.cat(means, dim=1))
    network(images).square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in network.parameters())
    assert network.reference_covariance.shape == (96, 96)


@pytest.mark.parametrize("name", ["shapes", "digits"])
def test_classifier_learns(name: str) -> None:
    """A few seconds of training tell most of the classes of unseen images."""
    from flowdistill.data import dataset

    data = dataset(name)
    torch.manual_seed(0)
    network = build("classifier", {"shape": data.shape, "classes": len(data.classes)})
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for step in range(80):
        images, labels = data.training.batch(torch.arange(64) + 64 * step)
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = data.held_out.batch(torch.arange(300))
    assert (network(images).argmax(1) == labels).float().mean() > 0.7


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unet", {"chanels": 3}, "unknown unet argument 'chanels', did you mean 'channels'?"),
        ("unet", {"shape": [3, 10, 16]}, "shape (3, 10, 16) must be channels, height, width"),
        ("unet", {"shape": [2]}, "sides divisible by 4 for 3 levels"),
        ("unet", {"attention": [3]}, "attention (3,) must name levels from -3 to 2"),
        ("unet", {"multipliers": []}, "at least one level"),
        ("unet", {"channels": "many"}, "unet(channels='many'): "),
        ("mlp", {"depth": 0}, "depth 0 must be at least 1"),
        ("classifier", {"shape": [16, 16]}, "shape (16, 16) must be channels, height, width"),
    ],
)
def test_wrong_arguments_are_named(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)):
        build(name, arguments)


def test_unknown_architecture_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown architecture 'umet', did you mean 'unet'?"):
        build("umet", {})
