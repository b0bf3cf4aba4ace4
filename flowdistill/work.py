"""What a stage is given to run, and what it gives back."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flowdistill.errors import Interrupted
from flowdistill.processes import World

if TYPE_CHECKING:
    from flowdistill.pairstore import PairStore
    from flowdistill.teachers import Model

Figures = dict[str, Any]
Indices = TypeVar("Indices", range, list[int])


def batches(indices: Indices, size: int) -> Iterator[Indices]:
    """`indices` in pieces of `size`, the last of which may be shorter."""
    return (indices[start : start + size] for start in range(0, len(indices), size))


@dataclass(frozen=True)
class Done:
    """What a stage made: its files, relative to the folder, what was measured, the type it computed in."""

    outputs: Sequence[str]
    figures: Figures
    dtype: str = "float32"
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of those outputs whose writer knows it, which spares reading them again."""


@dataclass(frozen=True)
class Cost:
    """What a stage will take: `units` at `per_second` on one device, and what it leaves on the disk."""

    units: int
    unit: str
    per_second: float
    seconds: float
    size_bytes: int
    candidates: Sequence[Mapping[str, Any]] = ()
    """Networks that the stage may choose, each with what it costs, the one that it will choose marked."""


class Stop:
    """Set by the first SIGINT or SIGTERM, or when the time is up; long work asks where its state is whole.

    Between two calls of `check` the answer is the same, whatever happens meanwhile: what was saved for it, or
    agreed on with other processes, is what `check` acts on.
    """

    def __init__(self, seconds: float = math.inf, limit: str = "") -> None:
        self.limit = limit
        """How a person said how many seconds there are, as in `--max-time 2h`."""
        self._deadline = time.monotonic() + seconds
        self._received = 0
        self._answer: int | None = None

    @property
    def signum(self) -> int:
        """The signal that work has to end by, 0 while it may go on: a deadline is like a SIGTERM."""
        if self._answer is None:
            self._answer = self._received or (signal.SIGTERM if self.seconds_left <= 0 else 0)
        return self._answer

    @signum.setter
    def signum(self, agreed: int) -> None:
        self._answer = agreed

    @property
    def seconds_left(self) -> float:
        """Until the time is up."""
        return self._deadline - time.monotonic()

    @property
    def is_late(self) -> bool:
        """Whether the time is up, and no signal came first."""
        return not self._received and self.seconds_left <= 0

    def receive(self, signum: int) -> None:
        """Note a signal of the system, at any moment."""
        self._received = signum

    def check(self) -> None:
        """Raise `Interrupted` if work has to end. Call it only when everything is saved."""
        if self.signum:
            raise Interrupted(self.signum)
        self._answer = None


@dataclass(frozen=True)
class Progress:
    """How far a stage is: `done` of `total` `unit`s, with figures worth a glance."""

    done: int
    total: int
    unit: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a stage is given to run: its folder, its opened inputs, the seed, the device."""

    stage: str
    folder: Path
    seed: int
    device: str
    inputs: Mapping[str, Any]
    """Reference field -> location, or list of (name, location): what the recipe's references resolved to."""
    parents: Mapping[str, str]
    """Input name -> digest, for the cards of what this stage makes."""
    settings: Mapping[str, Any]
    """The stage's resolved section of the recipe."""
    report: Callable[[Progress], None]
    stop: Stop
    world: World = World()
    """The processes that do a collective stage together."""

    def model(self, reference: str = "model") -> Model:
        """Open the model that the field `reference` names; ArtifactError where it fails the probe."""
        return self._open(self.inputs[reference])

    def models(self, reference: str = "models") -> dict[str, Model]:
        """Open the models of a field that lists several, by the names the recipe gave, as `model` does."""
        return {name: self._open(location) for name, location in self.inputs[reference]}

    def _open(self, location: str | Mapping[str, Any]) -> Model:
        from flowdistill import probing, teachers

        model = teachers.open_model(location, self.device)
        if model.probe:
            probing.strict(model, location if isinstance(location, str) else location["name"])
        return model

    def pairs(self, reference: str = "pairs") -> list[PairStore]:
        """Open the pairs that the field `reference` names, one store or several."""
        from flowdistill.pairstore import PairStore

        named = self.inputs[reference]
        return [
            PairStore.open(each) for each in ([named] if isinstance(named, str) else dict(named).values())
        ]
