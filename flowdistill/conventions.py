"""Foreign conventions: what a network is fed, what its output means, and the canonical velocity that it is.

A network sees a state x and a label of the time, and predicts something about x = alpha x0 + sigma eps. With
the state on the canonical line, z = x / (alpha + sigma), every such prediction p is affine in the velocity,

    v = eps - x0 = a(t) z + b(t) p

so one pair of coefficients converts there and back, and gives the weight of the loss as well. Guidance, being
linear in p, may be applied before or after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from flowdistill.flow import expand
from flowdistill.interpolants import DDPM, AffinePath, Interpolant, Rectified
from flowdistill.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    Coefficients: TypeAlias = tuple[Tensor, Tensor]
    """a and b, [B] each, of v = a z + b p"""

Prediction: TypeAlias = Literal["velocity", "x0", "eps", "score", "v"]
"""velocity: dx/dtime of the path; v: alpha eps - sigma x0 of a variance-preserving path (arXiv 2202.00512)"""

_UNBOUNDED = ("ve", "edm", "ddpm")
MARGIN = 1e-4
"""x0-, eps- and score-predictions are used no nearer than this to the end where they say nothing of v."""


class Linear(Settings):
    """scale * time, or scale * (1 - time) where the network's clock runs from noise to data."""

    name: Literal["linear"] = "linear"
    scale: float = Field(1.0, gt=0, description="1000 for most diffusers networks, 999 for score_sde's")
    reversed: bool = Field(False, description="the label falls with noise, as in RectifiedFlow and SiT")

    def label(self, time: Tensor, path: AffinePath) -> Tensor:
        """What the network is fed for the time of its path, [B]."""
        return self.scale * (1 - time if self.reversed else time)


class Logarithmic(Settings):
    """scale * ln(time / over): EDM has scale 1/4, score_sde's VE networks over 2."""

    name: Literal["logarithmic"] = "logarithmic"
    scale: float = Field(1.0, gt=0)
    over: float = Field(1.0, gt=0)

    def label(self, time: Tensor, path: AffinePath) -> Tensor:
        """What the network is fed for the time of its path, [B]."""
        return self.scale * (time / self.over).log()


class Nearest(Settings):
    """The index of the table's nearest entry, for networks that know whole numbers only."""

    name: Literal["nearest"] = "nearest"

    def label(self, time: Tensor, path: AffinePath) -> Tensor:
        """What the network is fed for the time of its path, [B]."""
        assert isinstance(path, DDPM)
        return path.nearest(time)


Clock: TypeAlias = Annotated[Linear | Logarithmic | Nearest, Field(discriminator="name")]


