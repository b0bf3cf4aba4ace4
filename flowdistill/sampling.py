"""Samples of a model on disk: the tensors, and for images a picture of them.

Sample i is a function of the model, the solver, the times and (seed, i) alone: a larger count adds samples
and changes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdistill import artifact
from flowdistill.errors import ArtifactError, UsageError, unknown
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, Solver, integrate, nfe, steps_for
from flowdistill.work import Progress, batches

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.teachers import Model

TENSORS = "samples.safetensors"
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


def scheduled(path: Path, model: Model, solver: str | None, evaluations: int | None, force: bool) -> Rule:
    """The rule in a schedule file that `flowdistill boss` wrote for this model.

    Raises `ArtifactError` where the file was made for another model, unless `force`, and `UsageError` where
    the solver or number of evaluations that was asked for is not the file's.
    """
    content = artifact.load_json(path)
    try:
        rule = Rule(find_solver(content["solver"]), Schedule(tuple(map(float, content["times"])), path.name))
        made_for = str(content["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: not a schedule, expected a file that `flowdistill boss` wrote"
        ) from error
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


def choose_labels(model: Model, wanted: Sequence[int], count: int) -> list[int] | None:
    """Labels [count] in turn: those that are wanted, else all classes; None for a model without classes."""
    classes = model.card.classes
    if not classes:
        if wanted:
            raise UsageError("--labels: this model has no classes")
        return None
    for label in wanted:
        if not 0 <= label < classes:
            raise UsageError(f"--labels: {label} is no class of this model, which has 0 to {classes - 1}")
    cycle = list(wanted) or list(range(classes))
    return [cycle[index % len(cycle)] for index in range(count)]


def sample(
    model: Model,
    rule: Rule,
    *,
    count: int,
    labels: Sequence[int],
    seed: int,
    folder: Path,
    report: Callable[[Progress], None],
) -> list[Path]:
    """Draw the samples and write them; returns the files, the tensors first."""
    import torch

    from flowdistill import pictures

    wanted = choose_labels(model, labels, count)
    label = None if wanted is None else torch.tensor(wanted)
    x0 = _draw(model, rule, count, label, seed, report)
    artifact.create_folder(folder)
    tensors = {"samples": x0} if label is None else {"samples": x0, "labels": label}
    artifact.save_tensors(folder / TENSORS, tensors, _header(model, rule, seed))
    shown = model.pixels(x0)
    if shown is None or not pictures.drawable(tuple(shown.shape[1:])):
        return [folder / TENSORS]
    artifact.atomic_write(folder / PICTURE, pictures.grid(shown, _COLUMNS))
    return [folder / TENSORS, folder / PICTURE]


def _draw(
    model: Model,
    rule: Rule,
    count: int,
    label: Tensor | None,
    seed: int,
    report: Callable[[Progress], None],
) -> Tensor:
    import torch

    from flowdistill import randomness

    drawn = []
    for indices in batches(range(count), _BATCH):
        eps = randomness.noise(seed, indices, model.card.shape).to(model.device)
        y = None if label is None else label[indices.start : indices.stop].to(model.device)
        drawn.append(integrate(model.field, eps, rule.schedule, rule.solver, y).cpu())
        report(Progress(indices.stop, count, "sample"))
    return torch.cat(drawn)


def _header(model: Model, rule: Rule, seed: int) -> dict[str, Any]:
    return {
        "kind": "samples",
        "model": model.digest,
        "solver": rule.solver.name,
        "times": list(rule.schedule.times),
        "nfe": rule.nfe,
        "seed": seed,
    }
