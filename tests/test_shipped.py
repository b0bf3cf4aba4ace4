"""What ships with the package: the teachers are what their recipes say, and as good as they must be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flowdistill import artifact, randomness
from flowdistill.data import dataset
from flowdistill.evaluation import extractors, metrics
from flowdistill.recipe import load
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.stages import verbs
from flowdistill.teachers import ASSETS, open_model

RECIPES = Path(__file__).parents[1] / "recipes"
TEACHERS = ("shapes", "digits")


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize(("stage", "suffix"), [("flow", ""), ("classifier", "-classifier")])
def test_a_shipped_model_was_made_by_its_recipe(name: str, stage: str, suffix: str) -> None:
    recipe = load(RECIPES / "teachers" / f"{name}.yaml", verbs())
    header = artifact.read_header(ASSETS / f"{name}{suffix}.safetensors")
    # Keys that came later had their defaults then.
    kept = verbs()["train"].model_validate_json(json.dumps(header["settings"]))
    assert kept.model_dump(mode="json") == recipe.settings_json(stage)
    assert header["data"] == name
    assert tuple(header["shape"]) == dataset(name).shape


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_files_are_small_and_whole(path: Path) -> None:
    assert path.stat().st_size < 6_000_000
    tensors, header = artifact.load_tensors(path)
    assert all(value.float().isfinite().all() for value in tensors.values())
    assert header


@pytest.mark.parametrize(("name", "nearer"), [("shapes", 8), ("digits", 4)])
def test_many_steps_classify_as_well_as_real_images(name: str, nearer: int) -> None:
    """Within 3 points of real ones, on 400 samples of 16 steps, and far nearer to the data than one step."""
    model = open_model(f"builtin:{name}")
    read = extractors.extractor(model.card)
    assert read is not None
    labels = model.labels(11, range(400))
    assert labels is not None
    noise = randomness.noise(11, range(400), model.card.shape)
    parts = zip(noise.split(100), labels.split(100), strict=True)
    x = torch.cat([integrate(model.field, eps, uniform(16), SOLVERS["euler"], y) for eps, y in parts])
    features, classes = read.read(x)
    images, truth = dataset(name).held_out.batch(torch.arange(400), seed=3)
    real_features, real_classes = read.read(images)
    assert classes is not None and real_classes is not None
    real = metrics.accuracy(real_classes, truth).value
    assert metrics.accuracy(classes, labels).value > real - 0.03
    one_step = integrate(model.field, noise[:200], uniform(1), SOLVERS["euler"], labels[:200])
    blurred = read.reference.estimate(read.read(one_step)[0]).value
    assert read.reference.estimate(features).value < blurred / nearer
    assert read.reference.estimate(real_features).value < blurred / nearer


@pytest.mark.parametrize("name", TEACHERS)
def test_a_classifier_tells_unseen_images(name: str) -> None:
    header = artifact.read_header(ASSETS / f"{name}-classifier.safetensors")
    assert header["figures"]["held_out_accuracy"] > 0.97
    assert header["kind"] == "classifier"


def test_weights_in_half_precision_move_samples_by_less_than_a_hundredth() -> None:
    """The shipped weights are float16 exactly; what they were rounded from lies within half a unit."""
    model, unrounded = open_model("builtin:shapes"), open_model("builtin:shapes")
    with torch.no_grad():
        for parameter in unrounded.network.parameters():
            unit = parameter.abs() * 2.0**-11
            parameter += unit * (randomness.uniforms(2, "rounding", 0, parameter.numel()) - 0.5).view_as(
                parameter
            )
    noise, labels = randomness.noise(1, range(8), model.card.shape), model.labels(1, range(8))
    x, y = (integrate(m.field, noise, uniform(8), SOLVERS["euler"], labels) for m in (model, unrounded))
    assert 0 < float((x - y).abs().mean()) < 0.01
