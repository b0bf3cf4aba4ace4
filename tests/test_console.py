"""Progress and numbers as they are shown."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flowdistill import console
from flowdistill.artifact import Manifest
from flowdistill.pipeline import Advanced, Event, Finished, Started
from flowdistill.work import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the time on by so many seconds; nothing else does."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def finished(stage: str, skipped: bool = False) -> Finished:
    now = datetime.now(UTC)
    manifest = Manifest(
        stage=stage, verb="pairs", settings={}, inputs={}, outputs={}, seed=0, versions={}, device="cpu",
        dtype="float32", started=now, finished=now,
    )  # fmt: skip
    return Finished(stage, "pairs", Path("runs") / stage, manifest, skipped)


def test_the_rate_counts_what_this_process_did(clock: Callable[[float], None]) -> None:
    """A stage that continues at 900 of 1000 has not done 900 in no time."""
    pace = console.Pace()
    clock(5)
    pace.due(Progress(900, 1000, "step"), 30)
    clock(10)
    line = pace.line(Progress(920, 1000, "step", {"loss": 0.08125}))
    assert re.fullmatch(r"920 of 1000 steps, 2/s, 0:40 left, loss 0\.0813, \d+\.\d GB", line)


def test_without_a_terminal_there_is_a_line_at_the_ends_and_every_30_seconds(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress(quiet=False) as show:
        show(Started("pairs", "pairs"))
        for done in range(1, 71):
            clock(1)
            show(Advanced("pairs", Progress(done, 70, "pair")))
        show(finished("pairs"))
        show(finished("reflow", skipped=True))
    streams = capsys.readouterr()
    lines = streams.err.splitlines()
    assert streams.out == ""
    assert [line.split(",")[0] for line in lines] == [
        "pairs: starts",
        "pairs: 30 of 70 pairs",
        "pairs: 60 of 70 pairs",
        "pairs: done in 1:10",
        "reflow: was done before",
    ]
    assert "1/s, 0:40 left" in lines[1]


def test_on_a_terminal_there_is_a_bar_and_the_cursor_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(console, "REDRAW_EVERY_SECONDS", 0.0)
    with pytest.raises(RuntimeError), console.progress(quiet=False) as show:
        events: list[Event] = [
            Started("pairs [1]", "pairs"),
            Advanced("pairs [1]", Progress(30, 70, "pair")),
            Advanced("pairs [1]", Progress(40, 70, "pair")),
            finished("pairs [1]"),
            Started("reflow", "reflow"),
            Advanced("reflow", Progress(3, 4, "step", {"loss": 0.5})),
        ]
        for event in events:
            show(event)
        time.sleep(0.15)  # the bar is drawn ten times a second
        raise RuntimeError
    shown = terminal.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "loading" in plain and "━" in plain and "3 of 4 steps" in plain and "loss 0.5" in plain
    assert "pairs [1]: done in 0:00, runs/pairs [1]" in plain
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(quiet=True) as show:
        show(Started("pairs", "pairs"))
        show(finished("pairs"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0812345, "0.0812"),
        (272.51, "273"),
        (1.0, "1"),
        (12345.6, "12346"),
        (1e-7, "1e-07"),
        (-0.5, "-0.5"),
        (2e9, "2e+09"),
    ],
)
def test_numbers(value: float, shown: str) -> None:
    assert console.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (58.4, "0:58"), (59.6, "1:00"), (7390, "2:03:10")]
)
def test_clock(seconds: float, shown: str) -> None:
    assert console.clock(seconds) == shown


def test_json_values_on_a_line() -> None:
    value = {"name": "unet", "multipliers": [1, 2], "empty": [], "on": True, "none": None, "in": {"a": 0.5}}
    assert (
        console.inline(value) == "name=unet, multipliers=[1, 2], empty=[none], on=yes, none=none, in={a=0.5}"
    )


def test_tables_keep_lines_whole_in_files_and_align_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("name", "NFE", "fd [95 %]"), [("teacher [x]", "4", "33 [30, 36]"), ("y" * 100, "64", "")])
    heading, rule, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "NFE", "fd", "[95", "%]"]
    assert set(rule) == {"─"}
    assert first.startswith("teacher [x]") and first.index("4") == second.index("64") + 1
    assert second == second.rstrip()
