"""Two evaluations brought together: row beside row, noise beside noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill import artifact
from flowdistill.comparison import comparing
from flowdistill.comparison.comparing import Change, Normal
from flowdistill.errors import MissingInput, UsageError, listed, unknown
from flowdistill.evaluation import results
from flowdistill.evaluation.kinds import kind
from flowdistill.evaluation.results import RESULT, SAMPLES, Content, Figure, Measured, Row

_QUANTILES = {
    "endpoint_error_median": ("endpoint_error", 0.5),
    "endpoint_error_p95": ("endpoint_error", 0.95),
}
"""Metrics that are quantiles of the values of another."""
_BIASED = ("fd", "fid", "precision", "recall")
"""How metrics begin whose value depends on the number of samples."""
_Z = -comparing.NORMAL.inv_cdf(comparing.LEVEL)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found, and the values of each sample where they were read."""

    path: Path
    content: Content
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: Path, samples: bool = True) -> Evaluation:
        """The evaluation in a folder, or of an `eval.json`; without its `samples` it cannot be paired.

        Raises `MissingInput` where a file is not there, `ArtifactError` for one that is altered, of
        another kind or of a later version.
        """
        file = path / RESULT if path.is_dir() else path
        if path.is_dir() and not file.is_file():
            raise MissingInput(f"{path}: no {RESULT} here; expected the folder of a finished eval stage")
        content = results.read(file)
        found = cls(file, content, {})
        return cls(file, content, found._samples()) if samples else found

    def _samples(self) -> dict[str, Tensor]:
        path = self.path.parent / SAMPLES
        if not path.is_file():
            raise MissingInput(
                f"{path}: no such file\nwithout the values of each sample only --unpaired compares"
            )
        tensors, header = artifact.load_tensors(path)
        index, told = tensors.get("index"), (header.get("kind"), header.get("seed"))
        if index is None or len(index) != self.content.samples or told != ("evaluation", self.content.seed):
            raise artifact.corrupt(path, f"not the samples of the {RESULT} beside it")
        return tensors

    def row(self, name: str) -> Subject:
        """A row by its id."""
        return Subject(self, name, self.rows[name])

    def model(self, name: str) -> Subject:
        """A model by its name."""
        return Subject(self, name, self.content.models[name])

    @property
    def rows(self) -> dict[str, Row]:
        """Rows by their id."""
        return {row.id: row for row in self.content.rows}


