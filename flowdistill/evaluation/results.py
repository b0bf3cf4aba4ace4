"""An `eval.json`, read and checked: the figures of models and rows, each with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from flowdistill import artifact
from flowdistill.errors import ArtifactError

FORMAT = 1
"""Of `eval.json`; one that does not say is of the first."""
RESULT, SAMPLES, PICTURE = "eval.json", "samples.safetensors", "grid.png"
_USUAL = ("uniform", "euler")


class _Read(BaseModel):
    """What is not known by name is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class Figure(_Read):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    method: str = ""
    extractor: str | None = None

    def __str__(self) -> str:
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"

    def overlaps(self, other: Figure) -> bool:
        """Whether the intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


class Measured(_Read):
    """Figures of the real data, by `kind@n`, and why others are not there."""

    metrics: dict[str, Figure] = {}
    skipped: dict[str, str] = {}


class Data(Measured):
    """The real data."""

    name: str | None = None


class MeasuredModel(Measured):
    """A model, apart from any row."""

    digest: str
    parameters: int | None = None
    macs: int | None = None


class Row(Measured):
    """One way to sample one model."""

    id: str
    model: str
    solver: str
    schedule: str
    nfe: int
    forward_passes: int | None = None

    @property
    def usual(self) -> bool:
        """Whether it takes uniform Euler steps."""
        return (self.schedule, self.solver) == _USUAL

    @property
    def steps(self) -> str:
        """`uniform`, or what is unusual: `boss`, `boss, ab2`."""
        words = [word for word in (self.schedule, self.solver) if word not in _USUAL]
        return ", ".join(words) or "uniform"

    @property
    def evaluations(self) -> str:
        """`1 evaluation`, `4 evaluations (boss, ab2)`."""
        plural = "" if self.nfe == 1 else "s"
        return f"{self.nfe} evaluation{plural}" + ("" if self.usual else f" ({self.steps})")

    @property
    def name(self) -> str:
        """`teacher with 4 evaluations`."""
        return f"{self.model} with {self.evaluations}"


class Solution(_Read):
    """What endpoints are compared with, and all that it depends on."""

    model_config = ConfigDict(extra="allow")

    model: str
    nfe: int


class Reference(_Read):
    """What distances in the features of an extractor refer to."""

    extractor: str
    digest: str


class Latency(_Read):
    """Milliseconds for one sample."""

    p50_ms: float
    p95_ms: float
    runs: int


class Throughput(_Read):
    """Samples a second of one process, at a batch size."""

    samples_per_second: float
    batch_size: int


class Memory(_Read):
    """The most memory in use, and whose it is."""

    peak_mb: float
    of: str


class Content(_Read):
    """An `eval.json`."""

    seed: int
    samples: int
    extractor: str | None = None
    preprocessing: str | None = None
    features: dict[str, Reference] = {}
    reference: Solution
    data: Data
    models: dict[str, MeasuredModel]
    rows: list[Row]
    latency: dict[str, Latency] = {}
    throughput: dict[str, Throughput] = {}
    memory: dict[str, Memory] = {}

    @property
    def order(self) -> list[str]:
        """The models that have rows, in the order of these."""
        return [name for name in dict.fromkeys(row.model for row in self.rows) if name in self.models]


def read(path: Path) -> Content:
    """An `eval.json`; `ArtifactError` for one that is altered, of another kind or of a later version."""
    found: dict[str, Any] = artifact.load_json(path)
    if found.get("kind") != "evaluation":
        raise ArtifactError(f"{path}: expected an evaluation, found {found.get('kind', 'no kind')!r}")
    if found.get("format", FORMAT) != FORMAT:
        raise ArtifactError(f"{path}: evaluation of format {found['format']}, expected {FORMAT}")
    try:
        content = Content.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise artifact.corrupt(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for row in content.rows:
        if row.model not in content.models:
            raise artifact.corrupt(path, f"row {row.id} is of '{row.model}', which is not among its models")
    if len({row.id for row in content.rows}) < len(content.rows):
        raise artifact.corrupt(path, "two rows have the same id")
    return content


def number(value: float) -> str:
    """Three significant digits, without an exponent for what is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
