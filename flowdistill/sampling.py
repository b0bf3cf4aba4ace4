"""Samples of a model on disk, or samples taken to their noise and back: tensors, and a picture of images.

Sample i is a function of the model, the solver, the times and (seed, i) alone: a larger count adds samples
and changes none. What is inverted depends on its place in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flowdistill import artifact
from flowdistill.errors import ArtifactError, UsageError, unknown
from flowdistill.pairmaking import INVERT_FROM, beginning_at, check_labels, noised
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, Solver, integrate, nfe, recorded, steps_for
from flowdistill.work import Progress, batches

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.teachers import Model

TENSORS = "samples.safetensors"
NOISE = "noise.safetensors"
PICTURE = "grid.png"
DEFAULT_NFE = 8

_COLUMNS = 8
_BATCH = 64
"""Fixed, since the last bits of a sample may depend on the size of its batch."""


@dataclass(frozen=True)
class Rule:
    """How a model is sampled."""

    solver: Solver
    schedule: Schedule

    @property
    def nfe(self) -> int:
        """Evaluations of the network for one sample."""
        return nfe(self.solver, self.schedule)


def stepwise(solver: str, evaluations: int) -> Rule:
    """Uniform steps that cost exactly so many evaluations."""
    chosen = find_solver(solver)
    return Rule(chosen, uniform(steps_for(chosen, evaluations)))


def by_default(model: Model, solver: str | None, evaluations: int | None) -> Rule:
    """What the model's card says of so many evaluations, or of those it was made for; else uniform steps."""
    count = evaluations or model.card.nfe or DEFAULT_NFE
    carried = None if solver else model.carried(count)
    return Rule(*carried) if carried else stepwise(solver or "euler", count)


def carry(reference: str, files: Sequence[Path], destination: Path) -> str:
    """Write the model with these schedules in its card, for all who sample it; returns the file's SHA-256.

    Raises `UsageError` where the file is there already or the model has none of its own, and `ArtifactError`
    where a schedule is for another model.
    """
    from flowdistill import teachers

    model = teachers.open_model(reference, "cpu")
    if destination.exists():
        raise UsageError(f"{destination}: is there already; name a new file, or remove it")
    if not any(True for _ in model.network.parameters()):
        raise UsageError(f"{reference}: has no weights that a file could hold")
    schedules = dict(model.card.schedules)
    for file in files:
        rule = scheduled(file, model, None, None, force=False)
        content = artifact.load_json(file)
        kept = {key: content.get(key) for key in ("solver", "schedule", "times", "coefficients")}
        schedules[str(rule.nfe)] = {**kept, "schedule": content.get("schedule", "boss")}
    card = model.card.model_copy(update={"schedules": schedules})
    return card.write(destination, model.weights.state_dict(), None)


def timed(solver: str, text: str) -> Rule:
    """Steps between the times that are listed, as in `1,0.6,0.3,0`."""
    try:
        times = tuple(map(float, text.split(",")))
    except ValueError:
        raise UsageError(
            f"--times {text}: expected numbers with commas between them, as in 1,0.6,0.3,0"
        ) from None
    return Rule(find_solver(solver), Schedule(times, "--times"))


def scheduled(path: Path, model: Model, solver: str | None, evaluations: int | None, force: bool) -> Rule:
    """The rule in a schedule file that `flowdistill boss` wrote for this model.

    Raises `ArtifactError` where the file was made for another model, unless `force`, and `UsageError` where
    the solver or number of evaluations that was asked for is not the file's.
    """
    content = artifact.load_json(path)
    rule, made_for = Rule(*recorded(content, path.name, path)), str(content.get("model"))
    if made_for != model.digest and not force:
        raise ArtifactError(
            f"{path}: made for another model ({made_for[:12]}…, this one is {model.digest[:12]}…)\n"
            "make one for this model with `flowdistill boss`, or add --force to use it all the same"
        )
    asked_for = None if solver is None else find_solver(solver).name
    for option, asked, found in (("solver", asked_for, rule.solver.name), ("nfe", evaluations, rule.nfe)):
        if asked is not None and asked != found:
            raise UsageError(f"--{option} {asked}: {path} is for --{option} {found}; leave one of them out")
    return rule


def find_solver(name: str) -> Solver:
    """The solver of this name; `UsageError` where there is none."""
    for known, solver in SOLVERS.items():
        if known == name:
            return solver
    raise UsageError(f"--solver: {unknown('solver', name, SOLVERS)}")


