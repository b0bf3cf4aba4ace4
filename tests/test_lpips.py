"""LPIPS: piq's values on weights made by a rule, the lpips package's, where weights come from, refusals."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from flowdistill import checkpoints, foreign
from flowdistill.errors import ArtifactError, FlowdistillError, MissingInput, UsageError
from flowdistill.evaluation import lpipsdistance, lpipsweights
from flowdistill.evaluation.lpipsdistance import LpipsDistance, Network, lpips_distance
from flowdistill.evaluation.lpipsweights import PUBLISHED, Published
from flowdistill.objectives import Lpips
from flowdistill.teachers import Card
from flowdistill.teachers.cards import Latent

CASE = json.loads((Path(__file__).parent / "fixtures" / "lpips_synthetic_vgg16.json").read_text())
State = dict[str, Tensor]


def card(*shape: int, latent: Latent | None = None) -> Card:
    return Card(architecture="unet", shape=shape, latent=latent)


def shapes_of(net: str) -> dict[str, tuple[int, ...]]:
    """Torchvision's names of the features, `0.weight` and so on."""
    body = Network(Lpips.model_validate({"net": net})).body
    return {name.partition(".")[2]: tuple(value.shape) for name, value in body.state_dict().items()}


def whole(net: str, features: State, heads: list[Tensor]) -> State:
    """The state dict of an LPIPS of the package's, all of it."""
    names = Network(Lpips.model_validate({"net": net})).body.state_dict()
    state = {f"net.{name}": features[name.partition(".")[2]] for name in names}
    for number, head in enumerate(heads):
        state |= {f"lin{number}.model.1.weight": head, f"lins.{number}.model.1.weight": head}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaling = {"shift": 2 * mean - 1, "scale": 2 * std}
    return state | {f"scaling_layer.{name}": each.reshape(1, 3, 1, 1) for name, each in scaling.items()}


def package_heads(net: str) -> list[Tensor]:
    content = lpipsweights._package_heads(net).content
    return [content[f"lin{number}.model.1.weight"].load().clone() for number in range(len(content))]


def drawn(net: str, seed: int = 0) -> State:
    """Features that let about half of everything through."""
    chance = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes_of(net).items():
        scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.05
        found[name] = scale * torch.randn(shape, generator=chance)
    return found


def images(count: int, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=chance).tanh()
    return x + 0.2 * torch.randn(count, *shape, generator=chance), x


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features alone, of the smallest network."""
    path = tmp_path_factory.mktemp("squeeze") / "squeeze.safetensors"
    safetensors.torch.save_file(drawn("squeeze"), path)
    return path


@pytest.fixture
def small(squeeze: Path) -> LpipsDistance:
    settings = Lpips(net="squeeze", pooling="max", resolution="native")
    return lpips_distance(settings, card(3, 32, 32), squeeze)


# What is computed ------------------------------------------------------------------------------------------


def by_rule() -> tuple[State, list[Tensor]]:
    """The fixture's VGG16 and heads, from its `weights_rule`."""
    features = {}
    for index, (name, shape) in enumerate(sorted(shapes_of("vgg").items())):
        numbers = np.random.RandomState(300_000 + index).standard_normal(shape)
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.05
        features[name] = torch.tensor(scale * numbers, dtype=torch.float32)
    heads = []
    for level, channels in enumerate((64, 128, 256, 512, 512)):
        numbers = np.abs(np.random.RandomState(310_000 + level).standard_normal((1, channels, 1, 1)))
        heads.append(torch.tensor(numbers / channels, dtype=torch.float32))
    return features, heads


