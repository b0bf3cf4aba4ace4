"""Evaluation: what each model is worth at each number of network calls, with intervals.

Every row of the result samples the same noises under the same labels, so rows are compared sample
by sample and not only on the average: 32 paired samples show a difference of endpoint errors that
2,000 unpaired ones do not show in a Fréchet distance. The paired error measures fidelity to the
accurate solution; a student may rightly send a noise elsewhere, then the Fréchet distance counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from flowdistill.errors import UsageError, unknown
from flowdistill.recipe import Reference, Settings
from flowdistill.solvers import SOLVERS, SolverName, steps_for
from flowdistill.stages import Done, Stage, Work

Evaluations = list[Annotated[int, Field(ge=1)]]


class Accurate(Settings):
    """The solution that endpoints are compared with: the teacher's, or else the first model's."""

    solver: SolverName = "heun"
    steps: int = Field(32, ge=1, description="uniform steps; heun makes 2 steps - 1 evaluations")
    samples: int = Field(512, ge=2, description="noises that it is solved for, the first of all")


class Evaluate(Stage):
    """Fréchet distance, class accuracy, paired endpoint error, straightness and latency."""

    verb: ClassVar[str] = "eval"
    produces = "evaluation"

    models: Annotated[list[str] | None, Reference("model", allow_teacher=True)] = Field(
        None, description="models that are measured"
    )
    schedule: Annotated[str | None, Reference("schedule", optional=True)] = Field(
        None, description="boss stage whose times are tried beside uniform ones, on its own model"
    )
    samples: int = Field(5000, ge=2, description="samples for each row")
    nfe: Evaluations | dict[str, Evaluations] = Field(
        [1, 2, 4, 8], description="numbers of network evaluations, for all models or for each"
    )
    solver: SolverName = "euler"
    batch_size: int = Field(256, gt=0, description="samples that are integrated at once")
    seed: int = Field(
        0, ge=0, description="of noises and labels; evaluations that are compared must share it"
    )
    reference: Accurate = Accurate()
    straightness: int = Field(
        128, ge=0, description="paths that it is measured on, at `reference.steps` Euler steps"
    )
    latency: bool = Field(True, description="time one sample at batch size 1")

    @model_validator(mode="after")
    def _possible(self) -> Evaluate:
        listed = self.models or []
        if len(set(listed)) < len(listed):
            raise ValueError("models: a model is listed twice")
        if isinstance(self.nfe, dict) and listed:
            for name in self.nfe:
                if name not in listed:
                    raise ValueError(f"nfe: {unknown('model', name, listed)}")
            for name in listed:
                if name not in self.nfe:
                    raise ValueError(f"nfe: has no entry for model '{name}'")
        for nfe in chain(*(self.nfe.values() if isinstance(self.nfe, dict) else [self.nfe])):
            try:
                steps_for(SOLVERS[self.solver], nfe)
            except UsageError as error:
                raise ValueError(f"nfe: {error}") from error
        return self

    def evaluations(self, model: str) -> Sequence[int]:
        """The numbers of evaluations for a model, in order, each once."""
        return sorted(set(self.nfe[model] if isinstance(self.nfe, dict) else self.nfe))

    def run(self, work: Work) -> Done:
        from flowdistill.evaluation.bench import Bench

        return Bench(self, work).run()
