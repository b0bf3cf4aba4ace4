"""What samples are compared with in the features of an extractor, and the comparison.

The reference is moments, for the Fréchet distance, and features of real samples, for all that looks at
single ones. Published statistics have the moments alone. What takes long to read is kept from one evaluation
to the next, in a file that is named by the data, the extractor and the number of samples.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill import artifact, images
from flowdistill.errors import ArtifactError, UsageError
from flowdistill.evaluation import kernels, metrics, neighbours
from flowdistill.evaluation.features import Read
from flowdistill.evaluation.kinds import distances
from flowdistill.evaluation.parts import Part
from flowdistill.teachers import Card

KEPT = 10_000
"""Features that are looked at one by one, the first of all: as many as published figures come from."""
KEPT_SHIPPED = 2_000
"""The same in what ships for the data, which every evaluation looks at, and which has few features."""
_ASYMMETRY = 1e-6
"""Of published covariances, as a share of their largest entry."""


@dataclass(frozen=True)
class Reader:
    """An extractor by its key in a recipe; `moments` are those of the data, where it comes with them."""

    key: str
    label: str
    read: Read
    moments: metrics.Reference | None = None


@dataclass(frozen=True, eq=False)
class Target:
    """A reference in the features of one extractor, and what it was made of."""

    moments: metrics.Reference
    features: Tensor | None
    """Of real samples [m, D]; None where there are moments alone."""
    of: str

    @cached_property
    def kernels(self) -> Tensor:
        """What the features have among themselves, [m]."""
        assert self.features is not None
        return kernels.means(self.features, self.features)

    @cached_property
    def radii(self) -> Tensor:
        """How far the features cover, [m]."""
        assert self.features is not None
        return neighbours.radii(self.features)


def kept(key: str) -> int:
    """How many features of an extractor are looked at one by one."""
    return KEPT_SHIPPED if key == "shipped" else KEPT


@dataclass(frozen=True)
class Compared:
    """What a comparison found: figures by kind, tensors by the rest of their name, and what was left out."""

    figures: dict[str, metrics.Estimate]
    tensors: dict[str, Tensor]
    skipped: dict[str, str]


def compare(key: str, features: Tensor, target: Target) -> Compared:
    """Features [n, D] of samples beside the reference: distances, precision and recall."""
    frechet, kernel, precision, recall = distances(key)
    found = Compared({}, {}, {})
    if len(features) > features.shape[1]:
        found.figures[frechet], influence = target.moments.measure(features)
        found.tensors[f"{frechet}.influence"] = influence.float()
    else:
        found.skipped[frechet] = f"{len(features)} samples are too few for {features.shape[1]} features"
    if target.features is None:
        reason = f"{target.of}: has moments only; give real samples as `reference_data`"
        found.skipped.update(dict.fromkeys((kernel, precision, recall), reason))
        return found
    ours, real = features[: kept(key)], target.features
    fewest = min(len(ours), len(real))
    if fewest <= neighbours.NEIGHBOUR:
        reason = f"{fewest} samples are too few, {neighbours.NEIGHBOUR + 1} are enough"
        found.skipped.update(dict.fromkeys((kernel, precision, recall), reason))
        return found
    found.figures[kernel], influence = kernels.kernel_distance(ours, real, target.kernels)
    found.tensors[f"{kernel}.influence"] = influence.float()
    precise = neighbours.covered(ours, real, target.radii)
    recalled = neighbours.covered(real, ours, neighbours.radii(ours))
    for kind, inside in ((precision, precise), (recall, recalled)):
        found.figures[kind] = metrics.accuracy(inside, torch.ones_like(inside))
        found.tensors[kind] = inside
    return found


def summary(
    readers: Sequence[Reader], compared: Sequence[Compared], classes: Tensor | None, labels: Tensor | None
) -> Part:
    """What all extractors found, and how often the labels [n or more] are recognised in classes [n]."""
    tensors: dict[str, Tensor] = {}
    figures: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for reader, found in zip(readers, compared, strict=True):
        tensors |= found.tensors
        figures |= metrics.named(found.figures, extractor=reader.label)
        skipped |= found.skipped
    if labels is not None and classes is not None:
        labels = labels[: len(classes)]
        tensors["correct"] = classes == labels
        share = {"accuracy": metrics.accuracy(classes, labels)}
        figures |= metrics.named(share, extractor=readers[0].label)
    elif any(reader.key == "shipped" for reader in readers):
        skipped["accuracy"] = "the model or its data has no classes"
    return tensors, {"metrics": figures, "skipped": skipped}


# --- a reference of the user's own ----------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What a recipe names as reference: real samples, or published moments."""

    path: str
    fingerprint: str
    samples: images.Samples | None
    moments: metrics.Reference | None

    def concerns(self, reader: Reader) -> bool:
        """Whether it is the reference in these features: moments are of extractors that are published."""
        return self.moments is None or reader.moments is None


