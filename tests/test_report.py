"""The report against the files that it was made from: every number, no injection, the same bytes."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from flowdistill import artifact, pictures, plots, randomness, recipe, stages
from flowdistill.cli import execute
from flowdistill.evaluation import results
from flowdistill.report import classes, page, reading, times, verdict, write
from flowdistill.timesteps import BINS

NASTY = "<script>alert('x')</script>&\"$a_b$"
BEGIN = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
CHAIN = """
seed: 3
teacher: {name: analytic:ring, components: 3}
stages:
  - pairs: {count: 128, solver: heun, steps: 2, batch_size: 64, shard_size: 64}
  - reflow:
      steps: 6
      batch_size: 8
      log_every: 2
      network: {name: mlp, width: 8, depth: 1}
      loss: {name: squared-l2}
  - boss: {model: teacher, nfe: [2, 4], choose: boss, grid: 8, trajectories: 8, held_out: 16, batch_size: 8}
  - eval: {models: [teacher, reflow], schedule: boss, samples: 64, nfe: [1, 2], latency: false}
"""


# Runs to report --------------------------------------------------------------------------------------------


def stage(folder: Path, verb: str, files: dict[str, str], number: int, **more: Any) -> None:
    """Declare what is in a folder a finished stage."""
    facts: dict[str, Any] = {"settings": {"name": folder.name}, "inputs": {}, "device": "cpu", **more}
    manifest = artifact.Manifest(
        stage=folder.name,
        verb=verb,
        outputs=files,
        seed=5,
        versions={"torch": "2.0", "flowdistill": "0.1"},
        dtype="float32",
        started=BEGIN + timedelta(minutes=number),
        finished=BEGIN + timedelta(minutes=number, seconds=30),
        **facts,
    )
    manifest.write(folder)


def figure(value: float, n: int, spread: float = 0.2, **more: Any) -> dict[str, Any]:
    low, high = value * (1 - spread), value * (1 + spread)
    return {"value": value, "low": low, "high": high, "n": n, "method": "made up", **more}


def row(model: str, nfe: int, fd: float, schedule: str = "uniform", **more: Any) -> dict[str, Any]:
    return {
        "id": f"{model}-{nfe}" + ("" if schedule == "uniform" else f"-{schedule}"),
        "model": model,
        "solver": "euler",
        "schedule": schedule,
        "nfe": nfe,
        "times": [1 - step / nfe for step in range(nfe + 1)],
        "forward_passes": nfe,
        "metrics": {"fd@64": figure(fd, 64, extractor="toy@1"), "endpoint_error@32": figure(fd / 3, 32)},
        "skipped": {},
        **more,
    }


def content(student: str = "reflow") -> dict[str, Any]:
    """An evaluation of a teacher and a student."""
    rows = [row("teacher", 1, 0.9), row("teacher", 2, 0.5), row("teacher", 2, 0.3, "boss")]
    rows += [row("teacher", 4, 0.2), row(student, 1, 0.25), row(student, 2, 0.1)]
    for each in rows:
        each["skipped"] = dict.fromkeys(("fid", "kid"), "not asked for, add `features: {}`")
    rows[-1]["skipped"]["lpips"] = "no weights <here>"
    rows[-1]["metrics"]["novel_thing@64"] = figure(7.0, 64)
    models = {
        name: {
            "digest": digest * 64,
            "parameters": 1234,
            "macs": 2_000_000_000,
            "metrics": {"curvature@16": figure(0.1, 16)},
        }
        for name, digest in (("teacher", "a"), (student, "b"))
    }
    return {
        "kind": "evaluation",
        "seed": 0,
        "samples": 64,
        "batch_size": 32,
        "extractor": "toy@1",
        "reference": {"model": "teacher", "nfe": 63, "samples": 32, "solver": "heun"},
        "data": {"name": "toy", "metrics": {"fd@64": figure(0.01, 64, extractor="toy@1")}, "skipped": {}},
        "models": models,
        "rows": rows,
        "throughput": {each["id"]: {"samples_per_second": 5000.0, "batch_size": 32} for each in rows},
        "memory": {each["id"]: {"peak_mb": 77.0, "of": "GPU"} for each in rows},
        "latency": {
            each["id"]: {"p50_ms": 2.0 * each["nfe"], "p95_ms": 3.0 * each["nfe"], "runs": 9} for each in rows
        },
    }


def evaluation(folder: Path, found: dict[str, Any], number: int = 3, **more: Any) -> None:
    """A finished evaluation with samples of 3 classes and a picture."""
    folder.mkdir(parents=True)
    chance = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {"label": torch.arange(64) % 3, "index": torch.arange(64)}
    for each in found["rows"]:
        tensors[f"{each['id']}.correct"] = torch.rand(64, generator=chance) < 0.8
        tensors[f"{each['id']}.endpoint_error"] = torch.rand(32, generator=chance)
    captions = [(each["model"], torch.zeros(3, 1, 8, 8)) for each in found["rows"]]
    files = {
        "eval.json": artifact.save_json(folder / "eval.json", found),
        "samples.safetensors": artifact.save_tensors(
            folder / "samples.safetensors", tensors, {"kind": "evaluation", "seed": 0}
        ),
        "grid.png": artifact.atomic_write(folder / "grid.png", pictures.labelled_rows(captions)),
    }
    stage(folder, "eval", files, number, **more)


def training(folder: Path, term: str = "data") -> None:
    folder.mkdir(parents=True)
    log = [
        {"step": step, "loss": 1 / step, term: 0.5 / step, "lr": 1e-3, "grad_norm": 1.0}
        | {"loss_by_t": [None if place == 3 else (place + 1) / step for place in range(BINS)]}
        for step in (10, 20, 30, 40)
    ]
    lines = "".join(f"{json.dumps(line)}\n" for line in log).encode()
    settings = {"name": folder.name, "steps": 40, "batch_size": 64}
    settings["timesteps"] = {"name": "u-shaped", "a": 4.0}
    sha = artifact.atomic_write(folder / "log.jsonl", lines)
    stage(folder, "reflow", {"log.jsonl": sha}, 1, settings=settings)


def boss(folder: Path, name: str = "shifted-1.5") -> None:
    folder.mkdir(parents=True)
    held_out = {key: figure(value, 16) for key, value in (("boss", 0.2), ("uniform", 0.3), ("chosen", 0.1))}
    file = {"nfe": 2, "solver": "ab2", "schedule": name, "times": [1.0, 0.6, 0.0], "regret": 0.0}
    file["local_cost"] = {"uniform": 3.0, "boss": 2.0}
    file["held_out"] = {**held_out, "verdict": "better"}
    file["choice"] = {"held_out": held_out, "improved": True, "candidates": []}
    tensors = {
        "cost": torch.arange(25.0).reshape(5, 5),
        "times": torch.linspace(1, 0, 5),
        "path.2": torch.tensor([0, 1, 4]),
    }
    files = {
        "schedule-nfe2.json": artifact.save_json(folder / "schedule-nfe2.json", file),
        "boss.safetensors": artifact.save_tensors(folder / "boss.safetensors", tensors, {}),
    }
    stage(folder, "boss", files, 2)


def toy(folder: Path) -> Path:
    training(folder / "reflow")
    boss(folder / "boss")
    evaluation(folder / "eval", content())
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return toy(tmp_path / "toy")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the plane that the real commands have made; tests leave its stages as they are."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "chain.yaml").write_text(CHAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert execute(["run", "chain.yaml", "--out", "made", "-q"]) == 0
    return folder / "made"


# Reading the page ------------------------------------------------------------------------------------------

VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser would find: balanced tags, attributes, texts, the cells of every table."""

    def __init__(self, data: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.source = data.decode()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(self.source)
        self.close()
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _, _ in self.attributes} | set(re.findall(r"<([a-z0-9]+)[ >]", self.source))


