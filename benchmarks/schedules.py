"""Ways to sample teachers in few steps, without training: endpoint errors and Fréchet distances.

    python benchmarks/schedules.py [shapes|digits|ring|edm ...] [--noises 256] [--rollouts 32] [--quick]

shapes, digits   the embedded networks, in rectified time; features are those of their data's classifier
ring             a mixture of 8 Gaussians in 2 dimensions, unconditional, in closed form
edm              a mixture of 300 digits in 64 dimensions as an EDM-time teacher: a denoiser that is asked at
                 noise levels. Its sampler's own steps are Euler's on EDM's grid, rho = 7: that is the line to
                 beat. In canonical coordinates it is a schedule like others

All is calibrated on 64 trajectories of Heun's on a grid of 100. The shift is the best of seven on 64 other
noises. `refined times` are BOSS's after 24 rollouts of 64 noises. `refined coefficients` begin as the best on
64 noises of AB2, uniform or at BOSS's times, and the fitted rule, and take so many rollouts of 256 noises, of
which one with its gradient counts as 4. Figures are of noises that had a say in nothing. Heun's rule takes an
odd number of evaluations: its row is the midpoint rule's. Prints Markdown; brackets hold 95 % intervals.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowdistill import teachers
from flowdistill.analytic import Mixture, ring
from flowdistill.conventions import Convention
from flowdistill.data import DATASETS
from flowdistill.evaluation import extractors, metrics
from flowdistill.multistep import fitted
from flowdistill.schedule import Schedule, bellman, edm, shifted, uniform
from flowdistill.solvers import SOLVERS, multistep
from flowdistill.teachers import Card, Model
from flowdistill.teachers.canonical import Canonical
from flowdistill.tuning.calibrating import Calibration, Follower, Frame
from flowdistill.tuning.candidates import SHIFTS, Candidate, Judge, Outcome
from flowdistill.tuning.refining import Refiner
from flowdistill.tuning.trials import Meter, Noises
from flowdistill.work import Stop, Work

_EDM = {"interpolant": {"name": "ve", "sigma_min": 0.002, "sigma_max": 80.0}, "prediction": "x0"}
EVALUATIONS = (2, 4, 6, 8)
CALIBRATED, CHOOSING, KNOTS, COEFFICIENTS = 64, 64, 64, 256
"""Noises that each is done on."""
GRID = 100


@dataclass(frozen=True)
class Teacher:
    """A field, and what its samples are compared in: features and the moments of the data's."""

    model: Model
    reference: metrics.Reference
    read: Callable[[Tensor], Tensor]


class Denoiser(nn.Module):
    """A mixture as EDM's networks see it: E[x0 | x0 + sigma eps]."""

    def __init__(self, flow: Mixture) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        sigma = sigma.to(x).reshape(-1, 1)
        t = sigma / (1 + sigma)
        z = x / (1 + sigma)
        found: Tensor = z - t * self.flow(z, t[:, 0])
        return found


def network(name: str) -> Teacher:
    """A teacher that ships."""
    model = teachers.open_model(f"builtin:{name}")
    extractor = extractors.extractor(model.card)
    assert extractor is not None
    return Teacher(model, extractor.reference, lambda x: extractor.read(x)[0])


def closed_form(flow: Mixture, field: nn.Module) -> Teacher:
    """A mixture, unconditional, with its exact moments; samples are their own features."""
    weights, means, variances = flow.log_weights.exp(), flow.means.flatten(1), flow.stds.flatten(1) ** 2
    mean = weights @ means
    second = (weights[:, None] * means).T @ means + torch.diag(weights @ variances)
    card = Card(architecture="mlp", arguments={}, shape=flow.shape)
    reference = metrics.Reference(mean, second - torch.outer(mean, mean))
    return Teacher(Model(card, field, "0" * 64), reference, lambda x: x.flatten(1).double())


def edm_time() -> Teacher:
    """300 digits, each a narrow Gaussian, behind a denoiser."""
    digits = DATASETS["digits"].batch(torch.arange(300))[0].flatten(1)
    flow = Mixture(torch.ones(300), digits, torch.full_like(digits, 0.1))
    convention = Convention.model_validate(_EDM)
    return closed_form(flow, Canonical(Denoiser(flow), convention))


TEACHERS: Mapping[str, Callable[[], Teacher]] = {
    "shapes": lambda: network("shapes"),
    "digits": lambda: network("digits"),
    "ring": lambda: closed_form(ring(), ring()),
    "edm": edm_time,
}


