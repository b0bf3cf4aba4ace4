"""What a terminal shows beyond single lines: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from flowdistill import artifact
from flowdistill.pipeline import Advanced, Event, Finished, Started
from flowdistill.stages import Progress

LINE_EVERY_SECONDS = 30.0
"""Where stderr is no terminal."""
REDRAW_EVERY_SECONDS = 0.1
_WIDTH_OF_FILES = 200


# Progress -----------------------------------------------------------------------------------------------


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[Event], None]]:
    """What shows the events of a pipeline on stderr: a bar on a terminal, elsewhere plain lines."""
    if quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[pace]}"))
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _Bars(bar)
    else:
        yield _Lines()


class Pace:
    """Rate and remaining time of one stage, from what it did since it began in this process."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._first: tuple[float, int] | None = None

    def line(self, now: Progress) -> str:
        """`120 of 300 steps, 3.1/s, 0:58 left, loss 0.0812, 0.9 GB`."""
        moment = time.monotonic()
        since, done_before = self._first = self._first or (moment, now.done)
        parts = [f"{now.done} of {now.total} {now.unit}s"]
        if moment > since and now.done > done_before:
            rate = (now.done - done_before) / (moment - since)
            parts += [f"{number(rate)}/s", f"{clock((now.total - now.done) / rate)} left"]
        parts += [f"{name} {number(value)}" for name, value in now.figures.items()]
        return ", ".join([*parts, f"{_peak_memory_gb():.1f} GB"])

    def took(self) -> str:
        """Time since the stage began."""
        return clock(time.monotonic() - self.began)


class _Bars:
    """A bar for the stage that runs, and a line for each that has ended."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._pace = Pace()
        self._drawn = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._pace, self._drawn = Pace(), 0.0
                self._task = self._bar.add_task(event.stage, total=None, pace="starts")
            case Advanced():
                self._advance(event.progress)
            case Finished():
                if self._task is not None:
                    self._bar.remove_task(self._task)
                    self._task = None
                self._bar.console.print(_ending(event, self._pace), markup=False, highlight=False, soft_wrap=True)

    def _advance(self, now: Progress) -> None:
        text = self._pace.line(now)
        if self._task is not None and time.monotonic() - self._drawn >= REDRAW_EVERY_SECONDS:
            self._drawn = time.monotonic()
            self._bar.update(self._task, total=now.total, completed=now.done, pace=text)


class _Lines:
    """A line when a stage begins, every 30 s, and when it ends."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._printed = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._pace, self._printed = Pace(), time.monotonic()
                _tell(f"{event.stage}: starts")
            case Advanced():
                text = self._pace.line(event.progress)
                if time.monotonic() - self._printed >= LINE_EVERY_SECONDS:
                    self._printed = time.monotonic()
                    _tell(f"{event.stage}: {text}")
            case Finished():
                _tell(_ending(event, self._pace))


def _ending(event: Finished, pace: Pace) -> str:
    how = "was done before" if event.skipped else f"done in {pace.took()}"
    return f"{event.stage}: {how}, {event.folder}"


def _peak_memory_gb() -> float:
    """The most that was in use so far: of the GPU where it is used, else of the process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


# Results ------------------------------------------------------------------------------------------------


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout; columns that hold numbers alone are aligned to the right."""
    cells = [list(row) for row in rows]
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for heading, column in zip(headings, zip(*cells, strict=True), strict=True):
        numbers = all(not cell or cell[0] in "-0123456789" for cell in column)
        grid.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        grid.add_row(*map(Text, row))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
    with console.capture() as captured:
        console.print(grid)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def facts(content: Mapping[str, Any]) -> None:
    """Print what is known as `name  value` lines on stdout, the names in one column."""
    width = max(map(len, content), default=0)
    for name, value in content.items():
        typer.echo(f"  {name:{width}}  {inline(value)}")


def inline(value: Any) -> str:
    """A JSON value on one line, without the noise of JSON."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_inner(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_inner, value)) or "none"
    if isinstance(value, float):
        return number(value)
    return {None: "none", True: "yes", False: "no"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def _inner(value: Any) -> str:
    text = inline(value)
    if isinstance(value, Mapping):
        return f"{{{text}}}"
    return f"[{text}]" if isinstance(value, list | tuple) else text


def number(value: float) -> str:
    """Three significant digits, and no exponent where it can be avoided."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def interval(estimate: Mapping[str, Any]) -> str:
    """`27.4 [25.9, 29.1]`: a value with its 95 % interval."""
    value, low, high = (number(estimate[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def clock(seconds: float) -> str:
    """`0:58`, `2:03:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def results(finished: Finished, kind: str) -> None:
    """Print what a stage found: its schedules, its evaluation, or its figures."""
    if kind == "schedule":
        _schedules(finished)
    elif kind == "evaluation":
        evaluation(finished)
    else:
        typer.echo(f"{finished.stage}: {finished.folder}")
        facts(finished.manifest.figures)


def _schedules(finished: Finished) -> None:
    names = [name for name in finished.manifest.outputs if name.startswith("schedule-")]
    found = [artifact.load_json(finished.folder / name) for name in names]
    headings = ("NFE", "local cost", "uniform", "endpoint error", "uniform", "BOSS against uniform")
    table(headings, ([
        str(each["nfe"]),
        number(each["local_cost"]["boss"]),
        number(each["local_cost"]["uniform"]),
        interval(each["held_out"]["boss"]),
        interval(each["held_out"]["uniform"]),
        each["held_out"]["verdict"],
    ] for each in found))
    for name, each in zip(names, found, strict=True):
        typer.echo(f"\n{finished.folder / name}")
        typer.echo(f"  times   {' '.join(f'{t:.4g}' for t in each['times'])}")
        typer.echo(f"  sigmas  {' '.join(f'{sigma:.4g}' for sigma in each['sigmas'])}")
