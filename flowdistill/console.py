"""What a terminal shows beyond single lines: progress on stderr, results on stdout.

rich is imported where it draws: most commands that look at something print lines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from flowdistill import artifact, evaluation, hardware
from flowdistill.boundary import tell
from flowdistill.pipeline import Advanced, Event, Finished, Standing, Started
from flowdistill.stages import verbs
from flowdistill.work import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from flowdistill.planning import Plan
    from flowdistill.probing import Report

LINE_EVERY_SECONDS = 30.0
"""Where stderr is no terminal."""
REDRAW_EVERY_SECONDS = 0.1
_WIDTH_OF_FILES = 200
_NAMED_AT_MOST = 3
_BARS = " ▁▂▃▄▅▆▇█"
_LONG = 80
"""Mappings that take more characters are printed over several lines."""


# Progress -----------------------------------------------------------------------------------------------


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[Event], None]]:
    """What shows the events of a pipeline on stderr: a bar on a terminal, elsewhere plain lines."""
    if quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _bar() as bar:
            yield _Bars(bar)
    else:
        yield _Lines()


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[pace]}"),
        console=Console(stderr=True),
        transient=True,
    )


def reporter(what: str, show: Callable[[Event], None]) -> Callable[[Progress], None]:
    """Shows work that is no stage as if it were one."""
    show(Started(what, what))
    return lambda progress: show(Advanced(what, progress))


class Pace:
    """Rate and remaining time of one stage, from what it did since it began in this process."""

    def __init__(self) -> None:
        self._began = self._shown = time.monotonic()
        self._first: tuple[float, int] | None = None

    def due(self, now: Progress, seconds: float) -> bool:
        """Note how far the stage is, and say whether it is time to show that again."""
        moment = time.monotonic()
        self._first = self._first or (moment, now.done)
        if moment - self._shown < seconds:
            return False
        self._shown = moment
        return True

    def line(self, now: Progress) -> str:
        """`120 of 300 steps, 3.1/s, 0:58 left, loss 0.0812, 0.9 GB`."""
        since, done_before = self._first or (self._began, 0)
        seconds, done = time.monotonic() - since, now.done - done_before
        parts = [f"{now.done} of {now.total} {now.unit}s"]
        if seconds > 0 and done > 0:
            parts += [f"{number(done / seconds)}/s", f"{clock((now.total - now.done) * seconds / done)} left"]
        parts += [f"{name} {number(value)}" for name, value in now.figures.items()]
        return ", ".join([*parts, f"{hardware.peak_memory_bytes() / 1e9:.1f} GB"])

    def ending(self, event: Finished) -> str:
        """`reflow: done in 1:36, runs/quickstart/reflow`."""
        took = f"done in {clock(time.monotonic() - self._began)}"
        return f"{event.stage}: {'was done before' if event.skipped else took}, {event.folder}"


class _Bars:
    """A bar for the stage that runs, and a line for each that has ended."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._pace = Pace()
        self._task = bar.add_task("loading", total=None, pace="")

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._pace = Pace()
                self._bar.remove_task(self._task)
                self._task = self._bar.add_task(event.stage, total=None, pace="starts")
            case Advanced(progress=now):
                if self._pace.due(now, REDRAW_EVERY_SECONDS):
                    line = self._pace.line(now)
                    self._bar.update(self._task, total=now.total, completed=now.done, pace=line)
            case Finished():
                self._bar.update(self._task, visible=False)
                line = self._pace.ending(event)
                self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Lines:
    """A line when a stage begins, every 30 s, and when it ends."""

    def __init__(self) -> None:
        self._pace = Pace()

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._pace = Pace()
                tell(f"{event.stage}: starts")
            case Advanced(progress=now):
                if self._pace.due(now, LINE_EVERY_SECONDS):
                    tell(f"{event.stage}: {self._pace.line(now)}")
            case Finished():
                tell(self._pace.ending(event))


# Results ------------------------------------------------------------------------------------------------


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout; columns that hold numbers alone are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    grid = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    for heading, column in zip(headings, zip(*cells, strict=True), strict=True):
        numbers = all(not cell or cell[0] in "-0123456789" for cell in column)
        grid.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        grid.add_row(*map(Text, row))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
    with console.capture() as captured:
        console.print(grid)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def lines(*texts: object) -> None:
    """Print the first text on stdout and the others below it, indented."""
    typer.echo("\n  ".join(map(str, texts)))


def facts(title: str, content: Mapping[str, Any]) -> None:
    """Print what is known as `name  value` lines below a title, the names in one column."""
    lines(title, *_facts(content))


def _facts(content: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, content), default=0)
    for name, value in content.items():
        text = inline(value)
        if isinstance(value, Mapping) and value.keys() == {"edges", "counts"}:
            low, high = number(value["edges"][0]), number(value["edges"][-1])
            yield f"{name:{width}}  {low} {_bars(value['counts'])} {high}"
        elif isinstance(value, Mapping) and len(text) > _LONG:
            yield name
            yield from (f"  {line}" for line in _facts(value))
        else:
            yield f"{name:{width}}  {text}"


def _bars(counts: Sequence[int]) -> str:
    """A histogram on one line."""
    most = max(1, *counts)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in counts)


