"""SlimFlow's recipes and InstaFlow's: what was published, ablations of one ingredient, small runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import test_presets
import torch
from test_cli import Shell
from test_presets import (
    EDM_GRID,
    RECIPES,
    SMALL,
    SQUARED,
    UNIFORM,
    adam,
    differing,
    overriding,
    placed,
    read,
    smaller,
)
from tiny_pipelines import make

from flowdistill import artifact, networks, students, teachers
from flowdistill.pairstore import PairStore
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.stages.slimflow import SlimFlow
from flowdistill.work import Work

shell, vgg = test_presets.shell, test_presets.vgg

# What was published ----------------------------------------------------------------------------------------

# the teacher's file, its network and shape, classes, steps for a pair; parameters of students
PUBLISHED: Mapping[str, tuple[str, str, int, int, int, Mapping[str, int]]] = {
    "cifar10": (
        *("edm-cifar10-32x32-uncond-vp", "edm-cifar10-vp", 32, 0, 18),
        {"28m": 27_906_179, "15m": 15_707_235},
    ),
    "ffhq": (
        *("edm-ffhq-64x64-uncond-vp", "edm-ffhq64-vp", 64, 0, 40),
        {"28m": 27_906_179, "15m": 15_707_235},
    ),
    "imagenet64": (
        *("edm-imagenet-64x64-cond-adm", "edm-imagenet64-adm", 64, 1000, 40),
        {"81m": 80_685_315, "45m": 44_685_827},
    ),
}
DROPOUT = {"cifar10": 0.15, "ffhq": 0.15, "imagenet64": 0.13}
ONE_STEP = "-one-step"
POWER_LAW = {"decay": 0.999999, "ramp": True, "also": []}
STUDENTS = [(name, student) for name, (*_, sizes) in PUBLISHED.items() for student in sizes]


def chosen(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in expected}


def stage_of(name: str, stage: str) -> SlimFlow:
    [found] = [each for each in read(name).stages if each.name == stage]
    return cast(SlimFlow, found)


@pytest.mark.parametrize(("name", "student"), STUDENTS)
def test_a_students_network_is_the_published_one(name: str, student: str) -> None:
    _, network, side, classes, _, sizes = PUBLISHED[name]
    architecture, arguments = networks.presets()[network]
    card = teachers.Card(
        architecture=architecture, arguments=dict(arguments), shape=(3, side, side), classes=classes
    )
    work = cast(Work, SimpleNamespace(seed=0, parents={}, settings={}))
    like = teachers.Model(card, torch.nn.Identity(), "")
    with torch.device("meta"):
        made = students.fresh(stage_of(f"slimflow/{name}", student).student, like, work, "student")
    assert sum(each.numel() for each in made.network.parameters()) == sizes[student]
    assert (made.card.shape, made.card.classes) == (card.shape, classes)
    assert made.card.arguments["dropout"] == DROPOUT[name]


@pytest.mark.parametrize(("name", "student"), STUDENTS)
def test_annealing_reflow_is_the_published_one(name: str, student: str) -> None:
    recipe = read(f"slimflow/{name}")
    expected = {
        "annealing": {"name": "linear", "steps": 300_000, "share": 0.375},
        "timesteps": UNIFORM,
        "loss": SQUARED,
        "settled": None,
        "warm_start": False,
        **{"steps": 800_000, "batch_size": 128, "accumulate": 1, "precision": "fp32"},
        "optimizer": adam(2e-4, 5000, clip=1.0),
        "ema": POWER_LAW,
    }
    found = recipe.settings_json(student)
    assert chosen(found, expected) == expected
    assert found["feed"]["flip"]
    assert recipe.references[student]["pairs"] == "pairs"
    assert recipe.references[student]["like"] == "teacher"
    annealing = stage_of(f"slimflow/{name}", student).annealing
    betas = [annealing.beta(step, 800_000) for step in (0, 150_000, 300_000, 799_999)]
    assert betas == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(("name", "student"), STUDENTS)
def test_distillation_is_the_published_one(name: str, student: str) -> None:
    recipe, stage = read(f"slimflow/{name}"), student + ONE_STEP
    lpips = {"name": "lpips", "net": "vgg", "pooling": "max", "resolution": 64, "precision": "fp32"}
    expected = {
        **{"nfe": 1, "start": "raw"},
        "two_step": {"first": "student", "interval": [0.2, 0.8], "weight": 1.0},
        **{"steps": 400_000, "batch_size": 128, "accumulate": 1, "precision": "fp32"},
        "optimizer": adam(2e-4, 0, clip=1.0),
        "ema": POWER_LAW,
    }
    found = recipe.settings_json(stage)
    assert chosen(found, expected) == expected
    assert found["loss"]["name"] == "perceptual" and found["loss"]["distance"] == lpips | {"weights": None}
    assert found["feed"]["flip"]
    assert recipe.references[stage]["model"] == student
    assert recipe.references[stage]["pairs"] == f"{student}-pairs"


@pytest.mark.parametrize("name", PUBLISHED)
def test_pairs_are_the_published_ones(name: str) -> None:
    recipe, (teacher, *_, steps, sizes) = read(f"slimflow/{name}"), PUBLISHED[name]
    assert recipe.teacher == str(RECIPES / "slimflow" / f"{teacher}.safetensors")
    found = recipe.settings_json("pairs")
    assert (found["count"], found["solver"], found["steps"]) == (100_000, "heun", steps)
    assert found["schedule"] == EDM_GRID
    for student in sizes:
        own = recipe.settings_json(f"{student}-pairs")
        assert (own["solver"], own["rtol"], own["atol"]) == ("rk45", 1e-5, 1e-5)
        assert recipe.references[f"{student}-pairs"]["model"] == student


def test_instaflow_is_the_published_one() -> None:
    recipe = read("instaflow")
    reflow, distill = recipe.settings_json("reflow"), recipe.settings_json("distill")
    assert isinstance(recipe.teacher, dict) and recipe.teacher["guidance"] == {"scale": 5.0}
    for pairs in map(recipe.settings_json, ("pairs", "straight")):
        assert (pairs["count"], 2 * pairs["steps"] - 1, pairs["guidance"]) == (1_600_000, 25, None)
    assert recipe.references["reflow"] == {"pairs": "pairs", "init": "teacher"}
    assert (reflow["timesteps"], reflow["loss"], reflow["network"]) == (UNIFORM, SQUARED, None)
    samples = 64 * 70_000 + 1024 * 25_000
    assert reflow["steps"] * reflow["batch_size"] == pytest.approx(samples, rel=0.05)
    assert recipe.references["straight"]["model"] == "reflow"
    assert chosen(recipe.references["distill"], {"pairs": 0, "model": 0}) == {
        "pairs": "straight",
        "model": "reflow",
    }
    assert (distill["nfe"], distill["loss"], distill["two_step"]) == (1, SQUARED, None)


# The ablations ---------------------------------------------------------------------------------------------

# of each table the first is what the others differ from, and in what
ABLATIONS: Mapping[str, Mapping[str, set[str]]] = {
    "neither": {"flip": {"feed"}, "anneal": {"annealing"}, "both": {"feed", "annealing"}},
    "l2": {"l2-two-step": {"two_step"}, "perceptual": {"loss"}, "perceptual-two-step": {"two_step", "loss"}},
}


@pytest.mark.parametrize("base", ABLATIONS)
def test_stages_of_an_ablation_differ_by_the_ingredient(base: str) -> None:
    recipe, tables = read("slimflow/shapes"), ABLATIONS[base]
    for name, ingredients in tables.items():
        found = differing(recipe.settings_json(base), recipe.settings_json(name))
        assert found.pop("name") == (base, name)
        assert {key.partition(".")[0] for key in found} == ingredients, name
        assert recipe.references[name] == recipe.references[base]
        if "feed" in ingredients:
            assert found["feed.flip"] == (False, True)
    evaluated = {"teacher", *(name for base, table in ABLATIONS.items() for name in (base, *table))}
    assert set(recipe.settings_json("eval")["models"]) == evaluated


def test_the_students_of_shapes_have_a_quarter_of_the_teachers_parameters() -> None:
    recipe, teacher = read("slimflow/shapes"), teachers.open_model("builtin:shapes")
    work = cast(Work, SimpleNamespace(seed=0, parents={}, settings={}))

    def parameters(model: teachers.Model) -> int:
        return sum(each.numel() for each in model.network.parameters())

    for stage in recipe.stages:
        if isinstance(stage, SlimFlow):
            student = students.fresh(stage.student, teacher, work, "student")
            assert parameters(teacher) / 5 < parameters(student) <= parameters(teacher) / 4


def test_the_command_for_one_student_of_shapes(shell: Shell) -> None:
    options = smaller(read("slimflow/shapes"), "builtin:shapes")
    answer = shell("distill", "slimflow/shapes", "--stage", "perceptual-two-step", "-q", *options)
    assert answer.code == 0, answer.err
    out = Path("runs/shapes")
    made = {path.parent.name for path in out.glob(f"*/{artifact.MANIFEST}")}
    assert made == {"pairs", "anneal", "own", "perceptual-two-step"}


# With weights: small and random ----------------------------------------------------------------------------

CHAINS = [
    ("cifar10", "15m", "{name: slimflow, size: 3m}"),
    ("imagenet64", "81m", "{name: scaled, width: 0.5, blocks: 1}"),
]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "student", "network"), CHAINS, ids=[name for name, *_ in CHAINS])
def test_the_command_of_the_head_does_it_all(
    name: str, student: str, network: str, shell: Shell, vgg: Path
) -> None:
    """Pairs, a small flow, its own pairs, one step: each from the one before."""
    options = [*placed(f"slimflow/{name}", shell, vgg), *overriding(f"{student}.student={network}")]
    answer = shell("eval", f"{name}.yaml", "-q", *options)
    assert answer.code == 0, answer.err
    out, one_step = Path("runs") / name, student + ONE_STEP
    made = {path.parent.name for path in out.glob(f"*/{artifact.MANIFEST}")}
    assert made == {"pairs", student, f"{student}-pairs", one_step, "eval"}

    assert [(line["step"], line["beta"]) for line in log_of(out / student)] == [(1, 1.0), (2, 0.5), (3, 0.0)]
    log = log_of(out / one_step)
    assert [line["step"] for line in log] == [1, 2]
    assert all(line["one_step"] > 0 and line["two_step"] > 0 and line["grad_norm"] > 0 for line in log)

    teacher, flow, card = (
        artifact.read_header(path)
        for path in (
            Path(f"{PUBLISHED[name][0]}.safetensors"),
            *(out / stage / "model.safetensors" for stage in (student, one_step)),
        )
    )
    published = "3m" in network
    assert flow["architecture"] == ("ncsnpp" if published else teacher["architecture"])
    assert (flow["convention"] == teacher["convention"]) is not published
    assert flow["arguments"] != teacher["arguments"]
    assert (flow["shape"], flow["classes"]) == (teacher["shape"], teacher["classes"])
    for key in ("architecture", "arguments", "convention", "shape", "classes"):
        assert card[key] == flow[key], key
    assert (flow["nfe"], card["nfe"]) == (None, 1)
    assert "-max-16" in card["figures"]["perceptual_distance"]

    own = PairStore.open(out / f"{student}-pairs")
    assert own.spec.origin["model"] == artifact.sha256(out / student / "model.safetensors")
    assert own.spec.origin["solver"] == "rk45" and own.column("nfe").min() > 6
    assert set(artifact.Manifest.read(out / one_step).inputs) == {
        student,
        f"{student}-pairs",
        "vgg.safetensors",
    }
    rows = json.loads((out / "eval" / "eval.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"teacher", student, one_step}


def test_instaflow_runs_on_a_small_pipeline(shell: Shell) -> None:
    """Guidance and prompts are in the pairs; those of the flow are its own, of fresh noises."""
    make(Path("sd"), "UNet2DConditionModel")
    Path("sd/embeddings.safetensors").rename("prompts.safetensors")
    assert shell("recipes", "copy", "instaflow", ".").code == 0
    changes = ["teacher.name=diffusers:sd", "teacher.probe=false", "teacher.pixels=[64, 64]"]
    for pairs in ("pairs", "straight"):
        changes += [f"{pairs}.{change}" for change in (*SMALL["pairs"].split(), "dtype=float32")]
    for training in ("reflow", "distill"):
        changes += [f"{training}.{change}" for change in (*SMALL["distill"].split(), "precision=fp32")]
    answer = shell("run", "instaflow.yaml", "-q", *overriding(*changes))
    assert answer.code == 0, answer.err
    out = Path("runs/instaflow")
    pairs, straight = PairStore.open(out / "pairs"), PairStore.open(out / "straight")
    guidance = pairs.spec.origin["guidance"]
    assert isinstance(guidance, Mapping) and guidance["scale"] == 5.0
    assert straight.spec.origin["guidance"] is None
    eps, x0, labels = straight.batch(range(len(straight)))
    assert labels is not None and set(labels.tolist()) == {0, 1}
    assert not torch.equal(pairs.batch(range(len(pairs)))[0], eps)  # fresh noises

    flow = teachers.open_model(str(out / "reflow"))
    assert (flow.card.guidance, flow.card.nfe, flow.card.classes) == (None, None, 2)

    def solved(labels: torch.Tensor) -> torch.Tensor:
        return integrate(flow.field, eps, uniform(2), SOLVERS["heun"], labels)

    torch.testing.assert_close(solved(labels), x0, rtol=1e-4, atol=1e-4)
    assert (solved(1 - labels) - x0).flatten(1).abs().amax(1).min() > 1e-3  # prompts tell

    student = teachers.open_model(str(out / "distill"))
    assert (student.card.nfe, student.card.classes, student.card.guidance) == (1, 2, None)
    assert student.card.convention == flow.card.convention
    before, after = flow.network.state_dict(), student.network.state_dict()
    moved = [float((after[key] - before[key]).abs().max()) for key in before if "conditions" not in key]
    assert 0 < max(moved) < 1e-4
    table = "network.conditions.prompt_embeds"
    assert torch.equal(after[table], before[table]) and len(before[table]) == 3  # with the null prompt
    answer = shell("sample", out / "distill" / "model.safetensors", "--count", 2, "--out", "samples")
    assert answer.code == 0, answer.err
