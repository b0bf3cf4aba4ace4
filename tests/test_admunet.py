"""The U-Net of guided diffusion against its originals: outputs, gradients, names and sizes.

`adm.safetensors` holds what the classes of the torchcfm and LFM repositories gave for tiny networks with the
weights and inputs of `hashed`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hashed import fill, numbers
from safetensors import safe_open
from torch import Tensor

from flowdistill.errors import ArtifactError
from flowdistill.networks import build
from flowdistill.networks.admunet import PRESETS, ADMUNet

with safe_open(Path(__file__).parent / "fixtures" / "adm" / "adm.safetensors", "pt") as file:
    TRUTH: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    CASES, SIZES = (json.loads(file.metadata()[part]) for part in ("cases", "sizes"))
EACH = pytest.mark.parametrize("name", CASES)


def _case(name: str, **changes: Any) -> tuple[ADMUNet, Tensor, Tensor, Tensor | None]:
    arguments = CASES[name]["arguments"]
    network = ADMUNet(**arguments | changes).eval()
    fill(network.named_parameters())
    side, labels = arguments["image_size"], CASES[name]["labels"]
    return (
        network,
        2.0 * numbers(f"{name}.x", 3, arguments["in_channels"], side, side),
        torch.tensor(CASES[name]["time"]),
        None if labels is None else torch.tensor(labels),
    )


def _keys_digest(network: ADMUNet) -> str:
    keys = [(name, list(weights.shape)) for name, weights in network.state_dict().items()]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


@EACH
def test_output_and_gradients_are_the_originals(name: str) -> None:
    network, x, time, labels = _case(name)
    y = network(x.requires_grad_(), time, labels)
    torch.testing.assert_close(y, TRUTH[f"{name}.y"], atol=2e-5, rtol=2e-5)
    (y * numbers(f"{name}.cotangent", *x.shape)).sum().backward()
    gradients = {key: weights.grad for key, weights in network.named_parameters()} | {"x": x.grad}
    norms = torch.stack([weights.grad.norm() for weights in network.parameters()])
    # The largest norm is 250; those of the keys' biases are 0 but for rounding.
    torch.testing.assert_close(norms, TRUTH[f"{name}.gradient_norms"], atol=2e-5, rtol=2e-5)
    for key, gradient in gradients.items():
        if f"{name}.gradient.{key}" in TRUTH:
            # Convolutions add in an order of the processor's choice; between two of them it made 3.1e-5.
            torch.testing.assert_close(gradient, TRUTH[f"{name}.gradient.{key}"], atol=1e-4, rtol=2e-5)


@EACH
def test_names_are_the_originals(name: str) -> None:
    assert _keys_digest(_case(name)[0]) == CASES[name]["keys"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cfm-cifar10", 35_746_307),
        ("lfm-celeb256-adm", 153_099_524),
        ("lfm-celeb512-adm", 352_160_516),
        ("lfm-church-adm", 356_065_028),
    ],
)
def test_published_networks(name: str, count: int) -> None:
    json.dumps(PRESETS[name])
    with torch.device("meta"):
        network = ADMUNet(**PRESETS[name])
    assert sum(weights.numel() for weights in network.parameters()) == count == SIZES[name]["parameters"]
    assert _keys_digest(network) == SIZES[name]["keys"]
    assert set(SIZES) == set(PRESETS)


@torch.no_grad()
def test_no_label_is_a_zero_embedding_or_the_null_label() -> None:
    network, x, time, labels = _case("guided")
    nothing = network(x, time)
    network.label_emb.weight[2] = 0.0
    torch.testing.assert_close(nothing, network(x, time, torch.tensor([2, 2, 2])))
    network, x, time, labels = _case("guided", null_label=4)
    assert torch.equal(network(x, time), network(x, time, torch.tensor([4, 4, 4])))
    torch.testing.assert_close(network(x, time, labels), TRUTH["guided.y"], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_labels_without_classes_are_ignored_and_layout_does_not_matter() -> None:
    network, x, time, _ = _case("torchcfm")
    expected = network(x, time)
    assert torch.equal(network(x, time, torch.tensor([1, 2, 3])), expected)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = network(x.contiguous(memory_format=torch.channels_last), time)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert found.is_contiguous()


@EACH
@torch.no_grad()
def test_low_precision_stays_near(name: str) -> None:
    network, x, time, labels = _case(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, time, labels).float()
    error = (found - TRUTH[f"{name}.y"]).norm() / TRUTH[f"{name}.y"].norm()
    assert error < 0.03


@torch.no_grad()
def test_dropout_only_in_training() -> None:
    network, x, time, _ = _case("torchcfm", dropout=0.5)
    torch.testing.assert_close(network(x, time), TRUTH["torchcfm.y"], atol=2e-5, rtol=2e-5)
    assert not torch.allclose(network.train()(x, time), TRUTH["torchcfm.y"], atol=1e-2)


@torch.no_grad()
def test_a_new_network_is_zero() -> None:
    network = ADMUNet(image_size=8, model_channels=32, channel_mult=[1, 2], num_classes=3)
    assert network(numbers("x", 2, 3, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([0, 2])).abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"image_size": 30}, "image_size 30 must be divisible by 4"),
        ({"channel_mult": []}, "at least one level"),
        ({"model_channels": 40}, "num_groups"),
        ({"num_heads": 3}, "do not divide into num_heads 3"),
        ({"num_head_channels": 0}, "num_head_channels 0"),
        ({"num_head_channels": 48}, "num_head_channels 48"),
        ({"null_label": 0}, "null_label 0 must be one of the 0 classes"),
        ({"null_label": 5, "num_classes": 5}, "one of the 5 classes"),
    ],
)
def test_refusals(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        build("admunet", arguments)
