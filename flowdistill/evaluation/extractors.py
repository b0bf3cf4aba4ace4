"""What samples are compared in: features of the data that a model imitates, offline and labelled.

Images of the package's own data sets have a small classifier, whose maps make the features and a
perceptual distance. Vectors of closed-form flows are their own features. The figures are comparable
within one data set and one extractor only, so the extractor's label stands with every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from flowdistill import teachers
from flowdistill.analytic import Mixture
from flowdistill.data import DATASETS, Dataset
from flowdistill.errors import ArtifactError
from flowdistill.evaluation import metrics
from flowdistill.networks.classifier import Classifier
from flowdistill.teachers import Card
from flowdistill.work import batches

_BATCH = 500
_NORM_FLOOR = 1e-6
"""Added to squared norms of features, so that silent places neither divide by 0 nor dominate."""


@dataclass(frozen=True)
class Extractor:
    """Features of samples, what the real ones have for moments, and the class that is recognised.

    `read` takes samples [B, *shape] to features [B, D] and classes [B] int64, None where the data has
    none, both on the CPU.
    """

    label: str
    reference: metrics.Reference
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Real(Protocol):
    """Real samples that no training has seen; `count` of them, None where they never end."""

    @property
    def count(self) -> int | None: ...

    def batch(self, indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Samples [B, *shape] and labels [B] of indices [B], pure functions of (seed, index)."""
        ...


def extractor(card: Card, device: str = "cpu", path: Path | None = None) -> Extractor | None:
    """The extractor for the data of a model; None where there is none.

    `path` is a classifier's file; left out, it is the one that ships for the data.
    """
    flow = _flow(card)
    if flow is not None:
        return _coordinates(card, flow)
    path = path or _shipped(card)
    if path is None:
        return None
    network, label = _classifier(path, device)
    reference = metrics.Reference(
        network.reference_mean.cpu().double(), network.reference_covariance.cpu().double()
    )
    if not reference.covariance.any():
        raise ArtifactError(f"{path}: holds no moments of its data; train it with `flowdistill train`")
    return Extractor(label, reference, lambda x: _read(network, x))


def real(card: Card) -> Real | None:
    """Fresh samples of the data that a model imitates; None where it cannot be drawn from."""
    flow = _flow(card)
    if flow is not None:
        return _Exact(flow)
    return DATASETS[card.data].held_out if card.data in DATASETS else None


def measure(network: nn.Module, data: Dataset, count: int) -> tuple[Tensor, Tensor, float]:
    """Mean [D] and covariance [D, D] of a classifier's features over data, and its accuracy there."""
    assert isinstance(network, Classifier)
    device = next(network.parameters()).device
    features, hits = [], []
    for indices in batches(range(count), _BATCH):
        x, labels = data.batch(torch.tensor(indices))
        found, classes = _read(network, x.to(device))
        features.append(found)
        hits.append(classes == labels)
    mean, covariance = metrics.moments(torch.cat(features))
    return mean, covariance, float(torch.cat(hits).double().mean())


@dataclass(frozen=True)
class Perceptual:
    """Distance of images in the maps of a classifier, after LPIPS (arXiv 1801.03924) without heads.

    Each place's feature vector is scaled to length 1; squared differences are summed over channels,
    averaged over places and summed over stages. The weights are frozen, gradients reach x_hat alone.
    """

    label: str
    path: Path

    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """x_hat, x [B, *shape] -> [B]."""
        network, _ = _classifier(self.path, str(x_hat.device))
        with torch.no_grad():
            targets = [_unit(maps) for maps in network.stages(x.float())]
        total = x_hat.new_zeros(len(x_hat), dtype=torch.float32)
        for maps, target in zip(network.stages(x_hat.float()), targets, strict=True):
            total = total + (_unit(maps) - target).square().sum(1).mean((1, 2))
        return total

    def features(self, x: Tensor) -> Tensor:
        """[B, *shape] -> [B, F]: the distance is the square of these vectors' distance."""
        network, _ = _classifier(self.path, str(x.device))
        maps = (_unit(each) / each[0, 0].numel() ** 0.5 for each in network.stages(x.float()))
        return torch.cat([each.flatten(1) for each in maps], dim=1)


def perceptual(card: Card, path: Path | None = None) -> Perceptual | None:
    """The perceptual distance for the data of a model; None where there is none."""
    path = path or _shipped(card)
    return Perceptual(_classifier(path, "cpu")[1], path) if path else None


def _unit(maps: Tensor) -> Tensor:
    """Feature maps [B, C, H, W] with vectors of length 1 at each place."""
    return maps * (maps.square().sum(1, keepdim=True) + _NORM_FLOOR).rsqrt()


def _shipped(card: Card) -> Path | None:
    """The classifier's file in the package, where the model's data has one."""
    path = teachers.ASSETS / f"{card.data}-classifier.safetensors"
    return path if card.data in DATASETS and path.is_file() else None


@cache
def _classifier(path: Path, device: str) -> tuple[Classifier, str]:
    """The network of a classifier's file, and its label."""
    model = teachers.load(path, device)
    if not isinstance(model.network, Classifier):
        raise ArtifactError(f"{path}: expected a classifier, found '{model.card.architecture}'")
    return model.network, f"{path.stem}@{model.digest[:8]}"


@torch.no_grad()
def _read(network: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    features, logits = network.describe(x)
    return features.cpu(), logits.argmax(1).cpu()


# --- closed forms ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exact:
    """Exact samples of a closed-form flow."""

    flow: Mixture
    count: None = None

    def batch(self, indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        return self.flow.data(indices, seed)


def _flow(card: Card) -> Mixture | None:
    """The closed-form flow that a model imitates; its one size stands in the card's shape or classes."""
    scheme, _, name = (card.data or "").partition(":")
    if scheme != "analytic" or name not in teachers.ANALYTIC:
        return None
    option, _ = teachers.ANALYTIC[name]
    size = card.shape[0] if option == "dim" else max(1, card.classes)
    flow = teachers.open_model({"name": f"analytic:{name}", option: size}).network
    assert isinstance(flow, Mixture)
    return flow


def _coordinates(card: Card, flow: Mixture) -> Extractor:
    """The samples themselves, with the exact moments and the most probable component."""
    weights, means = flow.log_weights.exp(), flow.means.flatten(1)
    variances = flow.stds.flatten(1) ** 2
    mean = weights @ means
    second = (weights[:, None] * means).T @ means + torch.diag(weights @ variances)
    reference = metrics.Reference(mean, second - torch.outer(mean, mean))

    def read(x: Tensor) -> tuple[Tensor, Tensor | None]:
        features = x.flatten(1).cpu().double()
        if not flow.classes:
            return features, None
        squares = (features[:, None] - means) ** 2 / variances + variances.log()
        return features, (flow.log_weights - 0.5 * squares.sum(2)).argmax(1)

    return Extractor(f"{card.data}-coordinates", reference, read)
