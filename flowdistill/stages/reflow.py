"""Reflow with rf++'s improvements: train a student on the teacher's own (noise, sample) pairs.

Lee, Lin and Fanti, "Improving the Training of Rectified Flows" (arXiv 2405.20320). The pairs of one round
hardly cross, so along x_t = (1-t) x0 + t eps the velocity eps - x0 is nearly a function of x_t: the student's
paths come out straight and one Euler step is almost exact. What is left to learn lies at both ends of t
(hence the U-shaped density, Sec. 4.1), and with nothing irreducible in the target any premetric has the same
optimum (hence LPIPS-Huber, Sec. 4.2). The student starts from the teacher's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowdistill.architectures import Architecture
from flowdistill.conventions import Convention
from flowdistill.errors import UsageError
from flowdistill.objectives import Loss, LpipsHuber
from flowdistill.recipe import Reference
from flowdistill.stages import OnPairs
from flowdistill.timesteps import Timesteps, UShaped
from flowdistill.work import Work

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowdistill.teachers import Model
    from flowdistill.training import Batch


class Reflow(OnPairs):
    """rf++: train a student on pairs."""

    verb: ClassVar[str] = "reflow"

    init: Annotated[str | None, Reference("model", allow_teacher=True)] = Field(
        "teacher", description="model that the student starts as, and whose data it imitates"
    )
    network: Literal["same"] | Architecture | None = Field(
        None,
        description="train this network from scratch instead of starting from the weights of `init`; same is "
        "the network of `init`, with its convention",
    )
    convention: Convention | None = Field(
        None,
        description="what the student is fed and what its output means; left out, canonical velocity for a "
        "fresh `network`, and else that of `init`, whose weights another makes a mere start",
    )
    timesteps: Timesteps = UShaped()
    loss: Loss = LpipsHuber()
    label_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of samples whose label is withheld, so that the student can be guided",
    )

    @property
    def losses(self) -> Mapping[str, Loss]:
        return {"loss": self.loss}

    def new_student(self, work: Work) -> Model:
        import torch

        from flowdistill import randomness, students, teachers

        start, key = work.model("init"), f"{work.stage}.network"
        if self.network is not None and self.network != "same":
            fresh = students.fresh(self.network, start, work, key, convention=self.convention)
            return self._labelled(work, fresh)
        if start.card.architecture == "analytic":
            raise UsageError(
                f"{key}: '{start.card.arguments['name']}' has no weights to start from; "
                "describe the student, for example network: {name: mlp}"
            )
        changes = {} if self.convention is None else {"convention": self.convention}
        torch.manual_seed(randomness.key(work.seed, "weights"))
        student = teachers.new(students.card(start.card, work, **changes))
        if self.network is None:
            student.weights.load_state_dict(start.weights.state_dict())
        return self._labelled(work, student)

    def _labelled(self, work: Work, student: Model) -> Model:
        """The student; `UsageError` where labels are to be withheld and it cannot do without."""
        import torch

        if not self.label_dropout:
            return student
        card, key = student.card, f"{work.stage}.label_dropout"
        if not card.classes:
            raise UsageError(f"{key}: the student has no classes; leave it out")
        null = torch.tensor([card.null])
        try:
            student.network(torch.zeros(1, *card.shape), torch.tensor([0.5]), null)
        except (IndexError, RuntimeError):
            raise UsageError(
                f"{key}: {card.architecture} with {card.classes} classes has no label for none; leave it out"
            ) from None
        return student

    def per_sample(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The premetric between v_hat(x_t, t) and eps - x0 at a U-shaped t."""
        from flowdistill import flow

        t = batch.times(self.timesteps)
        x_t = flow.interpolate(batch.x0, batch.eps, t)
        v_hat = network(x_t, t, batch.some_labels(self.label_dropout))
        v = flow.velocity(batch.x0, batch.eps)
        loss, terms = self.loss(v_hat, v, x_t, t, self.distance(self.loss, batch))
        return loss, {**terms, "t": t}
