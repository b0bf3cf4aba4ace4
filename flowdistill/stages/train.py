"""Train a base flow, or a classifier, on a data set: how the embedded teachers were made.

Flow matching (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003): with x_t = (1-t) x0 + t eps
and eps independent of x0, the regression min_v E||v(x_t, t) - (eps - x0)||^2 has the velocity field of the
probability flow as its solution. W-CFM (arXiv 2507.22270) weighs the pairs by exp(-||x0 - eps|| / (kappa
sqrt d)), an entropic optimal-transport coupling without a solver, at the price of tilted marginals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowdistill.architectures import Architecture, UNet, arguments
from flowdistill.objectives import SquaredL2, wcfm_weight
from flowdistill.recipe import Settings
from flowdistill.stages import Training
from flowdistill.timesteps import Timesteps, Uniform
from flowdistill.work import Figures, Work

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowdistill.sources import Source
    from flowdistill.teachers import Card, Model
    from flowdistill.training import Batch

_MEASURED = 50_000
"""Real samples behind the reference moments of a classifier."""


class FlowMatching(Settings):
    """Regression on the velocity of independent pairs."""

    name: Literal["flow-matching"] = "flow-matching"
    timesteps: Timesteps = Uniform()
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of samples whose label is withheld, for guidance"
    )
    wcfm_kappa: float | None = Field(None, gt=0, description="W-CFM's kappa; unset is plain flow matching")

    def per_sample(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """||v_hat - v||^2 / d, weighted."""
        from flowdistill import flow

        t = batch.times(self.timesteps)
        x_t = flow.interpolate(batch.x0, batch.eps, t)
        v_hat = network(x_t, t, batch.some_labels(self.label_dropout))
        loss, _ = SquaredL2()(v_hat, flow.velocity(batch.x0, batch.eps), x_t, t, None)
        if self.wcfm_kappa is None:
            return loss, {"t": t}
        weight = wcfm_weight(batch.x0, batch.eps, self.wcfm_kappa)
        return loss * weight, {"unweighted": loss, "t": t}


class Classification(Settings):
    """Cross-entropy on the labels of clean samples."""

    name: Literal["classification"] = "classification"

    def per_sample(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats, and whether the label was hit."""
        from torch.nn.functional import cross_entropy

        assert batch.labels is not None
        logits = network(batch.x0)
        loss = cross_entropy(logits, batch.labels, reduction="none")
        return loss, {"accuracy": (logits.argmax(1) == batch.labels).float()}


class Train(Training):
    """Train a network from scratch on one of the data sets that come with the package."""

    verb: ClassVar[str] = "train"

    data: Literal["shapes", "digits"] = "shapes"
    network: Architecture = UNet()
    objective: Annotated[FlowMatching | Classification, Field(discriminator="name")] = FlowMatching()
    held_out: bool = Field(
        False, description="train on the training part only, so that the held-out part can judge"
    )
    licence: str = "Apache-2.0"
    notes: str = Field("", description="what users of the model should know; goes into its card")

    def new_student(self, work: Work) -> Model:
        import torch

        from flowdistill import data, randomness, teachers

        chosen = data.dataset(self.data)
        card = teachers.Card(
            kind="classifier" if self.objective.name == "classification" else "velocity",
            architecture=self.network.name,
            arguments=arguments(self.network, chosen.shape, len(chosen.classes)),
            shape=chosen.shape,
            classes=len(chosen.classes),
            data=self.data,
            settings=dict(work.settings),
            licence=self.licence,
            notes=self.notes,
        )
        torch.manual_seed(randomness.key(work.seed, "weights"))
        return teachers.new(card)

    def source(self, work: Work, card: Card) -> Source:
        from flowdistill import data
        from flowdistill.sources import DataSource

        chosen = data.dataset(self.data)
        return DataSource(chosen.training if self.held_out else chosen)

    def per_sample(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.per_sample(network, batch)

    def conclude(self, network: nn.Module) -> Figures:
        """A classifier gets the data's moments in its own features, and its accuracy on the held-out part."""
        if self.objective.name != "classification":
            return {}
        from flowdistill import data
        from flowdistill.evaluation.extractors import measure

        chosen = data.dataset(self.data)
        count = chosen.count or _MEASURED
        mean, covariance, _ = measure(network, chosen, count)
        network.get_buffer("reference_mean").copy_(mean)
        network.get_buffer("reference_covariance").copy_(covariance)
        held_out = chosen.held_out
        _, _, accuracy = measure(network, held_out, held_out.count or _MEASURED)
        return {"reference_count": count, "held_out_accuracy": accuracy}
