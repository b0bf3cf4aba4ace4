"""The diffusion transformer against its originals: outputs, gradients, dropout, names and sizes.

The fixtures hold numbers that the originals' own classes gave: tiny networks whose weights are all random,
so that no zero-initialised layer hides a mistake.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from flowdistill.errors import ArtifactError
from flowdistill.networks import build
from flowdistill.networks.dit import PRESETS, DiT, infer

FIXTURES = Path(__file__).parent / "fixtures" / "dit"
NAMES = ("dit", "sit", "sit_pixels", "lfm", "lfm_unconditional")
CASES = pytest.mark.parametrize("name", NAMES)
TINY: dict[str, Any] = {"input_size": 8, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5}

COUNTS = {
    "dit-s-2": 32_963_360,
    "dit-s-4": 32_945_024,
    "dit-s-8": 33_148_160,
    "dit-b-2": 130_512_416,
    "dit-b-4": 130_475_648,
    "dit-b-8": 130_881_536,
    "dit-l-2": 458_102_816,
    "dit-l-4": 458_053_760,
    "dit-l-8": 458_594_816,
    "dit-xl-2": 675_129_632,
    "dit-xl-4": 675_074_432,
    "dit-xl-8": 675_683_072,
    "dit-xl-2-512": 676_014_368,
    "sit-xl-2-512": 675_995_920,
    "lfm-celeb256": 457_062_416,
    "lfm-ffhq256": 457_062_416,
    "lfm-church": 457_062_416,
    "lfm-bedroom": 457_062_416,
    "lfm-imagenet": 130_500_112,
}
"""Parameters of the originals, positions included; SiT's networks for 256 px are as large as DiT's."""


def _load(name: str) -> tuple[DiT, dict[str, Tensor]]:
    """The network with the original's weights, and what the original did."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        network = DiT(**json.loads(file.metadata()["arguments"]))
    state = {
        key.removeprefix("state."): tensors.pop(key) for key in list(tensors) if key.startswith("state.")
    }
    network.load_state_dict(state)
    return network.eval(), tensors


def _random(**changes: Any) -> DiT:
    """A network with no layer left at zero."""
    torch.manual_seed(0)
    network = DiT(**(TINY | changes)).eval()
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.1 * torch.randn(weights.shape))
    return network


def _shapes(network: DiT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _inputs(network: DiT, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 8, 8, generator=generator)
    return x, torch.linspace(0, 1, count), torch.arange(count) % 5


@CASES
def test_output_is_the_original_s_with_labels_and_without(name: str) -> None:
    network, original = _load(name)
    x, time = original["x"], original["time"]
    with torch.no_grad():
        torch.testing.assert_close(
            network(x, time, original["labels"]), original["output"], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(network(x, time), original["output_null"], atol=1e-5, rtol=0)


@CASES
def test_gradients_are_the_original_s(name: str) -> None:
    network, original = _load(name)
    x = original["x"].requires_grad_()
    (network(x, original["time"], original["labels"]) * original["probe"]).sum().backward()
    found = {"x": x.grad} | {key: weights.grad for key, weights in network.named_parameters()}
    for key, expected in original.items():
        kind, _, tensor = key.partition(".")
        gradient = found.get(tensor)
        if kind == "gradient":
            torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=1e-5)
        if kind == "norm":
            assert gradient is not None
            torch.testing.assert_close(gradient.norm(), expected, atol=0, rtol=1e-5)
    assert {f"norm.{key}" for key, value in found.items() if value is not None and key != "x"} == {
        key for key in original if key.startswith("norm.")
    }


@pytest.mark.parametrize("name", ["dit", "sit"])
def test_training_drops_labels_as_the_original_does(name: str) -> None:
    network, original = _load(name)
    torch.manual_seed(7)
    output = network.train()(original["x"], original["time"], original["labels"])
    torch.testing.assert_close(output.detach(), original["output_train"], atol=1e-5, rtol=0)
    assert original["dropped"].any() and not original["dropped"].all()
    torch.testing.assert_close(output[original["dropped"]], original["output_null"][original["dropped"]])


@CASES
def test_positions_are_the_original_s_and_frozen(name: str) -> None:
    network, original = _load(name)
    fresh = DiT(**infer(_shapes(network)) | {"num_heads": 3})
    torch.testing.assert_close(fresh.pos_embed.detach(), original["positions"], atol=1e-7, rtol=0)
    assert [key for key, weights in fresh.named_parameters() if not weights.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_originals_sizes_and_are_read_off_their_shapes(name: str) -> None:
    with torch.device("meta"):
        network = DiT(**PRESETS[name])
    count = COUNTS[name] if name in COUNTS else COUNTS[name.replace("sit", "dit")]
    assert sum(weights.numel() for weights in network.parameters()) == count
    assert infer(_shapes(network)) == PRESETS[name]


def test_a_network_made_without_memory_takes_a_state_dict() -> None:
    """Loading a large network need not draw random weights first."""
    expected = _random()
    with torch.device("meta"):
        network = DiT(**TINY).eval()
    network.load_state_dict(expected.state_dict(), assign=True)
    x, time, labels = _inputs(network, 3)
    assert torch.equal(network(x, time, labels), expected(x, time, labels))
    assert not network.pos_embed.requires_grad and network.x_embedder.proj.weight.requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        {"learn_sigma": True},
        {"patch_size": 1, "in_channels": 3, "num_classes": 2},
        {"patch_size": 4, "hidden_size": 28, "num_heads": 7, "mlp_ratio": 61 / 28},
        {"class_dropout_prob": 0.0, "num_classes": 1, "depth": 3},
    ],
)
def test_arguments_are_read_off_the_shapes(changes: dict[str, Any]) -> None:
    network = DiT(**(TINY | changes))
    arguments = infer(_shapes(network))
    assert arguments["num_heads"] is None
    again = DiT(**(arguments | {"num_heads": network.blocks[0].attn.heads}))  # type: ignore[union-attr]
    assert _shapes(again) == _shapes(network)
    assert infer(_shapes(again)) == arguments
    assert {key: arguments[key] for key in changes if key != "num_heads"} == {
        key: value for key, value in changes.items() if key != "num_heads"
    }