@dataclass(frozen=True, eq=False)
class Subject:
    """A row or a model, with its figures."""

    evaluation: Evaluation
    id: str
    measured: Row | Measured

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """By kind; of several with other numbers of samples, that with the most."""
        found: dict[str, Figure] = {}
        for name, figure in self.measured.metrics.items():
            if kind(name) not in found or figure.n > found[kind(name)].n:
                found[kind(name)] = figure
        return found

    @property
    def digest(self) -> str:
        """Of the model."""
        model = self.measured.model if isinstance(self.measured, Row) else self.id
        return self.evaluation.content.models[model].digest

    def has(self, name: str) -> bool:
        """Whether there is a figure of this kind."""
        return self.alone(name) is not None

    @property
    def latency(self) -> Normal | None:
        """Median time of one sample, ms, as sure as the spread of its runs.

        Only a summary of the runs is kept. They are not independent: the machine is slow or fast for all of
        them. So the deviation of one run, (p95 - p50) / 1.645 were it normal, is not divided by the root
        of their number.
        """
        found = self.evaluation.content.latency.get(self.id) if isinstance(self.measured, Row) else None
        if found is None:
            return None
        spread = max(0.0, found.p95_ms - found.p50_ms) / 1.645
        return Normal(found.p50_ms, 0, "spread from p50 to p95", False, spread, spread)

    def alone(self, name: str) -> Normal | None:
        """The metric of this kind by itself."""
        if name == "latency":
            return self.latency
        return _by_itself(self.figures[name]) if name in self.figures else None

    def values(self, name: str) -> Tensor | None:
        """Values [n], float64, whose mean is the metric of this kind, by noise; None where there are none.

        Raises `ArtifactError` where the mean is another number than `eval.json` has.
        """
        found = self._values(name) if name in self.figures else None
        if found is None:
            return None
        value, mean = self.figures[name].value, float(found.mean())
        if abs(mean - value) > 1e-4 * max(abs(value), 1e-3):
            raise artifact.corrupt(
                self.evaluation.path,
                f"{name} of {self.id} is {value:.6g} here and {mean:.6g} in {SAMPLES}: they are not of one "
                "evaluation",
            )
        order = self.evaluation.tensors["index"][: len(found)].argsort()
        return found[order] if len(order) == len(found) else found  # recall looks at real samples

    def sampled(self, name: str) -> Tensor | None:
        """The metric of each sample [n], in the order of the file; None where it is no mean of such."""
        return self.evaluation.tensors.get(f"{self.id}.{'correct' if name == 'accuracy' else name}")

    def _values(self, name: str) -> Tensor | None:
        tensors = self.evaluation.tensors
        if (own := self.sampled(name)) is not None:
            return own.double()
        if f"{self.id}.{name}.influence" in tensors:
            influence = tensors[f"{self.id}.{name}.influence"].double()
            return self.figures[name].value + influence - influence.mean()
        base, level = _QUANTILES.get(name, ("", 0.0))
        if f"{self.id}.{base}" in tensors:
            around = comparing.quantile_values(tensors[f"{self.id}.{base}"], level)
            return self.figures[name].value + around - around.mean()
        return None


def _by_itself(figure: Figure) -> Normal:
    """The number without another, with standard errors from its interval."""
    below, above = max(0.0, figure.value - figure.low) / _Z, max(0.0, figure.high - figure.value) / _Z
    return Normal(figure.value, figure.n, figure.method, False, below, above)


