"""Evaluation: what each model is worth at each number of network calls, with intervals.

Every row of the result samples the same noises under the same labels, so rows are compared sample
by sample and not only on the average: 32 paired samples show a difference of endpoint errors that
2,000 unpaired ones do not show in a Fréchet distance. The paired error measures fidelity to the
accurate solution; a student may rightly send a noise elsewhere, then the Fréchet distance counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from flowdistill.errors import ArtifactError, UsageError, unknown
from flowdistill.evaluation.choices import Features, Measured
from flowdistill.evaluation.results import FORMAT, PICTURE, RESULT, SAMPLES
from flowdistill.objectives import DOWNLOAD
from flowdistill.recipe import Reference, Settings
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, OdeSolver, Solver, SolverName, nfe, recorded, steps_for
from flowdistill.stages import Stage
from flowdistill.work import Cost, Done, Work

if TYPE_CHECKING:
    from flowdistill.evaluation.bench import Bench
    from flowdistill.evaluation.features import Asked
    from flowdistill.evaluation.instruments import Wanted
    from flowdistill.evaluation.parts import Part
    from flowdistill.evaluation.rows import Plan, Row
    from flowdistill.teachers import Model

_KEPT = 64
"""Bytes of a sample in a row, roughly, in the files and in `checkpoints/`."""

Evaluations = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class Accurate(Settings):
    """The solution that endpoints are compared with: of the models the teacher's, or else the first one's."""

    solver: OdeSolver = "heun"
    steps: int = Field(32, ge=1, description="uniform steps; heun makes 2 steps - 1 evaluations")
    samples: int = Field(512, ge=2, description="noises that it is solved for, the first of all")


class Evaluate(Stage):
    """Distance from real data, fidelity to the accurate solution, straightness, and what sampling costs."""

    verb: ClassVar[str] = "eval"
    produces: ClassVar[str] = "evaluation"
    collective: ClassVar[bool] = True

    models: Annotated[list[str] | None, Reference("model", allow_teacher=True)] = Field(
        None, description="models that are measured"
    )
    schedule: Annotated[str | None, Reference("schedule", optional=True)] = Field(
        None, description="boss stage whose times are tried beside uniform ones, on its own model"
    )
    samples: int = Field(5000, ge=2, description="samples for each row")
    nfe: Evaluations | dict[str, Evaluations] = Field(
        [1, 2, 4, 8], description="numbers of network evaluations, for all models or for each"
    )
    solver: SolverName = "euler"
    batch_size: int = Field(256, gt=0, description="samples that are integrated at once")
    seed: int = Field(
        0, ge=0, description="of noises and labels; evaluations that are compared must share it"
    )
    reference: Accurate = Accurate()
    straightness: int = Field(
        128, ge=0, description="paths that it is measured on, at `reference.steps` Euler steps"
    )
    inversion: int = Field(
        16, ge=0, description="samples of each row that the same solver takes back to their noise"
    )
    features: Features = Features()
    reference_data: Annotated[str | None, Reference("data", optional=True, files=True)] = Field(
        None,
        description="real samples that distances refer to: a folder of images, a .npz or .safetensors, or "
        "one of these with published moments, mu and sigma; left out, the data on the model's card",
    )
    lpips: Measured | None = Field(None, description="LPIPS to the accurate solution")
    latency: bool = Field(
        True, description="measure latency, throughput and memory, which differ from run to run"
    )

    @model_validator(mode="after")
    def _possible(self) -> Evaluate:
        listed = self.models or []
        if len(set(listed)) < len(listed):
            raise ValueError("models: a model is listed twice")
        if isinstance(self.nfe, dict) and listed:
            for name in self.nfe:
                if name not in listed:
                    raise ValueError(f"nfe: {unknown('model', name, listed)}")
            for name in listed:
                if name not in self.nfe:
                    raise ValueError(f"nfe: has no entry for model '{name}'")
        for evaluations in chain(*self.nfe.values()) if isinstance(self.nfe, dict) else self.nfe:
            try:
                steps_for(SOLVERS[self.solver], evaluations)
            except UsageError as error:
                raise ValueError(f"nfe: {error}") from error
        return self

    def preflight(self, inputs: Mapping[str, Any]) -> None:
        for asked in self._asked(inputs):
            if inputs.get(f"features.{asked.key}.weights") == DOWNLOAD:
                from flowdistill.evaluation import features

                features.fetch(asked)
        if self.lpips is not None and inputs.get("lpips.weights") == DOWNLOAD:
            from flowdistill.evaluation import lpipsweights

            lpipsweights.fetch(self.lpips.net)

    def run(self, work: Work) -> Done:
        from flowdistill.evaluation.bench import Bench

        models = _by_short_name(work.models("models"))
        _check_same_data(models)
        bench = Bench(self._plan(work, models), work)
        paths = {name: bench.straightness(name) for name in models}
        parts = bench.measured()
        content = _content(bench, paths, parts)
        if self.latency:
            content |= _costs(bench, parts)
        outputs = _write(bench, content, parts) if work.world.rank == 0 else []
        return Done(outputs, {row["id"]: _values(row["metrics"]) for row in content["rows"]})

    def plan(self, work: Work) -> Cost:
        """As many evaluations as all rows take, each at the rate of its model; features are not counted."""
        from flowdistill import sizing

        models = _by_short_name(work.models("models"))
        plan = self._plan(work, models)
        rates = {name: sizing.evaluations_per_second(each, self.batch_size) for name, each in models.items()}
        seconds = plan.pairs * plan.accurate.nfe / rates[plan.accurate.name]
        seconds += sum(plan.paths * plan.path_steps / rate for rate in rates.values())
        seconds += sum(plan.cost(row) / rates[row.name] for row in plan.rows)
        kept = len(plan.rows) * plan.samples * _KEPT
        return Cost(plan.evaluations, "evaluation", plan.evaluations / seconds, seconds, kept)

    def _plan(self, work: Work, models: Mapping[str, Model]) -> Plan:
        from flowdistill.evaluation.rows import Plan, Row

        base = "teacher" if "teacher" in models else next(iter(models))
        solver, steps = SOLVERS[self.reference.solver], self.reference.steps
        return Plan(
            rows=tuple(self.rows(work, models)),
            accurate=Row(base, models[base], solver, uniform(steps)),
            samples=self.samples,
            pairs=min(self.reference.samples, self.samples),
            paths=min(self.straightness, self.samples),
            path_steps=steps,
            inversions=min(self.inversion, self.samples),
            batch_size=self.batch_size,
            seed=self.seed,
            timed=self.latency,
            wanted=self._wanted(work.inputs),
            reference_data=work.inputs.get("reference_data"),
        )

    def _wanted(self, inputs: Mapping[str, Any]) -> Wanted:
        from flowdistill.evaluation.instruments import Wanted

        return Wanted(self.features.shipped, self._asked(inputs), self.lpips, _file(inputs, "lpips"))

    def _asked(self, inputs: Mapping[str, Any]) -> list[Asked]:
        """The extractors with weights of their own."""
        if not self.features.published:
            return []
        from flowdistill.evaluation.features import Asked

        return [
            Asked(key, settings.network, _file(inputs, f"features.{key}"))
            for key, settings in self.features.published.items()
        ]

    def rows(self, work: Work, models: Mapping[str, Model]) -> Iterator[Row]:
        """Model by model, fewest evaluations first; a schedule follows the uniform steps."""
        from flowdistill.evaluation.rows import Row

        chosen = _schedules(work, models)
        written = self.models or list(models)
        for (name, model), key in zip(models.items(), written, strict=True):
            listed = self.nfe[key] if isinstance(self.nfe, dict) else self.nfe
            for evaluations in sorted(set(listed)):
                solver = SOLVERS[self.solver]
                even = uniform(steps_for(solver, evaluations))
                yield Row(name, model, solver, even)
                found = chosen.get((model.digest, evaluations)) or model.carried(evaluations)
                if found is not None and (found[0], found[1].times) != (solver, even.times):
                    yield Row(name, model, *found)


def _write(bench: Bench, content: Mapping[str, Any], parts: Sequence[tuple[Row, Part]]) -> list[str]:
    """The figures, the values of each sample by its noise, and a picture where one can be drawn."""
    from flowdistill import artifact, pictures

    folder, accurate = bench.work.folder, bench.plan.accurate
    artifact.save_json(folder / RESULT, content)
    tensors = dict(bench.real.samples)
    for row, (values, _) in parts:
        tensors |= {f"{row.id}.{name}": value for name, value in values.items() if name != "shown"}
    header = {"kind": "evaluation", "seed": bench.plan.seed}
    artifact.save_tensors(folder / SAMPLES, tensors, header)
    if not pictures.drawable(bench.card.shape):
        return [RESULT, SAMPLES]
    shown = [(accurate.caption, bench.solution[: bench.shown])]
    shown += [(row.caption, values["shown"]) for row, (values, _) in parts]
    artifact.atomic_write(folder / PICTURE, pictures.labelled_rows(shown))
    return [RESULT, SAMPLES, PICTURE]


def _costs(bench: Bench, parts: Sequence[tuple[Row, Part]]) -> dict[str, Any]:
    """What differs from run to run, by row."""
    costs = {
        kind: {row.id: figures[kind] for row, (_, figures) in parts} for kind in ("throughput", "memory")
    }
    return {"latency": {row.id: bench.latency(row) for row, _ in parts}, **costs}


def _content(bench: Bench, models: Mapping[str, Any], parts: Sequence[tuple[Row, Part]]) -> dict[str, Any]:
    """What stands in `eval.json`, and is always the same."""
    from flowdistill.evaluation import costs

    plan, readers = bench.plan, bench.real.readers
    rows = [
        {
            "id": row.id,
            **row.facts(),
            "forward_passes": row.forward_passes,
            "metrics": figures["metrics"],
            "skipped": figures["skipped"],
        }
        for row, (_, figures) in parts
    ]
    described = {
        name: {
            "digest": model.digest,
            "parameters": sum(value.numel() for value in model.network.parameters()),
            "macs": costs.macs(model.card),
            **models[name],
        }
        for name, model in plan.models.items()
    }
    return {
        "format": FORMAT,
        "kind": "evaluation",
        "seed": plan.seed,
        "samples": plan.samples,
        "batch_size": plan.batch_size,
        "extractor": readers[0].label if readers else None,
        "preprocessing": bench.instruments.preprocessing,
        "features": bench.real.facts(),
        "reference": {**plan.accurate.facts(), "samples": plan.pairs},
        "data": {"name": bench.card.data, **bench.real.figures},
        "models": described,
        "rows": rows,
        "latency": {},
        "throughput": {},
        "memory": {},
    }


def _file(inputs: Mapping[str, Any], settings: str) -> Path | None:
    """The file that some settings name for their weights; None stands for the cache."""
    named = inputs.get(f"{settings}.weights")
    return None if named in (None, DOWNLOAD) else Path(named)


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in metrics.items()}


def _by_short_name(models: Mapping[str, Model]) -> dict[str, Model]:
    """A path is called after its folder or file where that is unique."""
    short = [_short(name) for name in models]
    names = [name if short.count(s) > 1 else s for name, s in zip(models, short, strict=True)]
    return dict(zip(names, models.values(), strict=True))


def _short(name: str) -> str:
    if "/" not in name and not name.endswith(".safetensors"):
        return name
    path = Path(name)
    return path.parent.name if path.name == "model.safetensors" else path.stem


def _check_same_data(models: Mapping[str, Model]) -> None:
    for what in ("data", "shape", "classes"):
        found = {getattr(model.card, what): name for name, model in models.items()}
        found = {value: name for value, name in found.items() if value}
        if len(found) > 1:
            differ = ", ".join(f"{name} {value}" for value, name in found.items())
            raise UsageError(f"models of one evaluation must agree in {what}, found {differ}")


def _schedules(work: Work, models: Mapping[str, Model]) -> dict[tuple[str, int], tuple[Solver, Schedule]]:
    """(digest of the model, evaluations) -> what the boss stage chose for it."""
    from flowdistill import artifact

    folder = work.inputs.get("schedule")
    if folder is None:
        return {}
    found = {}
    for path in sorted(Path(folder).glob("schedule-nfe*.json")):
        content = artifact.load_json(path)
        rule = recorded(content, content.get("schedule", "boss"), path)
        found[str(content.get("model")), nfe(*rule)] = rule
    digests = {model.digest for model in models.values()}
    if not any(digest in digests for digest, _ in found):
        raise ArtifactError(
            f"{folder}: no schedule for {' or '.join(models)}\n"
            "a schedule fits the model it was made for: evaluate that one, or make a new schedule"
        )
    return found
