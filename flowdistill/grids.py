"""Time grids as settings of a recipe: `schedule: uniform`, `schedule: {name: shifted, shift: 3}`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from flowdistill.errors import UsageError
from flowdistill.schedule import Schedule, edm, shifted, uniform
from flowdistill.settings import Settings


class Edm(Settings):
    """Karras et al. 2022 (arXiv 2206.00364), Eq. 5: close at small noise levels; for EDM's teachers."""

    name: Literal["edm"] = "edm"
    sigma_min: float = Field(0.002, gt=0, description="the last noise level but 0, sigma = t / (1 - t)")
    sigma_max: float = Field(80.0, gt=0, description="the first noise level; it stands for t = 1")
    rho: float = Field(7.0, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Edm:
        if not self.sigma_min < self.sigma_max:
            raise ValueError(
                f"expected sigma_min < sigma_max, found {self.sigma_min:g} and {self.sigma_max:g}"
            )
        return self

    def schedule(self, steps: int) -> Schedule:
        return edm(steps, self.sigma_min, self.sigma_max, self.rho)


class Shifted(Settings):
    """shift t / (shift t + 1 - t) of uniform t, as in SD3 (arXiv 2403.03206)."""

    name: Literal["shifted"] = "shifted"
    shift: float = Field(gt=0, description="above 1, more steps near the noise")

    def schedule(self, steps: int) -> Schedule:
        return shifted(steps, self.shift)


class Times(Settings):
    """These times, one more than steps, such as a `schedule-nfeN.json` of boss has."""

    name: Literal["times"] = "times"
    times: list[float] = Field(min_length=2, description="falling from 1 to 0")

    @model_validator(mode="after")
    def _falling(self) -> Times:
        try:
            self.schedule(len(self.times) - 1)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return self

    def schedule(self, steps: int) -> Schedule:
        return Schedule(tuple(self.times), "times")


Grid: TypeAlias = Literal["uniform", "edm"] | Annotated[Edm | Shifted | Times, Field(discriminator="name")]


def schedule(grid: Grid, steps: int) -> Schedule:
    """The grid with this number of steps; UsageError where it has another."""
    if isinstance(grid, str):
        return {"uniform": uniform, "edm": edm}[grid](steps)
    found = grid.schedule(steps)
    if found.steps != steps:
        raise UsageError(f"the schedule has {found.steps} steps, `steps` says {steps}")
    return found
