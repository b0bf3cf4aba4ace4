"""What BOSS's costs take once the trajectories are there, against the published way; and all its budgets.

    OPENBLAS_NUM_THREADS=1 python benchmarks/costs.py [--repeats 5] [--quick] [--check]

3x32x32, a grid of 100 steps, 100 trajectories of Euler's steps. Those of a network are needed either way, so
that its time is left out; the trajectories are those of a closed-form mixture of as many dimensions.

The published way is written anew from its description: states and velocities of all trajectories are held in
memory, stacked by time, and for each of the 5,050 jumps one operation over all of them computes
mean ||x_i + (t_j - t_i) v_i - x_j||^2, in float32. Ours takes the velocities in batches of 25 as the
calibration does, one Gram matrix for each trajectory (error bars come from those), and the costs from their
mean. Both are compared with the definition in float64, jump by jump.

Times are of this process' one thread: `cpu` is its processor time, `wall` the clock's. Sides take turns,
after one that does not count. `ratio` is that of the medians, published / ours, behind it its 95 % interval,
by bootstrap over the turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from pairs import cost_of, in_turns, interval, judged, processor
from torch import Tensor

from flowdistill.randomness import noise
from flowdistill.schedule import bellman, uniform
from flowdistill.teachers import open_model
from flowdistill.tuning.calibrating import Calibration, Follower, Frame

GOAL = 20.0
"""Times less processor time than the published way."""
BUDGETS_MS = 50.0
"""For the best paths of every number of steps."""
SAME = 1e-6
"""Relative difference of any cost from its definition in float64."""
NOTHING = 1e-12
"""Of the largest cost, below which one is 0 but for rounding: Euler's jumps to the next knot."""


class Recorded:
    """A field that gives back the velocities that it gave before, in their order: a network without time."""

    def __init__(self, speeds: Tensor, batch: int) -> None:
        self.parts = speeds.split(batch, dim=1)
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        part = self.parts[self.calls // len(self.parts[0])]
        found = part[self.calls % len(part)]
        self.calls += 1
        return found


def ours(frame: Frame, start: Tensor, speeds: Tensor, batch: int) -> NDArray[np.float64]:
    """Costs [M + 1, M + 1] as the calibration computes them, steps of the solver included."""
    follow = Follower(frame, Recorded(speeds, batch))
    grams = [follow(part, None) for part in start.split(batch)]
    return Calibration(frame, "l2", np.concatenate(grams)).mean_cost


def published(times: Sequence[float], start: Tensor, speeds: Tensor, batch: int) -> NDArray[np.float64]:
    """The same, jump by jump over stored trajectories, steps of the solver included."""
    stored_x, stored_v = [], []
    for part, moving in zip(start.split(batch), speeds.split(batch, dim=1), strict=True):
        states = [part]
        for v, t, s in zip(moving, times, times[1:], strict=False):
            states.append(states[-1] + (s - t) * v)
        stored_x.append(torch.stack(states))
        stored_v.append(torch.stack(list(moving)))
    x, v = torch.cat(stored_x, dim=1), torch.cat(stored_v, dim=1)
    cost = np.zeros((len(times), len(times)))
    for j in range(1, len(times)):
        for i in range(j):
            jump = x[i] + (times[j] - times[i]) * v[i]
            cost[i, j] = float(((jump - x[j]) ** 2).sum(dim=1).mean())
    return cost


def by_definition(times: Sequence[float], start: Tensor, speeds: Tensor) -> NDArray[np.float64]:
    """The same in float64, states too."""
    states = [start.double()]
    for v, t, s in zip(speeds, times, times[1:], strict=False):
        states.append(states[-1] + (s - t) * v.double())
    cost = np.zeros((len(times), len(times)))
    for i, j in combinations(range(len(times)), 2):
        missed = states[j] - states[i] - (times[j] - times[i]) * speeds[i].double()
        cost[i, j] = float(missed.square().sum(1).mean())
    return cost


def apart(found: NDArray[np.float64], truth: NDArray[np.float64]) -> tuple[float, float]:
    """The largest relative difference of a cost that is not 0, and of one that is a millionth or more."""
    off = np.abs(found - truth)
    some, large = (truth > share * truth.max() for share in (NOTHING, 1e-6))
    return float((off[some] / truth[some]).max()), float((off[large] / truth[large]).max())


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5, help="turns of both sides (default 5)")
    parser.add_argument("--quick", action="store_true", help="a little of all of it, to see that it runs")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    return parser.parse_args()


def main(chosen: argparse.Namespace) -> bool:
    """Measure and print; whether every goal is met."""
    torch.set_num_threads(1)
    size, steps, count, batch = (48, 12, 8, 4) if chosen.quick else (3072, 100, 100, 25)
    frame, start = Frame(uniform(steps), "euler"), noise(0, range(count), (size,))
    flow = open_model({"name": "analytic:mixture", "dim": size}).field
    speeds = frame.walk(flow, start, None)[1].double().cumsum(1).float().transpose(0, 1).contiguous()
    times = frame.fine.times
    print(f"{processor()}, one thread, torch {torch.__version__}")
    print(f"{size} dimensions, {steps} steps, {count} trajectories; medians of {chosen.repeats} turns")

    truth = by_definition(times, start, speeds)
    found = ours(frame, start, speeds, batch)
    exact = apart(found, truth)
    others = apart(published(times, start, speeds, batch), truth)
    for name, (worst, large) in (("ours", exact), ("published", others)):
        print(
            f"{name}: costs within {worst:.1e} of float64, those above a millionth of the largest {large:.1e}"
        )
    sides = {
        "published": lambda turn: cost_of(lambda: published(times, start, speeds, batch)),
        "ours": lambda turn: cost_of(lambda: ours(frame, start, speeds, batch)),
    }
    taken = in_turns(chosen.repeats, sides)
    met = exact[0] <= SAME
    print(f"\n{'s':8}{'published':>12}{'ours':>10}{'ratio':>8}{'(95 %)':>16}   goal")
    for clock in ("cpu", "wall"):
        above, below = ([getattr(each, clock) for each in taken[name]] for name in sides)
        ratio = statistics.median(above) / statistics.median(below)
        low, high = interval(above, below)
        goal = f"{GOAL:.0f}" if clock == "cpu" else ""
        fine = not goal or ratio >= GOAL
        met = met and fine
        between = f"({low:.1f} to {high:.1f})"
        print(
            f"{clock:8}{statistics.median(above):12.3f}{statistics.median(below):10.3f}{ratio:8.1f}"
            f"{between:>16}   {judged(fine, goal) if goal else ''}"
        )
    solved = [cost_of(lambda: bellman(found)).cpu * 1000 for _ in range(max(3, chosen.repeats))]
    budgets = statistics.median(solved)
    print(
        f"\nbest paths of every number of steps, 1 to {steps}: {budgets:.1f} ms of processor time, goal ",
        end="",
    )
    print(judged(budgets < BUDGETS_MS, f"{BUDGETS_MS:.0f}"))
    return met and budgets < BUDGETS_MS


if __name__ == "__main__":
    asked = options()
    raise SystemExit(0 if main(asked) or not asked.check else 1)