def made(run: Path, *others: Path) -> Page:
    return Page(write(run, None, others).read_bytes())


@pytest.fixture(scope="module")
def pages(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Of a made-up run, and of the real one."""
    return {"toy": made(toy(tmp_path_factory.mktemp("toy") / "toy")), "chain": made(chain)}


# One file, well formed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["toy", "chain"])
def test_page_needs_nothing_outside_it(kind: str, pages: dict[str, Page]) -> None:
    found = pages[kind]
    assert not found.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for value in found.values("src", "href", "xlink:href", "srcset", "action", "poster"):
        assert value.startswith(("#", "data:image/png;base64,")), value[:60]
    assert not re.search(r"@import|url\((?!#)", found.source)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert ("meta", "name", "viewport") in found.attributes


@pytest.mark.parametrize("kind", ["toy", "chain"])
def test_plots_are_well_formed_and_share_no_ids(kind: str, pages: dict[str, Page]) -> None:
    found = pages[kind]
    plots_ = re.findall(r"<svg .*?</svg>", found.source, re.DOTALL)
    assert len(plots_) > 8
    own = [{each.get("id") for each in ElementTree.fromstring(svg).iter()} - {None} for svg in plots_]
    ids = found.values("id")
    assert len(set(ids)) == len(ids)
    for svg, names in zip(plots_, own, strict=True):
        used = re.findall(r"(?:href=\"|url\()#([^\")]+)", svg)
        assert used and set(used) <= names, "each plot uses what it defines itself"
        assert "#000000" not in svg and "currentColor" in svg, "black would be lost on a dark page"
    for name, value in ((name, value) for _, name, value in found.attributes if name == "href"):
        assert name and value[1:] in ids


def test_sections_stand_in_order_and_all_are_linked(pages: dict[str, Page]) -> None:
    found = pages["chain"]
    sections = re.findall(r'<section id="([a-z]+)">', found.source)
    expected = "quality training paths schedules samples classes figures costs skipped lineage commands"
    assert [name for name in expected.split() if name in sections] == sections
    assert {"quality", "training", "paths", "schedules", "samples", "figures", "lineage"} <= set(sections)
    assert re.findall(r'<a href="#([a-z]+)">', found.source) == sections


def test_same_folders_make_the_same_bytes(run: Path) -> None:
    first = write(run).read_bytes()
    code = (
        "import sys; from pathlib import Path; from flowdistill.report import write; write(Path(sys.argv[1]))"
    )
    (run / "report.html").unlink()
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, run], check=True, env=environment)
    assert (run / "report.html").read_bytes() == first


def test_plots_follow_the_colours_of_the_page() -> None:
    drawn, axes = plots.figure(2, 2)
    for colour in plots.COLOURS:
        axes[0, 0].plot([0, 1], color=colour)
    text = plots.svg(drawn, "x-")
    for number in range(len(plots.COLOURS)):
        assert f"stroke: var(--line-{number}, {plots.COLOURS[number]})" in text
    declared = page.page("", page.Html("")).decode()
    for scheme in declared.split("prefers-color-scheme: dark"):
        assert all(f"--line-{number}:" in scheme for number in range(len(plots.COLOURS)))


# What it says ----------------------------------------------------------------------------------------------


def shown(value: float) -> str:
    """Three significant digits by another way."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def test_every_figure_is_in_the_page_and_no_other(pages: dict[str, Page]) -> None:
    found = content()
    wanted = []
    groups = [("real data", found["data"]["metrics"])]
    groups += [(name, model["metrics"]) for name, model in found["models"].items()]
    for each in found["rows"]:
        plural, chosen = "s" * (each["nfe"] > 1), " (boss)" * (each["schedule"] == "boss")
        groups.append((f"{each['model']} with {each['nfe']} evaluation{plural}{chosen}", each["metrics"]))
    for name, metrics in groups:
        for metric in metrics.values():
            value, low, high = (shown(metric[key]) for key in ("value", "low", "high"))
            wanted.append((name, f"{value} [{low}, {high}]", str(metric["n"])))
    cells = pages["toy"].cells
    start = cells.index(["of", "metric", "value", "n", "method"]) + 1
    listed = [(each[0], each[2], each[3]) for each in cells[start : start + len(wanted)]]
    assert sorted(listed) == sorted(wanted)
    assert cells[start + len(wanted)][0] == "model", "the next table begins: there are no more figures"


def test_costs_are_those_of_the_file(pages: dict[str, Page]) -> None:
    cells = pages["toy"].cells
    start = next(place for place, each in enumerate(cells) if each[-1:] == ["peak memory, MB"]) + 1
    for each, cell in zip(content()["rows"], cells[start:], strict=False):
        nfe = each["nfe"]
        measured = [shown(2.0 * nfe), shown(3.0 * nfe), "9", "5,000", "32", "77"]
        assert cell == [each["model"], str(nfe), cell[2], str(nfe), "1,234", str(2 * nfe), *measured]


def test_verdict_says_what_the_numbers_say(pages: dict[str, Page]) -> None:
    text = pages["toy"].text
    assert (
        "With 1 evaluation reflow has Fréchet distance 0.25 [0.2, 0.3], better than the 0.9 [0.72, 1.08] of "
        "teacher; with 4 evaluations teacher has 0.2 [0.16, 0.24]."
    ) in text
    assert (
        "To be no worse, teacher needs 4 evaluations (0.2 [0.16, 0.24]): reflow takes 4 times fewer "
        "evaluations and 4 times less time for one sample (2 ms against 8 ms)."
    ) in text
    assert "With 2 evaluations (boss) it comes near (0.3 [0.24, 0.36], the intervals overlap)." in text


@pytest.mark.parametrize("seed", range(20))
def test_saving_is_the_cheapest_that_is_no_worse(seed: int) -> None:
    chance = random.Random(seed)
    found = content()
    found["rows"] = [row("teacher", nfe, chance.uniform(0.1, 1)) for nfe in (1, 2, 4, 8, 16)]
    found["rows"].append(row("reflow", 1, chance.uniform(0.05, 1)))
    numbers = results.Content.model_validate(found)
    *base, student = numbers.rows
    saving = verdict.saved(numbers, student, base, "fd@64")
    able = [each.nfe for each in base if each.metrics["fd@64"].value <= student.metrics["fd@64"].value]
    assert (saving.teacher.nfe if saving else None) == min(able, default=None)
    said = " ".join(verdict.judge(numbers).sentences)
    ours, theirs = student.metrics["fd@64"], base[0].metrics["fd@64"]
    if ours.high < theirs.low:
        assert "better than" in said
    elif theirs.high < ours.low:
        assert "worse than" in said
    else:
        assert "no clear difference" in said
    assert ("is as good" in said) == (not able)


def test_more_is_better_where_it_is() -> None:
    found = content()
    for each in found["rows"]:
        each["metrics"] = {"fd@64": each["metrics"]["fd@64"]}
    numbers = results.Content.model_validate(found)
    more, less = (results.Figure.model_validate(figure(value, 9, 0.01)) for value in (2.0, 1.0))
    assert verdict.compared(more, less, 1) == "better" and verdict.compared(more, less, -1) == "worse"
    assert verdict.compared(more, more, 1) == "no clear difference"
    assert verdict.quality(numbers) == "fd@64"
    assert verdict.about("psnr@9").better == 1 and verdict.about("novel_thing@9").title == "novel thing"


def test_without_a_student_the_schedules_are_judged() -> None:
    found = content()
    found["rows"] = [each for each in found["rows"] if each["model"] == "teacher"]
    (said,) = verdict.judge(results.Content.model_validate(found)).sentences
    assert said == (
        "With 2 evaluations (boss) teacher has Fréchet distance 0.3 [0.24, 0.36], against 0.5 [0.4, 0.6] "
        "with uniform Euler steps: better."
    )


def test_of_several_evaluations_the_widest_has_the_verdict(run: Path) -> None:
    found = content()
    found["rows"] = [each for each in found["rows"] if each["model"] == "reflow"]
    evaluation(run / "later", found, 4)
    shown_ = made(run)
    assert "better than the 0.9 [0.72, 1.08] of teacher" in shown_.text
    assert shown_.source.count("<h3>later</h3>") == shown_.source.count("<h3>eval</h3>") > 4
    keys = set(re.findall(r'<i class="swatch (line-\d)"></i>reflow<', shown_.source))
    assert keys == {"line-1"}, "a model keeps its colour"


def test_there_is_a_verdict_on_any_rows() -> None:
    found = content()
    for rows, expected in (
        ([row("teacher", 2, 0.3, "boss")], "With 2 evaluations (boss) teacher has Fréchet distance 0.3"),
        (
            [row("reflow", 2, 0.3), row("reflow", 4, 0.2)],
            "With 4 evaluations reflow has Fréchet distance 0.2",
        ),
        ([], "Nothing that says how good a model is was measured."),
    ):
        numbers = results.Content.model_validate({**found, "rows": rows})
        assert verdict.judge(numbers).sentences[0].startswith(expected)


def test_a_run_without_an_evaluation_says_so(run: Path) -> None:
    for file in (run / "eval").iterdir():
        file.unlink()
    text = made(run).text
    assert "reflow is trained, the last loss is 0.025." in text
    assert (
        "boss with 2 evaluations (shifted-1.5, ab2) has endpoint error 0.1 [0.08, 0.12], against 0.3" in text
    )
    assert "Quality was not measured" in text


def test_what_was_skipped_is_told_with_its_reason(run: Path) -> None:
    (run / "later").mkdir()
    artifact.save_json(run / "later" / "started.json", {})
    text = made(run).text
    assert "LPIPS to the accurate solution of reflow with 2 evaluations: no weights <here>." in text
    assert "FID, KID of all rows: not asked for, add features: {}." in text
    assert "Not finished, and not part of this page: later." in text


def test_an_evaluation_alone_is_a_report(run: Path) -> None:
    found = made(run / "eval")
    assert (run / "eval" / "report.html").is_file()
    assert "With 1 evaluation reflow has" in found.text and "<h1>toy/eval</h1>" in found.source


def test_an_evaluation_alone_names_what_it_rests_on(chain: Path, tmp_path: Path) -> None:
    shown_ = Page(write(chain / "eval", tmp_path / "page.html").read_bytes())
    assert "made/eval rests on boss, reflow, which this folder does not have" in shown_.text
    assert "flowdistill eval recipe.yaml --stage eval --out made --device cpu" in shown_.text


def test_figures_by_class_are_means_over_the_class(run: Path, pages: dict[str, Page]) -> None:
    (found,) = reading.read(run).evaluations
    tensors = artifact.load_tensors(run / "eval" / "samples.safetensors")[0]
    by_class = classes.figures(found, "correct")
    assert list(by_class) == [0, 1, 2]
    for label, rows in by_class.items():
        for name, each in rows.items():
            chosen = tensors[f"{name}.correct"][tensors["label"] == label]
            assert each.value == pytest.approx(float(chosen.double().mean())) and each.n == len(chosen)
    for label, rows in classes.figures(found, "endpoint_error").items():
        chosen = tensors["reflow-1.endpoint_error"][tensors["label"][:32] == label]
        assert rows["reflow-1"].value == pytest.approx(float(chosen.double().mean()))
        assert rows["reflow-1"].low < rows["reflow-1"].value < rows["reflow-1"].high
    assert pages["toy"].source.count("<figcaption>class 2</figcaption>") == 2


def test_density_of_times_is_that_of_the_training(run: Path) -> None:
    (log,), part = reading.read(run).trainings.values(), reading.read(run).part("reflow")
    a = 4.0
    for t, value in times.nominal(part.manifest, log):
        # p(t) = a cosh(a (t - 1/2)) / (2 sinh(a / 2)), rf++
        assert value == pytest.approx(a * math.cosh(a * (t - 0.5)) / (2 * math.sinh(a / 2)), rel=2e-3)
    key = randomness.key(5, "reflow")
    u = torch.cat([randomness.uniforms(key, "timesteps", step, 64) for step in range(40)])
    t = 0.5 + ((2 * u - 1) * math.sinh(a / 2)).asinh() / a
    counts = [int(((t >= place / BINS) & (t < (place + 1) / BINS)).sum()) for place in range(BINS)]
    found = times.drawn(part.manifest, log)
    # Training keeps 1e-5 away from both ends, so one in thousands is on the other side of an edge.
    assert found == pytest.approx([each * BINS / len(t) for each in counts], abs=2.5 * BINS / len(t))


@pytest.mark.parametrize(
    "timesteps",
    [
        {"name": "fitted"},
        {"name": "logit-normal"},
        {"name": "mixture", "parts": [{"name": "uniform"}, {"name": "u-shaped"}]},
    ],
)
def test_density_has_mean_one_whatever_its_kind(timesteps: dict[str, Any], run: Path) -> None:
    (log,), part = reading.read(run).trainings.values(), reading.read(run).part("reflow")
    settings = {**part.manifest.settings, "timesteps": timesteps}
    manifest = part.manifest.model_copy(update={"settings": settings})
    found = times.drawn(manifest, log)
    assert found is not None and sum(found) == pytest.approx(BINS)
    other = manifest.model_copy(update={"settings": {**settings, "settled": {"name": "other times later"}}})
    assert times.drawn(other, log) is None
    nominal = [value for _, value in times.nominal(manifest, log)]
    assert sum(nominal) == pytest.approx(len(nominal))
    coarse = [sum(nominal[2 * place : 2 * place + 2]) / 2 for place in range(BINS)]
    assert sum(abs(one - other) for one, other in zip(found, coarse, strict=True)) / BINS < 0.15


# The real chain: paths, lineage, the recipe ----------------------------------------------------------------


def test_points_in_the_plane_show_their_paths(pages: dict[str, Page]) -> None:
    text = pages["chain"].text
    assert text.count("48 noises (open circles), the same for all") == 2, "the teacher's and the student's"


def test_lineage_and_commands_are_those_of_the_manifests(chain: Path, pages: dict[str, Page]) -> None:
    found = pages["chain"]
    for name in ("pairs", "reflow", "boss", "eval"):
        manifest = artifact.Manifest.read(chain / name)
        (cells,) = [each for each in found.cells if each[:2] == [name, name] and each[4:5] == ["3"]]
        assert cells[3] == manifest.digest[:12] and cells[5] == manifest.device
        assert cells[2] == ", ".join(f"{key} {sha[:12]}" for key, sha in manifest.inputs.items())
        assert f"flowdistill {name} recipe.yaml --stage {name} --out made --device cpu" in found.text


def test_the_recipe_of_the_page_makes_the_same_settings(chain: Path, pages: dict[str, Page]) -> None:
    blocks = re.findall(r"<code>(.*?)</code>", pages["chain"].source, re.DOTALL)
    text = Page(f"<code>{blocks[-1]}</code>".encode()).text
    again = recipe.parse(text.encode(), Path("recipe.yaml"), stages.verbs(), [], Path("made"))
    assert (again.seed, again.teacher) == (3, {"name": "analytic:ring", "components": 3})
    assert [each.name for each in again.stages] == ["pairs", "reflow", "boss", "eval"]
    for name in ("pairs", "reflow", "boss", "eval"):
        assert again.settings_json(name) == artifact.Manifest.read(chain / name).settings


# Names and texts are texts ---------------------------------------------------------------------------------


def nasty(folder: Path) -> None:
    """A run in which every text that can be is a script."""
    training(folder / "reflow", NASTY)
    boss(folder / "boss", NASTY)
    found = content(NASTY)
    found["data"]["skipped"] = {NASTY: NASTY}
    found["data"]["metrics"]["fd@64"]["extractor"] = found["data"]["name"] = NASTY
    for each in found["rows"]:
        each["metrics"]["fd@64"] |= {"method": NASTY, "extractor": NASTY}
        each["metrics"][f"{NASTY}@64"] = figure(1.0, 64)
        each["schedule"] = NASTY if each["schedule"] == "boss" else "uniform"
    facts = {"settings": {"name": "eval", NASTY: NASTY}, "inputs": {NASTY: NASTY}, "device": NASTY}
    evaluation(folder / "eval", found, **facts)


def test_texts_of_files_cannot_become_markup(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    nasty(folder)
    other = tmp_path / "<b>other"
    evaluation(other / "eval", content())
    found = made(folder, other)
    assert NASTY in found.text and "<img src=x onerror=alert(1)>" in found.text and "<b>other" in found.text
    assert "<script" not in found.source and "onerror=alert(1)>" not in re.sub("&gt;", "", found.source)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    for svg in re.findall(r"<svg .*?</svg>", found.source, re.DOTALL):
        ElementTree.fromstring(svg)


def test_tags_escape_what_is_no_html() -> None:
    text = '<a href="x">&</a>'
    assert page.tag("p", text, title=text) == (
        '<p title="&lt;a href=&quot;x&quot;&gt;&amp;&lt;/a&gt;">'
        "&lt;a href=&quot;x&quot;&gt;&amp;&lt;/a&gt;</p>"
    )
    assert page.tag("p", page.tag("b", "<")) == "<p><b>&lt;</b></p>"


def test_file_names_that_are_no_text_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"toy\xff")
    training(folder / "reflow")
    assert "<h1>toy?</h1>" in write(folder).read_text("utf-8")


# Beside another --------------------------------------------------------------------------------------------


def test_others_stand_beside_it(run: Path, tmp_path: Path) -> None:
    found = content("other")
    found["models"]["other"]["digest"] = "c" * 64
    for each in found["rows"]:
        if each["id"] == "teacher-1":
            each["metrics"]["fd@64"] = figure(0.1, 64, extractor="toy@1")
    evaluation(tmp_path / "old" / "eval", found)
    path = tmp_path / "old"
    shown_ = made(run, path)
    table = [each for each in shown_.cells if len(each) == 7]
    assert table[0][5] == str(path) and table[1][:4] == ["teacher", "1", "uniform", "Fréchet distance"]
    assert table[1][4:] == ["0.9 [0.72, 1.08]", "0.1 [0.08, 0.12]", "worse"]
    assert f"7 figures are the same here and in {path}." in shown_.text
    assert f"{path}: other" in shown_.text
    assert f"teacher of {path} is a model of this run, and not drawn again." in shown_.text


def test_what_another_extractor_read_is_not_compared(run: Path, tmp_path: Path) -> None:
    found = content("other")
    for each in found["rows"]:
        each["metrics"] = {"fd@64": {**each["metrics"]["fd@64"], "extractor": "toy@2", "value": 5.0}}
    evaluation(tmp_path / "old", found)
    shown_ = made(run, tmp_path / "old")
    assert f"0 figures are the same here and in {tmp_path / 'old'}." in shown_.text
    assert not [each for each in shown_.cells if each[-1:] == ["here is"]]
    assert f"Not drawn of {tmp_path / 'old'}: endpoint_error@32" in shown_.text


# The command, and what is wrong ----------------------------------------------------------------------------


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = execute(["report", *map(str, arguments)])
        streams = capsys.readouterr()
        assert "Traceback" not in streams.err and len(streams.err.splitlines()) <= 3
        return code, streams.out, streams.err

    yield call


def test_command_prints_the_path(run: Path, answer: Any) -> None:
    assert answer(run) == (0, f"{run / 'report.html'}\n", "")
    code, out, err = answer(run, "--out", run / "page.html", "--compare", run / "eval", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"run": str(run), "file": str(run / "page.html")}
    assert (run / "page.html").read_bytes() != (run / "report.html").read_bytes()


def test_matplotlib_is_named_where_it_is_missing(
    run: Path, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    code, out, err = answer(run)
    assert (code, out) == (3, "") and "pip install 'flowdistill[plots]'" in err
    assert not (run / "report.html").exists()
    assert answer(run / "eval" / "eval.json")[0] == 3, "before anything is read"


@pytest.mark.parametrize("name", ["eval.json", "grid.png", "samples.safetensors", "manifest.json"])
def test_an_altered_file_is_refused(name: str, run: Path, answer: Any) -> None:
    path = run / "eval" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, out, err = answer(run)
    assert (code, out) == (4, "") and str(path) in err
    assert not list(run.glob("*.html")) and not list(run.glob(".*.tmp"))


@pytest.mark.parametrize("change", ["rows", "models", "reference"])
def test_an_evaluation_of_another_form_is_refused(change: str, run: Path, answer: Any) -> None:
    found = content()
    del found[change]
    for file in (run / "eval").iterdir():
        file.unlink()
    sha = artifact.save_json(run / "eval" / "eval.json", found)
    stage(run / "eval", "eval", {"eval.json": sha}, 3)
    code, _, err = answer(run)
    assert code == 4 and f"eval.json: {change}: Field required" in err
    assert not (run / "report.html").exists()


def test_what_cannot_be_reported_is_told(run: Path, tmp_path: Path, answer: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pairs").mkdir()
    stage(tmp_path / "pairs", "pairs", {}, 0)
    wrong = [
        ((tmp_path / "none",), 3, "no such folder"),
        ((tmp_path / "empty",), 3, "no finished stage here"),
        ((tmp_path / "pairs",), 3, "nothing to report; it has pairs"),
        ((run / "eval" / "eval.json",), 2, "is a file, expected the folder"),
        ((run, "--out", tmp_path / "none" / "page.html"), 2, str(tmp_path / "none")),
        ((run, "--out", tmp_path / "empty"), 2, "is a folder, expected the name of a file"),
        ((run, "--compare", tmp_path / "pairs"), 3, "has no finished evaluation to compare with"),
        ((run / "reflow", "--compare", run), 3, "has no evaluation that others could be compared with"),
    ]
    for arguments, expected, text in wrong:
        code, out, err = answer(*arguments)
        assert (code, out) == (expected, "") and text in err, (arguments, code, err)
    assert not list(tmp_path.rglob("*.html"))


def test_a_stage_that_was_set_aside_is_left_out(run: Path) -> None:
    (run / "eval").rename(run / "eval.old-1")
    evaluation(run / "eval", content("newer"))
    text = made(run).text
    assert "newer" in text and "reflow with 1 evaluation" not in text


def test_nothing_that_is_not_there_is_spelled_out(pages: dict[str, Page]) -> None:
    for each in pages.values():
        assert not re.search(r"None|\bnan\b", each.text)
