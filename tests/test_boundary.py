"""Errors and signals: what the shell sees, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from flowdistill import artifact, errors
from flowdistill.boundary import Invocation, guard
from flowdistill.cli import execute
from flowdistill.work import Stop

ROOT = Path(__file__).parents[1]


def guarded(error: BaseException, invocation: Invocation | None = None) -> int:
    def fail() -> int:
        raise error

    return guard(fail, invocation or Invocation([]))


# Errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (errors.UsageError("no"), 2, "error: no\n"),
        (
            errors.RecipeError([errors.Problem("r.yaml", 2, 5, "boss.nfe", "no")]),
            2,
            "r.yaml:2:5: boss.nfe: no\n",
        ),
        (errors.MissingInput("no"), 3, "error: no\n"),
        (errors.ArtifactError("no"), 4, "error: no\n"),
        (errors.ResourceError("no"), 5, "error: no\n"),
        (errors.Diverged("no"), 6, "error: no\n"),
        (MemoryError(), 5, "error: the memory is full"),
        (torch.OutOfMemoryError("CUDA out of memory."), 5, "error: the device's memory is full"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), 5, "error: the memory is full"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.bin"),
            5,
            "error: x.bin: No space left on device\n",
        ),
        (OSError(errno.EROFS, "Read-only file system", "x.bin"), 2, "error: x.bin: Read-only file system\n"),
        (ZeroDivisionError("by zero"), 1, "error: a bug in flowdistill, ZeroDivisionError: by zero\n"),
        (OSError(errno.EIO, "I/O error"), 1, "error: a bug in flowdistill, OSError"),
        (RecursionError(), 1, "error: a bug in flowdistill, RecursionError"),
    ],
)
def test_every_error_has_a_message_and_an_exit_code(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(error) == code
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith(told) and "Traceback" not in streams.err
    assert len(streams.err.splitlines()) <= 3


def test_memory_is_really_refused_with_that_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert guard(lambda: len(torch.empty(2**60, dtype=torch.uint8)), Invocation([])) == 5
    assert "memory is full" in capsys.readouterr().err


def test_the_traceback_is_there_for_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert execute(["validate", "nope", "-v"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and told.splitlines()[-1].startswith("error: unknown recipe 'nope'")


def test_warnings_of_others_are_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowdistill import inspection

    def warn(reference: str) -> None:
        warnings.warn("old", UserWarning, stacklevel=1)
        raise errors.MissingInput("stop")

    monkeypatch.setattr(inspection, "describe", warn)
    with warnings.catch_warnings(record=True) as heard:
        assert execute(["inspect", "x"]) == 3
    assert heard == []
    with pytest.warns(UserWarning, match="old"):
        execute(["inspect", "x", "-v"])


# Signals: what they do to the invocation ---------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("disguise", [None, ImportError("torn"), KeyError("x")])
def test_a_command_that_has_nothing_to_save_ends_at_once(
    number: signal.Signals,
    code: int,
    disguise: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where an import swallows what the handler raises and raises something of its own."""
    from flowdistill import inspection

    def struck(reference: str) -> None:
        try:
            os.kill(os.getpid(), number)
        except BaseException:
            if disguise is None:
                raise
            raise disguise from None

    monkeypatch.setattr(inspection, "describe", struck)
    before = signal.getsignal(number)
    assert execute(["inspect", "x"]) == code
    assert capsys.readouterr().err == f"interrupted by {number.name}\n"
    assert signal.getsignal(number) is before


def test_work_that_saves_is_asked_first_and_ended_by_the_second_signal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    invocation = Invocation(["run", "x.yaml"])
    invocation.stop = Stop()
    invocation.on_signal(signal.SIGINT, None)
    assert invocation.stop.signum == signal.SIGINT
    assert capfd.readouterr().err == "SIGINT: saving the state; once more ends at once\n"
    with pytest.raises(Ended, match="130"):
        invocation.on_signal(signal.SIGINT, None)


def test_the_command_that_continues_is_told_as_it_has_to_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    invocation = Invocation(["run", "my recipe.yaml", "--fresh", "-s", "reflow.loss={name: squared-l2}"])
    invocation.stop, invocation.signum = Stop(), signal.SIGTERM
    assert guarded(errors.Interrupted(signal.SIGTERM), invocation) == 143
    expected = "continue: flowdistill run 'my recipe.yaml' -s 'reflow.loss={name: squared-l2}'\n"
    assert capsys.readouterr().err == f"interrupted by SIGTERM, the state is saved\n{expected}"


def test_an_error_after_a_signal_is_not_passed_off_as_an_interruption(
    capsys: pytest.CaptureFixture[str],
) -> None:
    invocation = Invocation(["run"])
    invocation.stop, invocation.signum = Stop(), signal.SIGINT
    assert guarded(errors.Diverged("not finite"), invocation) == 6
    assert capsys.readouterr().err == "error: not finite\n"


# Signals: a chain that is interrupted in each stage, as processes -------------------------------------------

LONG_CHAIN = """
seed: 1
teacher: {name: analytic:ring}
stages:
  - train: {data: digits, network: {name: mlp, width: 8, depth: 1}, steps: 60, batch_size: 8}
  - pairs: {count: 1024, solver: rk4, steps: 8, batch_size: 16, shard_size: 128}
  - reflow: {steps: 60, batch_size: 32, network: {name: mlp, width: 8, depth: 1}, loss: {name: squared-l2}}
  - boss: {model: teacher, nfe: [2], grid: 32, trajectories: 64, held_out: 32, batch_size: 2}
  - eval:
      {models: [teacher, reflow], schedule: boss, samples: 512, nfe: [1], latency: false, batch_size: 8}
"""
STRUCK = {
    "train": signal.SIGTERM,
    "pairs": signal.SIGINT,
    "reflow": signal.SIGTERM,
    "boss": signal.SIGINT,
    "eval": signal.SIGTERM,
}


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flowdistill", "run", "long.yaml", "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def strike(folder: Path, stage: str, number: signal.Signals) -> tuple[int, str, str]:
    """Run until `stage` starts, send the signal; exit code and both streams."""
    process = start(folder)
    assert process.stderr is not None
    for line in process.stderr:
        if line == f"{stage}: starts\n":
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def digests(document: Any) -> dict[str, str]:
    return {each["stage"]: each["digest"] for each in document["stages"]}


def test_a_chain_that_is_interrupted_in_every_stage_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for folder in (broken, whole):
        folder.mkdir()
        (folder / "long.yaml").write_text(LONG_CHAIN)
    for stage, number in STRUCK.items():
        code, out, err = strike(broken, stage, number)
        assert (code, out) == (128 + number, ""), err
        assert "Traceback" not in err
        assert f"interrupted by {number.name}, the state is saved\ncontinue: flowdistill run long.yaml" in err
        left = broken / "runs" / "long" / stage
        assert (left / "started.json").exists() and not (left / artifact.MANIFEST).exists()
    finished = start(broken)
    out, err = finished.communicate(timeout=120)
    assert finished.returncode == 0, err
    monkeypatch.chdir(whole)
    assert execute(["run", "long.yaml", "--json", "-q"]) == 0
    assert digests(json.loads(out)) == digests(json.loads(capsys.readouterr().out))