@dataclass(frozen=True)
class Job:
    """What is asked for, of samples as of inversions."""

    model: Model
    rule: Rule
    count: int
    labels: Sequence[int] | None
    """Classes that are taken in turn; empty, those that suggest themselves; None, no class."""
    seed: int
    folder: Path
    report: Callable[[Progress], None]

    def chosen_labels(self) -> Tensor | None:
        """Labels [count] in turn, of all classes if none are named; None for a model without classes."""
        import torch

        classes = self.model.card.classes
        if not classes:
            if self.labels is None or self.labels:
                raise UsageError("--labels: this model has no classes")
            return None
        if self.labels is None:
            return self._no_class()
        for label in self.labels:
            if not 0 <= label < classes:
                raise UsageError(f"--labels: {label} is no class of this model, which has 0 to {classes - 1}")
        cycle = list(self.labels) or list(range(classes))
        return torch.tensor([cycle[index % len(cycle)] for index in range(self.count)])

    def _no_class(self) -> Tensor | None:
        """What stands for no class; `UsageError` where the network, which alone can tell, has nothing."""
        import torch

        null = self.model.null(torch.zeros(self.count, dtype=torch.int64))
        try:
            once = replace(self, rule=stepwise("euler", 1))
            once.walk(torch.zeros(1, *self.model.card.shape), _part(null, range(1)))
        except ValueError as error:
            raise UsageError(f"--labels null: {error}") from None
        return null

    def walk(self, x: Tensor, label: Tensor | None, inverse: bool = False) -> Tensor:
        """Where the rule takes x [B, *shape], on the CPU."""
        model, rule = self.model, self.rule
        field = beginning_at(INVERT_FROM, model.field) if inverse else model.field
        y = None if label is None else label.to(model.device)
        return integrate(field, x.to(model.device), rule.schedule, rule.solver, y, inverse=inverse).cpu()

    def in_batches(self, walk: Callable[[range], tuple[Tensor, ...]]) -> list[Tensor]:
        """What `walk` makes of the indices, joined."""
        import torch

        made = []
        for indices in batches(range(self.count), _BATCH):
            made.append(walk(indices))
            self.report(Progress(indices.stop, self.count, "sample"))
        return [torch.cat(column) for column in zip(*made, strict=True)]

    def save(self, path: Path, name: str, rows: Tensor, label: Tensor | None, **more: str) -> None:
        """Write rows under this name, with their labels and what they depend on."""
        tensors = {name: rows} if label is None else {name: rows, "labels": label}
        header = {
            "kind": name,
            "model": self.model.digest,
            "solver": self.rule.solver.name,
            "times": list(self.rule.schedule.times),
            "nfe": self.rule.nfe,
            "seed": self.seed,
            **more,
        }
        artifact.save_tensors(path, tensors, header)

    def shown(self, x0: Tensor) -> Tensor | None:
        """What a picture of samples shows; None where there can be none."""
        from flowdistill import pictures

        shown = self.model.pixels(x0)
        return shown if shown is not None and pictures.drawable(shown.shape[1:]) else None


def sample(job: Job) -> list[Path]:
    """Draw the samples and write them; returns the files, the tensors first."""
    from flowdistill import pictures, randomness

    label, folder = job.chosen_labels(), job.folder

    def draw(indices: range) -> tuple[Tensor]:
        eps = randomness.noise(job.seed, indices, job.model.card.shape)
        return (job.walk(eps, _part(label, indices)),)

    (x0,) = job.in_batches(draw)
    artifact.create_folder(folder)
    job.save(folder / TENSORS, "samples", x0, label)
    shown = job.shown(x0)
    if shown is None:
        return [folder / TENSORS]
    artifact.atomic_write(folder / PICTURE, pictures.grid(shown, _COLUMNS))
    return [folder / TENSORS, folder / PICTURE]


@dataclass(frozen=True)
class RoundTrip:
    """What became of samples that were taken to their noise and back."""

    count: int
    nfe: int
    """Evaluations on the way up."""
    error: float
    """Mean over the samples of the root mean square over the dimensions of what they came back with."""
    noise: float
    """Mean of |noise|^2 / d, 1 for noise from N(0, I)."""
    files: list[Path]

    @property
    def figures(self) -> dict[str, float]:
        """For JSON."""
        return {
            "count": self.count,
            "inversion_nfe": self.nfe,
            "round_trip_error": self.error,
            "noise_norm": self.noise,
        }


def invert(job: Job, source: str) -> RoundTrip:
    """Take samples of `source`, at most `count`, to their noise and back; write both ends of the way down.

    The way up begins where that of pairs from data does; the way down is what `sample` does with the noise.
    Labels that are not named are those that the samples have.
    """
    from flowdistill import images
    from flowdistill.evaluation import metrics

    data = images.open_samples(source, job.model.card.shape)
    job = job if data.count is None else replace(job, count=min(job.count, data.count))
    x0, own = data.read(range(job.count))
    own_wanted = job.labels is not None and not job.labels
    label = _labels_of(job.model, source, own) if own_wanted else job.chosen_labels()

    def there_and_back(indices: range) -> tuple[Tensor, Tensor]:
        y = _part(label, indices)
        start = noised(x0[indices.start : indices.stop], INVERT_FROM, job.seed, indices)
        eps = job.walk(start, y, inverse=True)
        return eps, job.walk(eps, y)

    eps, back = job.in_batches(there_and_back)
    folder, files = job.folder, [job.folder / NOISE, job.folder / TENSORS]
    artifact.create_folder(folder)
    job.save(folder / NOISE, "noise", eps, label, inverted=source)
    job.save(folder / TENSORS, "samples", back, label, inverted=source)
    before, after = job.shown(x0), job.shown(back)
    if before is not None and after is not None:
        artifact.atomic_write(folder / PICTURE, _side_by_side(before, after))
        files.append(folder / PICTURE)
    up = nfe(job.rule.solver, job.rule.schedule, inverse=True)
    error = float(metrics.endpoint_error(back, x0).mean())
    return RoundTrip(job.count, up, error, float(eps.double().square().mean()), files)


def _labels_of(model: Model, source: str, own: Tensor | None) -> Tensor | None:
    """The labels that samples came with, if the model wants any."""
    classes = model.card.classes
    if not classes:
        return None
    if own is None:
        raise UsageError(f"{source}: has no labels, and the model has {classes} classes: add --labels")
    check_labels(own, classes, source)
    return own


def _part(label: Tensor | None, indices: range) -> Tensor | None:
    return None if label is None else label[indices.start : indices.stop]


def _side_by_side(before: Tensor, after: Tensor) -> bytes:
    """PNG of the samples, what they came back as below; images in rows of a few, points all at once."""
    from flowdistill import pictures

    columns = _COLUMNS if before.ndim == 4 else len(before)
    rows = []
    for part in batches(range(len(before)), columns):
        rows.append(("original", before[part.start : part.stop]))
        rows.append(("reconstruction", after[part.start : part.stop]))
    return pictures.labelled_rows(rows)
