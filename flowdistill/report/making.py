"""How the models and schedules of a run came about: losses, times, steps, and the lineage of it all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from flowdistill import artifact, plots
from flowdistill.artifact import Manifest
from flowdistill.evaluation.results import Figure, number
from flowdistill.report import lineage, page, paths, times
from flowdistill.report.charts import Charts
from flowdistill.report.page import Html, join, tag
from flowdistill.report.reading import Run
from flowdistill.schedule import uniform
from flowdistill.stages.boss import TENSORS

_NO_TERMS = ("step", "lr", "loss_by_t", "grad_norm", "loss")
_WINDOWS = 3
_PLOTTED_AT_MOST = 6
"""Content of evaluations whose schedules are drawn."""


def trainings(run: Run, charts: Charts) -> Html | None:
    """Of each training the loss by step and by t, and the times that it drew against those that it meant."""
    found = []
    for name, log in run.trainings.items():
        lines = [line for line in log if "loss" in line]
        figures = [*_losses(lines, charts), *_density(run.part(name).manifest, log, charts)] if lines else []
        if figures:
            heading = [tag("h3", name)] if len(run.trainings) > 1 else []
            found += [*heading, page.figures(figures)]
    text = (
        "Time runs from the data (t = 0) to the noise (t = 1). Where the loss by t is large there is "
        "something left to learn, and a density of t that looks there more often learns it sooner."
    )
    return join(page.paragraph(text), *found) if found else None


def _losses(lines: Sequence[Mapping[str, Any]], charts: Charts) -> Iterator[Html]:
    terms = [key for key in dict.fromkeys(key for line in lines for key in line) if key not in _NO_TERMS]
    shown = ["loss", *terms][: len(plots.COLOURS)]
    drawn = page.plot(charts.loss_by_step(lines, shown), "Loss by step")
    legend = page.legend([(term, place, "") for place, term in enumerate(shown)] if terms else [])
    caption = f"Means of windows that end at the steps of the log, the last at {lines[-1]['step']:,}."
    yield page.figure("Loss by step", join(drawn, legend) if terms else drawn, caption)
    windows = [line for line in lines if "loss_by_t" in line]
    if windows:
        chosen = [windows[round(place)] for place in _evenly(len(windows), _WINDOWS)]
        drawn = page.plot(charts.loss_by_time([line["loss_by_t"] for line in chosen]), "Loss by t")
        steps = ", ".join(f"{line['step']:,}" for line in chosen)
        caption = f"Mean loss in equal stretches of t, up to step {steps}; the strongest line is the last."
        yield page.figure("Loss by t", drawn, caption)


def _density(manifest: Manifest, log: Sequence[Mapping[str, Any]], charts: Charts) -> Iterator[Html]:
    shares = times.drawn(manifest, log)
    if shares is None:
        return
    drawn = page.plot(charts.density(shares, times.nominal(manifest, log)), "Density of t")
    caption = (
        "Filled: times of evenly spaced steps, drawn again from the seed. Line: the density as it is set"
    )
    yield page.figure("Density of t", drawn, f"{caption}, {_spoken(manifest.settings['timesteps'])}.")


def _spoken(timesteps: Any) -> str:
    """`u-shaped, a 4`."""
    return ", ".join(
        str(value) if key == "name" else f"{key} {_inline(value)}"
        for key, value in sorted(timesteps.items(), key=lambda item: item[0] != "name")
        if value is not None
    )


def trajectories(run: Run, charts: Charts, colours: Mapping[str, int]) -> Html | None:
    """Paths of points in the plane, by each model of the run."""
    found = paths.in_the_plane(run)
    if not found:
        return None
    extent = paths.extent(found)
    drawn = [
        page.figure(
            ways.model,
            page.plot(
                charts.paths(ways.paths, colours.get(ways.model, place), extent), f"Paths of {ways.model}"
            ),
            f"{len(ways.paths)} noises (open circles), the same for all, and where 32 Euler steps take them.",
        )
        for place, ways in enumerate(found)
    ]
    return page.figures(drawn)


def schedules(run: Run, charts: Charts) -> Html | None:
    """Knots, errors of each step, and how the schedules fared on other noises."""
    parts = []
    for name, files in run.schedules.items():
        part = run.part(name)
        tensors = artifact.load_tensors(part.file(TENSORS))[0] if part.has(TENSORS) else {}
        drawn = [_schedule(file, tensors, charts) for file in files[:_PLOTTED_AT_MOST]]
        if len(run.schedules) > 1:
            parts.append(tag("h3", name))
        parts.append(page.figures(drawn))
        rows = [_schedule_row(file) for file in files]
        heads = list(dict.fromkeys(head for row in rows for head in row))
        cells = [[row.get(head, "") for head in heads] for row in rows]
        parts.append(page.table(heads, cells, [head for head in heads if head not in ("written", "verdict")]))
    if not parts:
        return None
    text = (
        "A dot is a time at which the network is evaluated, from noise at the left to data at the right. The "
        "local error of each step, in the colours of the rows, is what BOSS makes least in sum. The endpoint "
        "errors are those of noises that had no say in the choice."
    )
    return join(page.paragraph(text), *parts)


def _schedule(file: Mapping[str, Any], tensors: Mapping[str, Any], charts: Charts) -> Html:
    """Times, and local errors where the costs of all jumps are kept."""
    nfe, times = file["nfe"], file["times"]
    rows: list[tuple[str, list[float], list[float]]] = []
    if {"times", "cost", f"path.{nfe}"} <= tensors.keys():
        grid, cost = tensors["times"].tolist(), tensors["cost"]
        even = [round(place * (len(grid) - 1) / nfe) for place in range(nfe + 1)]
        for name, path in (("uniform", even), ("BOSS", tensors[f"path.{nfe}"].tolist())):
            errors = [float(cost[i, j]) for i, j in pairwise(path)]
            rows.append((name, [grid[i] for i in path], errors))
    else:
        rows.append(("uniform", list(uniform(len(times) - 1).times), []))
    if not any(_same(times, known) for _, known, _ in rows):
        rows.append((str(file["schedule"]), times, []))
    drawn = page.plot(charts.schedules(rows), f"Schedules of {nfe} evaluations")
    title = f"{nfe} evaluation{'' if nfe == 1 else 's'}"
    return page.figure(title, drawn, f"Written: {file['schedule']}, {file['solver']}.")


def _same(times: Sequence[float], others: Sequence[float]) -> bool:
    close = (abs(one - other) < 1e-6 for one, other in zip(times, others, strict=False))
    return len(times) == len(others) and all(close)


def _schedule_row(file: Mapping[str, Any]) -> dict[str, str]:
    row = {"NFE": str(file["nfe"]), "written": f"{file['schedule']}, {file['solver']}"}
    local, held_out = file.get("local_cost", {}), file.get("held_out", {})
    row |= {f"local cost, {name}": number(local[name]) for name in ("uniform", "boss") if name in local}
    row |= {
        f"endpoint error, {name}": _interval(held_out[name])
        for name in ("uniform", "boss")
        if name in held_out
    }
    if choice := file.get("choice"):
        row["endpoint error, written"] = _interval(choice["held_out"]["chosen"])
        row["verdict"] = "better than uniform" if choice["improved"] else "nothing beat uniform"
    elif "verdict" in held_out:
        row["verdict"] = f"BOSS: {held_out['verdict']}"
    return row


def origins(run: Run) -> Html:
    """Stages, their inputs and digests, and the versions that they were made with."""
    text = (
        "A digest names what a stage has made, whatever its date. The same settings, seed and inputs "
        "make the same digest again on the same device with the same versions."
    )
    table = page.table(lineage.HEADINGS, lineage.stages(run), ("seed", "took"))
    return join(page.paragraph(text), table, tag("h3", "Versions"), page.facts(lineage.versions(run)))


def commands(run: Run) -> Html:
    """What makes each part again, and the recipe for it."""
    if absent := lineage.missing(run):
        text = (
            f"{run.name} rests on {', '.join(absent)}, which this folder does not have: see its own recipe."
        )
        return join(page.code(lineage.commands(run)), page.paragraph(text))
    recipe = lineage.recipe(run)
    if recipe is None:
        text = "The stages were made with different seeds, so no one recipe makes them again."
        return join(page.code(lineage.commands(run)), page.paragraph(text))
    text = f"With the recipe below as `{lineage.RECIPE}`; `flowdistill run {lineage.RECIPE}` makes it all."
    shown = page.details("The recipe with every setting as it was resolved", page.code(recipe))
    return join(page.paragraph(page.with_code(text)), page.code(lineage.commands(run)), shown)


def _interval(figure: Mapping[str, Any]) -> str:
    return str(Figure.model_validate(figure))


def _inline(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _evenly(count: int, most: int) -> Sequence[float]:
    """So many of `count` places, the first and the last among them."""
    if count <= most:
        return range(count)
    return [place * (count - 1) / (most - 1) for place in range(most)]