def inline(value: Any) -> str:
    """A JSON value on one line, without the noise of JSON."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_inner(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_inner, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    return "none" if value is None or value == "" else str(value)


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


def probe(model: str, report: Report) -> None:
    """What was measured of a model, and the stanza that would mend it."""
    width = max(len(finding.name) for finding in report.findings)
    found = [f"{each.verdict:7}  {each.name:{width}}  {each.text}" for each in report.findings]
    lines(f"{model}: {report.diagnosis or 'points the right way'}", *found)
    if report.remedy:
        lines("this in the card would mend it:", *_yaml(report.remedy))


def _yaml(content: Mapping[str, Any]) -> Iterator[str]:
    """Nested mappings as YAML, the inner ones on one line."""
    for name, value in content.items():
        yield f"{name}:"
        yield from (f"  {key}: {_flow(each)}" for key, each in value.items())


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


def plan(found: Plan) -> None:
    """Print what each stage will cost, and whether the disk is large enough."""
    rows = []
    for each in found.stages:
        cost = each.cost
        measured = ["", "", "", ""]
        if cost is not None:
            rate = f"{number(cost.per_second)} {cost.unit}s/s"
            measured = [f"{cost.units} {cost.unit}s", rate, clock(cost.seconds), gigabytes(cost.size_bytes)]
        rows.append([each.stage, each.verb, *measured, each.remark])
    table(("stage", "verb", "makes", "rate", "time", "disk", ""), rows)
    for each in found.stages:
        if each.cost and each.cost.candidates:
            typer.echo(f"\n{each.stage} chooses among")
            table(
                list(each.cost.candidates[0]),
                [[_cell(value) for value in row.values()] for row in each.cost.candidates],
            )
    room = "" if found.size_bytes <= found.free_bytes else ": NOT ENOUGH ROOM"
    typer.echo(
        f"\non {found.device}, one process; {gigabytes(found.peak_memory_bytes)} of memory so far; "
        f"{gigabytes(found.size_bytes)} to write, {gigabytes(found.free_bytes)} free{room}"
    )


def _cell(value: Any) -> str:
    """A figure of a table; yes or nothing."""
    if isinstance(value, bool):
        return "<" if value else ""
    return f"{value:,}" if isinstance(value, int) else number(value)


def gigabytes(size_bytes: int) -> str:
    """`6.2 GB`, `340 MB`."""
    return f"{number(size_bytes / 1e9)} GB" if size_bytes >= 1e9 else f"{number(size_bytes / 1e6)} MB"


def status(standings: Iterable[Standing]) -> None:
    """Print how the stages stand, and why those that are stale are."""
    found = list(standings)
    table(("stage", "verb", "state", "inputs"), [(s.stage, s.verb, s.state, inline(s.inputs)) for s in found])
    for each in found:
        for reason in (*each.conflicts, *each.waits):
            typer.echo(f"{each.stage}: {reason}")


def results(finished: Sequence[Finished], whole: bool) -> None:
    """Print what the last stage found or, of a `whole` recipe, every evaluation; and where it all is."""
    for each in finished if whole else finished[-1:]:
        kind = verbs()[each.verb].produces
        if kind == "evaluation":
            _evaluation(each)
        elif not whole:
            _schedules(each) if kind == "schedule" else facts(each.stage, each.manifest.figures)
    typer.echo()
    for each in finished if whole else finished[-1:]:
        typer.echo(f"{each.folder}/ {_listed(sorted(each.manifest.outputs))}")


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def _evaluation(finished: Finished) -> None:
    rows = evaluation.table(artifact.load_json(finished.folder / "eval.json"))
    headings = [name for name in rows[0] if any(row[name] for row in rows)]
    words = [name.replace("_", " ").replace("@", " @") for name in headings]
    table(words, [[row[name] for name in headings] for row in rows])


def _choices(found: Sequence[Mapping[str, Any]]) -> None:
    """What was written for each number of evaluations, of how many, and how much better it is."""
    rows = []
    for each in found:
        choice = each.get("choice")
        if choice is None:
            continue
        written = f"{each['solver']}, {each['schedule']}"
        judged = [interval(choice["held_out"][name]) for name in ("uniform", "chosen")]
        distances = [_distance(choice["held_out"][name]) for name in ("uniform", "chosen")]
        said = "better than uniform" if choice["improved"] else "nothing beat uniform"
        rows.append([str(each["nfe"]), str(len(choice["candidates"])), written, *judged, *distances, said])
    if rows:
        errors = ("endpoint error: uniform Euler", "best of them")
        headings = ("NFE", "tried", "written", *errors, "Fréchet distance: uniform Euler", "best of them", "")
        shown = [column for column in range(len(headings)) if column == 7 or any(row[column] for row in rows)]
        table([headings[column] for column in shown], [[row[column] for column in shown] for row in rows])
        typer.echo("The errors are those of noises that had no say in the choice.\n")


def _distance(outcome: Mapping[str, Any]) -> str:
    return interval(outcome["fd"]) if "fd" in outcome else ""


def _schedules(finished: Finished) -> None:
    names = [name for name in finished.manifest.outputs if name.endswith(".json")]
    found = [artifact.load_json(finished.folder / name) for name in names]
    headings = ("NFE", "local cost: uniform", "BOSS", "endpoint error: uniform", "BOSS", "BOSS is")
    rows = []
    for each in found:
        local, measured = each["local_cost"], each["held_out"]
        costs = [number(local[name]) for name in ("uniform", "boss")]
        errors = [interval(measured[name]) for name in ("uniform", "boss")]
        rows.append([str(each["nfe"]), *costs, *errors, measured["verdict"]])
    table(headings, rows)
    typer.echo(
        "Local cost is what BOSS makes least; the endpoint error (RMS [95 %]) is that of other noises.\n"
    )
    _choices(found)
    for each in found:
        facts(
            f"{each['nfe']} evaluations",
            {key: " ".join(f"{t:.4g}" for t in each[key]) for key in ("times", "sigmas") if key in each},
        )
    if "pictures" in finished.manifest.figures:
        typer.echo(f"pictures of these: {finished.manifest.figures['pictures']}")
