"""What a recipe will cost, measured on a little of each stage before the rest is spent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowdistill import hardware
from flowdistill.errors import MissingInput, UsageError
from flowdistill.pipeline import Event, Pipeline, Standing, Started
from flowdistill.work import Cost, Stop

if TYPE_CHECKING:
    from flowdistill.stages import Stage


@dataclass(frozen=True)
class Estimate:
    """A stage's cost; without one, `remark` says why."""

    stage: str
    verb: str
    state: str
    cost: Cost | None
    remark: str = ""


@dataclass(frozen=True)
class Plan:
    """The cost of all stages, and what the machine has."""

    stages: list[Estimate]
    device: str
    free_bytes: int
    peak_memory_bytes: int

    @property
    def size_bytes(self) -> int:
        """What the stages that are not done will take on the disk, as far as it is known."""
        return sum(each.cost.size_bytes for each in self.stages if each.cost and each.state != "done")


def plan(pipeline: Pipeline, device: str, show: Callable[[Event], None]) -> Plan:
    """Measure every stage that is not done and whose inputs are there."""
    estimates = []
    for standing in pipeline.status():
        stage = pipeline.stages[standing.stage]
        estimates.append(_estimate(pipeline, stage, standing, device, show))
    there = next(
        each for each in (pipeline.out.absolute(), *pipeline.out.absolute().parents) if each.exists()
    )
    return Plan(estimates, device, _free(there), hardware.peak_memory_bytes())


def _estimate(
    pipeline: Pipeline, stage: Stage, standing: Standing, device: str, show: Callable[[Event], None]
) -> Estimate:
    name = standing.stage
    if standing.state == "done":
        return Estimate(name, stage.verb, standing.state, None, "done")
    if missing := pipeline.missing(name, stage.planned_without):
        return Estimate(name, stage.verb, standing.state, None, f"needs {', '.join(missing)}")
    show(Started(name, stage.verb))
    try:
        cost = stage.plan(pipeline.work(name, device, show, Stop()))
    except (MissingInput, UsageError) as error:
        return Estimate(name, stage.verb, standing.state, None, str(error).partition("\n")[0])
    return Estimate(name, stage.verb, standing.state, cost, "" if cost else "not measured for this verb")


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