@pytest.fixture(scope="module")
def rule_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as torchvision and the package would have them, and as one LPIPS."""
    folder = tmp_path_factory.mktemp("rule")
    features, heads = by_rule()
    last = {"classifier.6.weight": torch.zeros(10, 4), "classifier.6.bias": torch.zeros(10)}
    torch.save({f"features.{name}": each for name, each in features.items()} | last, folder / "vgg.pth")
    torch.save({f"lin{n}.model.1.weight": head for n, head in enumerate(heads)}, folder / "heads.pth")
    state = {name: each.clone() for name, each in whole("vgg", features, heads).items()}
    safetensors.torch.save_file(state, folder / "lpips.safetensors")
    return {
        "torchvision": folder / "vgg.pth",
        "heads": folder / "heads.pth",
        "lpips": folder / "lpips.safetensors",
    }


@pytest.mark.parametrize(
    ("pooling", "resolution", "layout"),
    [
        ("average", "native", "torchvision"),
        ("average", 224, "lpips"),
        ("max", "native", "lpips"),
        ("max", 224, "torchvision"),
    ],
)
def test_the_values_of_rf_plus_plus_and_of_the_published_network(
    pooling: Any,
    resolution: Any,
    layout: str,
    rule_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lpipsweights, "_package_heads", lambda _: checkpoints.read(rule_files["heads"]))
    x = np.tanh(np.random.RandomState(1).standard_normal((4, 3, 32, 32)))[:2].astype("float32")
    x_hat = (x + 0.2 * np.random.RandomState(5).standard_normal((2, 3, 32, 32))).astype("float32")
    settings = Lpips(pooling=pooling, resolution=resolution)
    distance = lpips_distance(settings, card(3, 32, 32), rule_files[layout])
    with torch.no_grad():
        found = distance(torch.from_numpy(x_hat), torch.from_numpy(x))
    key = "native32" if resolution == "native" else "up224"
    assert found.tolist() == pytest.approx(CASE[f"replace_pooling={pooling == 'average'}"][key], rel=1e-5)
    sha256 = hashlib.sha256(rule_files[layout].read_bytes()).hexdigest()
    assert distance.label == f"lpips-vgg@{sha256[:8]}-{pooling}-{resolution}"


def package(net: str, state: State) -> Any:
    """The package's own LPIPS with these weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = foreign.load("lpips").LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    made.load_state_dict(state, assign=True)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
