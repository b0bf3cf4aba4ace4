"""Work whose time is up: it stops as after a SIGTERM, and ends in the same bytes when it is continued."""

from __future__ import annotations

import itertools
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults import content
from test_collective import RECIPE
from test_collective import reflow as command
from test_processes import environment

from flowdistill import processes, work
from flowdistill.cli import execute, options
from flowdistill.errors import Interrupted, UsageError
from flowdistill.work import Stop


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def made(folder: Path) -> dict[str, bytes]:
    return {
        name: data
        for name, data in content(folder).items()
        if name not in ("manifest.json", "started.json")  # they have dates and places
    }


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every look takes a second."""
    seconds = itertools.count()
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: next(seconds)))


# The option ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45", 45),
        ("45s", 45),
        ("90m", 5400),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h1m1s", 3661),
        ("01:30:00", 5400),
        ("100:00:01", 360001),
    ],
)
def test_times_are_read(text: str, seconds: int) -> None:
    stop = options.time_limit(text)
    assert seconds - 5 < stop.seconds_left <= seconds
    assert stop.limit == f"--max-time {text}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0s",
        "00:00:00",
        "-5",
        "1h30",
        "90 m",
        "1:30",
        "1:60:00",
        "soon",
        "1.5h",
        "2H",
        "٣",
        "m",
        "9" * 99,
    ],
)
def test_what_is_no_time_is_refused_in_one_line(
    text: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    with pytest.raises(UsageError):
        options.time_limit(text)
    assert execute(["reflow", str(recipe), f"--max-time={text}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --max-time '") and len(told.splitlines()) == 1
    assert "expected a time like 90m" in told
    assert not (recipe.parent / "runs").exists()


# The stop --------------------------------------------------------------------------------------------------


def test_without_a_limit_there_is_no_end(ticks: None) -> None:
    stop = options.time_limit(None)
    for _ in range(100):
        stop.check()
    assert not stop.is_late


def test_a_deadline_is_a_sigterm(ticks: None) -> None:
    stop = Stop(3)
    stop.check()
    stop.check()
    with pytest.raises(Interrupted) as caught:
        stop.check()
    assert caught.value.signum == signal.SIGTERM and stop.is_late


def test_what_was_asked_before_a_check_is_what_it_acts_on() -> None:
    """Else a training would end with a state that it has not saved, or behind another step than its peers."""
    stop = Stop()
    assert stop.signum == 0
    stop.receive(signal.SIGINT)
    assert stop.signum == 0
    stop.check()
    with pytest.raises(Interrupted, match="SIGINT"):
        stop.check()
    agreed = Stop()
    assert agreed.signum == 0
    agreed.signum = signal.SIGTERM
    for _ in range(2):
        with pytest.raises(Interrupted, match="SIGTERM"):
            agreed.check()


# Stages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("reflow", ("reflow.checkpoint_every=1000",)),
        ("pairs", ("pairs.batch_size=4", "pairs.shard_size=8")),
    ],
)
def test_a_stage_that_is_stopped_again_and_again_ends_in_the_same_bytes(
    verb: str,
    more: Sequence[str],
    recipe: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = [
        verb,
        str(recipe),
        *(part for each in more for part in ("-s", each)),
        "-q",
        "--device",
        "cpu",
    ]
    if verb != "pairs":
        assert execute(["pairs", *arguments[1:], "--out", str(broken)]) == 0
    assert execute([*arguments, "--out", str(whole)]) == 0
    request.getfixturevalue("ticks")
    capsys.readouterr()
    stopped = 0
    while code := execute([*arguments, "--out", str(broken), "--max-time", "6s"]):
        assert (stopped := stopped + 1) < 20
        told = capsys.readouterr().err
        assert code == 143
        assert told.startswith("the time (--max-time 6s) is up, the state is saved\ncontinue: flowdistill ")
        assert told.endswith(" --max-time 6s\n")
    assert stopped >= 2
    assert made(broken / verb) == made(whole / verb)


def test_processes_of_one_launch_stop_together(recipe: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    long = ("-s", "reflow.steps=1000", "-s", "reflow.checkpoint_every=1000", "--procs", "2")
    for out in (whole, broken):
        assert execute(["pairs", str(recipe), "--out", str(out), "-q"]) == 0
    started = command(recipe, broken, *long, "--max-time", "2")
    ended = subprocess.run(started, env=environment(), capture_output=True, text=True, timeout=180)
    if ended.returncode:  # else it was as good as done
        assert ended.returncode == 143, ended.stderr
        said = "the time (--max-time 2) is up, the state is saved\ncontinue: flowdistill reflow"
        assert ended.stderr.startswith(said) and len(ended.stderr.splitlines()) == 2
        assert not (broken / "reflow" / "manifest.json").exists()
    for out in (whole, broken):
        assert subprocess.run(command(recipe, out, *long), env=environment(), timeout=180).returncode == 0
    for name in ("model.safetensors", "log.jsonl", "checkpoints/last.safetensors"):
        assert (broken / "reflow" / name).read_bytes() == (whole / "reflow" / name).read_bytes()


def test_processes_that_are_started_again_get_the_time_that_is_left(
    recipe: Path, tmp_path: Path, ticks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    def launch(arguments: Callable[[], Sequence[str]], count: int, tell: Callable[[str], None]) -> None:
        while True:
            found = list(arguments())
            given.append(int(found[found.index("--max-time") + 1]))

    monkeypatch.setattr(processes, "launch", launch)
    assert (
        execute(["pairs", str(recipe), "--out", str(tmp_path / "out"), "--procs", "2", "--max-time", "20"])
        == 143
    )
    assert given[0] < 20 and given == sorted(set(given), reverse=True) and given[-1] <= 2
