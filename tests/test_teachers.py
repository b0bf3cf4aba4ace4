"""What a reference to a teacher opens, with which options, and what identifies it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pipelines import TINY, make, package, randomised

from flowdistill import pairstore, pictures, randomness, teachers
from flowdistill.cli import execute
from flowdistill.errors import ArtifactError, MissingInput, UsageError
from flowdistill.guidance import Guidance
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.teachers.cards import Latent
from flowdistill.teachers.latents import Decoder

SIT = Path(__file__).parent / "fixtures" / "teachers" / "sit.safetensors"


def point(count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randomness.noise(1, range(count), (1, 8, 8)), torch.full((count,), 0.6), torch.arange(count)


def test_guidance_is_part_of_the_field_and_of_its_identity() -> None:
    plain = teachers.open_model(str(SIT))
    reference = {"name": str(SIT), "guidance": {"scale": 2.0, "interval": [0.5, 1.0]}}
    guided = teachers.open_model(reference)
    x, t, labels = point()
    conditional, null = plain.field(x, t, labels), plain.field(x, t, None)
    torch.testing.assert_close(guided.field(x, t, labels), null + 2 * (conditional - null))
    torch.testing.assert_close(guided.field(x, t - 0.2, labels), plain.field(x, t - 0.2, labels))
    torch.testing.assert_close(guided.field(x, t, None), null)
    assert guided.digest == teachers.identify(reference) != plain.digest == teachers.identify(str(SIT))


def test_guidance_of_the_card_can_be_taken_back(tmp_path: Path) -> None:
    model = teachers.load(SIT)
    card = model.card.model_copy(update={"guidance": Guidance(scale=3.0)})
    teachers.Model(card, model.network, "").write(tmp_path / "guided.safetensors")
    x, t, labels = point()
    reference = {"name": str(tmp_path / "guided.safetensors"), "guidance": {"scale": 1.0}}
    guided = teachers.open_model(str(tmp_path / "guided.safetensors"))
    torch.testing.assert_close(teachers.open_model(reference).field(x, t, labels), model.field(x, t, labels))
    assert not torch.allclose(guided.field(x, t, labels), model.field(x, t, labels))


def test_a_class_may_stand_for_none() -> None:
    model = teachers.load(SIT)
    card = model.card.model_copy(update={"guidance": Guidance(scale=2.0), "null_label": 7})
    x, t, labels = point()
    seventh = model.field(x, t, torch.full((4,), 7))
    expected = seventh + 2 * (model.field(x, t, labels) - seventh)
    found = teachers.Model(card, model.network, "").field(x, t, labels)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidence": {"scale": 2.0}}, "did you mean 'guidance'"),
        ({"guidance": {"scale": -1.0}}, "guidance.scale"),
        ({"guidance": {"scale": "high"}}, "guidance.scale"),
        ({"probe": "no"}, "probe"),
        ({"prompts": "x.safetensors"}, "unknown option"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    for act in (teachers.open_model, teachers.identify):
        with pytest.raises(UsageError, match=message):
            act({"name": str(SIT), **options})


def test_guidance_that_a_model_cannot_have_is_refused() -> None:
    for name, guidance, message in (
        (str(SIT), {"scale": 2.0, "channels": 3}, "channels is 3"),
        (
            str(SIT.with_name("ddpm.safetensors")),
            {"scale": 2.0, "rescale": {"name": "clip"}},
            "predict velocity",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            teachers.open_model({"name": name, "guidance": guidance})


def test_only_foreign_models_have_to_prove_themselves() -> None:
    assert teachers.open_model(str(SIT)).probe
    assert not teachers.open_model({"name": str(SIT), "probe": False}).probe
    assert not teachers.open_model("builtin:digits").probe
    assert not teachers.open_model("analytic:ring").probe
    assert teachers.identify({"name": str(SIT), "probe": False}) == teachers.identify(str(SIT))


def test_a_model_file_is_written_and_read_under_its_makers_names(tmp_path: Path) -> None:
    model = teachers.load(SIT)
    model.write(tmp_path / "again.safetensors")
    again = teachers.load(tmp_path / "again.safetensors")
    assert "blocks.0.attn.qkv.weight" in again.weights.state_dict()
    x, t, labels = point()
    torch.testing.assert_close(again.field(x, t, labels), model.field(x, t, labels), rtol=0, atol=0)
    card = model.card.model_copy(update={"arguments": {**model.card.arguments, "depth": 5}})
    teachers.Model(card, model.network, "").write(tmp_path / "odd.safetensors")
    with pytest.raises(ArtifactError, match=r"blocks\.4.*not there"):
        teachers.load(tmp_path / "odd.safetensors")


def test_pictures_of_scaled_data_are_brought_back_to_pixels() -> None:
    model = teachers.load(SIT)
    x0 = torch.rand(2, 1, 8, 8)
    assert model.pixels(x0) is x0

    def told(latent: Latent) -> teachers.Model:
        return teachers.Model(model.card.model_copy(update={"latent": latent}), model.network, "")

    scaled = told(Latent(scale=(0.5,), shift=(-1.0,))).pixels(x0)
    assert scaled is not None
    torch.testing.assert_close(scaled, 2 * x0 - 1)
    assert told(Latent(vae="elsewhere")).pixels(x0) is None


# --- diffusers ----------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "sd3"
    make(folder, "SD3Transformer2DModel")
    return folder


def test_a_pipeline_is_a_teacher(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs by the recipe; labels are rows of the prompts, which are found beside the recipe."""
    teacher = {
        "name": "diffusers:sd3",
        "prompts": "sd3/embeddings.safetensors",
        "pixels": TINY["SD3Transformer2DModel"]["pixels"],
        "guidance": {"scale": 3.0},
        "probe": False,
    }
    recipe = {"teacher": teacher, "stages": [{"pairs": {"count": 6, "solver": "euler", "steps": 3}}]}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert execute(["run", "../recipe.yaml", "-q", "--out", "runs"]) == 0
    store = pairstore.PairStore.open(Path("runs/pairs"))
    eps, x0, labels = store.batch(torch.arange(6))
    assert labels is not None and set(labels.tolist()) <= {0, 1}
    prompts = str(pipeline / "embeddings.safetensors")
    opened = teachers.open_model({**teacher, "name": f"diffusers:{pipeline}", "prompts": prompts})
    expected = integrate(opened.field, eps, uniform(3), SOLVERS["euler"], labels)
    torch.testing.assert_close(x0, expected, atol=2e-2, rtol=2e-2)  # stored as float16
    assert store.spec.origin["model"] == opened.digest


