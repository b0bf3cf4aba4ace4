"""Extractors of torch-fidelity on random weights, and the user's own references: nothing is downloaded."""

from __future__ import annotations

import io
import json
import os
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_evaluate import QUICK, evaluate, save, unet
from torch import Tensor, nn

from flowdistill import artifact, foreign
from flowdistill.cli import execute
from flowdistill.data import SHAPES
from flowdistill.errors import ArtifactError, FlowdistillError, MissingInput, UsageError
from flowdistill.evaluation import features, lpipsweights, metrics, targets
from flowdistill.evaluation.features import Asked
from flowdistill.pictures import grid
from flowdistill.stages.eval import Evaluate

INCEPTION = "torch_fidelity.feature_extractor_inceptionv3"
SMALL: dict[str, Any] = {"nfe": [1], "reference": {"steps": 1, "samples": 8}, "straightness": 0}


def images(count: int, seed: int = 0) -> Tensor:
    return SHAPES.batch(torch.arange(count), seed)[0]


def asked(path: Path | None) -> Asked:
    return Asked("inception", "inception-v3-compat", path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity publishes it, of random weights."""
    module: Any = foreign.load(INCEPTION)
    states: list[Any] = []
    before = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: None
    blank = type(
        "Blank",
        (module.FeatureExtractorInceptionV3,),
        {"load_state_dict": lambda self, _: states.append(self.state_dict())},
    )
    torch.manual_seed(0)
    try:
        blank("inception-v3-compat", ["2048"])
    finally:
        module.load_state_dict_from_url = before
    path: Path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(dict(states[0]), path)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = lpipsweights.cache()
    folder.mkdir(parents=True)
    return folder


# --- Inception --------------------------------------------------------------------------------------


def test_inception_is_torch_fidelitys_network_on_the_pixels_of_a_png(weights: Path) -> None:
    """Bit for bit, whatever the batch; its label is the digest of the weights."""
    label, read = features.reader(asked(weights), "cpu")
    assert label == f"inception-v3-compat@{artifact.sha256(weights)[:8]}"
    module: Any = foreign.load(INCEPTION)
    theirs = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    x = images(3)
    found, classes = read(x)
    assert classes is None and found.shape == (3, 2048) and found.std() > 0
    png = [np.asarray(Image.open(io.BytesIO(grid(image[None], 1))).convert("RGB")) for image in x]
    scale = (png[0].shape[0] - 2 * 2) // 16  # enlarged, with a gap around
    small = np.stack([each[2::scale, 2::scale][:16, :16] for each in png]).transpose(0, 3, 1, 2)
    as_bytes = features.as_bytes(x)
    assert torch.equal(as_bytes, torch.from_numpy(small))
    assert torch.equal(found, theirs(as_bytes)[0])
    assert torch.equal(read(x[1:2])[0], found[1:2])
    grey = read(x[:1, :1])[0]
    assert torch.equal(grey, theirs(as_bytes[:1, :1].expand(-1, 3, -1, -1).contiguous())[0])


def test_inception_in_an_evaluation(tmp_path: Path, weights: Path, hub: Path) -> None:
    model = unet(tmp_path / "net.safetensors", data="shapes")
    inputs = {"features.inception.weights": str(weights)}
    settings = {"samples": 4, "features": {"inception": {"weights": str(weights)}}, **SMALL}
    found = evaluate(tmp_path / "eval", {"net": model}, inputs=inputs, **settings)
    row, label = found.rows["net-1"], f"inception-v3-compat@{artifact.sha256(weights)[:8]}"
    assert row["skipped"]["fid"] == "4 samples are too few for 2048 features"
    for kind in ("kid@4", "precision_inception@4", "recall_inception@4"):
        assert row["metrics"][kind]["extractor"] == label
    assert found.content["preprocessing"] == "native-uint8"
    assert found.content["features"]["inception"]["extractor"] == label
    assert found.content["features"]["inception"]["reference"] == "shapes, 4 real samples"
    assert found.content["data"]["skipped"]["kid"] == "these samples are the reference"
    influence = found.tensors["net-1.kid.influence"]
    assert influence.shape == (4,) and influence.any()


# --- where weights come from ------------------------------------------------------------------------


def test_weights_that_are_not_there_are_skipped_with_the_way_to_get_them(tmp_path: Path, hub: Path) -> None:
    model = unet(tmp_path / "net.safetensors", data="shapes")
    extractors = {"inception": {}, "clip": {}, "dinov2": {"network": "dinov2-vit-s-14"}}
    found = evaluate(tmp_path / "eval", {"net": model}, features=extractors, samples=6, **SMALL)
    skipped = found.rows["net-1"]["skipped"]
    assert skipped["kid"] == skipped["recall_inception"] == "as fid"
    assert f"curl -L --create-dirs -o {hub}/weights-inception-2015-12-05-6726825d.pth" in skipped["fid"]
    assert "inception: {weights: download}" in skipped["fid"]
    assert "clip-vit-b-32-40d365" in skipped["fd_clip"] and "dinov2_vits14" in skipped["fd_dinov2"]
    assert not any(name.startswith(("fid", "kid", "fd_")) for name in found.rows["net-1"]["metrics"])
    assert found.content["preprocessing"] is None


def test_a_cached_file_must_be_what_its_name_says(hub: Path, weights: Path) -> None:
    (hub / "pt_inception-2015-12-05-6726825d.pth").symlink_to(weights)
    with pytest.raises(
        ArtifactError, match=r"its SHA-256 is .{8}…, that of inception-v3-compat is 6726825d…"
    ):
        features.reader(asked(None), "cpu")


def test_a_download_that_fails_says_so(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    stage = Evaluate(name="eval", features={"inception": {"weights": "download"}})  # type: ignore[arg-type]
    with pytest.raises(MissingInput, match="cannot be downloaded: .*Name or service not known"):
        stage.preflight({"features.inception.weights": "download"})
    stage.preflight({})  # nothing is fetched that nobody asked for
    fetched: list[str] = []

    def fetch(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        fetched.append(url)
        Path(path).write_bytes(b"")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        stage.preflight({"features.inception.weights": "download"})
    assert len(fetched) == 1 and fetched[0].endswith("weights-inception-2015-12-05-6726825d.pth")


class Hostile:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("what", ["hostile", "other", "text", "nan", "list", "cut"])
def test_files_that_are_no_weights_are_refused_and_never_run(
    what: str, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    contents: dict[str, Any] = {
        "hostile": {"a": Hostile()},
        "other": {"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)},
        "nan": {"fc.bias": torch.full((4,), torch.nan)},
        "list": [torch.zeros(2)],
    }
    if what in contents:
        torch.save(contents[what], path)
    else:
        path.write_bytes(b"<html>" if what == "text" else weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="weights.pth") as error:
        features.reader(asked(path), "cpu")
    assert error.value.exit_code == 4 and len(str(error.value).splitlines()) <= 3
    assert not (tmp_path / "pwned").exists()


# --- DINOv2 and CLIP --------------------------------------------------------------------------------


def test_dinov2_is_the_code_in_the_cache_with_the_weights_of_a_file(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the repository: its entry makes the mean colour times a matrix."""
    state = {"weight": torch.randn(5, 3)}
    save_file(state, tmp_path / "dino.safetensors")
    dino = Asked("dinov2", "dinov2-vit-s-14", tmp_path / "dino.safetensors")
    with pytest.raises(MissingInput, match="nothing of facebookresearch/dinov2 is downloaded by itself"):
        features.reader(dino, "cpu")
    code = hub.parent / "facebookresearch_dinov2_main"
    code.mkdir()
    (code / "hubconf.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.mean((2, 3)))\n"
        "def dinov2_vits14(pretrained=True):\n"
        "    assert not pretrained\n"
        "    return Net(3, 5, bias=False)\n"
    )
    label, read = features.reader(dino, "cpu")
    assert label.startswith("dinov2-vit-s-14@")
    x = torch.zeros(2, 3, 8, 8)
    expected = (128 - 255 * torch.tensor([0.485, 0.456, 0.406])) / (255 * torch.tensor([0.229, 0.224, 0.225]))
    torch.testing.assert_close(read(x)[0], (expected @ state["weight"].T).expand(2, -1), rtol=1e-4, atol=1e-4)
    save_file({"weight": torch.randn(4, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="holds no weights of dinov2-vit-s-14"):
        features.reader(Asked("dinov2", dino.name, tmp_path / "other.safetensors"), "cpu")


def test_clip_reads_plain_tensors(tmp_path: Path) -> None:
    """A small transformer under OpenAI's names; an archive of TorchScript has to be the published one."""
    module: Any = foreign.load("torch_fidelity.feature_extractor_clip")
    torch.manual_seed(0)
    network = module.CLIPVisual(6, 32, 1, 64, 16)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file({**state, "text_projection": torch.zeros(4, 6)}, tmp_path / "clip.safetensors")
    clip = Asked("clip", "clip-vit-b-32", tmp_path / "clip.safetensors")
    label, read = features.reader(clip, "cpu")
    assert label == f"clip-vit-b-32@{artifact.sha256(clip.weights or Path())[:8]}"
    found = read(images(3))[0]
    assert found.shape == (3, 6) and torch.allclose(read(images(1))[0], found[:1], atol=1e-5)
    scripted = torch.jit.script(nn.Linear(2, 2))  # type: ignore[no-untyped-call]
    scripted.save(str(tmp_path / "clip.pt"))
    with pytest.raises(ArtifactError, match="clip.pt"):
        features.reader(Asked("clip", clip.name, tmp_path / "clip.pt"), "cpu")


# --- references of the user's own -------------------------------------------------------------------


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Six features in the place of Inception's 2048; returns how many images were read each time."""
    read_so_far: list[int] = []

    def read(x: Tensor) -> tuple[Tensor, None]:
        read_so_far.append(len(x))
        pixels = features.as_bytes(x).float() / 255
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1), None

    monkeypatch.setattr(features, "reader", lambda asked, device: (f"{asked.name}@colours", read))
    return read_so_far


def six(x: Tensor) -> Tensor:
    pixels = features.as_bytes(x).float() / 255
    return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1)


def measured(
    folder: Path, reference: Path, names: Sequence[str] = ("inception",), **settings: Any
) -> Mapping[str, Any]:
    model = unet(folder.parent / "net.safetensors", data="shapes")
    asked_for = {"features": {name: {} for name in names}, "samples": 60, **SMALL, **settings}
    inputs = {"reference_data": str(reference)}
    return evaluate(folder, {"net": model}, inputs=inputs, reference_data=str(reference), **asked_for).content


def write_images(folder: Path, x: Tensor) -> Path:
    folder.mkdir()
    for number, image in enumerate(features.as_bytes(x)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04}.png")
    return folder


@pytest.mark.parametrize("kind", ["folder", "npz", "safetensors"])
def test_a_reference_is_images_or_an_array_of_them(
    kind: str, tmp_path: Path, hub: Path, colours: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(300, seed=5)
    if kind == "folder":
        path = write_images(tmp_path / "images", x)
    elif kind == "npz":
        path = tmp_path / "images.npz"
        np.savez(path, features.as_bytes(x).permute(0, 2, 3, 1).numpy())
    else:
        path = tmp_path / "images.safetensors"
        save_file({"samples": features.as_bytes(x).contiguous()}, path)
    content = measured(tmp_path / "eval", path, batch_size=7)
    reference = metrics.Reference(*metrics.moments(six(x)))
    from flowdistill.randomness import key, noise

    made = six(noise(key(0, "evaluation"), range(60), (3, 16, 16)))
    row, real = content["rows"][0], content["data"]
    expected = reference.estimate(made)
    for name, value in row["metrics"]["fid@60"].items():
        if name in ("value", "low", "high"):
            assert value == pytest.approx(getattr(expected, name), rel=1e-6)
    assert {"kid@60", "precision_inception@60", "recall_inception@300", "kd@60"} <= row["metrics"].keys()
    assert {"fid@60", "kid@60", "kd@60"} <= real["metrics"].keys(), "fresh ones are another set"
    assert real["metrics"]["fid@60"]["value"] < 0.1 * row["metrics"]["fid@60"]["value"]
    assert content["features"]["inception"]["reference"] == f"{path.name}, 300 samples"


def test_a_reference_is_read_once_and_again_when_it_changes(
    tmp_path: Path, hub: Path, colours: list[int]
) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, features.as_bytes(images(300, seed=5)).numpy())
    first = measured(tmp_path / "first", path)
    once = sum(colours)
    colours.clear()
    assert measured(tmp_path / "second", path)["rows"] == first["rows"]
    assert sum(colours) == once - 300, "from the cache"
    (kept,) = (tmp_path / "cache" / "flowdistill" / "references").iterdir()
    kept.write_bytes(b"damaged")
    colours.clear()
    assert measured(tmp_path / "third", path)["rows"] == first["rows"]
    assert sum(colours) == once, "a damaged cache is made anew"
    np.savez(path, features.as_bytes(images(300, seed=6)).numpy())
    other = measured(tmp_path / "fourth", path)
    assert other["rows"][0]["metrics"]["fid@60"] != first["rows"][0]["metrics"]["fid@60"]
    assert other["features"]["inception"]["digest"] != first["features"]["inception"]["digest"]


def test_what_is_kept_of_a_folder_goes_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"a")
    before = artifact.fingerprint(folder), targets.content(folder)
    (folder / "0.png").write_bytes(b"b")
    assert artifact.fingerprint(folder) == before[0] and targets.content(folder) != before[1]


