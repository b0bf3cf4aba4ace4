"""Pairs: the teacher's ODE solved from many noises, (eps, x0) kept for reflow.

The noise of pair i is a function of (seed, i), so the store holds samples only, and the same bytes come out
whether it is made in one go or after any number of kills, by one process or by many. How far the solver is
from the solution is measured before anything is spent: the same noises, every step halved. With
`source: data` the ODE is solved upwards instead, from real samples to their noise (rf++'s config G).
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flowdistill.chords import bellman_schedules, merged
from flowdistill.errors import Diverged, FlowdistillError, UsageError
from flowdistill.grids import Grid, schedule
from flowdistill.guidance import Guidance
from flowdistill.pairmaking import INVERT_FROM, Maker, read_labels
from flowdistill.recipe import Reference, Settings
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, OdeSolver
from flowdistill.stages import Stage
from flowdistill.work import Cost, Done, Figures, Work

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.images import Samples
    from flowdistill.pairstore import PairSpec, PairStore
    from flowdistill.teachers import Model

CHECK = "check.safetensors"
"""The solver's error on the first pairs."""
DEFAULT_COUNT = 20_000
_TRIAL_S = 3.0
_TRIES, _MORE_STEPS, _LEAST_RTOL = 6, 32, 1e-7
"""How far a better setting is looked for: so many times, up to so many times the steps."""
_JUDGED = 4096
"""Inverted noises that are compared with a normal distribution."""


class Kept(Settings):
    """Times at which the states of the pairs are kept, for `straighten`: all that are named."""

    schedule: Annotated[str | None, Reference("schedule", optional=True)] = Field(
        None, description="boss stage: the times of its Bellman paths for each of its `nfe`"
    )
    uniform: list[Annotated[int, Field(ge=2)]] = Field([], description="the times of so many uniform steps")
    times: list[Annotated[float, Field(gt=0, lt=1)]] = Field([], description="further times")

    @model_validator(mode="after")
    def _some(self) -> Kept:
        if not (self.schedule or self.uniform or self.times):
            raise ValueError("expected `schedule`, `uniform` or `times`")
        return self


