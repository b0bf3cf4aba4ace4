"""The page: the verdict on top, then every section for which there is something to show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from flowdistill import __version__
from flowdistill.evaluation.results import Figure, number
from flowdistill.report import making, page
from flowdistill.report.charts import Charts
from flowdistill.report.page import Html, join, tag
from flowdistill.report.reading import Evaluation, Run
from flowdistill.report.results import Other, Results, colours
from flowdistill.report.verdict import Verdict, judge


def page_of(run: Run, others: Mapping[str, Evaluation]) -> bytes:
    """The whole file, with other evaluations by what they are called."""
    charts = Charts()
    beside = [Other(label, evaluation) for label, evaluation in others.items()]
    palette = colours(run.evaluations, beside)
    results = [Results(charts, each, beside, palette) for each in run.evaluations]
    drawn = {model: colour for (model, label), colour in palette.items() if not label}
    sections = list(_sections(run, results, charts, drawn))
    links = [tag("li", tag("a", title, href=f"#{anchor}")) for anchor, title, _ in sections]
    return page.page(
        f"{run.name}: flowdistill report",
        _header(run),
        tag("nav", tag("ul", *links), aria_label="Contents"),
        tag("main", *(page.section(*each) for each in sections)),
        _footer(run),
    )


def _sections(
    run: Run, results: Sequence[Results], charts: Charts, drawn: Mapping[str, int]
) -> Iterator[tuple[str, str, Html]]:
    """(anchor, title, content) of each that has something to show; `drawn` are the colours of the models."""

    def of_all(content: Callable[[Results], Html | None]) -> Html | None:
        shown = [(each.evaluation.part.name, content(each)) for each in results]
        found = [(name, html) for name, html in shown if html is not None]
        headed = [join(tag("h3", name), html) if len(results) > 1 else html for name, html in found]
        return join(*headed) if found else None

    def ways() -> Html | None:
        return making.trajectories(run, charts, drawn)

    candidates: list[tuple[str, str, Callable[[], Html | None]]] = [
        ("quality", "Quality against cost", lambda: of_all(Results.quality)),
        ("compared", "Compared", lambda: of_all(Results.compared)),
        ("training", "Training", lambda: making.trainings(run, charts)),
        ("paths", "Paths and straightness", lambda: _paths(ways(), of_all(Results.straightness))),
        ("schedules", "Schedules", lambda: making.schedules(run, charts)),
        ("samples", "Samples of the same noises", lambda: of_all(Results.picture)),
        ("classes", "Class by class", lambda: of_all(Results.classes)),
        ("figures", "Results in numbers", lambda: of_all(Results.tables)),
        ("costs", "Cost", lambda: of_all(Results.costs)),
        ("skipped", "What is not here, and why", lambda: _both(of_all(Results.skipped), _unfinished(run))),
        ("lineage", "Lineage", lambda: making.origins(run)),
        ("commands", "Commands", lambda: making.commands(run)),
    ]
    for anchor, title, content in candidates:
        html = content()
        if html is not None:
            yield anchor, title, html


def _header(run: Run) -> Html:
    widest = max(run.evaluations[::-1], key=lambda each: len(each.numbers.order), default=None)
    verdict = judge(widest.numbers) if widest else _of_the_making(run)
    first, *rest = verdict.sentences
    tiles = [tag("li", tag("b", figure), tag("span", about)) for figure, about in verdict.tiles]
    parts = [tag("p", page.with_intervals(first), class_="verdict")]
    parts += [tag("p", page.with_intervals(" ".join(rest)), class_="soft")] if rest else []
    parts += [tag("ul", *tiles, class_="tiles")] if tiles else []
    return tag("header", tag("p", "flowdistill report", class_="eyebrow"), tag("h1", run.name), *parts)


def _of_the_making(run: Run) -> Verdict:
    """Of a run without an evaluation."""
    said = []
    for name, log in run.trainings.items():
        last = f", the last loss is {number(log[-1]['loss'])}" if log and "loss" in log[-1] else ""
        said.append(f"{name} is trained{last}.")
    for name, files in run.schedules.items():
        for file in files:
            if judged := (file.get("choice") or file).get("held_out"):
                best = Figure.model_validate(judged.get("chosen") or judged["boss"])
                even = Figure.model_validate(judged["uniform"])
                steps = f"{file['schedule']}, {file['solver']}"
                said.append(
                    f"{name} with {file['nfe']} evaluations ({steps}) has endpoint error {best}, against "
                    f"{even} with uniform Euler steps."
                )
    return Verdict((*said, "Quality was not measured: there is no finished evaluation here."))


def _paths(ways: Html | None, straightness: Html | None) -> Html | None:
    text = "A straight path at constant speed is exact in one step; what bends takes more."
    shown = _both(ways, straightness)
    return shown and join(page.paragraph(text), shown)


def _both(*parts: Html | None) -> Html | None:
    found = [part for part in parts if part is not None]
    return join(*found) if found else None


def _unfinished(run: Run) -> Html | None:
    if not run.unfinished:
        return None
    return page.paragraph(f"Not finished, and not part of this page: {', '.join(run.unfinished)}.")


def _footer(run: Run) -> Html:
    stages = "1 finished stage" if len(run.parts) == 1 else f"{len(run.parts)} finished stages"
    text = f"Made by flowdistill {__version__} from {stages}. "
    return tag("footer", text, "The page holds all that it shows, and the same stages make the same page.")