def test_published_moments_are_a_reference(tmp_path: Path, hub: Path, colours: list[int]) -> None:
    """What shipped for the data keeps its own; neighbours cannot be looked at."""
    mean, covariance = metrics.moments(six(images(300, seed=5)))
    np.savez(tmp_path / "moments.npz", mu=mean.numpy(), sigma=covariance.numpy())
    np.savez(tmp_path / "images.npz", features.as_bytes(images(300, seed=5)).numpy())
    content = measured(tmp_path / "moments", tmp_path / "moments.npz")
    whole = measured(tmp_path / "images", tmp_path / "images.npz")
    row, other = content["rows"][0], whole["rows"][0]
    assert row["metrics"]["fid@60"]["value"] == pytest.approx(other["metrics"]["fid@60"]["value"], rel=1e-9)
    assert "moments.npz: has moments only; give real samples as `reference_data`" in row["skipped"]["kid"]
    assert "kd@60" in row["metrics"] and "fid@60" in content["data"]["metrics"]
    assert row["metrics"]["kd@60"] != other["metrics"]["kd@60"], "fresh samples here, the images there"


def broken(tmp_path: Path, what: str) -> Path:
    mean, covariance = metrics.moments(six(images(20)))
    arrays = {
        "shape": {"arr_0": np.zeros((4, 3, 8, 8), np.uint8)},
        "other size": {"mu": np.zeros(5), "sigma": np.eye(5)},
        "no matrix": {"mu": mean.numpy(), "sigma": mean.numpy()},
        "nan": {"mu": mean.numpy() * np.nan, "sigma": covariance.numpy()},
        "asymmetric": {"mu": mean.numpy(), "sigma": covariance.numpy() + np.triu(np.ones((6, 6)))},
    }
    path = tmp_path / "reference.npz"
    if what in arrays:
        np.savez(path, **arrays[what])
    elif what == "cut":
        np.savez(path, np.zeros((4, 3, 16, 16), np.uint8))
        path.write_bytes(path.read_bytes()[:-300])
    elif what == "empty":
        path = tmp_path / "nothing"
        path.mkdir()
    else:
        path.write_bytes(b"text")
    return path


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("shape", UsageError, r"has shape \[4, 3, 8, 8\], expected \[n, 3, 16, 16\]"),
        ("other size", UsageError, "moments of 5 features, inception-v3-compat@colours has 6"),
        ("no matrix", ArtifactError, r"expected mu \[D\] and sigma \[D, D\], found \[6\] and \[6\]"),
        ("nan", ArtifactError, "not finite"),
        ("asymmetric", ArtifactError, "sigma is no covariance"),
        ("cut", ArtifactError, "cannot be read"),
        ("text", ArtifactError, "cannot be read"),
        ("empty", MissingInput, "no images"),
    ],
)
def test_references_that_are_of_no_use_are_refused_before_anything_is_made(
    what: str, kind: type[FlowdistillError], message: str, tmp_path: Path, hub: Path, colours: list[int]
) -> None:
    with pytest.raises(kind, match=message) as error:
        measured(tmp_path / "eval", broken(tmp_path, what))
    assert len(str(error.value).splitlines()) <= 2
    assert not [each for each in (tmp_path / "eval").rglob("*") if each.is_file()]


