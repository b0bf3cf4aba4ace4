"""SongUNet and DhariwalUNet against EDM's own: outputs, gradients, trajectories, names, counts.

`fixtures/edm/networks.*` hold what the original code answered on small random networks, `full_size.json` the
sizes of the published ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowdistill.errors import ArtifactError
from flowdistill.networks import architectures, build, dhariwalunet, songunet
from flowdistill.networks._edm_layers import one_hot

FIXTURES = Path(__file__).parent / "fixtures" / "edm"
CASES: dict[str, dict[str, Any]] = json.loads((FIXTURES / "networks.json").read_text())
FULL_SIZE: dict[str, dict[str, Any]] = json.loads((FIXTURES / "full_size.json").read_text())
PRESETS = {
    **{name: ("songunet", arguments) for name, arguments in songunet.PRESETS.items()},
    **{name: ("dhariwalunet", arguments) for name, arguments in dhariwalunet.PRESETS.items()},
}
GIGAFLOPS = {"edm-cifar10-ve": 42.8, "edm-imagenet64-adm": 219.3}
"""Of the original code, one image."""
SMALL = {"img_resolution": 8, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
FAMILIES = pytest.mark.parametrize("architecture", ["songunet", "dhariwalunet"])
EVERY_CASE = pytest.mark.parametrize("name", CASES)
Denoiser = Callable[..., Tensor]


@cache
def recorded(name: str) -> dict[str, Tensor]:
    """The original's inputs and outputs, with labels as class numbers."""
    tensors = {
        key.removeprefix(f"{name}/"): tensor
        for key, tensor in load_file(FIXTURES / "networks.safetensors").items()
        if key.startswith(f"{name}/")
    }
    if "in.class_labels" in tensors:
        tensors["in.labels"] = tensors["in.class_labels"].argmax(1)
    return tensors


@cache
def network(name: str) -> nn.Module:
    case = CASES[name]
    built = build(case["architecture"], case["arguments"])
    built.load_state_dict(_weights(case["tensors"], case["seed"]), strict=False)
    return built.eval()


def _weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """The weights that the original was given: the i-th of the sorted names is drawn with seed + i."""
    weights = {}
    for number, name in enumerate(sorted(name for name in shapes if not name.endswith("resample_filter"))):
        shape = shapes[name]
        drawn = np.random.RandomState(seed + number).standard_normal(shape)
        if name.endswith("freqs"):
            drawn = 16 * drawn
        elif name.endswith("bias"):
            drawn = 0.1 * drawn
        elif len(shape) > 1:
            drawn = drawn / math.sqrt(math.prod(shape[1:]))
        else:
            drawn = 1 + 0.1 * drawn
        weights[name] = torch.from_numpy(drawn.astype(np.float32).astype(np.float16).astype(np.float32))
    return weights


def _small(architecture: str, **changes: Any) -> nn.Module:
    """A network with attention and with weights everywhere, also where it starts with none."""
    sizes = SMALL | {"model_channels": 64 if architecture == "dhariwalunet" else 8, "attn_resolutions": [4]}
    built = build(architecture, sizes | changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in built.parameters():
            scale = 0.1 if weights.dim() == 1 else 1 / math.sqrt(weights[0].numel())
            weights.copy_((weights.dim() == 1) + scale * torch.randn(weights.shape, generator=generator))
    return built.eval()


def _inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.linspace(-1.5, 1.5, count)


def _close(found: Tensor, original: Tensor) -> None:
    scale = max(1.0, float(original.abs().max()))
    torch.testing.assert_close(found, original, atol=1e-5 * scale, rtol=1e-4)


@cache
def iddpm_sigmas() -> Tensor:
    """The noise levels u of an iDDPM network, falling: [1001]."""
    last, least, shift = 1000, 0.001, 0.008
    kept = [math.sin(0.5 * math.pi * j / last / (shift + 1)) ** 2 for j in range(last + 1)]
    levels = [0.0]
    for j in range(last, 0, -1):
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(kept[j - 1] / kept[j], least) - 1))
    return torch.tensor(levels[::-1], dtype=torch.float64)


def vp_label(sigma: Tensor) -> Tensor:
    steepness, start = 19.9, 0.1
    return 999 * ((start**2 + 2 * steepness * (1 + sigma**2).log()).sqrt() - start) / steepness


def iddpm_label(sigma: Tensor) -> Tensor:
    return 999 - (sigma[:, None] - iddpm_sigmas().to(sigma)).abs().argmin(1).to(sigma)