@pytest.mark.parametrize("size", [(32, 32), (47, 40)])
def test_value_and_gradient_are_the_packages_own(net: Any, size: tuple[int, int], tmp_path: Path) -> None:
    features = drawn(net)
    torch.save(features, tmp_path / "features.pt")
    settings = Lpips(net=net, pooling="max", resolution="native")
    distance = lpips_distance(settings, card(3, *size), tmp_path / "features.pt")
    theirs = package(net, whole(net, features, package_heads(net))).to(memory_format=torch.channels_last)
    x_hat, x = images(2, 3, *size)
    x_hat, again = x_hat.requires_grad_(), x_hat.detach().clone().requires_grad_()
    found, expected = distance(x_hat, x), theirs(again, x)[:, 0, 0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    weights = torch.tensor([1.0, 3.0])
    (ours,) = torch.autograd.grad((weights * found).sum(), x_hat)
    (gradient,) = torch.autograd.grad((weights * expected).sum(), again)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_gradients_are_slopes_and_reach_the_students_image_alone(small: LpipsDistance) -> None:
    x_hat, x = images(2, 3, 32, 32)
    x_hat.requires_grad_()
    x.requires_grad_()
    small(x_hat, x).sum().backward()
    assert x.grad is None and x_hat.grad is not None
    assert not any(each.requires_grad or each.grad is not None for each in small.network.parameters())
    assert not small.network.training
    # Along the gradient itself; elsewhere the kinks of so many maxima are as large as the slope.
    slope = x_hat.grad.flatten(1).norm(dim=1)
    direction, step = x_hat.grad / slope.reshape(2, 1, 1, 1), 1e-3
    with torch.no_grad():
        change = small(x_hat + step * direction, x) - small(x_hat - step * direction, x)
    torch.testing.assert_close(change / (2 * step), slope, rtol=0.02, atol=0)


def test_parts_of_a_batch_are_compared_in_turn(small: LpipsDistance, monkeypatch: pytest.MonkeyPatch) -> None:
    x_hat, x = images(5, 3, 32, 32)
    x_hat.requires_grad_()
    sizes: list[int] = []
    small.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    whole_batch = small(x_hat, x)
    (expected,) = torch.autograd.grad(whole_batch.square().sum(), x_hat)
    monkeypatch.setattr(lpipsdistance, "_PIXELS_CPU", 2 * 32 * 32)
    found = small(x_hat, x)
    (slopes,) = torch.autograd.grad(found.square().sum(), x_hat)
    with torch.no_grad():
        torch.testing.assert_close(small(x_hat, x), found)
    assert sizes == [5, 2, 2, 1, 2, 2, 1]
    torch.testing.assert_close(found, whole_batch)
    torch.testing.assert_close(slopes, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_equal_and_featureless_images_have_finite_gradients(small: LpipsDistance) -> None:
    x_hat, x = images(2, 3, 32, 32)
    assert small(x, x).tolist() == [0.0, 0.0]
    for head in small.network.body.slice1[0].parameters():
        head.zero_()  # then nothing is seen anywhere
    x_hat.requires_grad_()
    small(x_hat, x).sum().backward()
    assert x_hat.grad is not None and not x_hat.grad.any()


def test_every_maximum_becomes_an_average(squeeze: Path) -> None:
    for net, count in (("vgg", 4), ("alex", 2), ("squeeze", 3)):
        layers = list(Network(Lpips.model_validate({"net": net})).modules())
        assert not any(isinstance(layer, nn.MaxPool2d) for layer in layers)
        assert sum(isinstance(layer, nn.AvgPool2d) for layer in layers) == count
    x_hat, x = images(1, 3, 33, 33)
    by_average = Lpips(net="squeeze", resolution="native")
    distance = lpips_distance(by_average, card(3, 33, 33), squeeze)
    maps = distance.network.body.slice1((x_hat - distance.network.shift) / distance.network.scale)
    # A window that leaves the map averages what is inside.
    assert maps.shape[2:] == (16, 16)
    pooled = distance.network.body.slice2[0](maps)
    torch.testing.assert_close(pooled[..., -1, -1], maps[..., -2:, -2:].mean((2, 3)))


def test_grey_images_count_as_coloured_ones(squeeze: Path) -> None:
    distance = lpips_distance(Lpips(net="squeeze", resolution=40), card(1, 8, 8), squeeze)
    x_hat, x = images(3, 1, 8, 8)
    found = distance(x_hat, x)
    assert found.shape == (3,)
    torch.testing.assert_close(found, distance(x_hat.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1)))


def test_the_body_may_compute_in_bf16(squeeze: Path, small: LpipsDistance) -> None:
    x_hat, x = images(4, 3, 32, 32)
    settings = Lpips(net="squeeze", pooling="max", resolution="native", precision="bf16")
    half = lpips_distance(settings, card(3, 32, 32), squeeze)
    assert half.label == f"{small.label}-bf16"
    found, exact = half(x_hat.requires_grad_(), x), small(x_hat, x)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
    found.sum().backward()
    assert x_hat.grad is not None and x_hat.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # whatever the caller computes in
        assert torch.equal(small(x_hat.detach().bfloat16().float(), x), small(x_hat.detach().bfloat16(), x))
        assert torch.equal(small(x_hat, x), exact)


# Where weights come from -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("layout", ["features", "torchvision", "lpips", "without dropout", "half"])
def test_layouts_of_weights(layout: str, ending: str, small: LpipsDistance, tmp_path: Path) -> None:
    features = drawn("squeeze")
    state = dict(features)
    if layout == "torchvision":
        state = {f"features.{name}": each for name, each in features.items()}
        state |= {"classifier.1.weight": torch.zeros(10, 512, 1, 1), "classifier.1.bias": torch.zeros(10)}
    elif layout == "half":
        state = {name: each.bfloat16() for name, each in features.items()}
    elif layout != "features":
        state = whole("squeeze", features, package_heads("squeeze"))
    if layout == "without dropout":
        state = {
            name.replace("model.1", "model.0"): each for name, each in state.items() if "lins." not in name
        }
    path = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file({name: each.clone() for name, each in state.items()}, path)
    settings = Lpips(net="squeeze", pooling="max", resolution="native")
    x_hat, x = images(2, 3, 32, 32)
    found = lpips_distance(settings, card(3, 32, 32), path)(x_hat, x)
    torch.testing.assert_close(found, small(x_hat, x), rtol=0.02 if layout == "half" else 1e-6, atol=0)


def test_heads_and_scaling_of_a_whole_lpips_are_its_own(small: LpipsDistance, tmp_path: Path) -> None:
    features, settings = drawn("squeeze"), Lpips(net="squeeze", pooling="max", resolution="native")
    heads = [2 * head for head in package_heads("squeeze")]
    state = whole("squeeze", features, heads)
    torch.save(state, tmp_path / "double.pth")
    torch.save(state | {"scaling_layer.scale": torch.ones(1, 3, 1, 1)}, tmp_path / "scaled.pth")
    x_hat, x = images(2, 3, 32, 32)
    double = lpips_distance(settings, card(3, 32, 32), tmp_path / "double.pth")(x_hat, x)
    torch.testing.assert_close(double, 2 * small(x_hat, x))
    scaled = lpips_distance(settings, card(3, 32, 32), tmp_path / "scaled.pth")(x_hat, x)
    assert not torch.allclose(scaled, double, rtol=0.01)


@pytest.mark.parametrize("net", list(PUBLISHED))
def test_missing_weights_are_one_message(net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "my cache"))
    with pytest.raises(MissingInput) as caught:
        lpips_distance(Lpips(net=net), card(3, 32, 32))
    first, command, last = str(caught.value).split("\n")
    file = PUBLISHED[net].file
    path = tmp_path / "my cache" / "hub" / "checkpoints" / file
    assert first.startswith(f"{path}: no such file; LPIPS with net: {net} ")
    assert f"({PUBLISHED[net].size}, SHA-256 {file[-12:-4]}…)" in first
    url = f"https://download.pytorch.org/models/{file}"
    assert command == f"get them: curl -L --create-dirs -o '{path}' {url}"
    assert "weights: download" in last and "name a file" in last


