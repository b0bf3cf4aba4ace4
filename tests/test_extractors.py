"""Feature extractors: what they read, what they compare with, and what the perceptual distance does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowdistill import artifact, teachers
from flowdistill.data import DIGITS, SHAPES
from flowdistill.errors import ArtifactError
from flowdistill.evaluation import extractors, metrics
from flowdistill.networks.classifier import Classifier
from flowdistill.randomness import noise
from flowdistill.teachers import Card, open_model

ARGUMENTS = {"shape": [3, 16, 16], "classes": 8, "channels": [4, 6, 8]}


def classifier(seed: int = 0) -> Classifier:
    """A small one with random weights."""
    torch.manual_seed(seed)
    return Classifier(**ARGUMENTS)  # type: ignore[arg-type]


def write(folder: Path, network: Classifier, name: str = "shapes-classifier") -> Path:
    path = folder / f"{name}.safetensors"
    card = Card(kind="classifier", architecture="classifier", arguments=ARGUMENTS, shape=(3, 16, 16))
    card.write(path, network.state_dict())
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's file with the moments of 600 shapes."""
    network = classifier()
    mean, covariance, _ = extractors.measure(network, SHAPES, 600)
    network.reference_mean.copy_(mean)
    network.reference_covariance.copy_(covariance)
    return write(tmp_path_factory.mktemp("classifier"), network)


def card(data: str | None, shape: tuple[int, ...] = (3, 16, 16), classes: int = 8) -> Card:
    return Card(architecture="unet", shape=shape, classes=classes, data=data)


def test_measured_moments_make_the_distance_of_the_same_samples_zero(path: Path) -> None:
    found = extractors.extractor(card("shapes"), path=path)
    assert found is not None
    assert found.label == f"shapes-classifier@{artifact.sha256(path)[:8]}"
    images, labels = SHAPES.batch(torch.arange(600))
    features, classes = found.read(images)
    assert features.shape == (600, 18)
    # The file holds float32.
    assert found.reference.distance(*metrics.moments(features)) == pytest.approx(0.0, abs=1e-6)
    assert found.reference.distance(*metrics.moments(features[:300])) > 1e-5
    network = classifier()
    assert classes is not None
    assert torch.equal(classes, network(images).argmax(1))
    accuracy = extractors.measure(network, SHAPES, 600)[2]
    assert accuracy == float((classes == labels).double().mean())


def test_a_classifier_without_moments_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, classifier())
    with pytest.raises(ArtifactError, match="holds no moments"):
        extractors.extractor(card("shapes"), path=path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from flowdistill import networks

    network = networks.build("mlp", {"shape": [2], "width": 4})
    path = tmp_path / "mlp.safetensors"
    Card(architecture="mlp", arguments={"shape": [2], "width": 4}, shape=(2,)).write(
        path, network.state_dict()
    )
    with pytest.raises(ArtifactError, match="expected a classifier, found 'mlp'"):
        extractors.extractor(card("shapes"), path=path)


def test_the_shipped_file_is_found_by_the_name_of_the_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "ASSETS", tmp_path)
    assert extractors.extractor(card("shapes")) is None
    assert extractors.perceptual(card("shapes")) is None
    (tmp_path / "shapes-classifier.safetensors").write_bytes(path.read_bytes())
    found, distance = extractors.extractor(card("shapes")), extractors.perceptual(card("shapes"))
    assert found is not None and distance is not None
    assert found.label == distance.label == f"shapes-classifier@{artifact.sha256(path)[:8]}"
    for data in (None, "celeba", "digits", "../shapes"):
        assert extractors.extractor(card(data)) is None
        assert extractors.perceptual(card(data)) is None


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        "analytic:ring",
        {"name": "analytic:ring", "components": 5},
        {"name": "analytic:mixture", "dim": 3},
        {"name": "analytic:gaussian", "dim": 4},
    ],
)
def test_closed_forms_have_exact_moments_and_exact_samples(reference: teachers.Reference) -> None:
    model = open_model(reference)
    # A student has another network, but imitates the same data.
    student = model.card.model_copy(update={"architecture": "mlp", "arguments": {}})
    found, real = extractors.extractor(student), extractors.real(student)
    assert found is not None and real is not None and real.count is None
    x, labels = real.batch(torch.arange(20_000), 7)
    features, classes = found.read(x)
    mean, covariance = metrics.moments(features)
    error = (covariance.diagonal() / 20_000).sqrt()
    assert ((mean - found.reference.mean).abs() < 5 * error).all()
    assert torch.allclose(covariance, found.reference.covariance, atol=0.06)
    estimate = found.reference.estimate(features)
    assert estimate.value < 3e-3
    if classes is None:
        assert model.card.classes == 0
    else:
        # Components overlap a little in the mixture, hardly in the ring.
        assert metrics.accuracy(classes, labels).value > (0.9 if "mixture" in found.label else 0.99)
    assert torch.equal(real.batch(torch.arange(5, 9), 7)[0], x[5:9])


