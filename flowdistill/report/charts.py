"""The plots of a report, each one SVG of the same size, so that they stand side by side or, on a phone, below
each other. Names of models and runs stand in the page, not in the plots: their colours are what ties them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from flowdistill import plots
from flowdistill.evaluation.results import Figure, number

_SIZE = (3.75, 2.6)
_SMALL = (1.75, 1.3)
_SQUARE = (3.75, 3.4)
_LOGARITHMIC_FROM = 8.0
"""Ratio of the largest to the smallest value from which on an axis is logarithmic."""
_TICKS_AT_MOST = 6


@dataclass(frozen=True)
class Point:
    """A value at a place, and how far both may reach."""

    x: float
    y: Figure
    x_high: float | None = None


@dataclass(frozen=True)
class Line:
    """Points of one model, in the colour of that number."""

    points: Sequence[Point]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """A value of one model."""

    name: str
    value: Figure
    colour: int


class Charts:
    """Draws the plots of one page, and gives each ids that no other has."""

    def __init__(self) -> None:
        self._numbers = count()

    def quality(
        self,
        lines: Sequence[Line],
        x: str,
        better: int,
        floor: Figure | None = None,
        among: Sequence[Line] = (),
    ) -> str:
        """Values with their intervals; `floor` is what real data reach, as a dotted line.

        Where less is better (`better` is -1) the axis may be logarithmic. `among` are the lines of all small
        plots that share an axis, of which this is one.
        """
        small = bool(among)
        drawn, axes = _axes(_SMALL if small else _SIZE)
        values = [point.y.value for line in among or lines for point in line.points]
        for place, line in enumerate(lines):
            # Beside each other, where they are at the same place.
            shift = (1.08 if small else 1.035) ** (place - (len(lines) - 1) / 2)
            _draw(axes, line, shift, 2.5 if small else 4)
        if floor is not None:
            axes.axhline(floor.value, color="#6c757d", linestyle=":", linewidth=1.4)
            values.append(floor.value)
        _scale(axes, sorted({point.x for line in lines for point in line.points}), small)
        ends = [(point.y.low, point.y.high) for line in among or lines for point in line.points]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        if better < 0 and min(values) > 0 and max(values) / min(values) >= _LOGARITHMIC_FROM:
            axes.set_yscale("log", nonpositive="clip")
            axes.set_ylim(0.8 * max(min(low, *values), min(values) / 3), 1.25 * max(high, *values))
            _plain(axes.yaxis)
        elif small:
            axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
        if not small:
            axes.set_xlabel(x)
        return self._svg(drawn)

    def loss_by_step(self, log: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
        """Means of each window, one line for each of the named figures."""
        drawn, axes = _axes(_SIZE)
        found = [[(line["step"], line[name]) for line in log if name in line] for name in names]
        for colour, points in enumerate(found):
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), color=plots.COLOURS[colour], marker=marker, markersize=4)
        values = [value for points in found for _, value in points]
        if min(values) > 0 and max(values) / min(values) > 3:
            axes.set_yscale("log")
            _plain(axes.yaxis)
        axes.set_xlabel("step")
        return self._svg(drawn)

    def loss_by_time(self, windows: Sequence[Sequence[float | None]]) -> str:
        """Loss in equal stretches of t in [0, 1], window by window, the last one the most opaque."""
        drawn, axes = _axes(_SIZE)
        for index, window in enumerate(windows, 1):
            known = [float("nan") if loss is None else loss for loss in window]
            edges = [place / len(known) for place in range(len(known) + 1)]
            style = {"color": plots.COLOURS[0], "linewidth": 1.6, "alpha": index / len(windows)}
            axes.stairs(known, edges, baseline=None, **style)
        values = [loss for window in windows for loss in window if loss is not None]
        if values and min(values) > 0 and max(values) / min(values) > 3:
            axes.set_yscale("log")
            _plain(axes.yaxis)
        _time_axis(axes)
        return self._svg(drawn)

    def density(self, drawn_share: Sequence[float], nominal: Sequence[tuple[float, float]]) -> str:
        """How often times fell into equal stretches of [0, 1], and (t, density) as it is meant."""
        drawn, axes = _axes(_SIZE)
        edges = [place / len(drawn_share) for place in range(len(drawn_share) + 1)]
        axes.stairs(drawn_share, edges, fill=True, color=plots.COLOURS[0], alpha=0.3, linewidth=0)
        axes.plot(*zip(*nominal, strict=True), color=plots.COLOURS[1])
        axes.set_ylim(0, 1.15 * max(*drawn_share, *(value for _, value in nominal[1:-1])))
        _time_axis(axes)
        return self._svg(drawn)

    def bars(self, bars: Sequence[Bar]) -> str:
        """Values of models with their intervals, from zero."""
        drawn, axes = _axes((_SIZE[0], 0.75 + 0.38 * len(bars)))
        places = range(len(bars))
        for place, bar in zip(places, bars, strict=True):
            axes.barh(place, bar.value.value, 0.55, color=plots.COLOURS[bar.colour])
        reach = [(max(0, b.value.value - b.value.low), max(0, b.value.high - b.value.value)) for b in bars]
        values = [bar.value.value for bar in bars]
        ends = list(zip(*reach, strict=True))
        axes.errorbar(values, places, xerr=ends, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        axes.set_yticks(places, [bar.name for bar in bars], parse_math=False)
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        return self._svg(drawn)

    def schedules(self, rows: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
        """(name, times, error of each step) of each schedule, from noise (left) to data.

        Above stand the times, a row for each; below the errors, which may be missing.
        """
        judged = [row for row in rows if row[2]]
        drawn, found = plots.figure(_SIZE[0], 0.75 + 0.3 * len(rows) + 1.5 * bool(judged), 1 + bool(judged))
        times, errors = found[0, 0], found[-1, 0]
        for place, (_, knots, _) in enumerate(rows):
            style = {"color": plots.COLOURS[place], "marker": "o", "markersize": 4, "linewidth": 1}
            times.plot(knots, [place] * len(knots), **style)
        times.set_yticks(range(len(rows)), [name for name, _, _ in rows], parse_math=False)
        times.set_ylim(len(rows) - 0.5, -0.5)
        times.grid(False, axis="y")
        for place, (_, knots, steps) in enumerate(rows):
            if steps:
                errors.stairs(
                    steps[::-1], knots[::-1], baseline=None, color=plots.COLOURS[place], linewidth=1.6
                )
        if judged:
            errors.set_ylabel("local error")
            errors.set_ylim(bottom=0)
            times.get_gridspec().set_height_ratios([0.3 * len(rows), 1.5])
        for axes in (times, errors):
            _time_axis(axes)
            axes.set_xlim(1.03, -0.03)
        if judged:
            times.tick_params(labelbottom=False)
        return self._svg(drawn)

    def paths(self, paths: Sequence[Sequence[tuple[float, float]]], colour: int, extent: float) -> str:
        """Ways of points in the plane from their noise (open) to their sample (filled)."""
        drawn, axes = _axes(_SQUARE)
        for path in paths:
            axes.plot(*zip(*path, strict=True), color=plots.COLOURS[colour], linewidth=0.8, alpha=0.6)
        starts, ends = zip(*((path[0], path[-1]) for path in paths), strict=True)
        axes.plot(*zip(*starts, strict=True), "o", markersize=3, mfc="none", mec="#6c757d", mew=0.8)
        axes.plot(*zip(*ends, strict=True), "o", markersize=3, color=plots.COLOURS[colour])
        axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
        return self._svg(drawn)

    def _svg(self, drawn: Any) -> str:
        return plots.svg(drawn, f"p{next(self._numbers)}-")


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    drawn, axes = plots.figure(*size)
    return drawn, axes[0, 0]


def _draw(axes: Any, line: Line, shift: float, marker: float) -> None:
    points = sorted(line.points, key=lambda point: point.x)
    places, values = [point.x * shift for point in points], [point.y.value for point in points]
    reach = [
        [max(0.0, point.y.value - point.y.low) for point in points],
        [max(0.0, point.y.high - point.y.value) for point in points],
    ]
    late = [max(0.0, (point.x_high or point.x) - point.x) for point in points]
    axes.errorbar(
        places,
        values,
        yerr=reach,
        xerr=[[0.0] * len(points), late] if any(late) else None,
        color=plots.COLOURS[line.colour],
        linestyle="--" if line.dashed else "-",
        marker="s" if line.dashed else "o",
        markersize=marker,
        elinewidth=1,
        capsize=2,
    )


def _scale(axes: Any, places: Sequence[float], small: bool) -> None:
    """A logarithmic axis with the places themselves as ticks, unless they are too many or too near."""
    axes.set_xscale("log", base=2)
    shown, least = [], 0.0
    for place in places:
        if place >= least:
            shown.append(place)
            least = place * max(2.4 if small else 1.5, (places[-1] / places[0]) ** (1 / _TICKS_AT_MOST))
    axes.set_xticks(shown, [number(place) for place in shown])
    axes.set_xticks([], minor=True)


def _plain(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def _time_axis(axes: Any) -> None:
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 (data)", "¼", "½", "¾", "1 (noise)"])