def test_the_cache_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, value in (("", ""), ("XDG_CACHE_HOME", "~/caches"), ("TORCH_HOME", "~/torch")):
        if variable:
            monkeypatch.setenv(variable, value)
        assert lpipsweights.cache() == Path(torch.hub.get_dir()) / "checkpoints"


def test_a_file_in_the_cache_must_be_what_its_name_says(
    squeeze: Path, small: LpipsDistance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    data, settings = squeeze.read_bytes(), Lpips(net="squeeze", pooling="max", resolution="native")
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    (place / PUBLISHED["squeeze"].file).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"its name promises b8a52dc0…\ndelete it and get it again: curl"):
        lpips_distance(settings, card(3, 32, 32))
    sha256 = hashlib.sha256(data).hexdigest()
    known = Published(f"squeezenet1_1-{sha256[:8]}.pth", "4.7 MiB")
    monkeypatch.setattr(lpipsweights, "PUBLISHED", {"squeeze": known})
    (place / known.file).write_bytes(data)
    assert lpips_distance(settings, card(3, 32, 32)).label == small.label


# Refusals --------------------------------------------------------------------------------------------------


def spoiled(change: Mapping[str, Tensor | None]) -> State:
    """Features of which some tensors are others, more, or (None) left out."""
    state: dict[str, Tensor | None] = {**drawn("squeeze"), **change}
    return {name: each for name, each in state.items() if each is not None}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (spoiled({"3.squeeze.bias": None}), "tensor '3.squeeze.bias' of net: squeeze is missing"),
        (
            spoiled({"0.weight": torch.zeros(64, 3, 11, 11)}),
            "tensor '0.weight' is float32 [64, 3, 11, 11], expected [64, 3, 3, 3] for net: squeeze",
        ),
        (spoiled({"0.bias": torch.zeros(64, dtype=torch.int64)}), "tensor '0.bias' is int64 [64], expected"),
        (spoiled({"0.bias": torch.full((64,), torch.nan)}), "tensor '0.bias' holds values that are not fin"),
        (spoiled({"13.weight": torch.zeros(1)}), "tensor '13.weight' does not belong to net: squeeze"),
        (spoiled({"classifier.1.bias": torch.zeros(9)}), "tensor 'classifier.1.bias' does not belong"),
        (
            {"net.slice1.0.weight": torch.zeros(64, 3, 3, 3)},
            "tensor 'net.slice1.0.bias' of net: squeeze is",
        ),
        ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, "tensor 'features.0.bias' of net: squeeze is"),
        ({"model": drawn("squeeze")}, "holds no state dict; expected squeezenet1_1-b8a52dc0.pth of torchvis"),
        ([torch.zeros(2)], "holds no state dict"),
        ({}, "tensor '0.weight' of net: squeeze is missing"),
    ],
)
def test_other_weights_are_refused(content: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ArtifactError) as caught:
        lpips_distance(Lpips(net="squeeze"), card(3, 32, 32), path)
    assert str(caught.value).startswith(f"{path}: {words}")


