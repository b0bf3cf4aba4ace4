"""Stages: the verbs of a recipe, one file each.

A stage is its settings (typed fields are the recipe's keys) and `run`, which turns the artifacts named by
its references into one artifact. The folder is the registry: a file that holds a `Stage` with a `verb` adds
that verb to recipes, to the schema and to the command line. Nothing here imports torch, so that a recipe is
checked before anything heavy is loaded.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from flowdistill.errors import UsageError
from flowdistill.recipe import Settings, StageSettings
from flowdistill.work import Cost, Done, Figures, Work

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowdistill.objectives import Labelled
    from flowdistill.sources import Source
    from flowdistill.teachers import Card, Model
    from flowdistill.training import Batch


class Stage(StageSettings):
    """One verb of a recipe."""

    verb: ClassVar[str]
    shared: ClassVar[bool] = False
    """Whether any number of processes may do the stage, each what the others leave."""
    collective: ClassVar[bool] = False
    """Whether the processes of one launch can do the stage in step."""

    def run(self, work: Work) -> Done:
        """Write the artifact into `work.folder`, continuing what an earlier run left there.

        The pipeline writes the manifest afterwards.
        """
        raise NotImplementedError

    def preflight(self, inputs: Mapping[str, Any]) -> None:
        """Raise what `run` would raise for want of a file, before the stages above have cost anything.

        `inputs` are those of `Work`.
        """

    def plan(self, work: Work) -> Cost | None:
        """What the stage will take, measured on a little of it; None where that is not known."""
        return None

    def mend(self, work: Work) -> list[str]:
        """Remove what is damaged in the folder, for `run` to make again bit for bit; returns its names."""
        raise UsageError(
            f"{work.folder}: a stage '{self.verb}' is not made in parts that could be repaired\n"
            f"make it anew: flowdistill {self.verb} RECIPE --fresh"
        )


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
        import math

        rate = self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr
        done = max(0.0, (step / steps - self.decay_from) / (1.0 - self.decay_from))
        if self.decay == "linear":
            return rate * (1.0 - 0.99 * done)
        if self.decay == "cosine":
            return rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done)))
        return rate


class Ema(Settings):
    """Exponential moving average of the weights; the average is what a stage ships."""

    decay: float = Field(0.9999, ge=0, lt=1)
    ramp: bool = Field(
        True,
        description="min(decay, (1+n)/(10+n)) at update n, as in SlimFlow; false is rf++'s constant",
    )

    def decay_at(self, update: int) -> float:
        """Decay of the 1-based `update`."""
        return min(self.decay, (1 + update) / (10 + update)) if self.ramp else self.decay


class Feed(Settings):
    """Which pairs of the stores are seen, and how often."""

    weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        min_length=1,
        description="share of each store, in their order; left out, by their numbers of pairs",
    )
    subset: tuple[Annotated[int, Field(ge=0)], int] | None = Field(
        None, description="only the pairs with indices from the first number up to, not with, the second"
    )
    drop_farthest: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a store's pairs that is left out: noise and data farthest apart",
    )
    flip: bool = Field(
        False, description="mirror noise and image of half the pairs, drawn anew for each step"
    )

    @model_validator(mode="after")
    def _some(self) -> Feed:
        if self.subset and not self.subset[0] < self.subset[1]:
            raise ValueError(f"expected a subset [first, end] with first < end, found {list(self.subset)}")
        return self


class Training(Stage):
    """A stage that trains a network: its subclass is a loss per sample, the loop is `training.fit`."""

    produces: ClassVar[str] = "model"
    collective: ClassVar[bool] = True

    steps: int = Field(gt=0, description="optimizer steps")
    batch_size: int = Field(128, gt=0, description="samples in a step, over all processes")
    accumulate: int = Field(
        1, gt=0, description="parts in which a process takes its samples, where memory is too small for all"
    )
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="arithmetic of the network; weights, averages and losses stay fp32"
    )
    weights: Literal["float32", "float16"] = Field(
        "float32",
        description="number format of the weights in model.safetensors; training is not touched",
    )
    log_every: int = Field(50, gt=0, description="steps between two lines of log.jsonl")
    checkpoint_every: int = Field(500, gt=0, description="steps between two checkpoints")

    def student(self, work: Work) -> Model:
        """The network to be trained, with its card."""
        raise NotImplementedError

    def source(self, work: Work) -> Source:
        """Where the batches come from."""
        raise NotImplementedError

    def perceptual(self, work: Work, card: Card) -> Labelled | None:
        """The perceptual distance for what the student makes, for a loss that needs one."""
        return None

    def per_sample(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [B] and its named terms [B]: the mathematics of the method."""
        raise NotImplementedError

    def conclude(self, network: nn.Module) -> Figures:
        """Measure the averaged network before it is written; the figures go into its card."""
        return {}

    def run(self, work: Work) -> Done:
        from flowdistill.training import fit

        return fit(self, work)


@cache
def verbs() -> Mapping[str, type[Stage]]:
    """Verb -> stage class, from the files of this folder."""
    found: dict[str, type[Stage]] = {}
    for file in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Stage) and "verb" in vars(value):
                found[value.verb] = value
    return found