def denoiser(name: str) -> Denoiser:
    """D(x; sigma, labels) of the case, with its preconditioning."""
    raw = network(name)
    kind = CASES[name]["precond"]

    def denoise(
        x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        x, sigma = x.float(), sigma.float().expand(len(x))
        scaled = (sigma**2 + (0.25 if kind == "EDM" else 1.0)).sqrt()
        keep, out, into, label = {
            "EDM": lambda: (0.25 / scaled**2, 0.5 * sigma / scaled, 1 / scaled, sigma.log() / 4),
            "VP": lambda: (torch.ones_like(sigma), -sigma, 1 / scaled, vp_label(sigma)),
            "VE": lambda: (torch.ones_like(sigma), sigma, torch.ones_like(sigma), (0.5 * sigma).log()),
            "iDDPM": lambda: (torch.ones_like(sigma), -sigma, 1 / scaled, iddpm_label(sigma)),
        }[kind]()
        keep, out, into = (each[:, None, None, None] for each in (keep, out, into))
        return keep * x + out * raw(into * x, label, labels, augment_labels)

    return denoise


def trajectory(name: str, steps: int) -> Tensor:
    """EDM's deterministic sampler, Heun's method with rho = 7."""
    case, tensors = CASES[name], recorded(name)
    highest = min(80.0, case["sigma_max"] or 80.0)
    ends = highest ** (1 / 7), max(0.002, case["sigma_min"]) ** (1 / 7)
    sigmas = torch.linspace(*ends, steps, dtype=torch.float64) ** 7
    if case["precond"] == "iDDPM":
        sigmas = iddpm_sigmas()[(sigmas[:, None] - iddpm_sigmas()).abs().argmin(1)]
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    labels = tensors["in.labels"][: len(tensors["in.latents"])] if "in.labels" in tensors else None
    denoise = denoiser(name)
    x = tensors["in.latents"].double() * sigmas[0]
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        slope = (x - denoise(x, now, labels).double()) / now
        ahead = x + (after - now) * slope
        if after > 0:
            slope = (slope + (ahead - denoise(ahead, after, labels).double()) / after) / 2
        x = x + (after - now) * slope
    return x


@EVERY_CASE
def test_names_and_shapes_are_the_originals(name: str) -> None:
    found = {key: list(tensor.shape) for key, tensor in network(name).state_dict().items()}
    assert list(found.items()) == list(CASES[name]["tensors"].items())


@EVERY_CASE
@torch.no_grad()
def test_raw_output(name: str) -> None:
    tensors = recorded(name)
    inputs = tensors["in.raw_x"], tensors["in.raw_noise_labels"], tensors.get("in.labels")
    _close(network(name).outputs(*inputs), tensors["out.raw_F"])
    assert torch.equal(network(name)(*inputs), network(name).outputs(*inputs)[:, : inputs[0].shape[1]])


@EVERY_CASE
@torch.no_grad()
def test_denoiser(name: str) -> None:
    tensors = recorded(name)
    x, sigma, labels = tensors["in.x"], tensors["in.sigma"], tensors.get("in.labels")
    denoise = denoiser(name)
    _close(denoise(x, sigma, labels), tensors["out.D"])
    if "out.D_labels_none" in tensors:
        _close(denoise(x, sigma), tensors["out.D_labels_none"])
    if "out.D_scalar_sigma0.7" in tensors:
        _close(denoise(x, torch.tensor(0.7), labels), tensors["out.D_scalar_sigma0.7"])
    if "out.D_aug" in tensors:
        _close(denoise(x, sigma, labels, tensors["in.augment_labels"]), tensors["out.D_aug"])


@pytest.mark.parametrize("name", [name for name in CASES if "in.latents" in recorded(name)])
@torch.no_grad()
def test_trajectories(name: str) -> None:
    _close(trajectory(name, 18), recorded(name)["out.heun18_f64"])


@EVERY_CASE
def test_gradients(name: str) -> None:
    """Of (D w).sum() with w = sin(0.7 k), k the place in D: norms of all, some of them whole."""
    tensors = recorded(name)
    raw = network(name)
    x = tensors["in.x"].clone().requires_grad_()
    output = denoiser(name)(
        x, tensors["in.sigma"], tensors.get("in.labels"), tensors.get("in.augment_labels")
    )
    w = torch.sin(0.7 * torch.arange(output.numel(), dtype=torch.float64)).float().reshape(output.shape)
    names, parameters = zip(*raw.named_parameters(), strict=True)
    from_x, *gradients = torch.autograd.grad((output * w).sum(), [x, *parameters])
    _close(from_x, tensors["grad.x"])
    norms = torch.stack([gradient.norm() for gradient in gradients])
    _close(norms, tensors["grad.norms"])
    whole = [key.removeprefix("grad.") for key in tensors if key.startswith("grad.")]
    chosen = [key for key in whole if key in names]
    assert len(chosen) >= 3
    for key in chosen:
        _close(gradients[names.index(key)], tensors[f"grad.{key}"])


def test_presets_are_the_published_networks() -> None:
    published = {name for name in PRESETS if name.startswith("edm-")}
    assert published == {*FULL_SIZE, "edm-afhq64-vp", "edm-afhq64-ve"}
    for kind in ("vp", "ve"):
        afhq, ffhq = (songunet.PRESETS[f"edm-{data}-{kind}"] for data in ("afhq64", "ffhq64"))
        assert afhq == {**ffhq, "dropout": 0.25}
    assert {"songunet", "dhariwalunet"} <= set(architectures())
    assert not any("edm" in name for name in architectures())


@pytest.mark.parametrize("preset", FULL_SIZE)
def test_full_size(preset: str) -> None:
    with torch.device("meta"):
        full = build(*PRESETS[preset])
    names = "\n".join(f"{key} {'x'.join(map(str, each.shape))}" for key, each in full.state_dict().items())
    assert FULL_SIZE[preset] == {
        "parameters": sum(weights.numel() for weights in full.parameters()),
        "tensors": len(full.state_dict()),
        "buffers": len(list(full.buffers())),
        "names_and_shapes_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }


@pytest.mark.parametrize("preset", GIGAFLOPS)
def test_takes_fewer_products_than_the_original(preset: str) -> None:
    architecture, arguments = PRESETS[preset]
    side = arguments["img_resolution"]
    with torch.device("meta"):
        full, x, time = build(architecture, arguments), torch.empty(1, 3, side, side), torch.empty(1)
        with FlopCounterMode(display=False) as counter:
            assert full(x, time).shape == x.shape
    assert 0.9 * GIGAFLOPS[preset] < counter.get_total_flops() / 1e9 < GIGAFLOPS[preset]


@FAMILIES
@torch.no_grad()
def test_rows_do_not_see_each_other(architecture: str) -> None:
    x, time = _inputs(5)
    labels = torch.tensor([0, 3, 1, 2, 2])
    small = _small(architecture, label_dim=4)
    whole = small(x, time, labels)
    for row in range(len(x)):
        alone = small(x[row : row + 1], time[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(alone[0], whole[row], atol=2e-5, rtol=2e-5)
        others = torch.cat(
            [small(x[row : row + 1], time[row : row + 1], torch.tensor([k])) for k in range(4)]
        )
        assert torch.pdist(others.flatten(1)).min() > 1e-3


@FAMILIES
@torch.no_grad()
def test_without_classes_labels_are_ignored(architecture: str) -> None:
    x, time = _inputs()
    small = _small(architecture)
    assert torch.equal(small(x, time, torch.tensor([5, 6, 7])), small(x, time))


@FAMILIES
@torch.no_grad()
def test_dropout_and_label_dropout_are_for_training(architecture: str) -> None:
    x, time = _inputs()
    labels = torch.tensor([0, 1, 2])
    small = _small(architecture, label_dim=3, dropout=0.0, label_dropout=1.0)
    assert not torch.equal(small(x, time, labels), small(x, time))
    assert torch.equal(small.train()(x, time, labels), small(x, time))
    dropping = _small(architecture, dropout=0.5)
    assert torch.equal(dropping(x, time), dropping(x, time))
    assert not torch.equal(dropping.train()(x, time), dropping(x, time))


def test_label_dropout_takes_whole_rows_at_its_rate() -> None:
    torch.manual_seed(0)
    rows = one_hot(torch.arange(4000) % 7, 7, torch.zeros(4000), 0.25)
    assert set(rows.sum(1).tolist()) == {0.0, 1.0}
    assert abs(float(rows.sum()) / 4000 - 0.75) < 0.03
    assert torch.equal(rows.argmax(1)[rows.any(1)], (torch.arange(4000) % 7)[rows.any(1)])


@EVERY_CASE
@torch.no_grad()
def test_autocast_stays_near(name: str) -> None:
    tensors = recorded(name)
    inputs = tensors["in.raw_x"], tensors["in.raw_noise_labels"], tensors.get("in.labels")
    with torch.autocast("cpu", torch.bfloat16):
        found = network(name).outputs(*inputs)
    assert found.dtype == torch.float32
    error = (found - tensors["out.raw_F"]).square().mean().sqrt()
    assert 0 < error < 0.02 * tensors["out.raw_F"].square().mean().sqrt()


@FAMILIES
@torch.no_grad()
def test_the_embedding_is_float32_under_autocast(architecture: str) -> None:
    """Two noise levels that bfloat16 cannot tell apart."""
    _, time = _inputs()
    small = _small(architecture, label_dim=3)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = small._embed(time, torch.tensor([0, 1, 2]), None)
    assert torch.equal(embeddings, small._embed(time, torch.tensor([0, 1, 2]), None))


@FAMILIES
def test_layouts_and_precisions(architecture: str) -> None:
    x, time = _inputs()
    small = _small(architecture, label_dim=3)
    reference = small(x, time)
    assert reference.is_contiguous()
    for layout in (torch.channels_last, torch.contiguous_format):
        found = small.to(memory_format=layout)(x.contiguous(memory_format=layout), time.double())
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)
        assert found.is_contiguous()
    half = small.bfloat16()(x.bfloat16(), time, torch.tensor([0, 1, 2]))
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_first_weights_of_dhariwal() -> None:
    """Blocks are the identity and the output is zero; torch's own bounds for the others."""
    torch.manual_seed(0)
    silent = ("conv1", "proj", "out_conv", "map_augment")
    new = build("dhariwalunet", SMALL | {"model_channels": 64, "label_dim": 30, "augment_dim": 9})
    for name, layer in new.named_modules():
        if name == "map_label":
            assert 0.9 < layer.weight.std() < 1.1
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 0.0 if name.endswith(silent) else 1 / math.sqrt(layer.weight[0].numel())
            assert 0.9 * bound <= layer.weight.abs().max() <= bound
            assert layer.bias is None or layer.bias.abs().max() <= bound


def test_first_weights_of_song() -> None:
    """Glorot's bounds, small where a branch should hardly speak."""
    torch.manual_seed(0)
    sizes = SMALL | {"model_channels": 64, "attn_resolutions": [8], "label_dim": 3, "augment_dim": 9}
    new = build("songunet", sizes | {"embedding_type": "fourier", "decoder_type": "skip"})
    assert 12 < new.map_noise.freqs.std() < 20
    for name, layer in new.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            gain = 1e-5 if name.endswith(("conv1", "proj", "aux_conv")) else 1.0
            gain = math.sqrt(0.2) if name.endswith("qkv") else gain
            weights = layer.weight
            bound = gain * math.sqrt(6 / ((weights.shape[0] + weights.shape[1]) * weights[0, 0].numel()))
            assert 0.9 * bound < weights.abs().max() <= bound
            assert layer.bias is None or layer.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("songunet", {"img_resolution": 9}, "img_resolution 9 must be divisible by 2"),
        (
            "songunet",
            {"embedding_type": "random"},
            "embedding_type 'random' must be one of positional, fourier",
        ),
        ("songunet", {"encoder_type": "none"}, "encoder_type 'none' must be"),
        ("songunet", {"decoder_type": "residual"}, "decoder_type 'residual' must be"),
        ("songunet", {"resample_filter": [1, 2, 1]}, "of an even number of taps"),
        ("songunet", {"resample_filter": [1, 2]}, "symmetric"),
        ("songunet", {"model_channels": 3}, "channels are too few"),
        ("songunet", {"channel_mult": []}, "0 levels"),
        ("dhariwalunet", {"num_blocks": 0}, "of 0 blocks"),
        ("dhariwalunet", {"out_channels": 2}, "out_channels 2 must be at least in_channels 3"),
        ("dhariwalunet", {"model_channels": 224, "attn_resolutions": [8]}, "do not split into"),
        ("songunet", {"out_channels": 2}, "out_channels 2 must be at least in_channels 3"),
    ],
)
def test_sizes_that_do_not_fit(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message), torch.device("meta"):
        build(architecture, SMALL | changes)


def test_a_label_out_of_range_is_refused() -> None:
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        _small("songunet", label_dim=3)(*_inputs(), torch.tensor([0, 1, 4]))  # 3 is none
