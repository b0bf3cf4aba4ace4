"""The ways that points in the plane take, by the models of a run: what straightness is about, to be seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flowdistill import artifact, randomness, teachers
from flowdistill.errors import FlowdistillError
from flowdistill.references import TEACHER
from flowdistill.report.reading import Part, Run
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.training import MODEL

_PATHS, _STEPS = 48, 32
_PLANE = (2,)
_CLOSED_FORM = "analytic:"
"""How teachers begin that are opened for a picture: it costs nothing."""

Path = list[tuple[float, float]]


@dataclass(frozen=True)
class Ways:
    """Paths of one model from noises that all models share."""

    model: str
    paths: list[Path]


def in_the_plane(run: Run) -> list[Ways]:
    """Of a teacher in closed form, and of every model that the run has made; empty for other data."""
    return [_follow(name, model) for name, model in _models(run) if tuple(model.card.shape) == _PLANE]


def extent(found: list[Ways]) -> float:
    """Half the side of a square around 0 that holds all paths."""
    return 1.05 * max(abs(x) for ways in found for path in ways.paths for point in path for x in point)


def teacher(run: Run) -> Any:
    """What the recipe says of the teacher; None where no stage was made from one."""
    return next((found for part in run.parts if (found := _teacher_of(part)) is not None), None)


def _models(run: Run) -> Iterator[tuple[str, teachers.Model]]:
    reference = teacher(run)
    name = reference.get("name") if isinstance(reference, Mapping) else reference
    if isinstance(name, str) and name.startswith(_CLOSED_FORM):
        with suppress(FlowdistillError):  # it is no more: the picture goes without it
            yield TEACHER, teachers.open_model(reference)
    for part in run.parts:
        if part.has(MODEL) and artifact.read_header(part.file(MODEL)).get("shape") == list(_PLANE):
            yield part.name, teachers.load(part.folder / MODEL)


def _follow(name: str, model: teachers.Model) -> Ways:
    seed = randomness.key(0, "report")
    states = []
    end = integrate(
        model.field,
        randomness.noise(seed, range(_PATHS), model.card.shape),
        uniform(_STEPS),
        SOLVERS["euler"],
        model.labels(seed, range(_PATHS)),
        lambda i, t, x, v: states.append(x.tolist()),
    )
    return Ways(name, [[(x, y) for x, y in path] for path in zip(*states, end.tolist(), strict=True)])


def _teacher_of(part: Part) -> Any:
    """The location that stands for the teacher among what a stage was made from."""
    for value in part.begun.get("locations", {}).values():
        for name, location in value if isinstance(value, list) else []:
            if name == TEACHER:
                return location
    for field, value in part.begun.get("locations", {}).items():
        if part.manifest.settings.get(field) == TEACHER:
            return value
    return None