class Bench:
    """A teacher calibrated once, and the candidates for every number of evaluations."""

    def __init__(self, teacher: Teacher, chosen: argparse.Namespace) -> None:
        work = Work("bench", Path(), 0, "cpu", {}, {}, {}, lambda _: None, Stop())
        self.noises = Noises(teacher.model, Meter(work, 1), 32)
        self.rollouts = chosen.rollouts
        frame = Frame(uniform(GRID), "heun")
        follow = Follower(frame, teacher.model.field)
        first = CALIBRATED
        grams = [torch.from_numpy(follow(*drawn)) for _, *drawn in self.noises(0, CALIBRATED)]
        self.calibration = Calibration(frame, "l2", torch.cat(grams).numpy())
        self.solution = bellman(self.calibration.mean_cost)
        self.choosing = self.noises.solved(first, CHOOSING)
        first += CHOOSING
        self.refiners = []
        for count in (KNOTS, COEFFICIENTS):
            fit = count * 3 // 4
            halves = self.noises.solved(first, fit), self.noises.solved(first + fit, count - fit)
            rollouts = 24 if count == KNOTS else self.rollouts
            self.refiners.append(Refiner(*halves, rollouts, 0, teacher.model.velocity))
            first += count
        self.judging = self.noises.solved(first, chosen.noises, teacher.read)

    def rows(self, k: int) -> Iterator[tuple[str, Candidate]]:
        """Ways to sample in k evaluations, by their names."""
        euler, ab2 = SOLVERS["euler"], SOLVERS["ab2"]
        path = self.solution.path(k)
        times = uniform(GRID).times
        boss = Schedule(tuple(times[i] for i in path), "boss")
        shifts = [Candidate(euler, shifted(k, shift)) for shift in (1.0, *SHIFTS)]
        table = fitted(self.calibration.gram, times, path)
        knots, coefficients = self.refiners
        yield "Euler, uniform", Candidate(euler, uniform(k))
        yield "Euler, best shift", min(shifts, key=self._chosen)
        yield "Euler, EDM's grid", Candidate(euler, edm(k))
        yield "Euler, BOSS", Candidate(euler, boss)
        start = Candidate(euler, boss)
        yield "Euler, BOSS, refined times", knots.better(start, "knots") or start
        yield "midpoint, uniform", Candidate(SOLVERS["midpoint"], uniform(k // 2))
        yield "AB2, uniform", Candidate(ab2, uniform(k))
        yield "AB2, BOSS", Candidate(ab2, boss)
        yield "fitted multistep, BOSS", Candidate(multistep(table), boss, table)
        starts = [Candidate(ab2, uniform(k)), Candidate(ab2, boss), Candidate(multistep(table), boss, table)]
        start = min(starts, key=self._chosen)
        yield "refined coefficients", coefficients.better(start, "coefficients") or start

    def _chosen(self, candidate: Candidate) -> float:
        return float(self.choosing(candidate).errors.mean())

    def measured(self) -> dict[str, dict[int, Outcome]]:
        """Outcomes on the noises that had no say, by name and evaluations."""
        found: dict[str, dict[int, Outcome]] = {}
        for k in EVALUATIONS:
            for name, candidate in self.rows(k):
                found.setdefault(name, {})[k] = self.judging(candidate)
        return found


def shown(estimate: metrics.Estimate) -> str:
    """A thousand times a figure, with its interval."""
    digits = [1000 * each for each in (estimate.value, estimate.low, estimate.high)]
    value, low, high = (f"{each:.{max(0, 2 - max(0, int(math.log10(max(each, 1e-9)))))}f}" for each in digits)
    return f"{value} [{low}, {high}]"


def tables(teacher: Teacher, found: Mapping[str, Mapping[int, Outcome]]) -> None:
    """Print both figures of every way; the best of a column is bold."""
    judge = Judge(0, "fd", teacher.reference)
    for title, criterion in (("endpoint error x 1000", "endpoint"), ("Fréchet distance x 1000", "fd")):
        print(f"\n| {title} | {' | '.join(map(str, EVALUATIONS))} |\n|---|{'---|' * len(EVALUATIONS)}")
        best = {}
        cells: dict[str, dict[int, metrics.Estimate]] = {}
        for name, outcomes in found.items():
            for k, outcome in outcomes.items():
                figures = judge.figures(outcome)
                cells.setdefault(name, {})[k] = metrics.Estimate(
                    **(figures["fd"] if criterion == "fd" else {key: figures[key] for key in FIELDS})
                )
        for k in EVALUATIONS:
            best[k] = min(cells, key=lambda name: cells[name][k].value)
        for name, row in cells.items():
            texts = (shown(row[k]) if best[k] != name else f"**{shown(row[k])}**" for k in EVALUATIONS)
            print(f"| {name} | {' | '.join(texts)} |")


FIELDS = ("value", "low", "high", "n", "method")


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("teachers", nargs="*", help=f"of {', '.join(TEACHERS)}; left out, all")
    parser.add_argument("--noises", type=int, default=256, help="that figures are of (default 256)")
    parser.add_argument("--rollouts", type=int, default=32, help="for coefficients (default 32)")
    parser.add_argument("--quick", action="store_true", help="a little of all of it, to see that it runs")
    return parser.parse_args()


def main(chosen: argparse.Namespace) -> None:
    """Measure and print."""
    global EVALUATIONS
    torch.set_num_threads(1)
    if chosen.quick:
        chosen.noises, chosen.rollouts, EVALUATIONS = 128, 2, (2,)
    for name in chosen.teachers or TEACHERS:
        started = time.process_time()
        teacher = TEACHERS[name]()
        found = Bench(teacher, chosen).measured()
        print(f"\n## {name}, {chosen.noises} noises, {time.process_time() - started:.0f} s of one core")
        tables(teacher, found)


if __name__ == "__main__":
    main(options())
