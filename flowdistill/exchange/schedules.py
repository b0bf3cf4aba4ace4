"""Schedules for other programs: the steps of a schedule file as diffusers and ComfyUI take them.

    diffusers   a folder: a scheduler that shifts nothing, and the sigmas to call a pipeline with
    comfyui     the text for the node ManualSigmas
    sigmas      a JSON list; also for a scheduler that shifts what it is given

Their sigma is our time, and their Euler is ours. Single precision is theirs: nothing is written whose times
do not come back from it within `TOLERANCE`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from flowdistill import artifact, foreign
from flowdistill.errors import ArtifactError, UsageError, listed, unknown
from flowdistill.exchange.growing import new_folder
from flowdistill.schedule import Schedule

Form = Literal["diffusers", "comfyui", "sigmas"]
FORMS: tuple[Form, ...] = get_args(Form)
TOLERANCE = 1e-6
SIGMAS = "sigmas.json"
CONFIG = "scheduler_config.json"
CLASS = "fixed_sigmas.py"

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_NEUTRAL = {
    "_class_name": _SCHEDULER,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
_SHIFT_AT_MOST = 1000.0


@dataclass(frozen=True)
class Exported:
    """What was written; `sigmas` as they stand there."""

    files: list[Path]
    sigmas: list[float]
    steps: int
    read_back: str | None = None
    """The package, with its version, that read the files and had the times of the schedule."""


def export_schedule(
    source: Path, destination: Path, form: Form, *, shift: float | None = None, mu: float | None = None
) -> Exported:
    """Write the steps of a schedule file for another program, as the new file or folder `destination`.

    With `shift`, or `mu` for exp(mu), the list is such that a scheduler that shifts so comes to the times of
    the schedule. Nothing is left behind if anything is wrong.

    Raises:
        MissingInput: there is no such file, or diffusers, which has to read its files back, is not installed.
        UsageError: the steps are not Euler's, the destination is there already, or the shift is not for this.
        ArtifactError: the file is no schedule, or is not read back as what it is.
        ResourceError: the disk is full or fails.
    """
    if form not in FORMS:
        raise UsageError(unknown("format", form, FORMS))
    factor = _shift(form, shift, mu)
    schedule = read(source, form)
    if os.path.lexists(destination):
        raise UsageError(f"{destination}: is there already; choose another name, or delete it first")
    if form == "diffusers":
        return _for_diffusers(schedule, destination)
    given = schedule.sigmas(factor)
    _check(_reached(given, factor), schedule, f"{source}: a scheduler with shift {factor:g}")
    if form == "comfyui":
        given.append(0.0)
        text = comfyui(given)
    else:
        text = json.dumps(given)
    artifact.atomic_write(destination, f"{text}\n".encode())
    return Exported([destination], given, schedule.steps)


def read(path: Path, form: Form = "sigmas") -> Schedule:
    """The schedule in a file of `flowdistill boss`, if a list of sigmas is all that there is to it."""
    if path.is_dir():
        names = sorted(each.name for each in path.glob("schedule-*.json"))
        raise UsageError(
            f"{path}: is a folder, and --as {form} is for a schedule file, "
            f"like {listed(names or ['schedule-nfe4.json'])}"
        )
    content = artifact.load_json(path)
    try:
        solver, times = str(content["solver"]), tuple(map(float, content["times"]))
        schedule = Schedule(times, path.name)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise ArtifactError(
            f"{path}: not a schedule, expected a file that `flowdistill boss` wrote"
        ) from error
    if solver != "euler":
        raise UsageError(
            f"{path}: is for the solver {solver}, and {form} would take Euler steps at its times: "
            "only schedules for euler can be exported; `flowdistill boss -s boss.choose=euler` makes such"
        )
    return schedule


def comfyui(sigmas: Sequence[float]) -> str:
    """The numbers as ManualSigmas reads them, which knows no exponents."""
    return ", ".join(np.format_float_positional(sigma, trim="-") for sigma in sigmas)


def _shift(form: Form, shift: float | None, mu: float | None) -> float:
    """The factor that a scheduler shifts by."""
    if shift is None and mu is None:
        return 1.0
    if shift is not None and mu is not None:
        raise UsageError("--shift and --mu: a scheduler has one of them, and --mu M is --shift exp(M)")
    option = "--shift" if mu is None else "--mu"
    if form != "sigmas":
        raise UsageError(f"{option}: is for --as sigmas alone, since {form} is given what shifts nothing")
    if shift is not None:
        if not 1 / _SHIFT_AT_MOST <= shift <= _SHIFT_AT_MOST:
            raise UsageError(
                f"--shift {shift:g}: expected a shift from {1 / _SHIFT_AT_MOST:g} to {_SHIFT_AT_MOST:g}"
            )
        return shift
    assert mu is not None
    if not abs(mu) <= math.log(_SHIFT_AT_MOST):
        most = math.log(_SHIFT_AT_MOST)
        raise UsageError(
            f"--mu {mu:g}: expected a number from {-most:.1f} to {most:.1f}, the logarithm of a shift"
        )
    return math.exp(mu)


def _reached(given: Sequence[float], shift: float) -> list[float]:
    """What a scheduler makes of the list in single precision."""
    sigmas = np.array(given, dtype=np.float32)
    return [*(np.float32(shift) * sigmas / (1 + np.float32(shift - 1) * sigmas)).tolist(), 0.0]


def _check(found: Sequence[float], schedule: Schedule, who: str) -> None:
    """Refuse where the times that are reached are not those of the schedule, or do not fall."""
    falls = all(a > b for a, b in pairwise(found))
    same = len(found) == len(schedule.times)
    off = max(abs(a - b) for a, b in zip(found, schedule.times, strict=True)) if same else math.inf
    if not falls or not off <= TOLERANCE:
        raise ArtifactError(
            f"{who} does not come to the times of {schedule.name}: off by {off:.2g}, at most {TOLERANCE:g}"
        )


def _for_diffusers(schedule: Schedule, destination: Path) -> Exported:
    """The scheduler, the sigmas and the class for pipelines without `sigmas`, as diffusers reads them."""
    euler = foreign.member("diffusers", _SCHEDULER)
    who = f"diffusers {foreign.load('diffusers').__version__}"
    from flowdistill.exchange import fixed_sigmas

    sigmas = schedule.sigmas()
    contents = {
        CONFIG: json.dumps(_NEUTRAL, indent=2) + "\n",
        SIGMAS: json.dumps(sigmas) + "\n",
        CLASS: Path(fixed_sigmas.__file__).read_text("utf-8"),
    }
    with new_folder(destination) as folder:
        for name, text in contents.items():
            artifact.atomic_write(folder / name, text.encode())
        stock = euler.from_pretrained(str(folder), local_files_only=True)
        stock.set_timesteps(sigmas=json.loads((folder / SIGMAS).read_text()))
        fixed = fixed_sigmas.FixedSigmas.from_pretrained(str(folder), local_files_only=True)
        fixed.set_timesteps(schedule.steps)
        for scheduler in (stock, fixed):
            _check(scheduler.sigmas.tolist(), schedule, f"{destination}: {type(scheduler).__name__} of {who}")
    return Exported([destination / name for name in contents], sigmas, schedule.steps, who)
