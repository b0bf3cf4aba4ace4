"""LPIPS in recipes: what is refused before anything runs, whose weights, what is written down."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_cli import LOADED
from test_lpips import drawn

from flowdistill import artifact, recipe
from flowdistill.artifact import Manifest
from flowdistill.cli import execute
from flowdistill.errors import RecipeError
from flowdistill.evaluation import lpipsweights
from flowdistill.references import references
from flowdistill.stages import verbs
from flowdistill.stages.reflow import Reflow

RECIPE = """
teacher: builtin:shapes
stages:
  - pairs: {count: 16, solver: euler, steps: 2, batch_size: 16, shard_size: 16, check: 0}
  - reflow:
      steps: 2
      batch_size: 8
      log_every: 1
      loss:
        name: lpips-huber
        distance: {name: lpips, net: squeeze, resolution: 32, weights: nets/squeeze.safetensors}
"""
FILE = Path("in/nets/squeeze.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the recipe ran, from another folder than its own."""
    folder = tmp_path_factory.mktemp("lpips")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        FILE.parent.mkdir(parents=True)
        safetensors.torch.save_file(drawn("squeeze"), FILE)
        Path("in/recipe.yaml").write_text(RECIPE)
        assert execute(["run", "in/recipe.yaml", "-q"]) == 0
        yield folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "work"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_reflow_says_what_it_compared_in(finished: Path) -> None:
    folder, sha256 = finished / "runs" / "recipe" / "reflow", artifact.sha256(finished / FILE)
    label = f"lpips-squeeze@{sha256[:8]}-average-32"
    manifest = artifact.Manifest.read(folder)
    assert manifest.figures["perceptual_distance"] == label
    assert artifact.read_header(folder / "model.safetensors")["figures"] == {"perceptual_distance": label}
    assert manifest.inputs["in/nets/squeeze.safetensors"] == sha256
    assert manifest.settings["loss"]["distance"]["weights"] == "nets/squeeze.safetensors"  # type: ignore
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["perceptual"] > 1e-4 and line["grad_norm"] > 0 for line in lines)


def test_the_classifier_that_ships_is_named_as_well(here: Path) -> None:
    assert execute(["reflow", "in/recipe.yaml", "-q", "-s", "reflow.loss.distance=null", "--fresh"]) == 0
    label = artifact.Manifest.read(Path("runs/recipe/reflow")).figures["perceptual_distance"]
    assert str(label).startswith("shapes-classifier@")


def test_a_loss_without_a_distance_names_none(here: Path) -> None:
    assert execute(["reflow", "in/recipe.yaml", "-q", "-s", "reflow.loss={name: l2}", "--fresh"]) == 0
    assert "perceptual_distance" not in artifact.Manifest.read(Path("runs/recipe/reflow")).figures


