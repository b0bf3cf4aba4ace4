"""Networks as a recipe describes them: the constructor arguments of `flowdistill.networks`, without torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator

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


class Published(Settings):
    """SlimFlow's own networks (arXiv 2407.12718), fed as its code feeds them."""

    name: Literal["slimflow"] = "slimflow"
    size: Literal["28m", "15m", "7m", "3m", "imagenet64-81m", "imagenet64-45m"] = Field(
        description="million parameters; the first four are DDPM++, the others ADM"
    )


class Scaled(Settings):
    """The network of the model that the student is made after, narrower or shallower."""

    name: Literal["scaled"] = "scaled"
    width: float = Field(1.0, gt=0, le=1, description="share of its channels, rounded to what fits")
    blocks: int | None = Field(None, gt=0, description="blocks of a level, or layers; left out, as many")


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_AMOUNT = r"([0-9]+(?:\.[0-9]+)?)([kMG]?)"
_LATENCY = r"([0-9]+(?:\.[0-9]+)?) @ batch ([1-9][0-9]*)"


def _amount(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(_AMOUNT, value)
    if found is None:
        raise ValueError(f"expected a number, as in 15M, found {value!r}")
    return round(float(found[1]) * _UNITS[found[2]])


Amount = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(_amount),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": f"^{_AMOUNT}$"}]}),
]


Latency = Annotated[
    float,
    Field(gt=0),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": f"^{_LATENCY}$"}]}
    ),
]


class Budget(Settings):
    """The largest network of the family of the model that the student is made after, within limits."""

    params: Amount | None = Field(None, description="most parameters, as in 15M")
    macs: Amount | None = Field(None, description="most multiply-adds of an evaluation, as in 4G")
    latency_ms: Latency | None = Field(
        None, description="longest evaluation on the device of the run; `5 @ batch 1` says both"
    )
    batch: int = Field(1, gt=0, description="samples that are evaluated together for `latency_ms`")

    @model_validator(mode="before")
    @classmethod
    def _spelt_out(cls, given: Any) -> Any:
        text = given.get("latency_ms") if isinstance(given, dict) else None
        found = re.fullmatch(_LATENCY, text) if isinstance(text, str) else None
        return {**given, "latency_ms": float(found[1]), "batch": int(found[2])} if found else given

    @model_validator(mode="after")
    def _limited(self) -> Budget:
        if self.params is None and self.macs is None and self.latency_ms is None:
            raise ValueError("expected a limit: params, macs or latency_ms")
        return self

    def allows(self, parameters: int, macs: int) -> bool:
        """Whether a network of such a size keeps to it, as far as can be told without a clock."""
        return parameters <= (self.params or parameters) and macs <= (self.macs or macs)

    def __str__(self) -> str:
        """As a person would say it."""
        limits = [
            f"{limit:,} {what}"
            for limit, what in ((self.params, "parameters"), (self.macs, "multiply-adds"))
            if limit
        ]
        if self.latency_ms:
            limits.append(f"{self.latency_ms:g} ms for {self.batch} at once")
        return ", ".join(limits)


def _kind(given: Any) -> str:
    """A budget is what has limits and no name."""
    if isinstance(given, dict):
        return str(given.get("name", "budget"))
    return str(getattr(given, "name", "budget"))


Student = Annotated[
    Annotated[Budget, Tag("budget")]
    | Annotated[UNet, Tag("unet")]
    | Annotated[MLP, Tag("mlp")]
    | Annotated[Published, Tag("slimflow")]
    | Annotated[Scaled, Tag("scaled")],
    Discriminator(_kind),
]
