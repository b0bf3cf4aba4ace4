"""What an evaluation comes to, in sentences: how good each student is, what the teacher pays for the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flowdistill.evaluation.kinds import KINDS, Kind, kind
from flowdistill.evaluation.results import Content, Figure, Row, number

_QUALITY = ("fid", "fd", "fd_", "kid", "kd", "kd_", "endpoint_error")
"""How the kinds begin that a verdict is about, the first that was measured: nearness to the data comes before
that to the teacher."""


@dataclass(frozen=True)
class Saving:
    """A student and the cheapest row of the teacher that is at least as good."""

    student: Row
    teacher: Row
    faster: float | None
    """Time for one sample of the teacher's row over that of the student's."""

    @property
    def fewer(self) -> float:
        """Evaluations of the teacher's row over those of the student's."""
        return self.teacher.nfe / self.student.nfe


@dataclass(frozen=True)
class Verdict:
    """Sentences, and (figure, what it is) that stand out."""

    sentences: tuple[str, ...]
    tiles: tuple[tuple[str, str], ...] = ()


def about(metric: str) -> Kind:
    """Title, unit and direction of `fid@5000`; of a kind that is not known, its name, and less is better."""
    return KINDS.get(kind(metric), Kind(kind(metric).replace("_", " "), -1))


def quality(numbers: Content) -> str | None:
    """The metric that the verdict is about; None where none was measured."""
    measured = sorted({name for row in numbers.rows for name in row.metrics})
    return next((name for each in _QUALITY for name in measured if _is(kind(name), each)), None)


def judge(numbers: Content) -> Verdict:
    """The verdict on all students or, without one, on the schedules of the one model."""
    metric = quality(numbers)
    rows = [row for row in numbers.rows if metric in row.metrics]
    if metric is None:
        return Verdict(("Nothing that says how good a model is was measured.",))
    base = [row for row in rows if row.model == numbers.reference.model]
    others = [name for name in numbers.order if name != numbers.reference.model]
    students = [min((row for row in rows if row.model == name), key=_cost, default=None) for name in others]
    found = [student for student in students if student is not None]
    if not base or not found:
        return Verdict(tuple(_of_schedules(rows, metric)))
    sentences: list[str] = []
    tiles: list[tuple[str, str]] = []
    for student in found:
        sentences += _of_student(numbers, student, base, metric)
    saving = saved(numbers, found[0], base, metric)
    figure, title = found[0].metrics[metric], about(metric).title
    if saving is not None and saving.fewer > 1:
        tiles.append((f"{number(saving.fewer)}×", f"fewer evaluations at no worse {title}"))
        if saving.faster is not None:
            tiles.append((f"{number(saving.faster)}×", "less time for one sample"))
    tiles.append((number(figure.value), f"{title} of {found[0].name}"))
    return Verdict(tuple(sentences), tuple(tiles))


def saved(numbers: Content, student: Row, base: Sequence[Row], metric: str) -> Saving | None:
    """The cheapest of the teacher's rows whose value is no worse than the student's; None where none is."""
    better = about(metric).better
    value = student.metrics[metric].value
    able = [row for row in base if better * (row.metrics[metric].value - value) >= 0]
    if not able:
        return None
    teacher = min(able, key=_cost)
    ours, theirs = (numbers.latency.get(row.id) for row in (student, teacher))
    faster = theirs.p50_ms / ours.p50_ms if ours and theirs and ours.p50_ms > 0 else None
    return Saving(student, teacher, faster)


def compared(ours: Figure, theirs: Figure, better: int) -> str:
    """`better`, `worse`, or what else the intervals say."""
    if ours.overlaps(theirs):
        return "no clear difference"
    return "better" if better * (ours.value - theirs.value) > 0 else "worse"


def _of_student(numbers: Content, student: Row, base: Sequence[Row], metric: str) -> Iterator[str]:
    ours, known = student.metrics[metric], about(metric)
    equal = min((row for row in base if row.nfe == student.nfe), key=_cost, default=None)
    most = max(base, key=lambda row: (row.nfe, row.usual))
    text = f"{_with(student)} {student.model} has {known.title} {ours}"
    if equal is not None:
        theirs = equal.metrics[metric]
        how = {"better": "better than", "worse": "worse than"}.get(compared(ours, theirs, known.better))
        text += f", {how or 'no clear difference from'} the {theirs} of {equal.model}"
    if equal is not most:
        text += f"; {_with(most).lower()} {most.model} has {most.metrics[metric]}"
    yield f"{text}."
    saving = saved(numbers, student, base, metric)
    if saving is None:
        yield f"No row of {most.model} that was measured is as good."
    elif saving.fewer > 1:
        yield _worth(numbers, saving, metric)
        yield from _cheaper_rival(saving, base, metric)


def _worth(numbers: Content, saving: Saving, metric: str) -> str:
    text = (
        f"To be no worse, {saving.teacher.model} needs {saving.teacher.evaluations} "
        f"({saving.teacher.metrics[metric]}): "
        f"{saving.student.model} takes {number(saving.fewer)} times fewer evaluations"
    )
    if saving.faster is not None:
        ours, theirs = (numbers.latency[row.id].p50_ms for row in (saving.student, saving.teacher))
        text += (
            f" and {number(saving.faster)} times less time for one sample "
            f"({number(ours)} ms against {number(theirs)} ms)"
        )
    return f"{text}."


def _cheaper_rival(saving: Saving, base: Sequence[Row], metric: str) -> Iterator[str]:
    """A row that costs less than the one that is no worse, and cannot be told from the student's."""
    ours = saving.student.metrics[metric]
    near = [row for row in base if row.nfe < saving.teacher.nfe and row.metrics[metric].overlaps(ours)]
    if near:
        row = min(near, key=_cost)
        yield f"{_with(row)} it comes near ({row.metrics[metric]}, the intervals overlap)."


def _of_schedules(rows: Sequence[Row], metric: str) -> list[str]:
    """Of models by themselves, what chosen steps bring at each number of evaluations, or the best row."""
    known, said = about(metric), []
    for row in rows:
        even = next((r for r in rows if (r.model, r.nfe, r.usual) == (row.model, row.nfe, True)), None)
        if not row.usual and even is not None:
            how = compared(row.metrics[metric], even.metrics[metric], known.better)
            said.append(
                f"{_with(row)} {row.model} has {known.title} {row.metrics[metric]}, against "
                f"{even.metrics[metric]} with uniform Euler steps: {how}."
            )
    for name in dict.fromkeys(row.model for row in rows) if not said else ():
        best = max(
            (row for row in rows if row.model == name),
            key=lambda row: (known.better * row.metrics[metric].value, -row.nfe),
        )
        said.append(f"{_with(best)} {best.model} has {known.title} {best.metrics[metric]}, its best.")
    return said


def _is(kind: str, beginning: str) -> bool:
    return kind.startswith(beginning) if beginning.endswith("_") else kind == beginning


def _with(row: Row) -> str:
    return f"With {row.evaluations}"


def _cost(row: Row) -> tuple[int, bool]:
    return row.nfe, not row.usual
