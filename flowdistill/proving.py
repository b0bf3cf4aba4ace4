"""Proving that a training resumes exactly: a few steps of it, once in one go and once killed and continued.

Each run is the real command in a process of its own, in a folder that is gone afterwards; of the stage's own
folder nothing is read or written.
"""

from __future__ import annotations

import filecmp
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flowdistill import artifact
from flowdistill.errors import FlowdistillError, ResourceError, UsageError
from flowdistill.pipeline import Pipeline
from flowdistill.stages import Training
from flowdistill.training import CHECKPOINT, LOG
from flowdistill.work import Progress, Stop

_LENGTHS = (24, 240, 2400)
"""Steps: as few as will do, and more where a training is over before it can be killed."""
_PIECE = 7
"""Steps between two checkpoints."""
_WINDOW = 5
"""Steps between two lines of the log, so that checkpoints fall within a window."""
_KILLED_AFTER = ((CHECKPOINT,), (CHECKPOINT, LOG))
"""A run is killed as soon as these files were new in turn: behind a checkpoint, and while one is written, for
which the log comes first."""
_RUNS = len(_KILLED_AFTER) + 2
_LOOK_EVERY_SECONDS = 0.001
_PATIENCE_SECONDS = 60.0
"""How long killed processes may take to let go of their folder."""


class RunFailed(FlowdistillError):
    """A run of the proof failed, and has `said` why; `exit_code` is its own."""

    def __init__(self, code: int, said: str) -> None:
        self.exit_code = code if code > 0 else 128 - code  # type: ignore[misc]
        super().__init__(said.strip().removeprefix("error: ") or f"ended with exit code {self.exit_code}")


@dataclass(frozen=True)
class Proof:
    """What was done, and which of the `compared` files are different."""

    stage: str
    steps: int
    checkpoint_every: int
    killed_at: list[int]
    """The step of the checkpoint that each killed run left."""
    compared: list[str]
    different: list[str]


def prove(
    pipeline: Pipeline,
    name: str,
    arguments: Sequence[str],
    stop: Stop,
    report: Callable[[Progress], None],
) -> Proof:
    """Train a few steps of stage `name` in one go and in killed pieces, and compare what is left of both.

    `arguments` name the recipe and what is changed of it. The inputs of the stage have to be done.

    Raises:
        UsageError: the stage is no training.
        RunFailed: one of the runs failed by itself.
        ResourceError: the training ends before it can be killed, so that nothing is proved.
        Interrupted: asked to stop; nothing is left of the proof.
    """
    if not isinstance(pipeline.stages[name], Training):
        raise UsageError(f"stage '{name}' is no training: there is nothing to prove")
    artifact.create_folder(pipeline.out)
    for steps in _LENGTHS:
        with tempfile.TemporaryDirectory(prefix=".proof-", dir=pipeline.out) as folder:
            proof = _Attempt(pipeline, name, arguments, steps, Path(folder), stop, report).proof()
        if proof is not None:
            return proof
    raise ResourceError(
        f"{name}: {_LENGTHS[-1]} steps were over before they could be killed: nothing is proved"
    )


@dataclass(frozen=True)
class _Attempt:
    """A proof with so many steps, in a folder of its own."""

    pipeline: Pipeline
    name: str
    arguments: Sequence[str]
    steps: int
    folder: Path
    stop: Stop
    report: Callable[[Progress], None]

    def proof(self) -> Proof | None:
        """None where a run was over before it could be killed."""
        whole, broken = (self._results(each) for each in ("whole", "broken"))
        killed_at = []
        for number, files in enumerate(_KILLED_AFTER):
            self.report(Progress(number, _RUNS, "run"))
            if not self._killed(broken, files):
                return None
            killed_at.append(int(artifact.read_header(broken / self.name / CHECKPOINT)["step"]))
        for number, out in enumerate((broken, whole), start=len(killed_at)):
            self.report(Progress(number, _RUNS, "run"))
            self._killed(out)
        self.report(Progress(_RUNS, _RUNS, "run"))
        one, other = (out / self.name for out in (whole, broken))
        outputs = {name for folder in (one, other) for name in artifact.Manifest.read(folder).outputs}
        compared = sorted({*outputs, CHECKPOINT})
        _, *unequal = filecmp.cmpfiles(one, other, compared, shallow=False)
        different = sorted(name for names in unequal for name in names)
        return Proof(self.name, self.steps, _PIECE, killed_at, compared, different)

    def _results(self, name: str) -> Path:
        """A folder of results in which the inputs of the stage are done."""
        out = self.folder / name
        out.mkdir()
        for needed in self.pipeline.needed(self.name)[:-1]:
            (out / needed).symlink_to((self.pipeline.out / needed).resolve())
        return out

    def _killed(self, out: Path, files: Sequence[str] = ()) -> bool:
        """Continue the training in `out`; whether it was killed before its end, `files` being new in turn."""
        paths: list[Path | None] = [out / self.name / file for file in files]
        with (self.folder / "said").open("w+", encoding="utf-8") as said:
            with _running(self._command(out), out, said.fileno()) as process:
                for path in paths or [None]:
                    before = _identity(path)
                    while process.poll() is None and _identity(path) == before:
                        self.stop.check()
                        time.sleep(_LOOK_EVERY_SECONDS)
                reached = process.poll() is None
            if process.returncode == 0:
                return False
            if not reached or process.returncode != -signal.SIGKILL:
                said.seek(0)
                raise RunFailed(process.returncode, said.read())
        return not (out / self.name / artifact.MANIFEST).exists()

    def _command(self, out: Path) -> list[str]:
        short = {"steps": self.steps, "checkpoint_every": _PIECE, "log_every": _WINDOW}
        settings = [part for key, value in short.items() for part in ("-s", f"{self.name}.{key}={value}")]
        verb = self.pipeline.stages[self.name].verb
        one = [verb, *self.arguments, *settings, "--stage", self.name, "--only", "--out", str(out), "-q"]
        return [sys.executable, "-m", "flowdistill", *one]


@contextmanager
def _running(command: Sequence[str], out: Path, said: int) -> Iterator[subprocess.Popen[bytes]]:
    """A command that works in `out`; if it runs at the end, it is killed with all that it has started."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            # A launcher's processes have groups of their own. It goes first, or it would start them again.
            for group in _descendants(process.pid):
                with suppress(ProcessLookupError, PermissionError):  # gone, or in the group of another
                    os.killpg(group, signal.SIGKILL)
            process.wait()
            _wait_for(out)


def _descendants(process: int) -> list[int]:
    """A process, and all that it and those have started, as far as the system tells."""
    found = [process]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):  # gone by now
                found += map(int, children.read_text().split())
    return found


def _wait_for(out: Path) -> None:
    """Until killed processes, which are not all our children, have let go of the folder."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with artifact.lock(out):
                return
        except UsageError:
            if time.monotonic() > until:
                raise
        time.sleep(_LOOK_EVERY_SECONDS)


def _identity(path: Path | None) -> tuple[int, int] | None:
    """What is another one for each file that takes this place."""
    try:
        found = path and path.stat()
    except FileNotFoundError:
        return None
    return (found.st_ino, found.st_mtime_ns) if found else None
