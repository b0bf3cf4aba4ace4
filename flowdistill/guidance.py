"""Guidance: how the velocity under a condition and the one without are combined, as a function of t.

Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) is v = v_null + scale (v_cond - v_null).
Being affine, it may be applied to canonical velocities whatever the network predicts. The rules that
rescale norms after it are not: they belong to networks that predict a velocity, and are the same for either
sign of it.

What pipelines of diffusers call a guidance scale is `scale` here, but for Z-Image's, which is one less.
Rules in terms of the step's index become an interval of t, so that the field does not depend on the number
of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from flowdistill.flow import expand
from flowdistill.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


class Token(Settings):
    """Every token of the image keeps the norm that it has under the condition (Qwen-Image)."""

    name: Literal["token"] = "token"
    patch: int = Field(2, ge=1, description="a token is patch x patch places, all channels")

    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        batch, channels, height, width = guided.shape
        sides = height // self.patch, self.patch, width // self.patch, self.patch
        tokens = guided.reshape(batch, channels, *sides)
        target = conditional.reshape(batch, channels, *sides)
        ratio = _norm(target, (1, 3, 5)) / _norm(tokens, (1, 3, 5))
        return (tokens * ratio).reshape(guided.shape)


class Row(Settings):
    """Every row of every channel keeps the norm that it has under the condition (Lumina 2 in diffusers)."""

    name: Literal["row"] = "row"

    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        return guided * (_norm(conditional, -1) / _norm(guided, -1))


class Clip(Settings):
    """A sample's norm is at most `factor` times the one under the condition (Z-Image)."""

    name: Literal["clip"] = "clip"
    factor: float = Field(1.0, gt=0)

    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        every = tuple(range(1, guided.ndim))
        ratio = self.factor * _norm(conditional, every) / _norm(guided, every)
        return guided * ratio.clamp(max=1.0)


class Deviation(Settings):
    """A sample's deviation is drawn to the one under the condition (arXiv 2305.08891, Sec. 3.4; LTX)."""

    name: Literal["deviation"] = "deviation"
    strength: float = Field(0.7, ge=0, le=1, description="0 leaves it, 1 restores it fully")

    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        every = tuple(range(1, guided.ndim))
        spread = guided.std(every, keepdim=True).clamp(min=1e-30)
        ratio = conditional.std(every, keepdim=True) / spread
        return guided * (1 - self.strength + self.strength * ratio)


Rescale = Annotated[Token | Row | Clip | Deviation, Field(discriminator="name")]


class Guidance(Settings):
    """Classifier-free guidance; the default is none."""

    scale: float = Field(1.0, ge=0, description="1: condition alone, 0: no condition")
    interval: tuple[float, float] = Field(
        (0.0, 1.0), description="t in which it applies; elsewhere the condition stands alone"
    )
    channels: int | None = Field(
        None, ge=1, description="only the first so many channels are guided: SiT and DiT have 3 of 4"
    )
    rescale: Rescale | None = Field(None, description="what happens to norms after guidance")

    @model_validator(mode="after")
    def _ordered(self) -> Guidance:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"expected an interval 0 <= low < high <= 1, found {low:g} to {high:g}")
        return self

    @property
    def needs_null(self) -> bool:
        """Whether the network is evaluated without condition too, so that one NFE is two passes."""
        return self.scale != 1

    def applies(self, t: Tensor) -> Tensor:
        """Whether t [B] lies in the interval, [B] bool."""
        low, high = self.interval
        return (t >= low) & (t <= high)

    def combine(self, conditional: Tensor, null: Tensor, t: Tensor) -> Tensor:
        """The guided velocity [B, *shape] from those with and without the condition at t [B]."""
        import torch

        guided = null + self.scale * (conditional - null)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], conditional[:, self.channels :]], dim=1)
        if self.rescale is not None:
            guided = self.rescale(guided, conditional)
        return torch.where(expand(self.applies(t), guided), guided, conditional)


def first_steps(times: Sequence[float], share: float) -> tuple[float, float]:
    """The interval of t in which the first `share` of the steps of a grid from 1 to 0 begin.

    Lumina 2's `cfg_trunc_ratio` in terms of t. The lower end lies half-way to the first step that is left
    out.
    """
    steps = len(times) - 1
    # The small number is for shares like 0.7 of 10, which is 7 steps.
    count = max(0, min(steps, int(share * steps + 1e-9)))
    if count == 0:
        raise ValueError(f"no step of {steps} lies in the first {share:g} of them; set scale to 1")
    return (0.0 if count == steps else 0.5 * (times[count - 1] + times[count])), 1.0


def _norm(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    import torch

    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return norm.clamp(min=torch.finfo(x.dtype).tiny)
