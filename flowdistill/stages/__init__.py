"""Stages: the verbs of a recipe, one file each.

A stage is its settings (typed fields are the recipe's keys) and `run`, which turns the artifacts named by
its references into one artifact. The folder is the registry: a file that holds a `Stage` with a `verb` adds
that verb to recipes, to the schema and to the command line. Nothing here imports torch, so that a recipe is
checked before anything heavy is loaded.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from flowdistill.errors import MissingInput, UsageError
from flowdistill.objectives import DOWNLOAD, Compared, Loss, of_some
from flowdistill.optimization import Ema, NonFinite, Optimizer, PostHoc, Previews
from flowdistill.recipe import Reference, Settings, StageSettings
from flowdistill.work import Cost, Done, Figures, Work

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowdistill.objectives import Distance, Labelled
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

    planned_without: ClassVar[frozenset[str]] = frozenset()
    """References whose artifacts `plan` does not read."""

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
    post_hoc: PostHoc | None = Field(
        None, description="keep averages from which others are made when training is done"
    )
    non_finite: NonFinite = NonFinite()
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="arithmetic of the network; weights, averages and losses stay fp32"
    )
    weights: Literal["float32", "float16"] = Field(
        "float32",
        description="number format of the weights in model.safetensors; training is not touched",
    )
    compile: bool = Field(False, description="torch.compile: worth its minutes on a GPU, and no gain on CPUs")
    channels_last: bool = Field(
        False, description="keep images with their channels innermost, which GPUs with tensor cores prefer"
    )
    sharded: bool = Field(
        False,
        description="deal out weights, averages and moments to the processes (FSDP2), for networks that "
        "are too large for one device",
    )
    previews: Previews | None = Field(None, description="pictures while training goes on, in previews/")
    trackers: list[Literal["tensorboard"]] = Field(
        [], description="where the log is written besides log.jsonl: tensorboard/"
    )
    log_every: int = Field(50, gt=0, description="steps between two lines of log.jsonl")
    checkpoint_every: int = Field(500, gt=0, description="steps between two checkpoints")

    @model_validator(mode="after")
    def _trainable(self) -> Training:
        if self.sharded and self.precision == "fp16":
            raise ValueError("precision: fp16 needs a loss scaler, which sharded gradients lack; use bf16")
        if self.sharded and self.channels_last:
            raise ValueError("channels_last: sharded weights have the usual order; leave one of them out")
        return self

    def new_student(self, work: Work) -> Model:
        """The network to be trained, with its card."""
        raise NotImplementedError

    def source(self, work: Work, card: Card) -> Source:
        """Where the batches come from, for a student of this card; UsageError where they are not for it."""
        raise NotImplementedError

    def perceptual(self, work: Work, card: Card) -> Labelled | None:
        """The perceptual distance for what the student makes, for a loss that needs one."""
        return None

    def equipment(self, work: Work) -> Any:
        """What the loss needs besides, opened once: it comes back as `batch.equipment`."""
        return None

    def per_sample(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [B] and its named terms [B]: the mathematics of the method.

        A term `t` says where in time each sample was, and the loss is sorted by it.
        """
        raise NotImplementedError

    def finished(self, network: nn.Module) -> nn.Module:
        """The averaged network as it is written, of the one that was trained."""
        return network

    def conclude(self, network: nn.Module) -> Figures:
        """Measure the averaged network before it is written; the figures go into its card."""
        return {}

    def preflight(self, inputs: Mapping[str, Any]) -> None:
        if self.trackers and importlib.util.find_spec("tensorboard") is None:
            raise MissingInput(
                "trackers: tensorboard is not installed; get it with pip install 'flowdistill[tensorboard]', "
                "or leave `trackers` out (log.jsonl has the same figures)"
            )

    def run(self, work: Work) -> Done:
        from flowdistill.training import fit

        return fit(self, work)

    def plan(self, work: Work) -> Cost:
        from flowdistill.training import rehearse

        if self.sharded:
            raise MissingInput("for several devices that share the weights, and only one is measured")
        return rehearse(self, work)


class OnPairs(Training):
    """A training on pairs, with losses that may have a perceptual term."""

    planned_without: ClassVar[frozenset[str]] = frozenset({"pairs"})

    pairs: Annotated[str | list[str] | None, Reference("pairs")] = Field(
        None, description="stage whose pairs are learnt, or several"
    )
    feed: Feed = Feed()

    @model_validator(mode="after")
    def _fed(self) -> Self:
        stores = self.pairs if isinstance(self.pairs, list) else [self.pairs]
        if not stores or len(set(stores)) < len(stores):
            raise ValueError("pairs: expected one or more, each once")
        if self.feed.weights and len(self.feed.weights) != len(stores):
            count = len(self.feed.weights)
            raise ValueError(f"feed.weights: {count} numbers for {len(stores)} stores of pairs")
        if len({loss.distance for loss in self._compared().values()}) > 1:
            raise ValueError(f"{' and '.join(self.losses)}: expected the same perceptual distance in both")
        return self

    @property
    def losses(self) -> Mapping[str, Loss]:
        """What is minimised, by its key in the recipe."""
        raise NotImplementedError

    def _compared(self) -> dict[str, Compared]:
        return {key: loss for key, loss in self.losses.items() if isinstance(loss, Compared)}

    def preflight(self, inputs: Mapping[str, Any]) -> None:
        super().preflight(inputs)
        for key, loss in self._compared().items():
            weights = inputs.get(f"{key}.distance.weights")
            if loss.distance is not None and weights in (None, DOWNLOAD):
                from flowdistill.evaluation import lpipsweights

                (lpipsweights.fetch if weights else lpipsweights.locate)(loss.distance.net)

    def source(self, work: Work, card: Card) -> Source:
        from flowdistill.sources import PairSource, check_for

        stores = work.pairs()
        for store in stores:
            check_for(card, store, work.stage)
        return PairSource(stores, self.feed)

    def perceptual(self, work: Work, card: Card) -> Labelled | None:
        from flowdistill.evaluation import extractors, lpipsdistance

        for key, loss in self._compared().items():
            if loss.distance is None:
                return extractors.perceptual(card)
            weights = work.inputs.get(f"{key}.distance.weights")
            file = None if weights in (None, DOWNLOAD) else Path(weights)
            return lpipsdistance.lpips_distance(loss.distance, card, file)
        return None

    def distance(self, loss: Loss, batch: Batch, among: Tensor | None = None) -> Distance | None:
        """The perceptual distance for a loss, of a share of the samples where it says so.

        0 for samples that are not `among` [B] bool, where that is given.
        """
        if batch.perceptual is None or not isinstance(loss, Compared) or (loss.share == 1 and among is None):
            return batch.perceptual
        total = batch.draw.total
        count = max(1, round(loss.share * total))
        chosen = batch.draw.chosen("perceptual", count)
        if among is not None:
            chosen &= among.cpu()
        return of_some(batch.perceptual, chosen, total / count)


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