def given(path: str, card: Card, fingerprint: str) -> Given:
    """Open the reference that a recipe names: what `images.open_samples` takes, or moments `mu`, `sigma`.

    Raises:
        MissingInput: there is nothing.
        UsageError: samples of another shape than the model's.
        ArtifactError: it cannot be read, or the moments are none.
    """
    if path.endswith(images.ARRAYS):
        arrays = images.arrays(Path(path))
        if {"mu", "sigma"} <= arrays.keys():
            return Given(path, fingerprint, None, _moments(arrays["mu"], arrays["sigma"], path))
        return Given(path, fingerprint, images.among(arrays, Path(path), card.shape), None)
    return Given(path, fingerprint, images.open_samples(path, card.shape), None)


def _moments(mean: Tensor, covariance: Tensor, path: str) -> metrics.Reference:
    size = mean.numel()
    if mean.ndim != 1 or covariance.shape != (size, size):
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise ArtifactError(f"{path}: expected mu [D] and sigma [D, D], found {shapes}")
    mean, covariance = mean.double(), covariance.double()
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ArtifactError(f"{path}: mu or sigma holds values that are not finite")
    uneven = float((covariance - covariance.T).abs().max())
    if uneven > _ASYMMETRY * float(covariance.abs().max()) or float(covariance.diagonal().min()) < 0:
        raise ArtifactError(
            f"{path}: sigma is no covariance: it is not symmetric, or has a negative variance"
        )
    return metrics.Reference(mean, covariance)


def of_moments(moments: metrics.Reference, reader: Reader, features: int, path: str) -> Target:
    """Published moments as the reference of an extractor; UsageError where it has more or fewer features."""
    if len(moments.mean) != features:
        raise UsageError(
            f"reference_data: {path}: moments of {len(moments.mean)} features, {reader.label} has {features}"
        )
    return Target(moments, None, Path(path).name)


def content(path: Path) -> str:
    """SHA-256 of all that a file or a folder of images holds; of a folder, `fingerprint` knows sizes only."""
    if not path.is_dir():
        return artifact.sha256(path)
    files = sorted(each for each in path.rglob("*") if each.is_file())
    return artifact.digest([[each.relative_to(path).as_posix(), artifact.sha256(each)] for each in files])


def cache(key: str) -> Path:
    """Where what was read of a reference is kept; `key` says of all that it depends on."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "flowdistill" / "references" / f"{key[:32]}.safetensors"


def stored(target: Target) -> dict[str, Tensor]:
    """A reference as tensors for a file."""
    tensors = {"mean": target.moments.mean, "covariance": target.moments.covariance}
    return tensors if target.features is None else {**tensors, "features": target.features}


def restored(tensors: Mapping[str, Tensor], of: str) -> Target:
    """The reverse."""
    return Target(metrics.Reference(tensors["mean"], tensors["covariance"]), tensors.get("features"), of)