def test_moments_need_an_extractor_that_they_are_of(tmp_path: Path, hub: Path) -> None:
    np.savez(tmp_path / "moments.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(UsageError, match="ask for those, as in `features: {inception: {}}`, or give samples"):
        measured(tmp_path / "eval", tmp_path / "moments.npz", names=())


def test_data_that_cannot_be_drawn_from_need_a_reference(
    tmp_path: Path, hub: Path, colours: list[int]
) -> None:
    arguments = {"shape": [3, 16, 16], "classes": 0, "channels": 4, "multipliers": [1, 1]}
    model = save(tmp_path / "net.safetensors", "unet", arguments, shape=(3, 16, 16), data="celeba")
    settings = {"features": {"inception": {}}, "samples": 20, **SMALL}
    found = evaluate(tmp_path / "without", {"net": model}, **settings)
    assert "give `reference_data`" in found.rows["net-1"]["skipped"]["fid"]
    path = tmp_path / "images.npz"
    np.savez(path, features.as_bytes(images(300, seed=5)).numpy())
    inputs = {"reference_data": str(path)}
    found = evaluate(tmp_path / "with", {"net": model}, inputs=inputs, reference_data=str(path), **settings)
    assert "fid@20" in found.rows["net-1"]["metrics"]
    assert found.content["data"]["metrics"] == {}


# --- the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ("reference_data: shape.npz", 2, "has shape [4, 3, 8, 8], expected [n, 3, 16, 16]"),
        ("reference_data: text.npz", 4, "cannot be read as an array"),
        ("reference_data: nowhere.npz", 2, "'nowhere.npz' does not exist"),
        ("features: {inception: {weights: nowhere.pth}}", 2, "'nowhere.pth' does not exist"),
        ("features: {inception: {weights: text.npz}}", 4, "text.npz"),
        ("features: {inceptoin: {}}", 2, "unknown key, did you mean 'inception'?"),
        ("samples: 0", 2, "expected a number >= 2, found 0"),
    ],
)
def test_mistakes_of_the_recipe_end_in_one_line(
    more: str, code: int, message: str, tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "shape.npz", np.zeros((4, 3, 8, 8), np.uint8))
    (tmp_path / "text.npz").write_bytes(b"text")
    recipe, samples = tmp_path / "recipe.yaml", "" if "samples" in more else "samples: 8\n      "
    recipe.write_text(f"out: out\nstages:\n  - eval:\n      nfe: [1]\n      {samples}{more}\n")
    assert execute(["eval", str(recipe), "-q"]) == code
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) <= 2
    assert not (tmp_path / "out" / "eval").exists()


def test_settings_of_the_recipe_reach_the_stage() -> None:
    stage = Evaluate.model_validate_json(
        json.dumps({"name": "eval", **QUICK, "features": {"clip": {"network": "clip-rn50"}}, "lpips": {}})
    )
    (clip,) = stage._asked({"features.clip.weights": "/a.pt"})
    assert clip == Asked("clip", "clip-rn50", Path("/a.pt"))
    assert stage.lpips is not None and (stage.lpips.net, stage.lpips.pooling) == ("alex", "max")
