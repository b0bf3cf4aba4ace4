"""Making damaged parts of a finished stage again, bit for bit.

A stage's folder says how it was made and from what, so no recipe is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flowdistill import artifact, pipeline, randomness
from flowdistill.errors import ArtifactError, MissingInput
from flowdistill.stages import verbs
from flowdistill.work import Progress, Stop, Work


def repair(folder: Path, report: Callable[[Progress], None], stop: Stop) -> list[str]:
    """Make again what is damaged or missing, and return the names of those files.

    Raises:
        MissingInput: the folder is of no stage, or what it was made from is not there any more.
        UsageError: the stage is of a kind that cannot be repaired, or its inputs have changed.
        ArtifactError: what was made again is not what was there, as with another version of torch.
    """
    begun = _begun(folder)
    stage = verbs()[begun["verb"]].model_validate_json(json.dumps(begun["settings"]))
    with artifact.lock(folder.parent), artifact.joined(folder):
        before = _recorded(folder)
        work = _work(folder, begun, report, stop)
        damaged = stage.mend(work)
        started = datetime.now(UTC)
        if before is None:
            (folder / artifact.MANIFEST).unlink(missing_ok=True)
            damaged.append(artifact.MANIFEST)
            pipeline.seal(stage, work, begun["seed"], started)
        else:
            stage.run(work)
            _check(folder, before)
    return damaged


def _begun(folder: Path) -> dict[str, Any]:
    path = folder / pipeline.STARTED
    if not path.is_file():
        raise MissingInput(f"{folder}: not the folder of a stage ({pipeline.STARTED} is missing)")
    begun = artifact.load_json(path)
    if "locations" not in begun:
        raise ArtifactError(f"{path}: made by a version of flowdistill that did not say from what")
    return begun


def _recorded(folder: Path) -> artifact.Manifest | None:
    """The manifest, if it is there and intact."""
    with suppress(ArtifactError, MissingInput):
        return artifact.Manifest.read(folder)
    return None


def _work(folder: Path, begun: dict[str, Any], report: Callable[[Progress], None], stop: Stop) -> Work:
    return Work(
        stage=begun["stage"],
        folder=folder,
        seed=randomness.key(begun["seed"], begun["stage"]),
        device=begun["device"],
        inputs=begun["locations"],
        parents=begun["inputs"],
        settings=begun["settings"],
        report=report,
        stop=stop,
    )


def _check(folder: Path, before: artifact.Manifest) -> None:
    wrong = before.verify(folder)
    if wrong:
        made = ", ".join(f"{name} {version}" for name, version in before.versions.items())
        raise ArtifactError(
            f"{wrong[0]} (and {len(wrong) - 1} more)\n"
            f"it was made again, but not bit for bit: the first time it was {before.device}, {made}"
        )
