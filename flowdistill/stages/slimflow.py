"""Annealing reflow: a small network learns the pairs of a large one, from fresh weights.

Zhu, Liu and Liu, "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow" (arXiv
2407.12718). A small network cannot start from the teacher's weights, and the coupling of the pairs is hard to
learn from scratch. So the noise of the pairs is phased in (Sec. 3.2, Eq. 9): at step k the student is shown

    noise = sqrt(1 - beta^2) eps + beta fresh,   x_t = (1 - t) x0 + t noise,   v = noise - x0

with beta falling from 1, where the coupling is independent and the flow easy, to 0, where it is a plain
reflow. The noise is N(0, I) throughout. Where the data look the same mirrored, mirrored pairs (`feed: {flip:
true}`) are worth as much again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flowdistill.architectures import Scaled, Student
from flowdistill.objectives import Loss, SquaredL2
from flowdistill.optimization import Ema, Optimizer
from flowdistill.recipe import Reference, Settings
from flowdistill.stages import OnPairs
from flowdistill.timesteps import Timesteps, Uniform, UShaped
from flowdistill.work import Cost, Done, Work

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowdistill.teachers import Model
    from flowdistill.training import Batch


class Phasing(Settings):
    """What the schedules of beta that fall have in common: how long they take."""

    steps: int | None = Field(None, gt=0, description="steps that it takes; left out, `share` says it")
    share: float = Field(
        0.375, gt=0, le=1, description="share of the training that it takes; SlimFlow's 300,000 of 800,000"
    )

    def over(self, total: int) -> float:
        """Steps that it takes of a training of `total`."""
        return self.steps or self.share * total


class Straight(Phasing):
    """beta = 1 - min(1, k / W): the paper's choice."""

    name: Literal["linear"] = "linear"

    def beta(self, step: int, total: int) -> float:
        """At 0-based `step` of `total`."""
        return 1 - min(1.0, step / self.over(total))


class Cosine(Phasing):
    """beta = (1 + cos(pi min(1, k / W))) / 2."""

    name: Literal["cosine"] = "cosine"

    def beta(self, step: int, total: int) -> float:
        """At 0-based `step` of `total`."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.over(total))))


class Exponential(Phasing):
    """beta = exp(-k / W), which never reaches 0."""

    name: Literal["exp"] = "exp"

    def beta(self, step: int, total: int) -> float:
        """At 0-based `step` of `total`."""
        return math.exp(-step / self.over(total))


class Fixed(Settings):
    """The same beta always; 0 is a reflow from scratch."""

    name: Literal["fixed"] = "fixed"
    value: float = Field(0.0, ge=0, le=1)

    def beta(self, step: int, total: int) -> float:
        """At any step."""
        return self.value


Annealing = Annotated[Straight | Cosine | Exponential | Fixed, Field(discriminator="name")]


class Settled(Settings):
    """What takes the place of the stage's own once beta is 0, and the pairs are all there is."""

    timesteps: Timesteps = UShaped()
    loss: Loss = SquaredL2()


class SlimFlow(OnPairs):
    """SlimFlow: annealing reflow into a smaller network."""

    verb: ClassVar[str] = "slimflow"

    like: Annotated[str | None, Reference("model", allow_teacher=True)] = Field(
        "teacher", description="model whose data and coordinates the student takes, and whose family"
    )
    student: Student = Scaled(width=0.5)
    warm_start: bool = Field(
        False, description="begin with the leading entries of the weights of `like`, in place of random ones"
    )
    annealing: Annealing = Straight()
    timesteps: Timesteps = Uniform()
    loss: Loss = SquaredL2()
    settled: Settled | None = Field(
        None, description="other timesteps and loss for the time when beta is 0, such as rf++'s"
    )
    optimizer: Optimizer = Optimizer(clip=1.0)
    ema: Ema = Ema(decay=0.999999)

    @model_validator(mode="after")
    def _anneals(self) -> SlimFlow:
        if isinstance(self.annealing, Phasing) and (self.annealing.steps or 0) > self.steps:
            raise ValueError(
                f"annealing.steps: {self.annealing.steps}, but the training has {self.steps} steps; "
                "it has to end before"
            )
        if self.settled is not None and isinstance(self.annealing, Exponential):
            raise ValueError("settled: with annealing 'exp' beta never is 0; choose linear or cosine")
        return self

    @property
    def losses(self) -> Mapping[str, Loss]:
        return {"loss": self.loss} | ({"settled.loss": self.settled.loss} if self.settled else {})

    def new_student(self, work: Work) -> Model:
        from flowdistill import sizing, students

        like = work.model("like")
        student = students.fresh(self.student, like, work, f"{work.stage}.student")
        if self.warm_start:
            sizing.sliced(student.network, like.network.state_dict())
        return student

    def run(self, work: Work) -> Done:
        from flowdistill import students

        students.settle(self.student, work, f"{work.stage}.student")
        return super().run(work)

    def plan(self, work: Work) -> Cost:
        from flowdistill import students

        return replace(
            super().plan(work), candidates=students.candidates(self.student, work.model("like"), work)
        )

    def per_sample(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The premetric between v_hat(x_t, t) and noise - x0, the noise partly fresh."""
        from flowdistill import flow

        beta = self.annealing.beta(round(batch.progress * self.steps), self.steps)
        settled = self.settled if beta == 0 else None
        noise = batch.eps
        if beta:
            noise = annealed(noise, batch.draw.normal("fresh noise", tuple(noise.shape[1:])), beta)
        t = batch.times(settled.timesteps if settled else self.timesteps)
        x_t = flow.interpolate(batch.x0, noise, t)
        v_hat = network(x_t, t, batch.labels)
        chosen = settled.loss if settled else self.loss
        loss, terms = chosen(v_hat, flow.velocity(batch.x0, noise), x_t, t, self.distance(chosen, batch))
        return loss, {**terms, "t": t, "beta": loss.new_full(loss.shape, beta)}


def annealed(eps: Tensor, fresh: Tensor, beta: float) -> Tensor:
    """sqrt(1 - beta^2) eps + beta fresh, [B, *shape]: normal noise if both are."""
    return math.sqrt(1 - beta * beta) * eps + beta * fresh
