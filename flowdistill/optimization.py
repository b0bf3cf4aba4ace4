"""What a recipe says of how a network is trained, whatever it is trained on. No torch here."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowdistill.settings import Settings


class Optimizer(Settings):
    """Adam or AdamW with linear warm-up."""

    name: Literal["adam", "adamw"] = "adam"
    lr: float = Field(2e-4, gt=0, description="learning rate after the warm-up")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0, description="steps of linear warm-up; step 0 already has lr/warmup")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="course of the learning rate after `decay_from`, down to 1 % of `lr`",
    )
    decay_from: float = Field(0.0, ge=0, lt=1, description="share of training after which `decay` sets in")
    clip: float | None = Field(None, gt=0, description="largest gradient norm")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of 0-based `step` of `steps`."""
        rate = self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr
        done = max(0.0, (step / steps - self.decay_from) / (1.0 - self.decay_from))
        if self.decay == "linear":
            return rate * (1.0 - 0.99 * done)
        if self.decay == "cosine":
            return rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done)))
        return rate


class Lora(Settings):
    """Low-rank adaptation: what is added to the weights is trained, and they stay."""

    rank: int = Field(4, ge=1, description="of what is added to a weight")
    alpha: float = Field(1.0, gt=0, description="it is scaled by alpha / rank")


class Ema(Settings):
    """Exponential moving average of the weights; the average is what a stage ships."""

    decay: float = Field(0.9999, ge=0, lt=1)
    ramp: bool = Field(
        True,
        description="min(decay, (1+n)/(10+n)) at update n, as in SlimFlow; false is rf++'s constant",
    )
    also: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [], description="decays of further averages; each becomes a model-ema-DECAY.safetensors"
    )

    @model_validator(mode="after")
    def _distinct(self) -> Ema:
        if len({self.decay, *self.also}) < 1 + len(self.also):
            raise ValueError("also: expected decays that differ from each other and from `decay`")
        return self


class PostHoc(Settings):
    """Averages with power-function profiles, kept at intervals, from which any other is made afterwards.

    Karras et al. 2024 (EDM2, arXiv 2312.02696, Sec. 3); `flowdistill export --ema` makes them.
    """

    stds: list[Annotated[float, Field(gt=0.01, lt=0.25)]] = Field(
        [0.05, 0.10],
        min_length=2,
        description="widths of the profiles that are kept, as shares of the training so far (sigma_rel)",
    )
    every: int = Field(gt=0, description="steps between two times that they are kept")

    @model_validator(mode="after")
    def _distinct(self) -> PostHoc:
        if len(set(self.stds)) < len(self.stds):
            raise ValueError(f"stds: expected widths that differ, found {self.stds}")
        return self


class NonFinite(Settings):
    """What is done about a loss or gradient that is not finite; no state with one is ever written."""

    policy: Literal["abort", "skip", "roll-back"] = Field(
        "abort",
        description="abort the training; skip the step; or go back to the last checkpoint, and on from there "
        "with other samples",
    )
    limit: int = Field(10, gt=0, description="so often it is skipped or rolled back before it is aborted")


class Previews(Settings):
    """Pictures that the averaged weights make of the same noises while training goes on."""

    every: int = Field(500, gt=0, description="steps between two pictures")
    count: int = Field(16, gt=0, le=256, description="noises, of all classes in turn")
    nfe: list[Annotated[int, Field(ge=1)]] = Field(
        [1], min_length=1, description="numbers of Euler steps; each is a row of the picture"
    )