def test_the_most_probable_component_is_bayes_rule() -> None:
    model = open_model({"name": "analytic:mixture", "dim": 1})
    found = extractors.extractor(model.card)
    assert found is not None
    x = torch.linspace(-4, 4, 801)[:, None]
    weights = torch.tensor([0.5, 0.3, 0.2])
    normal = torch.distributions.Normal(
        torch.tensor([-1.5, 0.7, 2.2]) * torch.ones(3), torch.tensor([0.3, 0.5, 0.15])
    )
    expected = (weights.log() + normal.log_prob(x)).argmax(1)
    classes = found.read(x)[1]
    assert classes is not None
    assert float((classes == expected).double().mean()) > 0.995


def test_real_images_are_held_out() -> None:
    real = extractors.real(card("digits", (1, 8, 8), 10))
    assert real is not None and real.count == DIGITS.held_out.count
    shapes = extractors.real(card("shapes"))
    assert shapes is not None and shapes.count is None
    assert not torch.equal(shapes.batch(torch.arange(4), 0)[0], SHAPES.batch(torch.arange(4), 0)[0])
    assert extractors.real(card("celeba")) is None


# --- perceptual distance --------------------------------------------------------------------------


def by_hand(network: Classifier, x_hat: Tensor, x: Tensor) -> Tensor:
    """LPIPS's sum, place by place."""
    total = torch.zeros(len(x))
    for a, b in zip(network.stages(x_hat), network.stages(x), strict=True):
        for place in range(a[0, 0].numel()):
            u, v = a.flatten(2)[..., place], b.flatten(2)[..., place]
            u, v = (w / (w.norm(dim=1, keepdim=True) ** 2 + 1e-6).sqrt() for w in (u, v))
            total = total + ((u - v) ** 2).sum(1) / a[0, 0].numel()
    return total


def test_perceptual_distance(path: Path) -> None:
    distance = extractors.perceptual(card("shapes"), path=path)
    assert distance is not None
    x = SHAPES.batch(torch.arange(6))[0]
    x_hat = x + 0.3 * noise(0, range(6), (3, 16, 16))
    found = distance(x_hat, x)
    assert found.shape == (6,)
    assert torch.allclose(found, by_hand(classifier(), x_hat, x), rtol=1e-4)
    assert torch.allclose(distance(x, x_hat), found, rtol=1e-4)
    assert (distance(x, x) == 0).all()
    assert (distance(x + 0.01 * (x_hat - x), x) < found).all()
    # The extremes: two units at right angles differ by 2 at each of the three stages.
    assert float(found.max()) < 3 * 4


def test_gradients_reach_the_student_alone(path: Path) -> None:
    distance = extractors.perceptual(card("shapes"), path=path)
    assert distance is not None
    x = SHAPES.batch(torch.arange(3))[0].requires_grad_()
    x_hat = (0.5 * x.detach()).requires_grad_()
    weights = [p for p in extractors._classifier(path, "cpu")[0].parameters()]
    distance(x_hat, x).sum().backward()
    assert x.grad is None
    assert x_hat.grad is not None and bool(x_hat.grad.isfinite().all())
    assert all(p.grad is None and not p.requires_grad for p in weights)
    direction = noise(1, range(3), (3, 16, 16))
    with torch.no_grad():
        step = 1e-2
        change = distance(x_hat + step * direction, x) - distance(x_hat - step * direction, x)
    slope = (x_hat.grad * direction).flatten(1).sum(1)
    assert torch.allclose(change / (2 * step), slope, rtol=0.05, atol=2e-3)


def test_equal_and_featureless_images_have_finite_gradients(path: Path) -> None:
    distance = extractors.perceptual(card("shapes"), path=path)
    assert distance is not None
    x_hat = torch.zeros(2, 3, 16, 16, requires_grad=True)
    distance(x_hat, torch.zeros(2, 3, 16, 16)).sum().backward()
    assert x_hat.grad is not None and bool((x_hat.grad == 0).all())
