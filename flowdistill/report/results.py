"""What evaluations say: quality against cost, straightness, pictures, classes, tables, what was skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from flowdistill import evaluation as evaluations
from flowdistill import plots
from flowdistill.evaluation.kinds import KINDS, kind
from flowdistill.evaluation.results import Figure, Row, number
from flowdistill.report import page
from flowdistill.report.charts import Bar, Charts, Line, Point
from flowdistill.report.page import Html, join, tag
from flowdistill.report.reading import Evaluation
from flowdistill.report.verdict import about, compared

Where = Callable[[str, Row], tuple[float, float | None] | None]
"""Place on the x-axis of a row of the evaluation that is so called, and how far it may reach."""

_IN_TABLES = ("endpoint_error_median", "endpoint_error_p95", "straightness_per_dim", "straightness_norm")
"""Kinds that say nearly what another one says, and have no plot of their own."""
_ORDER = tuple(dict.fromkeys(("fid", "fd", "endpoint_error", "accuracy", "precision", "recall", *KINDS)))
"""Of the kinds: the first few are plotted against latency too."""
_AGAINST_LATENCY = 3
_CLASSES_AT_MOST = 24
_READ_INTERVALS = (
    "Bars are 95 % intervals: of a hundred such evaluations with other noises about 95 would hold the true "
    "value. Where the bars of two rows overlap, `flowdistill compare` can tell more, noise by noise."
)


@dataclass(frozen=True)
class Other:
    """An evaluation that the run's is compared with, and what it is called."""

    label: str
    evaluation: Evaluation


def colours(evaluated: Sequence[Evaluation], others: Sequence[Other]) -> dict[tuple[str, str], int]:
    """(model, label of the other evaluation that it is from or nothing) -> number of its colour."""
    names = [(model, "") for each in evaluated for model in each.numbers.order]
    names += [(model, other.label) for other in others for model in other.evaluation.numbers.order]
    return {name: place % len(plots.COLOURS) for place, name in enumerate(dict.fromkeys(names))}


