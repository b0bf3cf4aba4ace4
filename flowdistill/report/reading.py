"""What a run, or one evaluation, has left in its folders, checked against the manifests."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdistill import artifact
from flowdistill.errors import ArtifactError, MissingInput, UsageError
from flowdistill.evaluation import results
from flowdistill.evaluation.results import PICTURE, RESULT, SAMPLES, Content
from flowdistill.pipeline import STARTED
from flowdistill.training import LOG

if TYPE_CHECKING:
    from torch import Tensor

_SCHEDULE = re.compile(r"schedule-nfe([0-9]+)\.json")


@dataclass(frozen=True)
class Part:
    """A finished stage."""

    folder: Path
    manifest: artifact.Manifest

    @property
    def name(self) -> str:
        """As the recipe calls the stage."""
        return self.manifest.stage

    @cached_property
    def begun(self) -> dict[str, Any]:
        """What it was made from: `locations` of its inputs and `device`; empty where that was not kept."""
        path = self.folder / STARTED
        return artifact.load_json(path) if path.is_file() else {}

    def has(self, name: str) -> bool:
        """Whether a file is among its outputs."""
        return name in self.manifest.outputs

    def file(self, name: str) -> Path:
        """One of its outputs; ArtifactError where it is missing or altered."""
        if problems := artifact.differs(self.folder, name, self.manifest.outputs[name]):
            raise ArtifactError("\n".join([*problems, "restore the file, or make the stage anew"]))
        return self.folder / name


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    part: Part
    content: Mapping[str, Any]
    numbers: Content

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """What is known of each sample, by its noise."""
        return artifact.load_tensors(self.part.file(SAMPLES))[0] if self.part.has(SAMPLES) else {}

    @property
    def picture(self) -> bytes | None:
        """PNG with a row of samples for each row."""
        return self.part.file(PICTURE).read_bytes() if self.part.has(PICTURE) else None


@dataclass(frozen=True)
class Run:
    """The finished stages of a folder in the order they were made in, and the names of unfinished ones.

    `out` is the last part of the folder's path that a recipe has as `out`.
    """

    name: str
    out: str
    parts: tuple[Part, ...]
    unfinished: tuple[str, ...]

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """All of them."""
        return [_evaluation(part) for part in self.parts if part.has(RESULT)]

    @cached_property
    def trainings(self) -> dict[str, list[dict[str, Any]]]:
        """Stage -> its log, window by window."""
        return {part.name: _log(part) for part in self.parts if part.has(LOG)}

    @cached_property
    def schedules(self) -> dict[str, list[dict[str, Any]]]:
        """Stage -> its schedule files, fewest evaluations first."""
        found = {part.name: _schedules(part) for part in self.parts}
        return {name: files for name, files in found.items() if files}

    def part(self, name: str) -> Part:
        """A finished stage by its name."""
        return next(part for part in self.parts if part.name == name)


def read(folder: Path) -> Run:
    """The run, or the one stage, in a folder.

    Raises `MissingInput` where there is nothing finished, `UsageError` for a file, `ArtifactError` where a
    manifest is not what was written.
    """
    if not folder.exists():
        raise MissingInput(f"{folder}: no such folder")
    if not folder.is_dir():
        raise UsageError(f"{folder}: is a file, expected the folder of a run or of an evaluation")
    folders = [folder] if _is_stage(folder) else sorted(each for each in folder.iterdir() if _is_stage(each))
    # What a stage was before it was made anew is kept beside it, as NAME.old-1.
    current = [each for each in folders if each == folder or "." not in each.name]
    parts = [
        Part(each, artifact.Manifest.read(each)) for each in current if (each / artifact.MANIFEST).exists()
    ]
    if not parts:
        raise MissingInput(
            f"{folder}: no finished stage here ({artifact.MANIFEST} is missing)\n"
            "expected the folder that `flowdistill run` or `flowdistill eval` has written"
        )
    parts.sort(key=lambda part: (part.manifest.started, part.name))
    done = {part.folder for part in parts}
    unfinished = tuple(each.name for each in current if each not in done)
    whole = folder.resolve()
    out = whole.parent.name if _is_stage(folder) else whole.name
    name = f"{out}/{whole.name}" if _is_stage(folder) else out
    return Run(name, out, tuple(parts), unfinished)


def _is_stage(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (artifact.MANIFEST, STARTED))


def _evaluation(part: Part) -> Evaluation:
    path = part.file(RESULT)
    return Evaluation(part, artifact.load_json(path), results.read(path))


def _log(part: Part) -> list[dict[str, Any]]:
    from flowdistill.training.records import Log

    path = part.file(LOG)
    try:
        return [json.loads(line) for line in Log(path, sys.maxsize).lines]
    except ValueError:
        raise artifact.corrupt(path, "not a log of a training") from None


def _schedules(part: Part) -> list[dict[str, Any]]:
    found = {int(match[1]): name for name in part.manifest.outputs if (match := _SCHEDULE.fullmatch(name))}
    return [artifact.load_json(part.file(name)) for _, name in sorted(found.items())]
