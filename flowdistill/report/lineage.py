"""Where each part of a run came from, and how it is made again: digests, commands, the recipe."""

from __future__ import annotations

import shlex
from datetime import timedelta
from typing import Any

import yaml

from flowdistill.references import TEACHER
from flowdistill.report.paths import teacher
from flowdistill.report.reading import Run

RECIPE = "recipe.yaml"
"""What the commands call the recipe that the page shows."""
SHORT = 12
"""Characters of a digest that are shown."""

HEADINGS = ("stage", "verb", "made from", "digest", "seed", "device", "dtype", "begun (UTC)", "took")


def stages(run: Run) -> list[list[str]]:
    """A row below `HEADINGS` for each finished stage."""
    rows = []
    for part in run.parts:
        manifest = part.manifest
        inputs = [f"{name} {digest[:SHORT]}" for name, digest in manifest.inputs.items()]
        took = timedelta(seconds=round((manifest.finished - manifest.started).total_seconds()))
        rows.append(
            [
                part.name,
                manifest.verb,
                ", ".join(inputs) or "nothing",
                manifest.digest[:SHORT],
                str(manifest.seed),
                manifest.device,
                manifest.dtype,
                f"{manifest.started:%Y-%m-%d %H:%M}",
                str(took),
            ]
        )
    return rows


def versions(run: Run) -> dict[str, str]:
    """Package -> its version, or all versions, with the stages that were made with each."""
    found: dict[str, dict[str, list[str]]] = {}
    for part in run.parts:
        for package, version in part.manifest.versions.items():
            found.setdefault(package, {}).setdefault(version, []).append(part.name)
    return {
        package: next(iter(by_version))
        if len(by_version) == 1
        else "; ".join(f"{version} ({', '.join(names)})" for version, names in by_version.items())
        for package, by_version in sorted(found.items())
    }


def commands(run: Run) -> str:
    """What makes each stage again with the recipe of the page, line by line."""
    lines = []
    for part in run.parts:
        device = part.begun.get("device")
        words = ["flowdistill", part.manifest.verb, RECIPE, "--stage", part.name, "--out", run.out]
        words += ["--device", str(device)] if device else []
        lines.append(shlex.join(words))
    return "\n".join(lines)


def missing(run: Run) -> list[str]:
    """Stages that others were made from and that the folder does not have, by name."""
    made = {part.name for part in run.parts} | {TEACHER}
    inputs = {name: digest for part in run.parts for name, digest in part.manifest.inputs.items()}
    # Files are told by their path, and data that ship stand for themselves.
    stages = {name for name, digest in inputs.items() if digest != name and not set(name) & set("/.:")}
    return sorted(stages - made)


def recipe(run: Run) -> str | None:
    """The recipe with all settings as they were resolved; None where the stages had different seeds."""
    seeds = {part.manifest.seed for part in run.parts}
    if len(seeds) > 1:
        return None
    content: dict[str, Any] = {"seed": seeds.pop()}
    if (reference := teacher(run)) is not None:
        content["teacher"] = reference
    content["stages"] = [{part.manifest.verb: part.manifest.settings} for part in run.parts]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