class Pairs(Stage):
    """Generate (noise, data, label) pairs with a model."""

    verb: ClassVar[str] = "pairs"
    produces: ClassVar[str] = "pairs"
    shared: ClassVar[bool] = True

    model: Annotated[str | None, Reference("model", allow_teacher=True)] = Field(
        "teacher", description="model that makes the pairs"
    )
    source: Literal["noise", "data"] = Field(
        "noise", description="noise: solve from noise to samples; data: invert real samples to their noise"
    )
    data: Annotated[str | None, Reference("data", optional=True, files=True, names=("shapes", "digits"))] = (
        Field(
            None,
            description="with `source: data`: a data set, a folder of images, a .npz or .safetensors; left "
            "out, what the model's card says",
        )
    )
    invert_from: float = Field(
        INVERT_FROM,
        ge=0,
        lt=1,
        description="with `source: data`: t at which the way up begins, at (1 - t) x0 + t fresh noise; "
        "0.001 in rf++'s code",
    )
    count: int | None = Field(
        None, gt=0, description="number of pairs; left out, 20000, or as many as the data have"
    )
    solver: Literal[OdeSolver, "rk45"] = Field(
        "heun",
        description="rf-solver is midpoint, fireflow midpoint-cached; rk45 chooses the steps of each sample "
        "itself",
    )
    steps: int = Field(18, gt=0, description="steps of the solver; heun makes 2 steps - 1 evaluations")
    schedule: Grid = Field("uniform", description="times of the steps; edm is for EDM's teachers")
    rtol: float = Field(1e-5, gt=0, description="of rk45: relative error of a step")
    atol: float = Field(1e-5, gt=0, description="of rk45: absolute error of a step")
    guidance: Guidance | None = Field(None, description="in place of the model's own")
    classes: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="classes, or prompts, that are drawn from; left out, all of them"
    )
    labels: Annotated[str | None, Reference("labels", optional=True, files=True)] = Field(
        None, description="a text file with a label in each line: pair i has that of line i, over and over"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="arithmetic of the network; the state of the ODE is float32 in any case"
    )
    batch_size: int = Field(256, gt=0, description="pairs that are integrated at once")
    shard_size: int = Field(1024, gt=0, description="pairs in a file; what a kill costs at most")
    dtype: Literal["uint8", "float16", "bfloat16", "float32"] = Field(
        "float16", description="type of the stored data"
    )
    path: Kept | None = Field(None, description="states between noise and sample that are kept, too")
    store_noise: bool = Field(False, description="store the noise too, for readers other than flowdistill")
    noise: Literal["seeded", "pcg64"] = Field(
        "seeded", description="pcg64: draw the noise as rf++ does, so that the pairs can be exported for it"
    )
    check: int = Field(
        64, ge=0, description="pairs that the solver's error is measured on, by halving every step"
    )
    tolerance: float | None = Field(
        None, gt=0, description="largest solver error, as a share of the distance from noise to data"
    )
    estimate_error: bool = Field(
        False, description="measure the solver's error of every pair and store it; three times the work"
    )

    @model_validator(mode="after")
    def _possible(self) -> Pairs:
        if self.classes and self.labels:
            raise ValueError("classes: cannot be given together with `labels`")
        if self.tolerance and not self.check:
            raise ValueError("tolerance: needs `check`, pairs to measure the error on")
        if self.noise == "pcg64" and (self.store_noise or self.source == "data"):
            raise ValueError("noise: pcg64 is for noise that is drawn and not stored")
        if self.source == "noise" and self.data:
            raise ValueError("data: is for `source: data`")
        if self.path and (self.source == "data" or self.solver == "rk45"):
            raise ValueError("path: needs `source: noise` and a solver of given steps")
        if self.source == "data" and (self.classes or self.labels):
            raise ValueError("source: data have their own labels; leave `classes` and `labels` out")
        if self.solver != "rk45":
            try:
                schedule(self.schedule, self.steps)
            except UsageError as error:
                raise ValueError(f"schedule: {error}") from error
        return self

    def run(self, work: Work) -> Done:
        from flowdistill.pairstore import PairStore, PairWriter, refuse_others

        maker = self.maker(work)
        refuse_others(work.folder, maker.spec)
        judged = self.judge(maker)
        started = time.monotonic()
        with PairWriter(work.folder, maker.spec) as writer:
            before = writer.committed_pairs
            for shard in writer.claims(idle=work.stop.check):
                writer.commit(shard, *maker.shard(shard, writer))
            made, files = writer.committed_pairs - before, writer.files()
        seconds = time.monotonic() - started
        figures = {
            "pairs": maker.spec.count,
            **maker.evaluations(),
            **judged,
            "pairs_per_second": made / seconds,
            "seconds": seconds,
        }
        store = PairStore.open(work.folder)
        if self.source == "data":
            figures["noise"] = _noise_figures(store)
        if self.solver == "rk45":
            calls = store.column("nfe").double()
            figures["nfe"] = {
                "mean": float(calls.mean()),
                "least": int(calls.min()),
                "most": int(calls.max()),
            }
        outputs = [*files, CHECK] if self.check else list(files)
        return Done(outputs, figures, _DTYPES[self.precision], files)

    def mend(self, work: Work) -> list[str]:
        from flowdistill import artifact
        from flowdistill.pairstore import mend

        names = mend(work.folder, self.maker(work).spec)
        with suppress(FlowdistillError):
            artifact.load_tensors(work.folder / CHECK)
            return names
        (work.folder / CHECK).unlink(missing_ok=True)
        return [*names, CHECK] if self.check else names

    def maker(self, work: Work) -> Maker:
        """Everything that a pair depends on."""
        from flowdistill import images

        model = work.model().guided(self.guidance)
        data = None
        if self.source == "data":
            named = work.inputs.get("data") or model.card.data
            if named is None or named.startswith("analytic:"):
                raise UsageError(
                    f"{work.stage}.data: the model's card names no data set at hand; name one, or a path"
                )
            data = images.open_samples(named, model.card.shape)
        spec = self.spec(work, model, data)
        return Maker(self, work, model, spec, data, self.chosen_labels(work, model))

    def spec(self, work: Work, model: Model, data: Samples | None) -> PairSpec:
        """What the store says of itself; two runs with equal specs make equal bytes."""
        from flowdistill.pairstore import PairSpec

        guidance, latent = model.card.guidance, model.card.latent
        scaling = {"latent": latent.model_dump(mode="json", include={"scale", "shift"})} if latent else {}
        own = {"steps", "schedule"} if self.solver != "rk45" else {"rtol", "atol"}
        settings = self.model_dump(
            mode="json", include={"source", "classes", "precision", "batch_size"} | own
        )
        settings["solver"] = SOLVERS[self.solver].name if self.solver != "rk45" else self.solver
        if data is not None:
            settings["invert_from"] = self.invert_from
        inputs = {
            key: work.parents.get(str(work.inputs[key])) for key in ("data", "labels") if work.inputs.get(key)
        }
        return PairSpec(
            count=_count(self.count, data, work.stage),
            shape=model.card.shape,
            classes=model.card.classes,
            shard_size=self.shard_size,
            dtype=self.dtype,
            noise="stored" if self.store_noise or data is not None else self.noise,
            error=self.estimate_error,
            evaluations=self.solver == "rk45",
            path=self.kept_times(work, model),
            seed=work.seed,
            origin={
                "model": model.digest,
                "guidance": guidance.model_dump(mode="json") if guidance else None,
                **scaling,
                **settings,
                **inputs,
            },
        )

    def kept_times(self, work: Work, model: Model) -> tuple[float, ...]:
        """The times of `path`, falling, without 1 and 0."""
        if self.path is None:
            return ()
        found = {*self.path.times, *(t for steps in self.path.uniform for t in uniform(steps).times)}
        folder = work.inputs.get("path.schedule")
        if folder is not None:
            for each in bellman_schedules(Path(folder), model.digest, f"{work.stage}.path.schedule").values():
                found.update(each.times)
        return merged((1.0, 0.0), sorted(found, reverse=True))[1:-1]

    def judge(self, maker: Maker) -> Figures:
        """The solver's error on the first pairs, measured once; UsageError where it is above `tolerance`."""
        from flowdistill import artifact

        if not self.check:
            return {}
        path = maker.work.folder / CHECK
        with artifact.claimed(maker.work.folder / artifact.CLAIMS / "check", wait=True):
            if path.exists():
                error, distance = (artifact.load_tensors(path)[0][name] for name in ("error", "distance"))
                return _error_figures(error, distance)
            error, distance = maker.errors(range(min(self.check, maker.spec.count)))
            figures = _error_figures(error, distance)
            self._refuse_inaccurate(figures["solver_error"]["relative"], maker)
            header = {"kind": "solver error", "store": maker.spec.digest}
            artifact.save_tensors(path, {"error": error, "distance": distance}, header)
            return figures

    def _refuse_inaccurate(self, relative: float, maker: Maker) -> None:
        stage = maker.work.stage
        if not math.isfinite(relative):
            raise Diverged(
                f"{stage}: pairs made in {self.precision} are not finite, nothing was made\n"
                "make them in fp32 or with more steps, or look at the model with `flowdistill probe`"
            )
        if self.tolerance is None or relative <= self.tolerance:
            return
        raise UsageError(
            f"{stage}.tolerance: the solver's error is {relative:.3g} of the distance from noise to data, "
            f"more than {self.tolerance:.3g}; nothing was made\n{self._remedy(relative, maker)}"
        )

    def _remedy(self, relative: float, maker: Maker) -> str:
        """What would do, tried: the solver's order says where to begin, but may not have set in yet."""
        assert self.tolerance is not None
        tried, indices = self, range(min(self.check, maker.spec.count))
        for _ in range(_TRIES):
            tried = tried._finer(relative / self.tolerance)
            fixed = not isinstance(tried.schedule, str) and tried.schedule.name == "times"
            if fixed or tried.steps > _MORE_STEPS * self.steps or tried.rtol < _LEAST_RTOL:
                break
            error, distance = replace(maker, stage=tried).errors(indices)
            relative = _error_figures(error, distance)["solver_error"]["relative"]
            if relative <= self.tolerance:
                if self.solver == "rk45":
                    return f"lower rtol and atol to {tried.rtol:g} and {tried.atol:g}, or another solver"
                return f"{tried.steps} steps would do, or another solver"
        return "use another solver, more steps, or a larger tolerance"

    def _finer(self, excess: float) -> Pairs:
        if self.solver == "rk45":
            finer = {name: float(f"{getattr(self, name) / (2 * excess):.1e}") for name in ("rtol", "atol")}
            return self.model_copy(update=finer)
        growth = (1.1 * excess) ** (1 / SOLVERS[self.solver].order)
        return self.model_copy(update={"steps": math.ceil(self.steps * max(growth, 1.1))})

    def chosen_labels(self, work: Work, model: Model) -> list[int] | None:
        """The labels of a file, or the classes to draw from; UsageError for unknown ones."""
        chosen, what = self.classes, f"{work.stage}.classes"
        if self.labels:
            what = str(work.inputs["labels"])
            chosen = read_labels(Path(what))
        if chosen is None:
            return None
        if not model.card.classes:
            raise UsageError(f"{what}: the model has no classes")
        for number, label in enumerate(chosen, start=1):
            if not 0 <= label < model.card.classes:
                place = f"{what}:{number}" if self.labels else what
                raise UsageError(
                    f"{place}: {label} is no class of the model, which has 0 to {model.card.classes - 1}"
                )
        return chosen

    def plan(self, work: Work) -> Cost:
        """Rate of a few batches, in the type and size of the real ones, and what the whole comes to."""
        maker = self.maker(work)
        size = min(self.batch_size, maker.spec.count)
        maker.block(range(size))  # the first is slower: caches are filled, kernels chosen
        made, started = 0, time.monotonic()
        while not made or time.monotonic() - started < _TRIAL_S:
            maker.block(range(size))
            made += size
        rate = made / (time.monotonic() - started)
        checked = 3 * min(self.check, maker.spec.count)
        return Cost(
            maker.spec.count,
            "pair",
            rate,
            seconds=(maker.spec.count + checked) / rate,
            size_bytes=maker.spec.size_bytes,
        )


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _count(asked: int | None, data: Samples | None, stage: str) -> int:
    there = None if data is None else data.count
    if asked is None:
        return there or DEFAULT_COUNT
    if there is not None and asked > there:
        raise UsageError(f"{stage}.count: {asked} pairs are asked for, the data have {there}")
    return asked


def _error_figures(error: Tensor, distance: Tensor) -> Figures:
    """How large the solver's error [n] is, and as a share of the distance [n] from noise to data."""
    relative = float(error.double().mean() / distance.double().mean())
    spread = {name: float(error.quantile(q)) for name, q in (("median", 0.5), ("p95", 0.95))}
    measured = {"mean": float(error.mean()), **spread, "relative": relative, "pairs": len(error)}
    return {"solver_error": measured, "distance": float(distance.mean())}


def _noise_figures(store: PairStore) -> Figures:
    """What inverted noise looks like, beside what a normal distribution would."""
    from flowdistill.evaluation import metrics

    stride = -(-len(store) // _JUDGED)
    return metrics.normality(store.column("eps", range(0, len(store), stride)))