class Convention(Settings):
    """How a network's input, time and output relate to the canonical velocity."""

    interpolant: Interpolant = Rectified()
    prediction: Prediction = Field("velocity", description="what the network's output stands for")
    sign: Literal[1, -1] = Field(1, description="-1: the output is the prediction's negative")
    clock: Clock = Linear()
    t_min: float | None = Field(None, ge=0, lt=1, description="smallest t that is used; default: the path's")
    t_max: float | None = Field(None, gt=0, le=1, description="largest t that is used; default: the path's")

    @model_validator(mode="after")
    def _consistent(self) -> Convention:
        if self.prediction == "v" and self.interpolant.deviation is None:
            raise ValueError(
                f"prediction 'v' needs a path of constant variance, found '{self.interpolant.name}'; "
                "expected one of cosine, vp, ddpm, edm, or prediction 'velocity'"
            )
        if isinstance(self.clock, Nearest) and not isinstance(self.interpolant, DDPM):
            raise ValueError(f"clock 'nearest' needs interpolant 'ddpm', found '{self.interpolant.name}'")
        levels = self.interpolant.name in ("ve", "edm")
        if isinstance(self.clock, Logarithmic) and not levels:
            raise ValueError(
                f"clock 'logarithmic' needs noise levels (ve, edm), found '{self.interpolant.name}'"
            )
        if isinstance(self.clock, Linear) and self.clock.reversed and self.interpolant.name in _UNBOUNDED:
            raise ValueError(
                f"the time of interpolant '{self.interpolant.name}' has no end to be reversed at"
            )
        low, high = self.span
        if not low < high:
            raise ValueError(f"t_min {low:g} must be less than t_max {high:g}")
        return self

    @property
    def span(self) -> tuple[float, float]:
        """The canonical t at which the network is evaluated."""
        low, high = self.interpolant.span
        if self.prediction == "x0":
            low = max(low, MARGIN)
        if self.prediction in ("eps", "score"):
            high = min(high, 1 - MARGIN)
        return max(low, self.t_min or low), min(high, self.t_max or high)

    def canonical(self, network: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor) -> Tensor:
        """The velocity [B, *shape] at z [B, *shape], t [B], from one call of `network`.

        The network is called as (x [B, *shape], label [B]) -> output [B, *shape]; the label comes in float64,
        where the device has it.

        Outside the span the data that the network sees at its end are taken to be all there is to know:
        above, x = sigma(end) z / t has the noise the network expects, and z moves straight at the x0 that it
        predicts. At t = 1 that is where EDM's and diffusers' samplers start.
        """
        low, high = self.span
        precise = _precise(t)
        inside = precise.clamp(low, high)
        share = (high / precise).clamp(max=1)
        time = self.interpolant.time_at(inside)
        alpha, sigma = self.interpolant.alpha_sigma(time)
        scale = share * (alpha + sigma)
        output = network(_times(scale, z), self.clock.label(time, self.interpolant))
        a, b = self.coefficients(inside)
        # There v' = a r z + b p with r = share; it points to x0 = r z - inside v', and v = (z - x0) / t.
        own = share * share * a + (1 - share) / precise.clamp(min=high)
        return _times(own, z) + _times(share * b * self.sign, output.to(z.dtype))

    def output(self, v: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """What the network would return where the velocity is v: the inverse of `canonical` in its span."""
        a, b = self.coefficients(_precise(t))
        return _times(self.sign / b, v) - _times(self.sign * a / b, z)

    def coefficients(self, t: Tensor) -> Coefficients:
        """a and b of v = a z + b p at canonical t [B] within the span, [B], in the type of t."""
        if self.prediction == "x0":
            return 1 / t, -1 / t
        if self.prediction == "eps":
            return -1 / (1 - t), 1 / (1 - t)
        time = self.interpolant.time_at(t)
        alpha, sigma = self.interpolant.alpha_sigma(time)
        if self.prediction == "score":
            return -1 / (1 - t), -sigma / (1 - t)
        scale = alpha + sigma
        if self.prediction == "v":
            deviation = self.interpolant.deviation or 1.0
            return scale * (sigma - deviation**2 * alpha), scale * deviation
        d_alpha, d_sigma = self.interpolant.rates(time)
        per_w = scale / self.interpolant.wronskian(time)
        return -per_w * (d_alpha + d_sigma), per_w

    def loss_weight(self, t: Tensor) -> Tensor:
        """Squared error of the network's output in units of that of v, at the same z and t, [B]."""
        _, b = self.coefficients(_precise(t))
        return b.square().reciprocal()

    def density(self, native: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        """Density of canonical t [B] where the path's own time has the density `native`."""
        time = self.interpolant.time_at(_precise(t))
        return native(time) / self.interpolant.canonical_rate(time)


def _precise(t: Tensor) -> Tensor:
    """t in float64, where the device has it: B numbers, whose rounding would be seen in every sample."""
    return t.double() if t.device.type != "mps" else t.float()


def _times(factor: Tensor, x: Tensor) -> Tensor:
    """factor [B] times x [B, *shape], in the type of x."""
    return expand(factor.to(x.dtype), x) * x
