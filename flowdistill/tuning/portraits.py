"""Pictures of schedules: where their knots lie, and what each jump between them costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from flowdistill import plots
from flowdistill.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]

_LEAST = 1e-9
"""Of the largest cost, below which one is nothing but rounding."""
_ORDERS = 30
"""So many times the least cost, the largest makes a scale of its own."""


def portrait(
    title: str,
    knots: Mapping[str, Sequence[float]],
    paths: Mapping[str, Sequence[int]],
    cost: Floats,
    fine: Schedule,
) -> bytes:
    """A PNG: the times of schedules, and the local cost of the jumps of those that are paths on a grid.

    `knots` are times from 1 to 0 by what they are called, `paths` knots of the `fine` grid by names that are
    among them, `cost` [M + 1, M + 1] that of Euler's jumps on it.
    """
    drawn, ((above,), (below,)) = plots.figure(6.4, 3.9, rows=2)
    above.get_gridspec().set_height_ratios([0.22 * len(knots), 2])
    colours = dict(zip(knots, plots.COLOURS, strict=False))
    for row, (name, times) in enumerate(knots.items()):
        above.plot([1, 0], [row, row], color=colours[name], alpha=0.3, linewidth=1)
        above.plot(times, [row] * len(times), "o", color=colours[name], markersize=5, clip_on=False)
    above.set_title(title, fontsize=9, loc="left")
    above.set_yticks(range(len(knots)), list(knots))
    above.set_ylim(len(knots) - 0.4, -0.6)
    above.grid(visible=False)
    above.spines[["left", "bottom"]].set_visible(False)
    above.tick_params(length=0, labelbottom=False)
    jumps = {name: [float(cost[i, j]) for i, j in pairwise(path)] for name, path in paths.items()}
    for name, path in paths.items():
        edges = [fine.times[i] for i in reversed(path)]
        below.stairs(jumps[name][::-1], edges, color=colours[name], alpha=0.12, fill=True)
        label = f"{name}, {sum(jumps[name]):.3g} in all"
        below.stairs(jumps[name][::-1], edges, color=colours[name], linewidth=1.6, label=label)
    _scale(below, [each for costs in jumps.values() for each in costs])
    below.set_ylabel("local cost of Euler's jump")
    below.set_xlabel("time, from noise (1) to data (0)")
    below.legend(loc="best", frameon=False, fontsize=9)
    for axes in (above, below):
        axes.set_xlim(1, 0)
    return plots.png(drawn)


def _scale(axes: Any, costs: Sequence[float]) -> None:
    """From 0 on or, where costs differ by much, by orders of magnitude; those that are 0 fall out of it."""
    most = max(costs)
    least = min((each for each in costs if each > _LEAST * most), default=most)
    if most > _ORDERS * least:
        axes.set_yscale("log")
        axes.set_ylim(least / 2, most * 2)
    else:
        axes.set_ylim(bottom=0)
