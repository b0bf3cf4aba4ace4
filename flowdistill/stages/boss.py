"""BOSS: the best step sizes for every number of steps, from one calibration, and what is better still.

Nguyen, Nguyen and Nguyen, "Bellman Optimal Stepsize Straightening of Flow-Matching Models" (arXiv
2312.16414). Follow the model's own fine trajectory; a jump from knot i to knot j costs c_ij = E||x_j - x_i -
(t_j - t_i) v_i||^2 (Eq. 5); the path over the knots of least total cost with exactly NFE jumps is found by
dynamic programming (Eq. 8). The cost of all M (M + 1) / 2 jumps needs the trajectory and no more; the mean
Gram matrix of its increments and velocities holds it all, and with it the best schedules and coefficients of
rules with memory.

The paper's cost is local, and its solver Euler. So for each number of evaluations many solvers and schedules
are tried on noises that the calibration has not seen, and what is written is the best of them, unless it is
no better than uniform Euler steps on yet others. `refine` makes the best of them better by real rollouts
before the choice. `choose: boss` writes the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from flowdistill.errors import MissingInput, UsageError
from flowdistill.multistep import ab2_cost, ab2_paths
from flowdistill.recipe import Reference
from flowdistill.schedule import Bellman, Schedule, bellman, local_cost, uniform
from flowdistill.solvers import SOLVERS, nfe
from flowdistill.stages import Stage
from flowdistill.tuning import calibrating
from flowdistill.tuning.calibrating import Calibration, Follower, Frame, Parts, pushed
from flowdistill.tuning.candidates import Candidate, Criterion, Judge, calibrated, choose, closed
from flowdistill.tuning.portraits import portrait
from flowdistill.tuning.refining import LEAST_TRAJECTORIES, Refine, Refiner, refinable
from flowdistill.tuning.trials import REFERENCE, Meter, Noises, Trial
from flowdistill.work import Cost, Done, Work

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from flowdistill.evaluation.extractors import Extractor, Perceptual
    from flowdistill.teachers import Model

TENSORS = "boss.safetensors"
TO_DRAW = "pip install 'flowdistill[plots]'"


def file_name(nfe: int) -> str:
    """Name of the schedule file for `nfe` evaluations."""
    return f"schedule-nfe{nfe}.json"


def picture_name(nfe: int) -> str:
    """Name of the picture beside it."""
    return f"schedule-nfe{nfe}.png"


class Boss(Stage):
    """Step sizes by dynamic programming, for every number of steps up to `grid`."""

    verb: ClassVar[str] = "boss"
    produces: ClassVar[str] = "schedule"

    model: Annotated[str | None, Reference("model", allow_teacher=True)] = Field(
        None, description="model that is to be sampled in few steps"
    )
    nfe: list[Annotated[int, Field(ge=1)]] = Field(
        [2, 4, 6, 8],
        min_length=1,
        description="numbers of evaluations to write a schedule file for",
    )
    choose: Literal["best", "euler", "boss"] = Field(
        "best",
        description="what is written: the best of all candidates; the best of Euler's, for programs that "
        "know no other solver; or Euler steps at BOSS's times",
    )
    criterion: Criterion = Field(
        "endpoint",
        description="what is better: a smaller endpoint error, noise by noise; or fd, a smaller Fréchet "
        "distance from the data, which needs more `held_out` noises than there are features",
    )
    grid: int = Field(100, ge=2, le=1000, description="steps of the fine trajectory (K_max in the paper)")
    reference: calibrating.Reference = Field(
        "heun",
        description="how the fine trajectory is solved: by Heun's rule at every other knot and Hermite's "
        "cubics between, or by Euler steps at all, as in the paper; both take `grid` evaluations",
    )
    cost: calibrating.Cost = Field(
        "l2",
        description="of an Euler jump: the mean of squared errors, as in the paper, or of errors (rms); or "
        "of squared errors as the perceptual distance for the data sees them",
    )
    trajectories: int = Field(64, gt=0, description="noises that the cost is averaged over")
    until_regret: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="take no more trajectories once schedules of resampled ones cost at most this share more "
        "than the best, for every `nfe`; `trajectories` is then the most",
    )
    held_out: int = Field(
        64,
        ge=16,
        description="further noises: one half chooses among candidates, the other judges the choice",
    )
    refine: Refine = Field(
        "none",
        description="make the best candidate better by rollouts: its times, or also its coefficients, by "
        "gradients",
    )
    refine_trajectories: int = Field(
        256, ge=16, description="further noises to refine on: three quarters fit, the others say when to stop"
    )
    refine_rollouts: int = Field(
        240,
        ge=1,
        description="of all of these for each `nfe` that refining may take; one with gradients counts as 4",
    )
    batch_size: int = Field(32, gt=0, description="noises that are integrated at once")

    @model_validator(mode="after")
    def _possible(self) -> Boss:
        if max(self.nfe) > self.grid:
            raise ValueError(
                f"nfe {max(self.nfe)} is more than the {self.grid} steps of the grid; raise `grid`"
            )
        if self.choose == "boss" and (self.refine != "none" or self.criterion != "endpoint"):
            what = f"refine: {self.refine}" if self.refine != "none" else f"criterion: {self.criterion}"
            raise ValueError(f"{what} with choose: boss, where nothing is chosen; leave one of them out")
        if self.refine == "coefficients" and self.choose == "euler":
            raise ValueError("refine: coefficients are not Euler's; use knots with choose: euler")
        if self.refine == "coefficients" and self.refine_trajectories < LEAST_TRAJECTORIES:
            raise ValueError(
                f"refine_trajectories: coefficients need {LEAST_TRAJECTORIES} or more, lest they be "
                f"fitted to few noises; found {self.refine_trajectories}"
            )
        return self

    def run(self, work: Work) -> Done:
        from flowdistill import artifact, plots

        model = work.model()
        noises = Noises(model, Meter(work, self.evaluations), self.batch_size)
        extractor = self._extractor(model)
        calibration = self.calibrate(noises)
        halves = self.halves(noises, extractor)
        refiner = self._refiner(noises)
        judge = Judge(work.seed, self.criterion, extractor.reference if extractor else None)
        ways = Ways.of(calibration, max(self.nfe) if self.choose != "boss" else 0)
        regret = calibration.regret(self.nfe, work.seed)
        figures = {}
        for k in self.nfe:
            boss = ways.boss(k)
            compared: dict[str, Any] = {"local_cost": ways.local_cost(k), "regret": regret[k]}
            compared["held_out"] = compare(boss, halves, work.seed)
            written = boss
            if self.choose != "boss":
                tried = self._wanted([*closed(k), *ways.calibrated(k)])
                tried += self._refined(tried, halves[0], refiner)
                verdict = choose(tried, *halves, judge)
                written, compared = verdict.chosen, {**compared, "choice": verdict.facts}
            figures[str(k)] = {**described(written), **compared}
            used = {"grid": self.grid, "trajectories": len(calibration.grams), "seed": work.seed}
            content = {**schedule_file(written, model), **used, **compared}
            artifact.save_json(work.folder / file_name(k), content)
            if plots.available():
                artifact.atomic_write(work.folder / picture_name(k), ways.picture(k, written))
        _save_arrays(work, ways, model)
        # No outputs: their bytes depend on matplotlib, and all that is made of the schedules on the outputs.
        drawn = ", ".join(map(picture_name, self.nfe)) if plots.available() else TO_DRAW
        return Done((TENSORS, *map(file_name, self.nfe)), {"schedules": figures, "pictures": drawn})

    def plan(self, work: Work) -> Cost:
        """As many evaluations as all noises take, at the rate of the model."""
        from flowdistill import sizing

        rate = sizing.evaluations_per_second(work.model(), self.batch_size)
        kept = 8 * self.grid**2 * self.trajectories
        return Cost(self.evaluations, "evaluation", rate, self.evaluations / rate, kept)

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for all noises; every candidate takes as many as any other."""
        half, best = self.held_out // 2, self.choose != "boss"
        fitted = 6 if self.choose == "best" else 2  # Euler's, AB2's and fitted coefficients at two times
        refined = self.refine != "none"
        tried = {k: len(self._wanted(list(closed(k)))) + fitted for k in self.nfe}
        tried = {k: count + refined * (1 + count) for k, count in tried.items()}
        chosen = {k: half * tried[k] + 2 * (self.held_out - half) for k in self.nfe}
        rows = sum(k * (2 * self.held_out + best * chosen[k]) for k in self.nfe)
        solved = self.held_out + refined * self.refine_trajectories
        rollouts = refined * self.refine_trajectories * self.refine_rollouts * sum(self.nfe)
        return self.trajectories * self.grid + solved * nfe(*REFERENCE) + rows + rollouts

    def _wanted(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that may be written."""
        return [each for each in candidates if self.choose == "best" or each.solver.name == "euler"]

    def _extractor(self, model: Model) -> Extractor | None:
        """What the Fréchet distance is taken in, where either half of the held-out noises has enough."""
        from flowdistill.evaluation import extractors

        found = extractors.extractor(model.card, model.device) if self.choose != "boss" else None
        if found is None:
            if self.criterion == "fd":
                raise MissingInput(
                    f"criterion: fd needs features of the data, and there are none for "
                    f"'{model.card.data}'; choose endpoint"
                )
            return None
        needed = 2 * (len(found.reference.mean) + 1)
        if self.held_out >= needed:
            return found
        if self.criterion == "fd":
            raise UsageError(
                f"held_out: criterion fd needs {needed} noises or more, so that each half outnumbers the "
                f"{len(found.reference.mean)} features of {found.label}; found {self.held_out}"
            )
        return None

    def calibrate(self, noises: Noises) -> Calibration:
        """Follow the trajectories batch by batch; what this or a neighbouring run has kept is taken."""
        import numpy as np

        model, meter = noises.model, noises.meter
        frame = Frame(uniform(self.grid), self.reference)
        perceptual = self._perceptual(model)
        follow = Follower(frame, model.field, pushed(perceptual.features) if perceptual else None)
        parts = Parts(meter.work.folder, self._made_from(noises, perceptual))
        found: list[NDArray[np.float64]] = []
        for indices, noise, labels in noises(0, self.trajectories):
            grams = parts.read(indices)
            if grams is None:
                grams = follow(noise, labels)
                parts.write(indices, grams)
            found.append(grams)
            meter.add(len(noise) * self.grid)
            if self.until_regret is not None:
                so_far = Calibration(frame, self.cost, np.concatenate(found))
                if len(so_far.grams) > 1 and max(so_far.regret(self.nfe, 0).values()) <= self.until_regret:
                    break
        return Calibration(frame, self.cost, np.concatenate(found))

    def _perceptual(self, model: Model) -> Perceptual | None:
        if self.cost != "perceptual":
            return None
        from flowdistill.evaluation import extractors

        found = extractors.perceptual(model.card)
        if found is None:
            raise MissingInput(
                f"cost: perceptual needs a perceptual distance, and there is none for data "
                f"'{model.card.data}'; choose l2 or rms"
            )
        return found

    def _made_from(self, noises: Noises, perceptual: Perceptual | None) -> dict[str, Any]:
        """All that the Gram matrices of a batch depend on besides its indices."""
        import torch

        model, work = noises.model, noises.meter.work
        return {
            "format": calibrating.FORMAT,
            "model": model.digest,
            "guidance": _guidance(model),
            "seed": work.seed,
            "grid": self.grid,
            "reference": self.reference,
            "seen": perceptual.label if perceptual else "coordinates",
            "batch_size": self.batch_size,
            "device": work.device,
            "torch": torch.__version__,
        }

    def halves(self, noises: Noises, extractor: Extractor | None = None) -> tuple[Trial, Trial]:
        """The noises that choose, and those that judge."""
        half, first = self.held_out // 2, self.trajectories
        read = (lambda x: extractor.read(x)[0]) if extractor else None
        return noises.solved(first, half, read), noises.solved(first + half, self.held_out - half, read)

    def _refiner(self, noises: Noises) -> Refiner | None:
        if self.refine == "none":
            return None
        first, others = self.trajectories + self.held_out, self.refine_trajectories // 4
        fit = noises.solved(first, self.refine_trajectories - others)
        validate = noises.solved(first + self.refine_trajectories - others, others)
        return Refiner(fit, validate, self.refine_rollouts, noises.meter.work.seed, noises.model.velocity)

    def _refined(self, tried: Sequence[Candidate], half: Trial, refiner: Refiner | None) -> list[Candidate]:
        """The best on one half of those tried that can be refined, if rollouts make it better."""
        if refiner is None:
            return []
        errors = {each: float(half(each).errors.mean()) for each in tried}
        start = min((each for each in tried if refinable(each, self.refine)), key=lambda each: errors[each])
        found = refiner.better(start, self.refine)
        if found is None:
            half.meter.add(half.count * nfe(start.solver, start.schedule))  # it was planned
        return [] if found is None else [found]


@dataclass(frozen=True)
class Ways:
    """The ways to sample that follow from a calibration, for every number of evaluations."""

    calibration: Calibration
    solution: Bellman
    after_ab2: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, calibration: Calibration, most: int) -> Ways:
        """With paths for Adams-Bashforth up to `most` evaluations, whose jumps cost their squared errors."""
        times, gram = calibration.frame.fine.times, calibration.gram
        after_ab2 = ab2_paths(local_cost(gram, times), ab2_cost(gram, times), most) if most else {}
        return cls(calibration, bellman(calibration.mean_cost), after_ab2)

    @property
    def fine(self) -> Schedule:
        """The grid that all paths are on."""
        return self.calibration.frame.fine

    def boss(self, k: int) -> Candidate:
        """Euler steps at BOSS's times."""
        times = tuple(self.fine.times[i] for i in self.solution.path(k))
        return Candidate(SOLVERS["euler"], Schedule(times, "boss"))

    def calibrated(self, k: int) -> Iterator[Candidate]:
        """All that follow from the calibration."""
        named = {"boss": self.solution.path(k), "ab2-boss": self.after_ab2[k]}
        return calibrated(self.calibration.gram, self.fine, named)

    def local_cost(self, k: int) -> dict[str, float]:
        """What all jumps cost, BOSS's and those between the knots nearest to uniform times."""
        even = self._even(k)
        cost = self.calibration.mean_cost[even[:-1], even[1:]]
        return {"boss": float(self.solution.totals[k]), "uniform": float(cost.sum())}

    def _even(self, k: int) -> list[int]:
        return [round(i * self.fine.steps / k) for i in range(k + 1)]

    def picture(self, k: int, written: Candidate) -> bytes:
        """A PNG: the knots of uniform steps, BOSS and what is written, and what Euler's jumps cost."""
        knots: dict[str, Sequence[float]] = {"uniform": uniform(k).times, "BOSS": self.boss(k).schedule.times}
        if written.schedule.times not in knots.values():
            knots["written"] = written.schedule.times
        paths = {"uniform": self._even(k), "BOSS": self.solution.path(k)}
        title = f"{k} evaluations; written: {written.name}"
        return portrait(title, knots, paths, self.calibration.mean_cost, self.fine)

    def arrays(self) -> dict[str, Any]:
        """All of it as arrays."""
        fine, solution = self.fine, self.solution
        arrays = {"gram": self.calibration.gram, "cost": self.calibration.mean_cost, "times": fine.times}
        paths = {f"path.{k}": solution.path(k) for k in range(1, fine.steps + 1)}
        return {**arrays, "totals": solution.totals[1:], **paths}


def compare(boss: Candidate, halves: tuple[Trial, Trial], seed: int) -> dict[str, Any]:
    """BOSS's schedule beside uniform steps, both Euler's, on all held-out noises."""
    import torch

    from flowdistill.evaluation import metrics

    even = Candidate(SOLVERS["euler"], uniform(boss.schedule.steps))
    ours, theirs = (torch.cat([half(each).errors for half in halves]) for each in (boss, even))
    difference = metrics.paired_difference(ours, theirs, seed)
    return {
        "boss": metrics.mean_interval(ours, seed).as_dict(),
        "uniform": metrics.mean_interval(theirs, seed).as_dict(),
        "difference": difference.as_dict(),
        "verdict": "better" if difference.high < 0 else "worse" if difference.low > 0 else "no difference",
    }


def described(written: Candidate) -> dict[str, Any]:
    """Which way of sampling it is, by its names."""
    return {"solver": written.solver.name, "schedule": written.schedule.name}


def schedule_file(written: Candidate, model: Model) -> dict[str, Any]:
    """What a schedule file says of the way of sampling itself and of the model it is for."""
    # Others take Euler steps at them, whatever the solver that they were made for.
    sigmas = {"sigmas": written.schedule.sigmas()} if written.solver.name == "euler" else {}
    return {
        "nfe": nfe(written.solver, written.schedule),
        **described(written),
        "times": list(written.schedule.times),
        **sigmas,
        "coefficients": written.coefficients,
        "model": model.digest,
        "guidance": _guidance(model),
    }


def _guidance(model: Model) -> Any:
    return model.card.guidance.model_dump(mode="json") if model.card.guidance else None


def _save_arrays(work: Work, ways: Ways, model: Model) -> None:
    import torch

    from flowdistill import artifact

    tensors = {name: torch.as_tensor(array) for name, array in ways.arrays().items()}
    header = {"kind": "schedule", "model": model.digest, "settings": dict(work.settings)}
    artifact.save_tensors(work.folder / TENSORS, tensors, header)
