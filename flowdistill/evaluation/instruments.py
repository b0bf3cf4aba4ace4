"""What an evaluation looks at samples with, and why it does without the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from flowdistill.errors import MissingInput
from flowdistill.evaluation import extractors, features, lpipsdistance, metrics
from flowdistill.evaluation.features import Asked
from flowdistill.evaluation.kinds import distances
from flowdistill.evaluation.targets import Reader
from flowdistill.objectives import LEAST

if TYPE_CHECKING:
    from flowdistill.objectives import Labelled, Lpips
    from flowdistill.teachers import Model

_NO_EXTRACTOR = "there is no feature extractor for the data of the model"


@dataclass(frozen=True)
class Wanted:
    """What a recipe asks for beyond what ships for the data."""

    shipped: bool = True
    asked: Sequence[Asked] = ()
    lpips: Lpips | None = None
    lpips_weights: Path | None = None


@dataclass(frozen=True)
class Instruments:
    """Extractors, and distances of two samples; `absent` says why there are no other kinds of figures."""

    readers: Sequence[Reader]
    paired: Mapping[str, Labelled]
    absent: Mapping[str, str]
    pixels: Callable[[Tensor], Tensor] | None
    """Samples as images [B, 1 or 3, H, W] in [-1, 1]; None where they are none."""

    @property
    def labels(self) -> list[str]:
        """Everything that figures depend on, by name and digest."""
        return [each.label for each in self.readers] + [each.label for each in self.paired.values()]

    @property
    def preprocessing(self) -> str | None:
        """How images reach the extractors; None where these read samples as they are."""
        published = any(reader.moments is None for reader in self.readers)
        return features.PREPROCESSING if published else None

    def compare(self, x: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Kind -> value [B] of samples beside the solution [B, *shape] from the same noises."""
        found = {"endpoint_error": metrics.endpoint_error(x, reference)}
        if self.pixels is not None and len(reference):
            x, reference = self.pixels(x), self.pixels(reference.to(x.device))
            found["psnr"] = metrics.psnr(x, reference)
            for kind, distance in self.paired.items():
                found[kind] = distance(x, reference).cpu()
        return found


def equip(model: Model, device: str, wanted: Wanted) -> Instruments:
    """The instruments for what a model makes.

    Raises `ArtifactError` for weights that are there and of no use; those that are not there are `absent`.
    """
    readers: list[Reader] = []
    paired: dict[str, Labelled] = {}
    absent: dict[str, str] = {}
    shipped = extractors.extractor(model.card, device) if wanted.shipped else None
    if shipped is not None:
        readers.append(Reader("shipped", shipped.label, shipped.read, shipped.reference))
    pixels = _pixels(model)
    for asked in wanted.asked:
        try:
            if pixels is None:
                raise MissingInput("the samples are no images")
            label, read = features.reader(asked, device)
            readers.append(Reader(asked.key, label, _of(pixels, read)))
        except MissingInput as error:
            first, *others = distances(asked.key)
            absent |= {first: _spoken(error), **dict.fromkeys(others, f"as {first}")}
    if not readers:
        reason = _NO_EXTRACTOR if wanted.shipped else "`features.shipped` is off"
        absent.update(dict.fromkeys((*distances("shipped"), "accuracy"), reason))
    if pixels is not None:
        perceptual = extractors.perceptual(model.card)
        if perceptual is not None:
            paired["perceptual"] = perceptual
        else:
            absent["perceptual"] = "no classifier ships for the data of the model"
        _add_lpips(model, wanted, paired, absent)
        if not any(asked.key == "inception" for asked in wanted.asked):
            reason = "not asked for; `features: {inception: {}}` measures it, with the weights of Inception"
            absent.update(dict.fromkeys(distances("inception")[:2], reason))
    return Instruments(readers, paired, absent, pixels)


def _add_lpips(model: Model, wanted: Wanted, paired: dict[str, Labelled], absent: dict[str, str]) -> None:
    settings, side = wanted.lpips, min(model.card.shape[1:])
    if settings is None:
        absent["lpips"] = "not asked for; `lpips: {}` measures it, with the weights of its network"
    elif model.card.latent is not None:
        absent["lpips"] = "the samples are latents"
    elif settings.resolution == "native" and side < LEAST[settings.net]:
        least = LEAST[settings.net]
        absent["lpips"] = (
            f"images of {side} pixels are too small for net: {settings.net}, which needs {least}; "
            "give `lpips.resolution` a number"
        )
    else:
        try:
            paired["lpips"] = lpipsdistance.lpips_distance(settings, model.card, wanted.lpips_weights)
        except MissingInput as error:
            absent["lpips"] = _spoken(error)


def _pixels(model: Model) -> Callable[[Tensor], Tensor] | None:
    """What shows a model's samples as images of 1 or 3 channels; None where nothing does."""
    card = model.card
    if card.latent is None:
        return (lambda x: x) if len(card.shape) == 3 and card.shape[0] in (1, 3) else None
    import torch

    shown = model.pixels(torch.zeros(1, *card.shape, device=model.device))
    if shown is None or shown.ndim != 4 or shown.shape[1] not in (1, 3):
        return None

    def decode(x: Tensor) -> Tensor:
        found = model.pixels(x)
        assert found is not None
        return found

    return decode


def _of(pixels: Callable[[Tensor], Tensor], read: features.Read) -> features.Read:
    return lambda x: read(pixels(x))


def _spoken(error: MissingInput) -> str:
    """On one line."""
    return "; ".join(str(error).splitlines())