def test_pairs_of_latents_are_shown_as_pictures(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(TINY["SD3Transformer2DModel"]["autoencoder"])
    randomised(getattr(package(), config.pop("_class_name"))(**config)).save_pretrained(pipeline / "vae")
    decoder = Decoder(pipeline)
    size = [side * decoder.space.factor for side in TINY["SD3Transformer2DModel"]["shape"][-2:]]
    prompts = "sd3/embeddings.safetensors"
    teacher = {"name": "diffusers:sd3", "prompts": prompts, "pixels": size, "probe": False}
    stage = {"pairs": {"count": 3, "solver": "euler", "steps": 1, "check": 0, "dtype": "float32"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"teacher": teacher, "stages": [stage]}))
    monkeypatch.chdir(tmp_path)
    assert execute(["run", "recipe.yaml", "-q", "--out", "runs"]) == 0
    assert execute(["inspect", "runs/pairs", "--grid", "grid.png"]) == 0
    x0 = pairstore.PairStore.open(Path("runs/pairs")).batch(range(3))[1]
    assert Path("grid.png").read_bytes() == pictures.grid(decoder(x0), 8)


def test_a_pipeline_of_random_weights_is_refused_by_the_probe(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has options is probed through its recipe."""
    assert execute(["probe", f"diffusers:{pipeline}"]) == 3
    assert "prompts" in capsys.readouterr().err
    teacher = {
        "name": "diffusers:sd3",
        "prompts": "sd3/embeddings.safetensors",
        "pixels": TINY["SD3Transformer2DModel"]["pixels"],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps({"teacher": teacher, "stages": [{"pairs": {}}]}))
    assert execute(["probe", str(tmp_path / "recipe.yaml"), "--strict"]) == 4
    assert len(capsys.readouterr().err.splitlines()) <= 3


def test_a_missing_pipeline_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingInput, match="no such folder"):
        teachers.identify("diffusers:not/a/pipeline")


def test_unconditional_pipelines_draw_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "ddpm"
    make(folder, "UNet2DModel")
    out = tmp_path / "samples"
    code = execute(["sample", f"diffusers:{folder}", "--nfe", "2", "--count", "2", "--out", str(out), "-q"])
    assert code == 0
    drawn = (out / "grid.png").exists()
    assert drawn is (TINY["UNet2DModel"]["config"]["in_channels"] in (1, 3))
    if drawn:
        Image.open(out / "grid.png").verify()
