"""NCSN++ against its original: outputs, inner features, samples, gradients, names and sizes.

`ncsnpp.safetensors` holds what the class of the RectifiedFlow repository gave for tiny networks with the
weights and inputs of `hashed`, `ckpt_ddpmpp` a checkpoint after three steps of its training.
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
from safetensors.torch import load_file
from torch import Tensor

from flowdistill.errors import ArtifactError
from flowdistill.networks import build
from flowdistill.networks.ncsnpp import PRESETS, NCSNpp

FIXTURES = Path(__file__).parent / "fixtures" / "ncsnpp"
with safe_open(FIXTURES / "ncsnpp.safetensors", "pt") as file:
    TRUTH: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    CASES, SIZES = (json.loads(file.metadata()[part]) for part in ("cases", "sizes"))
EACH = pytest.mark.parametrize("name", CASES)


def _case(name: str, **changes: Any) -> tuple[NCSNpp, Tensor, Tensor]:
    network = NCSNpp(**CASES[name]["arguments"] | changes).eval()
    fill(network.named_parameters())
    side = CASES[name]["arguments"]["image_size"]
    return network, 2.0 * numbers(f"{name}.x", 3, 3, side, side), torch.tensor(CASES[name]["time"])


def _near(found: Tensor, name: str) -> None:
    torch.testing.assert_close(found, TRUTH[name], atol=2e-5, rtol=2e-5)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _keys(network: NCSNpp) -> list[tuple[str, list[int]]]:
    return [(name, list(weights.shape)) for name, weights in network.state_dict().items()]


@EACH
@torch.no_grad()
def test_output_and_samples_are_the_originals(name: str) -> None:
    network, x, time = _case(name)
    _near(network(x, time), f"{name}.y")
    for i in range(4):  # RectifiedFlow's Euler sampler
        x = x + network(x, torch.full((3,), 999.0 * (0.999 * i / 4 + 0.001))) / 4
    _near(x, f"{name}.euler_4")


@EACH
def test_features_inside_are_the_originals(name: str) -> None:
    network, x, time = _case(name)
    found: dict[str, Tensor] = {}
    for key in TRUTH:
        if key.startswith(f"{name}.activation."):
            module = network.all_modules[int(key.rpartition(".")[2])]
            module.register_forward_hook(
                lambda module, inputs, output, key=key: found.update({key: output[:1]})
            )
    with torch.no_grad():
        network(x, time)
    for key, features in found.items():
        _near(features, key)


@EACH
def test_gradients_are_the_originals(name: str) -> None:
    network, x, time = _case(name)
    x.requires_grad_()
    (network(x, time) * numbers(f"{name}.cotangent", *x.shape)).sum().backward()
    gradients = {key: p.grad for key, p in network.named_parameters() if p.grad is not None} | {"x": x.grad}
    norms = torch.stack([gradients[key].norm() for key in network.averaged_names()])
    # The largest norm is 250; those of the keys' biases are 0 but for rounding.
    torch.testing.assert_close(norms, TRUTH[f"{name}.gradient_norms"], atol=2e-5, rtol=2e-5)
    for key, gradient in gradients.items():
        if f"{name}.gradient.{key}" in TRUTH:
            torch.testing.assert_close(gradient, TRUTH[f"{name}.gradient.{key}"], atol=2e-5, rtol=2e-5)


@EACH
def test_names_and_order_are_the_originals(name: str) -> None:
    network, _, _ = _case(name)
    assert _digest(_keys(network)) == CASES[name]["keys"]
    assert _digest(network.averaged_names()) == CASES[name]["averaged"]


@pytest.mark.parametrize("name", PRESETS)
def test_published_networks(name: str) -> None:
    json.dumps(PRESETS[name])
    with torch.device("meta"):
        network = NCSNpp(**PRESETS[name])
    assert sum(weights.numel() for weights in network.parameters()) == SIZES[name]["parameters"]
    assert _digest(_keys(network)) == SIZES[name]["keys"]
    assert _digest(network.averaged_names()) == SIZES[name]["averaged"]


def test_published_counts() -> None:
    counts = {name: size["parameters"] for name, size in SIZES.items()}
    assert counts["rf-cifar10"] == 61_804_419
    assert counts["rf-church256"] == 65_574_549
    assert [counts[f"slimflow-{size}m"] for size in (28, 15, 7, 3)] == [
        27_906_179,
        15_707_235,
        6_989_891,
        3_437_123,
    ]
    averaged = {name: size["averaged_count"] for name, size in SIZES.items()}
    assert (averaged["rf-cifar10"], averaged["rf-celebahq256"]) == (564, 644)
    with torch.device("meta"):
        ffhq = NCSNpp(**{**PRESETS["slimflow-3m"], "image_size": 64})
    assert sum(weights.numel() for weights in ffhq.parameters()) == 3_536_195


def test_nameless_average_finds_its_places() -> None:
    """The averaged weights of a real checkpoint, put by order alone, give the output of its average."""
    facts = json.loads((FIXTURES / "ckpt_ddpmpp.json").read_text())
    tensors = load_file(FIXTURES / "ckpt_ddpmpp.expected.safetensors")
    model, data = facts["config"]["model"], facts["config"]["data"]
    network = NCSNpp(
        image_size=data["image_size"],
        **{key: model[key] for key in ("nf", "ch_mult", "num_res_blocks", "attn_resolutions")},
    ).eval()
    names = network.averaged_names()
    assert [f"module.{name}" for name in names] == facts["ema_param_order"]
    probe = tensors["probe.x"], tensors["probe.labels"]
    for kind, expected in (("final", "probe.y_raw"), ("ema", "probe.y_ema")):
        listed = [tensors[f"{kind}.module.{name}"] for name in names]
        network.load_state_dict(dict(zip(names, listed, strict=True)), strict=False)
        with torch.no_grad():
            torch.testing.assert_close(network(*probe), tensors[expected], atol=1e-5, rtol=0)


def test_original_buffer_of_double_precision_loads() -> None:
    network, x, time = _case("unfiltered")
    noise_levels = torch.linspace(0.5, 4.0, 1000, dtype=torch.float64)
    network.load_state_dict(network.state_dict() | {"sigmas": noise_levels})
    assert network.sigmas.dtype == torch.float32
    assert network(x, time).dtype == torch.float32
    scaled = network(x, time) * noise_levels[time.long()].float()[:, None, None, None]
    network.scale_by_sigma = False
    torch.testing.assert_close(network(x, time), scaled)


@torch.no_grad()
def test_labels_are_ignored_and_layout_does_not_matter() -> None:
    network, x, time = _case("celebahq")
    expected = network(x, time)
    assert torch.equal(network(x, time, torch.tensor([1, 2, 3])), expected)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = network(x.contiguous(memory_format=torch.channels_last), time)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert found.is_contiguous()


@EACH
@torch.no_grad()
def test_low_precision_stays_near(name: str) -> None:
    network, x, time = _case(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, time).float()
    error = (found - TRUTH[f"{name}.y"]).norm() / TRUTH[f"{name}.y"].norm()
    assert error < 0.03


@torch.no_grad()
def test_dropout_only_in_training() -> None:
    network, x, time = _case("ddpmpp", dropout=0.5)
    _near(network(x, time), "ddpmpp.y")
    assert not torch.allclose(network.train()(x, time), TRUTH["ddpmpp.y"], atol=1e-2)


@torch.no_grad()
def test_a_new_network_starts_near_zero() -> None:
    x = numbers("x", 2, 3, 16, 16)
    network = NCSNpp(image_size=16, nf=16, ch_mult=[1, 2], fir=True, progressive="output_skip")
    assert network(x, torch.tensor([1.0, 500.0])).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"image_size": 30}, "image_size 30 must be divisible by 4"),
        ({"nf": 30}, "nf 30"),
        ({"ch_mult": []}, "at least one level"),
        ({"progressive": "residual"}, "'residual' must be one of none, output_skip"),
        ({"progressive_input": "cat"}, "'cat' must be one of none, input_skip, residual"),
        ({"embedding_type": "sine"}, "'sine' must be one of positional, fourier"),
        ({"progressive_input": "residual"}, "needs fir"),
    ],
)
def test_refusals(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        build("ncsnpp", arguments)
