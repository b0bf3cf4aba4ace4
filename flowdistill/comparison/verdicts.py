"""What `flowdistill compare` says: for each metric of each row how far it moved, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowdistill.comparison import comparing
from flowdistill.comparison.comparing import LEVEL, Change
from flowdistill.comparison.joining import Evaluation, Joined, Pair, differences, join
from flowdistill.errors import ArtifactError, UsageError
from flowdistill.evaluation.kinds import KINDS

UNPAIRED = "unpaired"


@dataclass(frozen=True, eq=False)
class Line:
    """One metric of one row, or model, of both."""

    pair: Pair
    kind: str
    change: Change
    """b - a."""
    relative: Change | None
    """As a share of a; None where that is no positive number."""
    verdict: str
    needed: int | None
    """Samples that would settle an inconclusive verdict."""
    p: float | None
    """Of no difference at all, two-sided, corrected for all lines; None where noise has no model."""

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        a, b = self.pair.a.alone(self.kind), self.pair.b.alone(self.kind)
        return {
            "a": self.pair.a.id,
            "b": self.pair.b.id,
            "metric": self.kind,
            "n": self.change.n,
            "value_a": a and a.value,
            "value_b": b and b.value,
            "difference": bounds(self.change),
            "relative": self.relative and bounds(self.relative),
            "p_holm": self.p,
            "verdict": self.verdict,
            "paired": self.change.paired,
            "needed": self.needed,
            "method": self.change.method,
        }


@dataclass(frozen=True, eq=False)
class Comparison:
    """All that was compared, and what was not."""

    lines: Sequence[Line]
    joined: Joined
    differ: Sequence[str]
    """What keeps the samples from being paired."""
    notes: Sequence[str]


def bounds(change: Change) -> dict[str, float]:
    """Value and 95 % interval."""
    return {"value": change.value, "low": change.low(LEVEL), "high": change.high(LEVEL)}


def parse_margin(text: str) -> float:
    """The share that `1%` stands for; UsageError where it stands for none."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not (text.endswith("%") and 0 < share < 1):
        raise UsageError(f"--margin {text}: expected a share of the first value, like 1%")
    return share


def check_paired(a: Evaluation, b: Evaluation) -> None:
    """Raise ArtifactError where samples of a and b cannot be paired, with what differs."""
    if differ := differences(a, b):
        raise ArtifactError(
            f"{a.path} and {b.path} cannot be paired, they differ in: {'; '.join(differ)}\n"
            "--unpaired compares them all the same, with wider intervals"
        )


def compare(
    a: Evaluation, b: Evaluation, chosen: Sequence[str] = (), margin: float = 0.01, paired: bool = True
) -> Comparison:
    """Every metric that rows of both have.

    Raises `ArtifactError` where the samples cannot be paired and that was wanted, and what `join` does.
    """
    if paired:
        check_paired(a, b)
    joined = join(a, b, chosen)
    lines, notes = [], []
    for pair in joined.pairs:
        for kind in KINDS:
            if not (pair.a.has(kind) and pair.b.has(kind)):
                continue
            if why := pair.incomparable(kind):
                notes.append(f"{kind} of {pair.title} is not compared: {why}")
            else:
                lines.append(_line(pair, kind, margin, paired))
    tested = [line.p for line in lines if line.p is not None]
    adjusted = iter(comparing.holm(tested))
    lines = [line if line.p is None else replace(line, p=next(adjusted)) for line in lines]
    notes += [f"only the first has row {name}" for name in joined.only_a]
    notes += [f"only the second has row {name}" for name in joined.only_b]
    return Comparison(lines, joined, differences(a, b), notes)


def _line(pair: Pair, kind: str, margin: float, paired: bool) -> Line:
    start = pair.a.alone(kind)
    change = pair.change(kind, relative=False, paired=paired)
    assert start is not None and change is not None
    relative = pair.change(kind, relative=True, paired=paired) if start.value > 0 else None
    judged, reach = (relative, margin) if relative else (change, margin * abs(start.value))
    said = comparing.verdict(judged, KINDS[kind].better, reach)
    needed = None
    if said == "inconclusive":
        edge = reach if judged.value > 0 else -reach
        needed = judged.needed(edge, LEVEL)
    text = said if change.paired else f"{said} ({UNPAIRED})"
    return Line(pair, kind, change, relative, text, needed, _p(pair, kind, change))


def _p(pair: Pair, kind: str, change: Change) -> float | None:
    if not change.n:
        return None
    values = pair.values(kind) if change.paired else None
    if values is not None and pair.a.sampled(kind) is not None:
        return comparing.sign_flip_p(*values)
    return min(1.0, 2 * min(change.p_above(0.0), change.reversed().p_above(0.0)))
