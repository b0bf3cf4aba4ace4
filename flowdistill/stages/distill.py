"""One-step distillation of a flow: where it takes each noise, and no more.

Liu, Gong and Liu, "Flow Straight and Fast" (arXiv 2209.03003, Sec. 3.2): the student's step eps - v(eps, 1)
is compared with the pair's x0. With `nfe` k the student is asked at the k times of a grid instead of at 1
alone, and the target stays eps - x0.

Zhu et al., "SlimFlow" (arXiv 2407.12718, Sec. 3.3, Eq. 11-13) add, on fresh noise z, a step of the student
against two of the flow that made the pairs: with v = student(z, 1), x_t = z - (1 - t) v and w = flow(x_t, t)
the target is the velocity (1 - t) v + t w of both together, held fixed. As squared error that is t^2 ||v -
w||^2: no image is made. In the paper's text the first of the two steps is the flow's, in its code the
student's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flowdistill.errors import MissingInput, UsageError
from flowdistill.objectives import Loss, SquaredL2
from flowdistill.optimization import Optimizer
from flowdistill.recipe import Reference, Settings
from flowdistill.schedule import Schedule, uniform
from flowdistill.stages import OnPairs
from flowdistill.work import Work

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowdistill.flow import VelocityField
    from flowdistill.teachers import Model
    from flowdistill.training import Batch


class TwoStep(Settings):
    """A step of the student against two of the flow."""

    first: Literal["student", "flow"] = Field(
        "student",
        description="whose velocity makes the first of the two: the student's, as in SlimFlow's code, "
        "or the flow's, as in its text",
    )
    interval: tuple[float, float] = Field(
        (0.2, 0.8),
        description="t of the second step is uniform in it; the code has 0.2 to 0.8, the text 0 to 1",
    )
    weight: float = Field(1.0, gt=0, description="of this term beside that of the pairs")

    @model_validator(mode="after")
    def _ordered(self) -> TwoStep:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"interval: expected 0 <= low < high <= 1, found {low:g} to {high:g}")
        return self

    def target(self, flow: VelocityField, z: Tensor, v: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The velocity [B, *shape] of two steps from z, through t [B], without gradient."""
        import torch

        from flowdistill.flow import expand

        with torch.no_grad():
            at = expand(t, z)
            first = v.detach() if self.first == "student" else flow(z, torch.ones_like(t), labels)
            second = flow(z - (1 - at) * first, t, labels)
            return (1 - at) * first + at * second


class Distill(OnPairs):
    """Distil a flow into a student of one step, or of a few."""

    verb: ClassVar[str] = "distill"

    model: Annotated[str | None, Reference("model", allow_teacher=True)] = Field(
        None, description="the flow that made the pairs; the student begins as it"
    )
    start: Literal["average", "raw"] = Field(
        "average",
        description="weights that the student begins with: the flow's average, or those that were trained, "
        "as in SlimFlow's code; the flow itself is always the average",
    )
    nfe: int = Field(1, gt=0, description="steps that the student is made for")
    schedule: Annotated[str | None, Reference("schedule", optional=True)] = Field(
        None,
        description="boss stage whose times for `nfe` are taken in place of uniform ones; one with "
        "choose: euler or boss, since others may be for solvers with memory",
    )
    loss: Loss = SquaredL2()
    two_step: TwoStep | None = None
    optimizer: Optimizer = Optimizer(clip=1.0)

    @property
    def losses(self) -> Mapping[str, Loss]:
        return {"loss": self.loss}

    def new_student(self, work: Work) -> Model:
        from flowdistill import students

        student = students.continued(work.model(), work, f"{work.stage}.model", nfe=self.nfe)
        if self.start == "raw":
            student.network.load_state_dict(_trained(work))
        return student

    def equipment(self, work: Work) -> Equipment:
        return Equipment(self._grid(work).times[:-1], work.model().field if self.two_step else None)

    def per_sample(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The premetric of one step (of the grid's times), and of one against two on fresh noise."""
        import torch

        from flowdistill import flow

        t, v = self._times(batch), flow.velocity(batch.x0, batch.eps)
        x_t = flow.interpolate(batch.x0, batch.eps, t)
        distance = self.distance(self.loss, batch)
        if self.two_step is None:
            return self.loss(network(x_t, t, batch.labels), v, x_t, t, distance)
        z, start = batch.draw.normal("two-step noise", tuple(x_t.shape[1:])), torch.ones_like(t)
        # One call for both: the network's batch is twice as large, and processes exchange its gradient once.
        labels = None if batch.labels is None else torch.cat([batch.labels, batch.labels])
        v_hat, v_z = network(torch.cat([x_t, z]), torch.cat([t, start]), labels).chunk(2)
        low, high = self.two_step.interval
        middle = (low + (high - low) * batch.draw.uniform("two-step times")).to(x_t)
        target = self.two_step.target(batch.equipment.flow, z, v_z, middle, batch.labels)
        one, terms = self.loss(v_hat, v, x_t, t, distance)
        two, _ = self.loss(v_z, target, z, start, distance)
        return one + self.two_step.weight * two, {**terms, "one_step": one, "two_step": two}

    def _times(self, batch: Batch) -> Tensor:
        """t [B]: the times at which a step begins, each equally likely."""
        times = batch.x0.new_tensor(batch.equipment.times)
        chosen = (batch.draw.uniform("timesteps") * len(times)).long()
        return times[chosen.to(times.device)]

    def _grid(self, work: Work) -> Schedule:
        folder = work.inputs.get("schedule")
        if folder is None:
            return uniform(self.nfe)
        from flowdistill import artifact

        path = Path(folder) / f"schedule-nfe{self.nfe}.json"
        if not path.exists():
            there = ", ".join(sorted(each.name for each in Path(folder).glob("schedule-nfe*.json")))
            raise MissingInput(f"{path}: no schedule for {self.nfe} evaluations, only {there}")
        content = artifact.load_json(path)
        if content["model"] != work.model().digest:
            raise UsageError(
                f"{work.stage}.schedule: {path} was made for another model; make one for the flow itself"
            )
        if content["solver"] != "euler":
            raise UsageError(
                f"{work.stage}.schedule: {path} is for the solver {content['solver']}, and the student takes "
                "Euler steps; make it with choose: boss"
            )
        return Schedule(tuple(content["times"]), "boss")


@dataclass(frozen=True)
class Equipment:
    """The times at which steps begin, and the flow for the two-step term."""

    times: tuple[float, ...]
    flow: VelocityField | None


def _trained(work: Work) -> dict[str, Tensor]:
    """The weights of the flow as they were trained, not averaged."""
    from flowdistill import artifact
    from flowdistill.training import CHECKPOINT

    given = work.inputs["model"]
    model = Path(given if isinstance(given, str) else given["name"])
    path = (model if model.is_dir() else model.parent) / CHECKPOINT
    if not (model.exists() and path.is_file()):
        raise UsageError(
            f"{work.stage}.start: raw weights are only there of a model that a stage has trained, in its "
            "checkpoints; take average"
        )
    prefix = "network."
    tensors, _ = artifact.load_tensors(path)
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