def test_other_weights_make_a_stage_stale(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", "in/recipe.yaml", "-q"]) == 0
    safetensors.torch.save_file(drawn("squeeze", 1), FILE)
    assert execute(["run", "in/recipe.yaml", "-q"]) == 2
    assert "input in/nets/squeeze.safetensors: " in said(capsys)


def test_a_share_of_a_batch_is_compared(here: Path) -> None:
    folder = Path("runs/recipe/reflow")
    whole = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert execute(["reflow", "in/recipe.yaml", "-q", "-s", "reflow.loss.share=0.25", "--fresh"]) == 0
    some = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert some[0]["huber"] == whole[0]["huber"]
    assert some[0]["perceptual"] != whole[0]["perceptual"]
    assert 0.1 < some[0]["perceptual"] / whole[0]["perceptual"] < 4


def test_missing_weights_end_a_run_before_it_trains(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("runs/recipe/reflow")
    assert execute(["run", "in/recipe.yaml", "-q", "-s", "reflow.loss.distance={name: lpips}"]) == 3
    found = said(capsys)
    assert "vgg16-397923af.pth: no such file; LPIPS with net: vgg" in found
    assert "curl -L --create-dirs -o" in found and "528 MiB" in found
    assert not Path("runs/recipe/reflow").exists()
    assert (
        execute(["run", "in/recipe.yaml", "-q", "-s", "reflow.loss.distance={name: lpips}", "--out", "new"])
        == 3
    )
    assert not Path("new").exists()  # nor are pairs made before it is noticed


def test_weights_are_fetched_where_the_recipe_says_so(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder in place of the server; the file has to have the SHA-256 that its name promises."""
    distance = "reflow.loss.distance={name: lpips, net: squeeze, resolution: 32, weights: download}"
    command = ["run", "in/recipe.yaml", "-q", "--fresh", "-s", distance]
    monkeypatch.setattr(lpipsweights, "URL", f"{here.as_uri()}/server/")
    assert execute(command) == 3
    assert "squeezenet1_1-b8a52dc0.pth: cannot be downloaded" in said(capsys)
    Path("server").mkdir()
    torch.save({name: value for name, value in drawn("squeeze").items()}, "server/squeeze.pth")
    sha256 = artifact.sha256(Path("server/squeeze.pth"))[:8]
    for promised, code in (("0" * 8, 3), (sha256, 0)):
        Path("server/squeeze.pth").rename(f"server/squeeze-{promised}.pth")
        file = lpipsweights.Published(f"squeeze-{promised}.pth", "1 MiB")
        monkeypatch.setattr(lpipsweights, "PUBLISHED", {"squeeze": file})
        assert execute(command) == code
        assert (lpipsweights.cache() / file.file).exists() == (code == 0)
        Path(f"server/squeeze-{promised}.pth").rename("server/squeeze.pth")
    assert "invalid hash value" in said(capsys)
    assert (
        Manifest.read(Path("runs/recipe/reflow"))
        .figures["perceptual_distance"]
        .startswith(f"lpips-squeeze@{sha256}")
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("reflow.loss.distance.resolution=native", "net: squeeze needs images of 24 pixels or more, found"),
        ("teacher=analytic:ring", "lpips compares images [1 or 3, H, W], found data of shape [2]"),
    ],
)
def test_data_that_cannot_be_compared_end_a_run_before_it_trains(
    change: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = "reflow.network={name: mlp, width: 8}" if "ring" in change else "reflow.network=null"
    assert execute(["run", "in/recipe.yaml", "-q", "--out", "other", "-s", change, "-s", network]) == 2
    assert words in said(capsys)
    assert not Path("other/reflow").exists()


# Recipes ---------------------------------------------------------------------------------------------------


def load(folder: Path, distance: str, loss: str = "perceptual") -> recipe.Recipe[Any]:
    text = f"stages: [pairs: {{}}, reflow: {{steps: 1, loss: {{name: {loss}, distance: {distance}}}}}]"
    (folder / "recipe.yaml").write_text(text)
    return recipe.load(folder / "recipe.yaml", verbs())


def test_weights_are_an_input_only_where_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    assert references(Reflow)["loss.distance.weights"].files
    assert load(tmp_path, "{name: lpips, weights: w.pth}").references["reflow"] == {
        "pairs": "pairs",
        "init": "teacher",
        "loss.distance.weights": str(tmp_path / "w.pth"),
    }
    for distance in ("{name: lpips, weights: null}", "{name: lpips}", "null"):
        assert "loss.distance.weights" not in load(tmp_path, distance).references["reflow"]


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        ("{weights: nowhere.pth}", "reflow.loss.distance.weights: 'nowhere.pth' does not exist (paths start"),
        ("{weights: 5}", "reflow.loss.distance.weights: expected text, found 5"),
        ("lpips", "reflow.loss.distance: expected a mapping, found 'lpips'; write {name: lpips}"),
        ("{name: piq}", "reflow.loss.distance.name: unknown name 'piq' (lpips)"),
        (
            "{net: vgg19}",
            "reflow.loss.distance.net: unknown net 'vgg19', did you mean 'vgg'? (vgg, alex, squ",
        ),
        ("{net: alex, resolution: 16}", "reflow.loss.distance: resolution: alex needs 32 pixels or more, fo"),
        (
            "{resolution: big}",
            "reflow.loss.distance.resolution: expected 'native' or an integer, found 'big'",
        ),
        ("{pooled: max}", "reflow.loss.distance.pooled: unknown key, did you mean 'pooling'?"),
    ],
)
def test_mistakes_are_found_without_a_run(distance: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, distance)
    (problem,) = caught.value.problems
    assert message in str(problem)


def test_only_losses_with_a_perceptual_term_take_a_distance(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"reflow.loss.distance: unknown key"):
        load(tmp_path, "{name: lpips}", "squared-l2")


def test_validation_needs_no_torch(tmp_path: Path) -> None:
    torch.save(drawn("squeeze"), tmp_path / "w.pth")
    load(tmp_path, "{name: lpips, weights: w.pth}")
    command = [sys.executable, "-c", LOADED, "validate", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert not {"torch", "numpy", "lpips", "torchvision"} & set(done.stderr.split())
