"""What training minimises: how it measures a velocity's error.

Each class is a choice in a recipe (`loss: {name: pseudo-huber}`), its fields are the keys,
its method is the mathematics. v_hat, v and x_t are [B, *shape], t and losses [B]; d is the size of
one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol, TypeAlias

from pydantic import Field, model_validator

from flowdistill.errors import MissingInput
from flowdistill.flow import expand, x0_from_velocity
from flowdistill.references import Reference
from flowdistill.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

Distance: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""Perceptual distance of images: (x_hat [B, *shape], x [B, *shape]) -> [B], gradients to x_hat."""


class Labelled(Protocol):
    """A `Distance` with a name that says what it compares in, for the figures of whoever used it."""

    @property
    def label(self) -> str: ...

    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """x_hat, x [B, *shape] -> [B]."""
        ...


Terms: TypeAlias = "dict[str, Tensor]"
"""Parts of a loss by name, each [B], for the log; empty where the loss has one part."""

DOWNLOAD = "download"
"""In place of a file of weights: they are fetched from where torchvision has them."""
LEAST: Mapping[str, int] = {"vgg": 16, "alex": 32, "squeeze": 24}
"""Pixels that a side of an image must have for each network of LPIPS."""


class Lpips(Settings):
    """The published LPIPS (arXiv 1801.03924); by default as rf++ takes it, which is piq 0.8.0's.

    rf++ pools by the average and enlarges images to 224 pixels. The `lpips` package's own figures, which
    papers report, are those of pooling by the maximum at native size.
    """

    name: Literal["lpips"] = "lpips"
    net: Literal["vgg", "alex", "squeeze"] = Field(
        "vgg", description="vgg is VGG16, as in rf++; alex and squeeze are smaller and faster"
    )
    pooling: Literal["average", "max"] = Field(
        "average", description="average is rf++'s, max is that of the published network"
    )
    resolution: Literal["native"] | int = Field(
        224, description="images are resized to this many pixels a side, bilinearly; native leaves them"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the network's body")
    weights: Annotated[str | None, Reference("weights", optional=True, files=True, names=(DOWNLOAD,))] = (
        Field(
            None,
            description="file with the network's weights, relative to the recipe; left out, torchvision's "
            "cache; download puts them there",
        )
    )

    @model_validator(mode="after")
    def _large_enough(self) -> Lpips:
        least = LEAST[self.net]
        if self.resolution != "native" and self.resolution < least:
            raise ValueError(f"resolution: {self.net} needs {least} pixels or more, found {self.resolution}")
        return self


class Direct(Settings):
    """What the losses without a perceptual term have in common: the difference they measure.

    x0_hat - x0 = -t (v_hat - v) and eps_hat - eps = (1 - t) (v_hat - v): to compare another quantity is to
    weigh times otherwise. `eps` is how diffusion models are trained, and Rectified Diffusion's loss
    (arXiv 2410.07303).
    """

    needs_perceptual: ClassVar[bool] = False

    on: Literal["velocity", "x0", "eps"] = Field(
        "velocity", description="what is compared, whatever the network predicts"
    )

    def difference(self, v_hat: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Of what is compared, up to its sign, [B, *shape]."""
        if self.on == "velocity":
            return v_hat - v
        return expand(t if self.on == "x0" else 1 - t, v) * (v_hat - v)


class SquaredL2(Direct):
    """||v_hat - v||^2 / d, whose minimum is the conditional mean."""

    name: Literal["squared-l2"] = "squared-l2"

    def __call__(
        self, v_hat: Tensor, v: Tensor, x_t: Tensor, t: Tensor, perceptual: Distance | None
    ) -> tuple[Tensor, Terms]:
        """Loss [B] and its terms."""
        return self.difference(v_hat, v, t).square().flatten(1).mean(1), {}


class L2(Direct):
    """||v_hat - v|| / sqrt(d), the root of `squared-l2`: rf++'s `l2`."""

    name: Literal["l2"] = "l2"

    def __call__(
        self, v_hat: Tensor, v: Tensor, x_t: Tensor, t: Tensor, perceptual: Distance | None
    ) -> tuple[Tensor, Terms]:
        """Loss [B] and its terms."""
        difference = self.difference(v_hat, v, t).flatten(1)
        return difference.norm(dim=1) / math.sqrt(difference.shape[1]), {}


class L1(Direct):
    """Mean of |v_hat - v| over the sample's numbers, whose minimum is their conditional median."""

    name: Literal["l1"] = "l1"

    def __call__(
        self, v_hat: Tensor, v: Tensor, x_t: Tensor, t: Tensor, perceptual: Distance | None
    ) -> tuple[Tensor, Terms]:
        """Loss [B] and its terms."""
        return self.difference(v_hat, v, t).abs().flatten(1).mean(1), {}


class PseudoHuber(Direct):
    """H = (sqrt(||v_hat - v||^2 + c^2) - c) / d: quadratic near 0, linear far away."""

    name: Literal["pseudo-huber"] = "pseudo-huber"
    c: float | None = Field(None, gt=0, description="where it turns linear; default 0.00054 d")

    def __call__(
        self, v_hat: Tensor, v: Tensor, x_t: Tensor, t: Tensor, perceptual: Distance | None
    ) -> tuple[Tensor, Terms]:
        """Loss [B] and its terms."""
        return pseudo_huber(self.difference(v_hat, v, t), self.c), {}


class Compared(Settings):
    """What the losses with a perceptual term have in common."""

    needs_perceptual: ClassVar[bool] = True

    distance: Lpips | None = Field(
        None, description="left out, distance in the maps of the small classifier that ships for the data"
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each batch whose perceptual term is computed, scaled so that the mean stays",
    )
    divide_by_t: bool = Field(False, description="weigh the perceptual term by 1 / t: rf++'s config F")

    def weighed(self, distance: Tensor, t: Tensor) -> Tensor:
        """The perceptual term [B] of the loss."""
        return distance / t if self.divide_by_t else distance


class Perceptual(Compared):
    """P: perceptual distance of the image where v_hat points, x_t - t v_hat, from the true one."""

    name: Literal["perceptual"] = "perceptual"

    def __call__(
        self, v_hat: Tensor, v: Tensor, x_t: Tensor, t: Tensor, perceptual: Distance | None
    ) -> tuple[Tensor, Terms]:
        """Loss [B] and its terms, unweighted; MissingInput without a distance."""
        distance = _perceptual(v_hat, v, x_t, t, perceptual)
        return self.weighed(distance, t), {"perceptual": distance}


class LpipsHuber(Compared):
    """(1 - t) H + P (rf++'s config E, arXiv 2405.20320) or (1 - t) H + P / t (its config F)."""

    name: Literal["lpips-huber"] = "lpips-huber"

    def __call__(
        self, v_hat: Tensor, v: Tensor, x_t: Tensor, t: Tensor, perceptual: Distance | None
    ) -> tuple[Tensor, Terms]:
        """Loss [B] and its terms, unweighted; MissingInput without a distance."""
        huber = pseudo_huber(v_hat - v)
        distance = _perceptual(v_hat, v, x_t, t, perceptual)
        return (1 - t) * huber + self.weighed(distance, t), {"huber": huber, "perceptual": distance}


class PerceptualL2(Compared):
    """P + ||v_hat - v||^2 / d: SlimFlow's `lpips+l2` (arXiv 2407.12718)."""

    name: Literal["perceptual-l2"] = "perceptual-l2"

    def __call__(
        self, v_hat: Tensor, v: Tensor, x_t: Tensor, t: Tensor, perceptual: Distance | None
    ) -> tuple[Tensor, Terms]:
        """Loss [B] and its terms, unweighted; MissingInput without a distance."""
        squares = (v_hat - v).square().flatten(1).mean(1)
        distance = _perceptual(v_hat, v, x_t, t, perceptual)
        return self.weighed(distance, t) + squares, {"squared_l2": squares, "perceptual": distance}


Loss: TypeAlias = Annotated[
    SquaredL2 | L2 | PseudoHuber | L1 | Perceptual | LpipsHuber | PerceptualL2, Field(discriminator="name")
]


def of_some(distance: Distance, chosen: Tensor, scale: float) -> Distance:
    """`distance` times `scale` of the `chosen` samples, [B] bool, and 0 of the others.

    With `scale` the inverse of a sample's probability to be chosen, expectation and gradient stay.
    """

    def scaled(x_hat: Tensor, x: Tensor) -> Tensor:
        rows = chosen.to(x_hat.device).nonzero()[:, 0]
        if not len(rows):  # the others of a batch that processes share
            return x_hat.flatten(1).sum(1) * 0
        found = distance(x_hat[rows], x[rows])
        return found.new_zeros(len(x_hat)).index_copy(0, rows, scale * found)

    return scaled


def pseudo_huber(difference: Tensor, c: float | None = None) -> Tensor:
    """(sqrt(||difference||^2 + c^2) - c) / d, [B]; c is 0.00054 d by default.

    That is rf++'s code. iCT (arXiv 2310.14189), where the constant comes from, has sqrt(d) for d.
    """
    squares = difference.square().flatten(1)
    d = squares.shape[1]
    c = 0.00054 * d if c is None else c
    norm2 = squares.sum(1)
    return norm2 / ((norm2 + c * c).sqrt() + c) / d  # sqrt(..) - c, without its cancellation


def wcfm_weight(x0: Tensor, eps: Tensor, kappa: float) -> Tensor:
    """Weights [B] of mean 1 that favour short pairs: w ~ exp(-||x0 - eps|| / (kappa sqrt(d))).

    W-CFM (arXiv 2507.22270). The flow that is learnt is straighter, but its data are tilted by the
    weights; not for pairs of a reflow, whose coupling is fixed. As a softmax it is never 0 / 0.
    """
    squares = (x0 - eps).square().flatten(1)
    scale = kappa * math.sqrt(squares.shape[1])
    return len(squares) * (-squares.sum(1).sqrt() / scale).softmax(0)


def _perceptual(v_hat: Tensor, v: Tensor, x_t: Tensor, t: Tensor, perceptual: Distance | None) -> Tensor:
    if perceptual is None:
        raise MissingInput(
            "the loss needs a perceptual distance, and no classifier ships for these data: give it "
            "distance: {name: lpips}, or choose squared-l2 or pseudo-huber"
        )
    return perceptual(x0_from_velocity(x_t, v_hat, t), x0_from_velocity(x_t, v, t))