@dataclass(frozen=True, eq=False)
class Pair:
    """The same row, or model, of two evaluations."""

    a: Subject
    b: Subject

    @property
    def title(self) -> str:
        """`student-4`, or `old-4 → new-4`."""
        return self.a.id if self.a.id == self.b.id else f"{self.a.id} → {self.b.id}"

    @property
    def _same_model(self) -> bool:
        digests = {subject.digest for subject in (self.a, self.b)}
        return len(digests) == 1 and digests != {""}

    def values(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Values [n] of a and b, noise by noise; None where they are not known for both."""
        a, b = self.a.values(name), self.b.values(name)
        return None if a is None or b is None or len(a) != len(b) or len(a) < 2 else (a, b)

    def incomparable(self, name: str) -> str:
        """Why figures of this kind may not be subtracted; empty where they may."""
        if not name.startswith(_BIASED):
            return ""
        n = [
            (subject.figures[name].n, subject.evaluation.content.samples if name.startswith("recall") else 0)
            for subject in (self.a, self.b)
        ]
        if n[0] != n[1]:
            first, second = (max(each) for each in n)
            return f"it is of {first} and {second} samples, and depends on their number"
        return ""

    def change(self, name: str, relative: bool, paired: bool) -> Change | None:
        """b less a, sample by sample if that is wanted and known; None where either has no such figure."""
        values = self.values(name) if paired else None
        if values is not None and self._same_model and torch.equal(*values):
            return Normal(0.0, len(values[0]), "the same model", True, 0.0, 0.0)
        if values is not None:
            return comparing.paired_change(*values, relative)
        if paired and name in self.a.figures and self.a.figures[name] == self.b.figures.get(name):
            return Normal(0.0, self.a.figures[name].n, "the same figure", True, 0.0, 0.0)
        a, b = self.a.alone(name), self.b.alone(name)
        return None if a is None or b is None else comparing.unpaired_change(a, b, relative)


@dataclass(frozen=True, eq=False)
class Joined:
    """Pairs of rows and of models, and the ids of rows that only one side has."""

    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


# --- whether they belong together -----------------------------------------------------------------


def differences(a: Evaluation, b: Evaluation) -> list[str]:
    """What keeps the samples of two evaluations from being paired, each as `seed 0 and 1`."""
    first, second = dict(_conditions(a)), dict(_conditions(b))
    found = [
        f"{name} {_short(first.get(name))} and {_short(second.get(name))}"
        for name in dict.fromkeys((*first, *second))
        if first.get(name) != second.get(name)
    ]
    if not found and a.tensors and b.tensors:
        found = [
            f"the {what} of samples" for what in ("index", "label") if not _same(a.tensors, b.tensors, what)
        ]
    return found


def _conditions(evaluation: Evaluation) -> Iterator[tuple[str, Any]]:
    """Everything on which the noises depend, and what is measured of a sample."""
    content = evaluation.content
    yield "seed", content.seed
    yield "samples", content.samples
    yield "data", content.data.name
    yield "extractor", content.extractor
    yield "preprocessing", content.preprocessing
    for key, features in content.features.items():
        yield f"reference of {key} features", features.digest
    reference = content.reference.model_dump()
    teacher = content.models.get(str(reference.pop("model", None)))
    yield "reference model", teacher.digest[:12] if teacher else None
    for name, value in reference.items():
        yield f"reference {name}", value
    for row in content.rows:
        for name, figure in row.metrics.items():
            if figure.extractor != content.extractor:
                yield f"extractor of {kind(name)}", figure.extractor


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> bool:
    found = [each[what][each["index"].argsort()] if what in each else None for each in (a, b)]
    if found[0] is None or found[1] is None:
        return found[0] is found[1]
    return torch.equal(found[0], found[1])


def join(a: Evaluation, b: Evaluation, chosen: Sequence[str] = ()) -> Joined:
    """Rows of the same id; of the rest, where it is of one model on each side, those sampled alike.

    `chosen` are ids, or `A_ID=B_ID`, and leave out all other rows. Raises `UsageError` where a chosen
    row does not exist, or no row is left.
    """
    pairs = _chosen(a, b, chosen) if chosen else _matching(a, b)
    if not pairs:
        raise UsageError(
            f"the evaluations have no row in common\n{a.path}: {listed(a.rows)}\n{b.path}: {listed(b.rows)}"
        )
    models = {a.rows[left].model: b.rows[right].model for left, right in pairs.items()}
    joined = [Pair(a.row(left), b.row(right)) for left, right in pairs.items()]
    joined += [Pair(a.model(left), b.model(right)) for left, right in models.items()]
    if chosen:
        return Joined(tuple(joined), (), ())
    taken = set(pairs.values())
    only = (name for name in a.rows if name not in pairs), (name for name in b.rows if name not in taken)
    return Joined(tuple(joined), *map(tuple, only))


def _chosen(a: Evaluation, b: Evaluation, chosen: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in chosen:
        left, _, right = (text, "", "") if text in a.rows else text.partition("=")
        right = right or left
        for name, evaluation in ((left, a), (right, b)):
            if name not in evaluation.rows:
                raise UsageError(f"--row {text}: {evaluation.path}: {unknown('row', name, evaluation.rows)}")
        pairs[left] = right
    return pairs


def _matching(a: Evaluation, b: Evaluation) -> dict[str, str]:
    pairs = {name: name for name in a.rows if name in b.rows}
    models = [{row.model for row in each.rows.values()} for each in (a, b)]
    rest = [
        [row for name, row in each.rows.items() if name not in pairs and row.model not in others]
        for each, others in ((a, models[1]), (b, models[0]))
    ]
    if all(len({row.model for row in rows}) == 1 for rows in rest):
        same = {(row.nfe, row.solver, row.schedule): row.id for row in rest[1]}
        alike = {row.id: same.get((row.nfe, row.solver, row.schedule)) for row in rest[0]}
        pairs |= {left: right for left, right in alike.items() if right is not None}
    return pairs