def test_an_lpips_needs_all_of_its_heads(tmp_path: Path) -> None:
    state = whole("squeeze", drawn("squeeze"), package_heads("squeeze"))
    del state["lin6.model.1.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ArtifactError, match=r"tensor 'lin6.model.1.weight' of net: squeeze is missing"):
        lpips_distance(Lpips(net="squeeze"), card(3, 32, 32), tmp_path / "weights.pth")


def test_hostile_and_broken_files_are_refused(
    squeeze: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("zip: cut in half", "web page", "LFS pointer", "stride 0 bomb"):
        Path("weights.pth").write_bytes(hostile.corpus()[name][0])
        with pytest.raises(ArtifactError, match="weights.pth"):
            lpips_distance(Lpips(net="squeeze"), card(3, 32, 32), Path("weights.pth"))
    for data, _ in hostile._that_execute().values():
        Path("weights.pth").write_bytes(data)
        with pytest.raises(FlowdistillError, match="weights.pth"):
            lpips_distance(Lpips(net="squeeze"), card(3, 32, 32), Path("weights.pth"))
    assert not Path("canary").exists()
    Path("weights.pth").write_bytes(squeeze.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="weights.pth"):
        lpips_distance(Lpips(net="squeeze"), card(3, 32, 32), Path("weights.pth"))
    with pytest.raises(MissingInput, match=r"nowhere.pth: no such file"):
        lpips_distance(Lpips(net="squeeze"), card(3, 32, 32), Path("nowhere.pth"))


@pytest.mark.parametrize("shape", [(2,), (3, 8), (4, 32, 32), (2, 32, 32), (3, 4, 32, 32)])
def test_data_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        lpips_distance(Lpips(), card(*shape))
    assert f"compares images [1 or 3, H, W], found data of shape {list(shape)}\n" in str(caught.value)


def test_latents_are_refused() -> None:
    with pytest.raises(UsageError, match=r"found latents of shape \[3, 64, 64\]"):
        lpips_distance(Lpips(), card(3, 64, 64, latent=Latent()))


@pytest.mark.parametrize(("net", "least"), [("vgg", 16), ("alex", 32), ("squeeze", 24)])
def test_the_least_size_is_enough_and_less_is_refused(net: Any, least: int, tmp_path: Path) -> None:
    native = Lpips(net=net, resolution="native")
    with pytest.raises(UsageError, match=f"net: {net} needs images of {least} pixels or more, found shape"):
        lpips_distance(native, card(3, 64, least - 1))
    torch.save(drawn(net), tmp_path / "weights.pth")
    for settings, size in ((native, least), (Lpips(net=net, resolution=least), 4)):
        distance = lpips_distance(settings, card(3, size, size), tmp_path / "weights.pth")
        assert distance(*images(1, 3, size, size)).item() > 0
