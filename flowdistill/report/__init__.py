"""A run as one HTML file for people: a verdict, plots, pictures, tables, and where it all came from.

The file needs nothing outside it. The same folders make the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowdistill import artifact, plots
from flowdistill.errors import MissingInput, UsageError

FILE = "report.html"


def write(folder: Path, out: Path | None = None, others: Sequence[Path] = ()) -> Path:
    """Write the report of a run's or evaluation's folder; returns its path.

    `others` are evaluations that are shown beside it. Nothing is written unless all of it can be read.

    Raises:
        MissingInput: matplotlib, the folder or a finished stage is not there, or nothing can be reported.
        ArtifactError: a file is not what its stage wrote.
        UsageError: the folder is a file, or `out` cannot be written.
    """
    plots.require()
    path = out or folder / FILE
    if path.is_dir():
        raise UsageError(f"{path}: is a folder, expected the name of a file")
    artifact.atomic_write(path, _render(folder, others))
    return path


def _render(folder: Path, others: Sequence[Path]) -> bytes:
    from flowdistill.report import reading, sections

    run = reading.read(folder)
    if not (run.evaluations or run.trainings or run.schedules):
        raise MissingInput(
            f"{folder}: nothing to report; it has {', '.join(part.name for part in run.parts)}, "
            "expected an evaluation, a training or a schedule"
        )
    if others and not run.evaluations:
        raise MissingInput(f"{folder}: has no evaluation that others could be compared with")
    beside = {str(other): reading.read(other) for other in others}
    for name, other in beside.items():
        if not other.evaluations:
            raise MissingInput(f"{name}: has no finished evaluation to compare with")
    return sections.page_of(run, {name: other.evaluations[-1] for name, other in beside.items()})
