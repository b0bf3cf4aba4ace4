"""The card of a model: enough to rebuild, use and judge it from its one file. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from flowdistill import artifact
from flowdistill.conventions import Convention
from flowdistill.errors import ArtifactError
from flowdistill.guidance import Guidance
from flowdistill.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


class Latent(Settings):
    """x0 = (latent - shift) * scale: from what an autoencoder returns to what the model calls data."""

    scale: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,), min_length=1, description="one number, or one a channel"
    )
    shift: tuple[float, ...] = Field((0.0,), min_length=1, description="one number, or one a channel")
    vae: str | None = Field(None, description="the autoencoder, as its maker names it")

    def encode(self, latent: Tensor) -> Tensor:
        """Data x0 [B, C, ...] of raw latents [B, C, ...]."""
        return (latent - self._like(self.shift, latent)) * self._like(self.scale, latent)

    def decode(self, x0: Tensor) -> Tensor:
        """Raw latents [B, C, ...] of data x0 [B, C, ...]."""
        return x0 / self._like(self.scale, x0) + self._like(self.shift, x0)

    @staticmethod
    def _like(values: tuple[float, ...], x: Tensor) -> Tensor:
        return x.new_tensor(values).reshape(1, -1, *[1] * (x.ndim - 2))


class Statistics(Settings):
    """Moments of the data x0 over samples and places, one number a channel, as the probe expects them."""

    mean: tuple[float, ...] = Field(min_length=1)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)


class Source(Settings):
    """The foreign file that a model was imported from."""

    file: str = Field(description="its name, without its folder")
    sha256: str
    format: str = Field(description="kind of container")
    family: str = Field(description="whose layout it has")
    weights: str = Field(
        description="which of the weights in it: ema, model (those being trained), or unknown"
    )
    importer: str = Field(description="version of flowdistill that read it")


class Reading(Settings):
    """How a network is to be taken: the keys of a card that others than its maker may have to give."""

    convention: Convention | None = Field(
        None,
        description="how the network's input and output relate to v; none: it returns canonical v itself",
    )
    null_label: int | None = Field(
        None, ge=0, description="the class that stands for none; without it, labels are left out"
    )
    guidance: Guidance | None = Field(None, description="classifier-free guidance that is part of the field")
    latent: Latent | None = Field(None, description="how the data relate to an autoencoder's latents")
    statistics: Statistics | None = Field(None, description="moments of the data, where they are known")
    distilled: bool = Field(
        False, description="made from another model (reflow, distillation, guidance): it obeys fewer laws"
    )
    data: str | None = Field(None, description="data set that the model imitates, where we can draw from it")
    licence: str = "Apache-2.0"
    notes: str = ""


class Stanza(Reading):
    """Keys of a card in a file of their own, for `flowdistill import --card`."""

    architecture: str | None = None
    arguments: dict[str, Any] | None = None
    shape: list[int] | None = None
    classes: int | None = Field(None, ge=0)


class Card(Reading):
    """What a model is: enough to rebuild, use and judge it from its one file."""

    format: Literal[1] = 1
    kind: Literal["velocity", "classifier"] = Field("velocity", description="what the network returns")
    architecture: str = Field(description="file of flowdistill/networks that holds the class")
    arguments: dict[str, Any] = Field(default_factory=dict, description="its constructor's arguments")
    shape: tuple[int, ...] = Field(description="shape of one sample, [C, H, W] for images")
    classes: int = Field(0, ge=0, description="number of classes; 0 is unconditional")
    nfe: int | None = Field(None, description="number of evaluations that the model was trained for")
    schedules: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="number of evaluations -> solver, times and coefficients that `boss` chose for it",
    )
    parents: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of the artifacts it was made from"
    )
    source: Source | None = Field(None, description="foreign file that it was imported from")
    settings: dict[str, Any] = Field(default_factory=dict, description="section of the recipe that made it")
    figures: dict[str, Any] = Field(
        default_factory=dict, description="measured properties that belong to the file"
    )

    @property
    def null(self) -> int:
        """The label that stands for none, for networks that are told so by a label."""
        return self.classes if self.null_label is None else self.null_label

    @property
    def foreign(self) -> bool:
        """Whether others trained it, so that its convention is a claim and not a fact."""
        return (self.convention is not None or self.source is not None) and not self.parents

    def write(self, path: Path, state: Mapping[str, Tensor], dtype: str | None = "float32") -> str:
        """Write a model file: `state` in `dtype`, or each tensor in its own; returns its SHA-256."""
        import torch

        kept = {
            name: value.to(getattr(torch, dtype)) if dtype and value.is_floating_point() else value
            for name, value in state.items()
        }
        return artifact.save_tensors(path, kept, self.model_dump(mode="json"))

    @classmethod
    def parse(cls, header: Mapping[str, Any], path: Path) -> Card:
        """The card of a model file's header."""
        try:
            return cls.model_validate_json(json.dumps(header))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(
                f"{path}: not a flowdistill model, header key '{where}': {first['msg']}; "
                "`flowdistill inspect` shows what the file is"
            ) from error
