"""The proof that a training resumes exactly: it convinces, it fails where it has to, and leaves no trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from faults import content
from test_collective import RECIPE, reflow
from test_processes import environment

from flowdistill import proving
from flowdistill.cli import execute

ROOT = Path(__file__).parents[1]
COMPARED = ["checkpoints/last.safetensors", "log.jsonl", "model.safetensors"]
PERTURBED = """
import os
from flowdistill import randomness
exact = randomness.uniforms
randomness.uniforms = lambda *args, **options: (exact(*args, **options) + os.getpid() / 2**22) % 1
"""
"""As a training would be that draws from a generator of its own."""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return path


def prove(recipe: Path, out: Path, *more: str) -> int:
    return execute(
        ["reflow", str(recipe), "--prove-resume", "-q", "--device", "cpu", "--out", str(out), *more]
    )


def left(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name != ".lock")


def moments(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_a_training_resumes_exactly_and_its_folder_is_not_touched(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert execute(["reflow", str(recipe), "-q", "--device", "cpu", "--out", str(out)]) == 0
    before = content(out)
    written = moments(out / "reflow")
    capsys.readouterr()
    # The steps are those of the proof, whatever the recipe or the command says; all else is as it says.
    assert prove(recipe, out, "-s", "reflow.steps=1000000", "-s", "reflow.optimizer.lr=0.01") == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.startswith(f"reflow resumes exactly: {', '.join(COMPARED)} are equal (")
    assert told.out.endswith("steps, killed 2 times)\n") and len(told.out.splitlines()) == 1
    assert content(out) == before
    assert moments(out / "reflow") == written


def test_a_training_that_depends_on_its_process_is_found_out(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "sitecustomize.py").write_text(PERTURBED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'faulty'}:{ROOT}")
    assert prove(recipe, out, "--json") == 4
    told = capsys.readouterr()
    assert told.err.startswith(f"error: reflow does not resume exactly: {', '.join(COMPARED)} differ (")
    assert len(told.err.splitlines()) == 2
    facts = json.loads(told.out)
    assert facts["different"] == facts["compared"] == COMPARED
    assert left(out) == ["pairs"]


def test_processes_resume_exactly(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert execute(["pairs", str(recipe), "-q", "--out", str(out)]) == 0
    capsys.readouterr()
    assert prove(recipe, out, "--procs", "2", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["compared"], facts["different"]) == (COMPARED, [])
    assert facts["stage"] == "reflow" and facts["steps"] >= 24
    first, second = facts["killed_at"]
    assert 0 < first < second <= facts["steps"]
    assert left(out) == ["pairs"]


def test_a_proof_that_is_stopped_leaves_nothing_behind(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = subprocess.Popen(
        reflow(recipe, out, "--prove-resume"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not list(out.glob(".proof-*/broken/reflow/started.json")):
        assert time.monotonic() < until and started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 143, said
    assert left(out) == ["pairs"]
    commands = (
        path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)
    )
    assert not any(os.fsencode(out) in command for command in commands)


def test_a_proof_whose_time_is_up_leaves_nothing_behind(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["pairs", str(recipe), "-q", "--out", str(tmp_path / "out")]) == 0
    assert prove(recipe, tmp_path / "out", "--max-time", "1") == 143
    assert capsys.readouterr().err.startswith("the time (--max-time 1) is up")
    assert left(tmp_path / "out") == ["pairs"]


def test_nothing_killed_is_nothing_proved(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proving, "_LENGTHS", (2,))
    monkeypatch.setattr(proving, "_identity", lambda path: None)
    assert prove(recipe, tmp_path / "out") == 5
    assert "error: reflow: 2 steps were over before they could be killed" in capsys.readouterr().err
    assert left(tmp_path / "out") == ["pairs"]


def test_what_a_run_fails_of_is_told(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove(recipe, tmp_path / "out", "--only") == 3
    told = capsys.readouterr().err
    assert told == "error: reflow: needs pairs, which is not done; run without --only\n"
    assert left(tmp_path / "out") == []


def test_a_proof_is_not_made_with_fresh(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove(recipe, tmp_path / "out", "--fresh") == 2
    assert "--fresh and --prove-resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
