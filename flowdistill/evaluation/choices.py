"""What a recipe can ask an evaluation to look at samples with. Importing it does not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flowdistill.objectives import DOWNLOAD, Lpips
from flowdistill.recipe import Reference, Settings


class _Published(Settings):
    weights: Annotated[str | None, Reference("weights", optional=True, files=True, names=(DOWNLOAD,))] = (
        Field(
            None,
            description="file with the weights, relative to the recipe; left out, torch.hub's cache; "
            "download puts them there",
        )
    )


class Inception(_Published):
    """The 2048 features of FID and KID."""

    network: Literal["inception-v3-compat"] = Field(
        "inception-v3-compat", description="as torch-fidelity calls it"
    )


class Dinov2(_Published):
    """DINOv2, whose network is its makers' code in torch.hub's cache."""

    network: Literal["dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14", "dinov2-vit-g-14"] = Field(
        "dinov2-vit-b-14", description="as torch-fidelity calls it"
    )


class Clip(_Published):
    """CLIP's image encoder."""

    network: Literal[
        "clip-rn50",
        "clip-rn101",
        "clip-rn50x4",
        "clip-rn50x16",
        "clip-rn50x64",
        "clip-vit-b-32",
        "clip-vit-b-16",
        "clip-vit-l-14",
        "clip-vit-l-14-336px",
    ] = Field("clip-vit-b-32", description="as torch-fidelity calls it")


class Features(Settings):
    """In which features samples are compared with real ones; `{}` asks for one as it is by default."""

    shipped: bool = Field(True, description="the small classifier of the data, where it ships with one")
    inception: Inception | None = Field(None, description="for FID and KID")
    dinov2: Dinov2 | None = None
    clip: Clip | None = None

    @property
    def published(self) -> dict[str, Inception | Dinov2 | Clip]:
        """Those whose weights are not shipped, by their keys."""
        each = {"inception": self.inception, "dinov2": self.dinov2, "clip": self.clip}
        return {key: settings for key, settings in each.items() if settings is not None}


class Measured(Lpips):
    """LPIPS as papers report it: that of the `lpips` package, of images as they are."""

    net: Literal["vgg", "alex", "squeeze"] = Field(
        "alex", description="alex needs images of 32 pixels, squeeze 24, vgg 16"
    )
    pooling: Literal["average", "max"] = Field("max", description="max is that of the published network")
    resolution: Literal["native"] | int = Field(
        "native", description="images are resized to this many pixels a side, bilinearly; native leaves them"
    )