def test_shapes_that_are_no_dit_are_refused() -> None:
    shapes = _shapes(DiT(**TINY))
    with pytest.raises(ValueError, match="'pos_embed' is missing"):
        infer({key: value for key, value in shapes.items() if key != "pos_embed"})
    with pytest.raises(ValueError, match="15 positions must be a square"):
        infer(shapes | {"pos_embed": (1, 15, 24)})
    with pytest.raises(ValueError, match="20 outputs a token 16 or 32"):
        infer(shapes | {"final_layer.linear.weight": (20, 24)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 9}, "input_size 9 must be a multiple of patch_size 2"),
        ({"num_heads": 5}, "hidden_size 24 must be a multiple of 4 and of num_heads 5"),
        ({"hidden_size": 30}, "hidden_size 30 must be a multiple of 4 and of num_heads 3"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob 1.5 must be a probability"),
        ({"num_classes": 0, "class_dropout_prob": 0.0}, "num_classes 0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        build("dit", TINY | changes)


def test_no_labels_need_a_null_class_or_a_single_class() -> None:
    network = _random(class_dropout_prob=0.0)
    x, time, labels = _inputs(network, 3)
    with pytest.raises(ValueError, match="no null class"):
        network(x, time)
    assert network(x, time, labels).isfinite().all()
    for unconditional in ({"num_classes": 0}, {"num_classes": 1, "class_dropout_prob": 0.0}):
        network = _random(**unconditional)
        torch.testing.assert_close(network(x, time), network(x, time, torch.zeros_like(labels)))


def test_without_training_no_label_is_dropped_and_samples_are_independent() -> None:
    network = _random(class_dropout_prob=1.0, patch_size=1)
    x, time, labels = _inputs(network, 7)
    together = network(x, time, labels)
    assert together.shape == x.shape and together.is_contiguous()
    for index in range(7):
        alone = network(x[index : index + 1], time[index : index + 1], labels[index : index + 1])
        torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=0)
    torch.testing.assert_close(network.train()(x, time, labels), network.eval()(x, time))


def test_a_new_network_is_zero_and_its_layers_have_the_family_s_scales() -> None:
    torch.manual_seed(0)
    network = DiT(**(TINY | {"hidden_size": 96, "num_classes": 200}))
    x, time, labels = _inputs(network, 3)
    assert not network(x, time, labels).any()
    state = network.state_dict()
    for key, value in state.items():
        if "adaLN" in key or key.startswith("final_layer") or key.endswith("bias"):
            assert not value.any(), key
    for key in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
        assert state[key].std() == pytest.approx(0.02, rel=0.05), key
    # Glorot's uniform distribution: variance 2 / (inputs + outputs); the patches count as a linear layer.
    for key, fans in {
        "blocks.0.attn.qkv": 4 * 96,
        "blocks.1.mlp.fc2": 5 * 96,
        "x_embedder.proj": 16 + 96,
    }.items():
        assert state[f"{key}.weight"].var() == pytest.approx(2 / fans, rel=0.1), key


def test_bfloat16_stays_near_and_tells_close_times_apart() -> None:
    network = _random()
    x, time, labels = _inputs(network, 5)
    expected = network(x, time, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, time, labels)
        embedding = network.t_embedder(time)
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(embedding, network.t_embedder(time)) and embedding.dtype == torch.float32
    whole = network.bfloat16()(x.bfloat16(), time, labels)
    assert whole.dtype == torch.bfloat16
    assert (whole - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(training: bool) -> None:
    network = _random(class_dropout_prob=1.0).train(training)
    x, time, labels = _inputs(network, 3)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for given in (labels, None):
        torch.testing.assert_close(compiled(x, time, given), network(x, time, given))
