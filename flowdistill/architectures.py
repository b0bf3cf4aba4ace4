"""Networks as a recipe describes them: the constructor arguments of `flowdistill.networks`, without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from flowdistill.recipe import Settings


class UNet(Settings):
    """The light U-Net of the embedded teachers."""

    name: Literal["unet"] = "unet"
    channels: int = Field(32, gt=0, description="channels at full resolution")
    multipliers: list[Annotated[int, Field(gt=0)]] = Field(
        [1, 2, 4], min_length=1, description="channels of each level, in units of `channels`"
    )
    blocks: int = Field(1, gt=0, description="residual blocks of a level on the way down")
    attention: list[int] = Field([-1], description="levels with self-attention; -1 is the lowest")
    embedding: int = Field(128, gt=0, description="width of the time and class embedding")
    dropout: float = Field(0.0, ge=0, lt=1)


class MLP(Settings):
    """A multilayer perceptron for vector data."""

    name: Literal["mlp"] = "mlp"
    width: int = Field(128, gt=0)
    depth: int = Field(3, gt=0, description="hidden layers")


class Classifier(Settings):
    """A small convolutional classifier: offline features and perceptual maps."""

    name: Literal["classifier"] = "classifier"
    channels: list[Annotated[int, Field(gt=0)]] = Field([16, 32, 48], min_length=1)


Architecture = Annotated[UNet | MLP | Classifier, Field(discriminator="name")]


def arguments(architecture: UNet | MLP | Classifier, shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    """Constructor arguments for data of `shape` with `classes` classes."""
    return {
        "shape": list(shape),
        "classes": classes,
        **architecture.model_dump(mode="json", exclude={"name"}),
    }
