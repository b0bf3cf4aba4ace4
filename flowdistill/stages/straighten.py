"""Straightening: a flow is trained to go in straight lines between the times at which it is sampled.

Nguyen, Nguyen and Nguyen, "Bellman Optimal Stepsize Straightening of Flow-Matching Models" (arXiv 2312.16414,
Sec. 3.3, Eq. 9). On the flow's own path, the velocity at each time t of a schedule becomes that of the chord
to the next one s, (x_t - x_s) / (t - s), so that Euler steps at these times miss nothing. The times are those
of BOSS's dynamic programme, or uniform.

The paper shows the network the states of the path (teacher forcing). In sampling it meets the states where
its own steps have led; `own_states` shows it these for a share of the steps, with the velocity that leads
back onto the path. Several `nfe` share a network: where their schedules have a time in common, as they all
have t = 1, it learns the mean of their chords.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from flowdistill.chords import ChordSource, Drawn, bellman_schedules
from flowdistill.errors import UsageError
from flowdistill.objectives import Loss, SquaredL2
from flowdistill.optimization import Lora
from flowdistill.recipe import Reference
from flowdistill.schedule import Schedule, uniform
from flowdistill.stages import OnPairs
from flowdistill.work import Work

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowdistill.chords import Chord
    from flowdistill.sources import Source
    from flowdistill.teachers import Card, Model
    from flowdistill.training import Batch


class Straighten(OnPairs):
    """BOSS: train a flow on the chords of a schedule."""

    verb: ClassVar[str] = "straighten"

    init: Annotated[str | None, Reference("model", allow_teacher=True)] = Field(
        "teacher", description="the flow that made the pairs; the student begins as it"
    )
    schedule: Annotated[str | None, Reference("schedule", optional=True)] = Field(
        None,
        description="boss stage whose Bellman paths the chords are of, whatever it has chosen; left out, "
        "uniform steps",
    )
    nfe: list[Annotated[int, Field(ge=1)]] = Field(
        [6], min_length=1, description="numbers of Euler steps that the student is made for"
    )
    own_states: float = Field(
        0.0, ge=0, le=1, description="share of steps that begin where the student itself arrives"
    )
    loss: Loss = SquaredL2()
    last: Loss | None = Field(
        None, description="in place of `loss` on the chords that end at the data; such as perceptual-l2"
    )
    lora: Lora | None = Field(
        None, description="train what is added to the weights; the model that is written has the sums"
    )

    @model_validator(mode="after")
    def _mergeable(self) -> Self:
        if self.lora and (self.sharded or self.post_hoc):
            what = "sharded" if self.sharded else "post_hoc"
            raise ValueError(f"lora: is not for trainings with `{what}`; leave one of them out")
        return self

    @property
    def losses(self) -> Mapping[str, Loss]:
        return {"loss": self.loss} | ({"last": self.last} if self.last else {})

    def preflight(self, inputs: Mapping[str, Any]) -> None:
        from flowdistill import students

        super().preflight(inputs)
        init = inputs["init"] if isinstance(inputs["init"], str) else inputs["init"]["name"]
        students.refuse_formula(init, f"{self.name}.init")

    def new_student(self, work: Work) -> Model:
        import torch

        from flowdistill import lora, randomness, students

        carried = {
            str(each.steps): {"solver": "euler", "schedule": each.name, "times": list(each.times)}
            for each in self._schedules(work)
        }
        start = work.model("init")
        student = students.continued(start, work, f"{work.stage}.init", nfe=max(self.nfe), schedules=carried)
        if self.lora:
            torch.manual_seed(randomness.key(work.seed, "weights"))
            lora.attach(student.weights, self.lora.rank, self.lora.alpha)
        return student

    def finished(self, network: nn.Module) -> nn.Module:
        from flowdistill import lora

        return lora.merged(network) if self.lora else network

    def source(self, work: Work, card: Card) -> Source:
        from flowdistill.sources import PairSource

        pairs = super().source(work, card)
        assert isinstance(pairs, PairSource)
        self._check_maker(work, pairs)
        return ChordSource(pairs, self.equipment(work), f"{work.stage}.pairs")

    def equipment(self, work: Work) -> Drawn:
        return Drawn(self._schedules(work), self.own_states)

    def per_sample(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The premetric between v_hat(x_t, t) and the velocity of the chord from x_t to x_s."""
        from flowdistill.flow import expand

        chord: Chord = batch.equipment.at(batch.draw)
        x_t = _walked(network, batch.eps, chord, batch.labels) if chord.own else batch.eps
        t, s = chord.start.to(x_t), chord.end.to(x_t)
        v = (x_t - batch.x0) / expand(t - s, x_t)
        v_hat = network(x_t, t, batch.labels)
        loss, terms = self.loss(v_hat, v, x_t, t, self.distance(self.loss, batch))
        if self.last is not None:
            at_end = s == 0
            last, _ = self.last(v_hat, v, x_t, t, self.distance(self.last, batch, at_end))
            loss = last.where(at_end, loss)
        return loss, {**terms, "t": t}

    def _schedules(self, work: Work) -> list[Schedule]:
        folder, wanted = work.inputs.get("schedule"), sorted(set(self.nfe))
        if folder is None:
            return [uniform(nfe) for nfe in wanted]
        key = f"{work.stage}.schedule"
        there = bellman_schedules(Path(folder), work.model("init").digest, key)
        missing = [nfe for nfe in wanted if nfe not in there]
        if missing:
            raise UsageError(
                f"{key}: {folder} has schedules for {', '.join(map(str, there))} evaluations, not for "
                f"{missing[0]}; add it to that stage's nfe"
            )
        return [there[nfe] for nfe in wanted]

    def _check_maker(self, work: Work, pairs: Any) -> None:
        made = {store.spec.origin.get("model"): store.folder for store in pairs.stores}
        for digest, folder in made.items():
            if digest != work.model("init").digest:
                raise UsageError(
                    f"{work.stage}.pairs: {folder} has paths of another model than `init`; a flow is "
                    "straightened on its own"
                )


def _walked(network: nn.Module, x: Tensor, chord: Chord, labels: Tensor | None) -> Tensor:
    """Where the student's own Euler steps lead from the noise x [B, *shape] to the beginning of its chord.

    All samples take as many steps, so that processes are in step; those that have arrived stay.
    """
    import torch

    from flowdistill.flow import expand

    grid, number = chord.grid.to(x), chord.number.to(x.device)
    training = network.training
    network.eval()
    with torch.no_grad():
        for i in range(grid.shape[1] - 2):
            step = torch.where(i < number, grid[:, i + 1] - grid[:, i], 0.0)
            x = x + expand(step, x) * network(x, grid[:, i], labels)
    network.train(training)
    return x