class Results:
    """The sections that one evaluation gives, with others beside it."""

    def __init__(
        self,
        charts: Charts,
        evaluation: Evaluation,
        others: Sequence[Other],
        colours: Mapping[tuple[str, str], int],
    ) -> None:
        self.charts, self.evaluation, self.others = charts, evaluation, others
        self.numbers = evaluation.numbers
        names = [(model, "") for model in self.numbers.order]
        names += [
            (model, other.label)
            for other in others
            for model in other.evaluation.numbers.order
            if not self._known(model, other)
        ]
        self.colours = {name: colours[name] for name in names}

    # --- quality ----------------------------------------------------------------------------------

    def quality(self) -> Html:
        """Against the number of evaluations, and against the time that they take."""
        names = self._measured()
        by_nfe = [self._chart(name, "evaluations of the network (NFE)", _by_nfe) for name in names]
        timed = {"": self.evaluation, **{other.label: other.evaluation for other in self.others}}
        by_time = [
            self._chart(name, "milliseconds for one sample", partial(_by_latency, timed))
            for name in names[:_AGAINST_LATENCY]
            if self.numbers.latency
        ]
        parts = [page.paragraph(page.with_code(_READ_INTERVALS)), self._legend(), page.figures(by_nfe)]
        if by_time:
            text = "The same against the time for one sample: the point is the median, the bar to its right "
            parts += [tag("h3", "Against latency"), page.paragraph(text, "reaches to the 95th percentile.")]
            parts.append(page.figures(by_time))
        return join(*parts, *self._not_drawn())

    def _measured(self) -> list[str]:
        """Metrics of rows that have a plot, in the order of their kinds."""
        found = {name for row in self.numbers.rows for name in row.metrics if kind(name) not in _IN_TABLES}
        known = [name for each in _ORDER for name in sorted(found) if kind(name) == each]
        return [*known, *sorted(found - set(known))]

    def _chart(self, name: str, x: str, place: Where) -> Html:
        known, floor = about(name), self.numbers.data.metrics.get(name)
        lines = self._lines(name, place)
        how = "Lower is better" if known.better < 0 else "Higher is better"
        extractor = next(
            (row.metrics[name].extractor for row in self.numbers.rows if name in row.metrics), None
        )
        caption = f"{how}. n = {name.partition('@')[2]}{f', {extractor}' if extractor else ''}."
        title = _title(name) + (f" ({known.unit})" if known.unit else "")
        drawn = self.charts.quality(lines, x, known.better, floor)
        return page.figure(title, page.plot(drawn, f"{title} against {x}"), caption)

    def _lines(self, name: str, place: Where) -> list[Line]:
        """Uniform steps of each model as one line, chosen ones as another."""
        lines = []
        for (model, label), colour in self.colours.items():
            rows = [row for row in self._rows(label) if row.model == model]
            for usual in (True, False):
                placed = [self._point(row, name, label, place) for row in rows if row.usual == usual]
                points = [point for point in placed if point is not None]
                if points:
                    lines.append(Line(points, colour, not usual))
        return lines

    def _point(self, row: Row, name: str, label: str, place: Where) -> Point | None:
        found = place(label, row)
        if found is None or name not in row.metrics:
            return None
        figure = row.metrics[name]
        return None if label and not self._comparable(name, figure) else Point(found[0], figure, found[1])

    def _rows(self, label: str) -> list[Row]:
        found = {other.label: other.evaluation for other in self.others}
        return (found[label] if label else self.evaluation).numbers.rows

    def _comparable(self, name: str, figure: Figure) -> bool:
        """Whether a figure of another evaluation was read by the same extractor as ours."""
        ours = {row.metrics[name].extractor for row in self.numbers.rows if name in row.metrics}
        return ours == {figure.extractor}

    def _legend(self) -> Html:
        entries: list[tuple[str, int, str]] = []
        for (model, label), colour in self.colours.items():
            name = f"{label}: {model}" if label else model
            kinds = {row.usual for row in self._rows(label) if row.model == model}
            entries += [(name, colour, "")] if True in kinds else []
            entries += [(f"{name}, chosen steps", colour, "dashed")] if False in kinds else []
        if self.numbers.data.metrics:
            entries.append(("real data", 5, "dotted"))
        return page.legend(entries)

    # --- others -----------------------------------------------------------------------------------

    def _not_drawn(self) -> Iterator[Html]:
        for other in self.others:
            theirs = {name for row in other.evaluation.numbers.rows for name in row.metrics}
            missing = [name for name in self._measured() if name not in theirs]
            if missing:
                text = (
                    f"Not drawn of {other.label}: {', '.join(missing)}; it has {', '.join(sorted(theirs))}."
                )
                yield page.paragraph(text)
            for model in other.evaluation.numbers.order:
                if self._known(model, other):
                    yield page.paragraph(
                        f"{model} of {other.label} is a model of this run, and not drawn again."
                    )

    def _known(self, model: str, other: Other) -> bool:
        """Whether a model of another evaluation is one of this, by its digest."""
        digest = other.evaluation.numbers.models[model].digest
        return bool(digest) and digest in {each.digest for each in self.numbers.models.values()}

    def compared(self) -> Html | None:
        """Rows that both evaluations have, metric by metric, without those that are equal."""
        if not self.others:
            return None
        text = (
            "By their intervals alone, as if the noises were not the same: `flowdistill compare` pairs the "
            "samples by their noise, and tells smaller differences apart."
        )
        parts = [page.paragraph(page.with_code(text))]
        for other in self.others:
            shared = list(self._shared(other))
            rows = [
                [row.model, str(row.nfe), row.steps, about(name).title, str(ours), str(theirs)]
                + [compared(ours, theirs, about(name).better)]
                for row, name, ours, theirs in shared
                if ours != theirs
            ]
            heads = ("model", "NFE", "steps", "metric", "here", other.label, "here is")
            parts += [page.table(heads, rows, ("NFE", "here", other.label))] if rows else []
            equal = len(shared) - len(rows)
            parts.append(page.paragraph(f"{equal} figures are the same here and in {other.label}."))
        return join(*parts)

    def _shared(self, other: Other) -> Iterator[tuple[Row, str, Figure, Figure]]:
        """(row, metric, figure here, figure there) of all that can be compared."""
        theirs = {row.id: row for row in other.evaluation.numbers.rows}
        for row in self.numbers.rows:
            for name in self._measured():
                rival = theirs[row.id].metrics.get(name) if row.id in theirs else None
                if name in row.metrics and rival is not None and self._comparable(name, rival):
                    yield row, name, row.metrics[name], rival

    # --- straightness, pictures, classes ----------------------------------------------------------

    def straightness(self) -> Html | None:
        """Bars of each figure that belongs to a model."""
        models = self.numbers.models
        names = dict.fromkeys(name for each in models.values() for name in each.metrics)
        found = []
        for name in (name for name in names if kind(name) not in _IN_TABLES):
            bars = [
                Bar(model, models[model].metrics[name], self.colours[model, ""])
                for model in self.numbers.order
                if name in models[model].metrics
            ]
            title = _title(name)
            caption = f"0 is a straight path at constant speed. n = {name.partition('@')[2]} paths."
            known = "straight" in name or "curvature" in name
            drawn = page.plot(self.charts.bars(bars), f"{title} of each model")
            found.append(page.figure(title, drawn, caption if known else ""))
        return page.figures(found) if found else None

    def picture(self) -> Html | None:
        """The rows of samples, each column from one noise."""
        png = self.evaluation.picture
        if png is None:
            return None
        solution = self.numbers.reference
        rows = [f"{solution.model}, {solution.nfe} evaluations", *(row.name for row in self.numbers.rows)]
        text = (
            "A row is a way to sample, a column is one noise (of points: all noises in one panel). The first "
            "row is the accurate solution; down a column one sees how far other steps or models lead from it."
        )
        width = int.from_bytes(png[16:20], "big")
        return join(page.paragraph(text), page.picture(png, f"Samples of {'; '.join(rows)}", width))

    def classes(self) -> Html | None:
        """A small plot for each class, of how often it is recognised and of the endpoint error."""
        from flowdistill.report import classes

        parts = []
        for name, kind_ in classes.NAMES.items():
            found = classes.figures(self.evaluation, name)
            lines = {label: self._lines_of_class(rows) for label, rows in found.items()}
            lines = {label: each for label, each in lines.items() if each}
            if not lines:
                continue
            everything, better = [line for each in lines.values() for line in each], about(kind_).better
            shown = sorted(lines, key=lambda label: (_worst(lines[label], name), label))[:_CLASSES_AT_MOST]
            plots_ = [
                page.figure(
                    f"class {label}",
                    page.plot(
                        self.charts.quality(lines[label], "", better, among=everything), f"class {label}"
                    ),
                )
                for label in sorted(shown)
            ]
            left = len(lines) - len(shown)
            counts = [point.y.n for line in everything for point in line.points]
            title = f"{_title(kind_)}, {min(counts)} to {max(counts)} samples of a class"
            parts.append(tag("h3", title + (f": the {len(shown)} worst of {len(lines)}" if left else "")))
            parts.append(page.figures(plots_, small=True))
        if not parts:
            return None
        text = "Against the number of evaluations, all on the same axis; the bars are 95 % intervals."
        return join(page.paragraph(text), self._legend(), *parts)

    def _lines_of_class(self, figures: Mapping[str, Figure]) -> list[Line]:
        rows = {row.id: row for row in self.numbers.rows}
        lines = []
        for (model, label), colour in self.colours.items():
            for usual in (True, False):
                points = [
                    Point(rows[id_].nfe, figure)
                    for id_, figure in figures.items()
                    if not label and (rows[id_].model, rows[id_].usual) == (model, usual)
                ]
                if points:
                    lines.append(Line(points, colour, not usual))
        return lines

    # --- tables -----------------------------------------------------------------------------------

    def tables(self) -> Html:
        """The rows with their main figures, and all figures below."""
        rows = evaluations.table(self.evaluation.content)
        heads = [name for name in rows[0] if any(row[name] for row in rows)]
        titles = {name: _heading(name) for name in heads}
        main = page.table(
            list(titles.values()),
            [[row[name] for name in heads] for row in rows],
            [titles[name] for name in heads if name not in ("model", "steps")],
        )
        figures = list(self._all_figures())
        everything = page.table(("of", "metric", "value", "n", "method"), figures, ("value", "n"))
        return join(main, page.details(f"All {len(figures)} figures with n and method", everything))

    def _all_figures(self) -> Iterator[list[str]]:
        groups: list[tuple[str, dict[str, Figure]]] = [("real data", self.numbers.data.metrics)]
        groups += [(name, model.metrics) for name, model in self.numbers.models.items()]
        groups += [(row.name, row.metrics) for row in self.numbers.rows]
        for what, metrics in groups:
            for name, figure in metrics.items():
                method = ", ".join(filter(None, (figure.method, figure.extractor)))
                yield [what, about(name).title, str(figure), f"{figure.n:,}", method]

    def costs(self) -> Html:
        """What a sample of each row costs."""
        cells = [self._cost(row) for row in self.numbers.rows]
        heads = [head for head in cells[0] if any(each[head] for each in cells)] if cells else []
        text = (
            "NFE counts evaluations of the network for one sample; with guidance one is two forward passes. "
            "Times are those of the machine below, and differ from run to run."
        )
        whose = sorted({peak.of for peak in self.numbers.memory.values()})
        text += f" Memory is that of the {' or the '.join(whose)}." if whose else ""
        rows = [[each[head] for head in heads] for each in cells]
        return join(page.paragraph(text), page.table(heads, rows, set(heads) - {"model", "steps"}))

    def _cost(self, row: Row) -> dict[str, str]:
        """Heading -> cell, empty for what was not measured."""
        numbers, model = self.numbers, self.numbers.models.get(row.model)
        took, rate = numbers.latency.get(row.id), numbers.throughput.get(row.id)
        peak = numbers.memory.get(row.id)
        passes, macs = row.forward_passes, model.macs if model else None
        return {
            "model": row.model,
            "NFE": str(row.nfe),
            "steps": row.steps,
            "forward passes": str(passes or ""),
            "parameters": f"{model.parameters:,}" if model and model.parameters else "",
            "multiply-adds, 10⁹": number(macs * passes / 1e9) if macs and passes else "",
            "ms, median": number(took.p50_ms) if took else "",
            "ms, 95th percentile": number(took.p95_ms) if took else "",
            "runs timed": str(took.runs) if took else "",
            "samples a second": number(rate.samples_per_second) if rate else "",
            "in batches of": str(rate.batch_size) if rate else "",
            "peak memory, MB": number(peak.peak_mb) if peak else "",
        }

    def skipped(self) -> Html | None:
        """What was not measured, and why; what no row has is told once."""
        groups: list[tuple[str, dict[str, str]]] = [("real data", self.numbers.data.skipped)]
        groups += [(name, model.skipped) for name, model in self.numbers.models.items()]
        groups += [(row.name, row.skipped) for row in self.numbers.rows]
        by_metric: dict[tuple[str, str], list[str]] = {}
        for what, skipped in groups:
            for name, reason in skipped.items():
                by_metric.setdefault((reason, about(name).title), []).append(what)
        rows = {row.name for row in self.numbers.rows}
        found: dict[tuple[str, str], list[str]] = {}
        for (reason, title), skipped_of in by_metric.items():
            of = "all rows" if rows <= set(skipped_of) else ", ".join(skipped_of)
            found.setdefault((reason, of), []).append(title)
        items = [
            tag("li", tag("b", ", ".join(titles)), f" of {of}: ", page.with_code(reason), ".")
            for (reason, of), titles in found.items()
        ]
        return tag("ul", *items) if items else None


def _by_nfe(label: str, row: Row) -> tuple[float, float | None]:
    return row.nfe, None


def _by_latency(timed: Mapping[str, Evaluation], label: str, row: Row) -> tuple[float, float | None] | None:
    latency = timed[label].numbers.latency.get(row.id)
    return (latency.p50_ms, latency.p95_ms) if latency and latency.p50_ms > 0 else None


def _worst(lines: Sequence[Line], name: str) -> float:
    """Small for classes that are badly off."""
    values = [point.y.value for line in lines for point in line.points]
    return min(values) if name == "correct" else -max(values)


def _title(name: str) -> str:
    title = about(name).title
    return title[:1].upper() + title[1:]


def _heading(name: str) -> str:
    """Of a column of `evaluation.table`, some of which are no metrics."""
    known, _, n = name.partition("@")
    unit = f", {about(known).unit}" if about(known).unit else ""
    return f"{about(known).title}{unit}, n = {n}" if n else name
