"""Adapters of diffusers: tiny random networks in folders laid out as theirs, against their own pipelines."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import (
    STEPS,
    TINY,
    TRANSFORMERS,
    call,
    conditions,
    draw,
    make,
    package,
    pipeline,
    randomised,
    reopen,
    run,
    sigmas,
)
from torch import Tensor, nn

from flowdistill import foreign, networks, teachers
from flowdistill.conventions import Convention
from flowdistill.errors import ArtifactError, MissingInput, UsageError
from flowdistill.guidance import Clip, Deviation, Guidance, first_steps
from flowdistill.networks.diffusersmodel import FAMILIES, DiffusersModel
from flowdistill.teachers import hub, pipelines, prompts
from flowdistill.teachers.families import convention_of
from flowdistill.teachers.latents import Decoder
from flowdistill.teachers.pipelines import Opened, Options

for needed in ("diffusers", "transformers"):
    pytest.importorskip(needed, reason="the extra flowdistill[diffusers] is not installed")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, nn.Module, Opened]]:
    """Folder, network and opened pipeline of a family, each made once."""

    @cache
    def find(name: str) -> tuple[Path, nn.Module, Opened]:
        folder = tmp_path_factory.mktemp(name)
        model = make(folder, name)
        return folder, model, reopen(folder, name)

    return find


# --- our way --------------------------------------------------------------------------------------


def convention_in(opened: Opened) -> Convention:
    assert opened.card.convention is not None
    return opened.card.convention


def velocity(opened: Opened, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """Canonical velocity of a rectified flow, by hand."""
    convention = convention_in(opened)
    assert (convention.interpolant.name, convention.prediction) == ("rectified", "velocity")
    time = convention.clock.scale * (1 - t if convention.clock.reversed else t)
    return convention.sign * opened.network(x, time, labels)


def euler(opened: Opened, x: Tensor, times: list[float], labels: Tensor, guidance: Guidance | None) -> Tensor:
    with torch.no_grad():
        for t, s in pairwise(times):
            at = torch.full((len(x),), t)
            v = velocity(opened, x, at, labels)
            if guidance is not None:
                v = guidance.combine(v, velocity(opened, x, at, None), at)
            x = x + (s - t) * v
    return x


LABELS = torch.tensor([0, 1])
Made = Callable[[str], tuple[Path, nn.Module, Opened]]


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_euler_in_canonical_coordinates_is_the_pipelines_own_sampler(
    name: str, guided: bool, made: Made
) -> None:
    folder, model, opened = made(name)
    if guided and name.startswith("Flux2"):
        pytest.skip("FLUX.2 has embedded guidance alone")
    x = draw(name)
    guidance = opened.card.guidance if guided else None
    if name.startswith("FluxT") and guided:
        assert guidance is None  # it is embedded, true guidance is off by default
        guidance = Guidance(scale=3.0)
    expected, times = run(name, model, folder, x, guided)
    assert (guidance is not None) == guided
    assert opened.card.shape == tuple(TINY[name]["shape"]) and opened.card.classes == 2
    assert len(times) == STEPS + 1 and times[-1] == 0
    result = euler(opened, x, times, LABELS, guidance)
    assert (result - x).abs().max() > 0.1
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


OTHER_RULES: Mapping[str, tuple[str, dict[str, Any], Callable[[list[float]], Guidance]]] = {
    "ltx-rescale": (
        "LTXVideoTransformer3DModel",
        {"guidance_rescale": 0.7},
        lambda times: Guidance(scale=3.0, rescale=Deviation(strength=0.7)),
    ),
    "z-image-norm": (
        "ZImageTransformer2DModel",
        {"guidance_scale": 2.0, "cfg_normalization": 0.9},
        lambda times: Guidance(scale=3.0, rescale=Clip(factor=0.9)),
    ),
    "z-image-truncation": (
        "ZImageTransformer2DModel",
        {"cfg_truncation": 0.3},
        lambda times: Guidance(scale=6.0, interval=(0.7, 1.0)),
    ),
    "lumina-truncation": (
        "Lumina2Transformer2DModel",
        {"cfg_trunc_ratio": 0.5, "cfg_normalization": False},
        lambda times: Guidance(scale=4.0, interval=first_steps(times, 0.5)),
    ),
}


@pytest.mark.parametrize("rule", OTHER_RULES)
def test_other_guidance_rules_are_the_pipelines(rule: str, made: Made) -> None:
    name, extra, guidance = OTHER_RULES[rule]
    folder, model, opened = made(name)
    x = draw(name)
    expected, times = run(name, model, folder, x, True, **extra)
    usual, _ = run(name, model, folder, x, True)
    assert (expected - usual).abs().max() > 1e-3
    result = euler(opened, x, times, LABELS, guidance(times))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_samples_of_a_batch_do_not_see_each_other(name: str, made: Made) -> None:
    """Each sample has its own time and prompt, of whatever length; both matter."""
    network = made(name)[2].network
    x, labels = draw(name, 3), torch.tensor([1, 0, 1])
    scale = convention_in(made(name)[2]).clock.scale
    time = scale * torch.tensor([0.9, 0.5, 0.2])
    with torch.no_grad():
        together = network(x, time, labels)
        for i in range(3):
            alone = network(x[i : i + 1], time[i : i + 1], labels[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
        null = network(x, time, None)
        assert (network(x, time, 1 - labels) - together).abs().max() > 1e-3
        assert (null - together).abs().max() > 1e-3
        assert (network(x, time.flip(0), labels) - together).abs().max() > 1e-3
        # The null row is the last of the table.
        torch.testing.assert_close(network(x, time, torch.full((3,), 2)), null)


@pytest.mark.parametrize("name", list(TINY))
def test_rebuilt_from_its_card_and_trained(name: str, made: Made, tmp_path: Path) -> None:
    """The one file of a model gives the same network, and gradients reach its weights.

    It is used in inference mode first, as a teacher is: what it keeps from then must not stop training.
    """
    _, model, opened = made(name)
    x, time = draw(name), torch.tensor([0.7, 0.3])
    labels = LABELS if opened.card.classes else None
    state = opened.network.state_dict()
    assert {key.removeprefix("model.") for key in state if key.startswith("model.")} == set(
        model.state_dict()
    )
    assert all(key.startswith(("model.", "conditions.")) for key in state)
    opened.card.write(tmp_path / "model.safetensors", state)
    loaded = teachers.load(tmp_path / "model.safetensors")
    assert loaded.card == opened.card
    rebuilt = loaded.weights.requires_grad_()
    with torch.inference_mode():
        expected = opened.network(x, time, labels)
        torch.testing.assert_close(rebuilt(x, time, labels), expected)
    rebuilt(x, time, labels).square().mean().backward()
    reached = [weight.grad is not None for weight in rebuilt.parameters()]
    assert sum(reached) > 0.9 * len(reached)
    assert all(weight.grad.isfinite().all() for weight in rebuilt.parameters() if weight.grad is not None)
    half = rebuilt.to(torch.bfloat16)(x, time, labels)
    assert half.dtype == torch.float32
    assert nn.functional.cosine_similarity(half.flatten(1), expected.flatten(1)).min() > 0.9


def test_rotations_kept_from_inference_do_not_stop_training(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen-Image's are kept for each device: on a GPU they are copies, made in the mode of the first call."""
    name = "QwenImageTransformer2DModel"
    rotations = made(name)[1].pos_embed
    kept = cache(lambda device: (rotations.pos_freqs.clone(), rotations.neg_freqs.clone()))
    monkeypatch.setattr(rotations, "_get_device_freqs", kept)
    network, x, time = made(name)[2].network, draw(name), torch.tensor([0.7, 0.3])
    network.model.pos_embed, own = rotations, network.model.pos_embed
    try:
        with torch.inference_mode():
            network(x, time, LABELS)
        network(x, time, LABELS).sum().backward()
    finally:
        network.model.pos_embed = own
        network.zero_grad()


# --- diffusion U-Nets -----------------------------------------------------------------------------


def tables(scheduler: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """alpha and sigma of every index, by hand."""
    start, end = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    if scheduler["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(start, end, 1000, dtype=torch.float64)
    share = (1 - betas).cumprod(0)
    return share.sqrt(), (1 - share).sqrt()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("index", [0.0, 17.0, 500.5, 998.9, 999.0])
def test_velocity_of_a_diffusion_network(prediction: str, index: float, tmp_path: Path) -> None:
    """Against the conversion by hand, at entries of the table and between them, where log SNR is linear."""
    name = "UNet2DConditionModel"
    make(tmp_path, name, changes={"prediction_type": prediction})
    opened = reopen(tmp_path, name)
    low = int(min(index, 998))
    alphas, sigmas = tables(TINY[name]["scheduler"])
    ratio = (alphas / sigmas).log()
    between = (ratio[low] + (index - low) * (ratio[low + 1] - ratio[low])).double()
    alpha, sigma = (2 * between).sigmoid().sqrt(), (-2 * between).sigmoid().sqrt()
    x = draw(name).double()
    with torch.no_grad():
        out = opened.network(x.float(), torch.full((2,), index), LABELS).double()
    data, noise = {
        "epsilon": ((x - sigma * out) / alpha, out),
        "v_prediction": (alpha * x - sigma * out, sigma * x + alpha * out),
        "sample": (out, (x - alpha * out) / sigma),
    }[prediction]
    t = (sigma / (alpha + sigma)).expand(2)
    convention = convention_in(opened)
    with torch.no_grad():
        v = convention.canonical(lambda x, time: opened.network(x, time, LABELS), x / (alpha + sigma), t)
    torch.testing.assert_close(v, noise - data, rtol=1e-4, atol=1e-4)


VARIANTS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1.5": ({"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}, {}),
    "sd2-v": (
        {
            "steps_offset": 1,
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
        {},
    ),
    "sd2-v-zero-snr": (
        {
            "steps_offset": 1,
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        },
        {},
    ),
    "sdxl": (
        {"clip_sample": False},
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 36,
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_euler_in_canonical_coordinates_is_ddim(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "UNet2DConditionModel"
    changes, config = VARIANTS[variant]
    if config:
        monkeypatch.setitem(TINY[name], "pipeline", "StableDiffusionXLPipeline")
    model = make(tmp_path, name, changes=changes, **config)
    opened = reopen(tmp_path, name)
    x = draw(name)
    expected, _ = run(name, model, tmp_path, x, True)
    scheduler = package().DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(STEPS)
    share = scheduler.alphas_cumprod.double()
    ends = [*share[scheduler.timesteps].tolist(), float(scheduler.final_alpha_cumprod)]
    convention = convention_in(opened)
    guidance = opened.card.guidance
    assert guidance == Guidance(scale=5.0 if config else 7.5)

    def field(z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return convention.canonical(lambda x, time: opened.network(x, time, labels), z, t)

    scales = [a**0.5 + (1 - a) ** 0.5 for a in ends]
    times = [(1 - a) ** 0.5 / scale for a, scale in zip(ends, scales, strict=True)]
    z = x.double() / scales[0]
    with torch.no_grad():
        for t, s in pairwise(times):
            at = torch.full((2,), t, dtype=torch.float64)
            v = guidance.combine(field(z, at, LABELS), field(z, at, None), at)
            z = z + (s - t) * v
    result = z * scales[-1]
    # Where alpha is 0 at the end of the table, diffusers' DDIM leaves it, ours is 2^-12 as in its Euler.
    atol = 5e-4 if ends[0] == 0 else 1e-4
    torch.testing.assert_close(result.float(), expected, rtol=1e-5, atol=atol)


def test_euler_in_canonical_coordinates_is_ddim_of_pixels(tmp_path: Path) -> None:
    name = "UNet2DModel"
    model = make(tmp_path, name, changes={"prediction_type": "v_prediction", "clip_sample": False})
    opened = reopen(tmp_path, name)
    assert (opened.card.latent, opened.card.classes, opened.card.shape) == (None, 0, (3, 8, 8))
    scheduler = package().DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    pipe = package().DDIMPipeline(unet=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=STEPS,
        output_type="pt",
    ).images
    convention = convention_in(opened)
    indices = torch.tensor([*range(1000 - 1000 // STEPS, -1, -1000 // STEPS)], dtype=torch.float64)
    times = [*convention.interpolant.t_at(indices).tolist(), 0.0]
    alpha, sigma = convention.interpolant.alpha_sigma(indices[:1])
    z = draw(name).double() / float(alpha + sigma)
    with torch.no_grad():
        for t, s in pairwise(times):
            at = torch.full((2,), t, dtype=torch.float64)
            z = z + (s - t) * convention.canonical(lambda x, time: opened.network(x, time, None), z, at)
    result = (z / 2 + 0.5).clamp(0, 1).float()
    assert ((result > 0) & (result < 1)).float().mean() > 0.3
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_instaflow_moves_by_its_output(tmp_path: Path) -> None:
    """x + out / N at 1000 (1 - i / N), whatever the scheduler in the folder says."""
    name = "UNet2DConditionModel"
    make(tmp_path, name, "PNDMScheduler")
    (tmp_path / "model_index.json").write_text('{"_class_name": "RectifiedFlowPipeline"}')
    opened = reopen(tmp_path, name)
    assert opened.card.guidance == Guidance(scale=1.5)
    x = draw(name)
    with torch.no_grad():
        expected = x
        for i in range(STEPS):
            time = torch.full((2,), 1000 * (1 - i / STEPS))
            expected = expected + opened.network(expected, time, LABELS) / STEPS
    times = [1 - i / STEPS for i in range(STEPS + 1)]
    torch.testing.assert_close(euler(opened, x, times, LABELS, None), expected)


def test_a_network_with_classes_wants_a_label(tmp_path: Path) -> None:
    model = make(tmp_path, "UNet2DModel", num_class_embeds=5)
    opened = reopen(tmp_path, "UNet2DModel")
    x, time = draw("UNet2DModel"), torch.tensor([3.0, 500.0])
    assert opened.card.classes == 5
    with torch.no_grad():
        expected = model(x, time, class_labels=torch.tensor([4, 0])).sample
        torch.testing.assert_close(opened.network(x, time, torch.tensor([4, 0])), expected)
    with pytest.raises(ValueError, match="no null class"):
        opened.network(x, time, None)


# --- what folders say -----------------------------------------------------------------------------

DDPM = {"name": "ddpm", "betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "steps": 1000}
CONVENTIONS: Mapping[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # pipeline, network, its config, scheduler -> expected
    "wan": (
        "WanPipeline",
        "WanTransformer3DModel",
        {},
        {
            "_class_name": "UniPCMultistepScheduler",
            "prediction_type": "flow_prediction",
            "num_train_timesteps": 1000,
        },
        {"interpolant": {"name": "rectified"}, "sign": 1, "clock": (1000.0, False)},
    ),
    "sana": (
        "SanaPipeline",
        "SanaTransformer2DModel",
        {"timestep_scale": 0.001},
        {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
        {"interpolant": {"name": "rectified"}, "sign": 1, "clock": (1.0, False)},
    ),
    "z-image": (
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"interpolant": {"name": "rectified"}, "sign": -1, "clock": (1.0, True)},
    ),
    "flow-u-net": (
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        {},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500},
        {"interpolant": {"name": "rectified"}, "sign": 1, "clock": (500.0, False)},
    ),
    "iddpm": (
        "DDPMPipeline",
        "UNet2DModel",
        {},
        {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
        {
            "interpolant": {**DDPM, "betas": "squaredcos_cap_v2", "steps": 100},
            "sign": 1,
            "clock": (1.0, False),
        },
    ),
    "zero-snr": (
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        {},
        {
            "_class_name": "EulerDiscreteScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
        },
        {
            "interpolant": {
                **DDPM,
                "betas": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "zero_terminal_snr": True,
            },
            "sign": 1,
            "clock": (1.0, False),
        },
    ),
}


@pytest.mark.parametrize("which", CONVENTIONS)
def test_conventions_are_read_from_configs(which: str) -> None:
    pipeline, name, config, scheduler, expected = CONVENTIONS[which]
    card = convention_of({"_class_name": pipeline}, name, config, scheduler)
    assert card.interpolant.model_dump(exclude_defaults=True, exclude={"name"}) == {
        key: value
        for key, value in expected["interpolant"].items()
        if key != "name" and value != DDPM.get(key)
    }
    assert (card.sign, card.clock.scale, card.clock.reversed) == (expected["sign"], *expected["clock"])
    assert card.prediction == ("v" if which == "zero-snr" else "eps" if which == "iddpm" else "velocity")


REFUSED = {
    "a consistency model": (
        "SanaTransformer2DModel",
        {"_class_name": "SCMScheduler"},
        "not that of a rectified flow",
    ),
    "a flow map": (
        "WanTransformer3DModel",
        {"_class_name": "FlowMapEulerDiscreteScheduler"},
        "not that of a rectified flow",
    ),
    "a diffusion scheduler of a flow": (
        "SD3Transformer2DModel",
        {"_class_name": "DDIMScheduler"},
        "rectified flow",
    ),
    "noise at sigma 0": (
        "FluxTransformer2DModel",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
        "rectified flow",
    ),
    "preconditioned": ("UNet2DConditionModel", {"_class_name": "EDMEulerScheduler"}, "unknown scheduler"),
    "own betas": ("UNet2DModel", {"_class_name": "DDPMScheduler", "trained_betas": [0.1]}, "trained_betas"),
    "other betas": ("UNet2DModel", {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "'sigmoid'"),
    "other prediction": (
        "UNet2DModel",
        {"_class_name": "DDPMScheduler", "prediction_type": "x"},
        "prediction_type",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_conventions_that_are_none_of_ours_are_refused(what: str) -> None:
    name, scheduler, words = REFUSED[what]
    with pytest.raises(ArtifactError, match=words):
        convention_of({}, name, {}, scheduler)


BROKEN: Mapping[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), MissingInput, "model_index.json: no such file"),
    "index is no object": (
        lambda f: (f / "model_index.json").write_text("[]"),
        ArtifactError,
        "not a JSON object",
    ),
    "two experts": (
        lambda f: (f / "model_index.json").write_text('{"boundary_ratio": 0.875}'),
        ArtifactError,
        "an expert for much noise",
    ),
    "no network": (
        lambda f: (f / "unet/config.json").unlink(),
        MissingInput,
        "neither transformer/config.json",
    ),
    "unknown network": (
        lambda f: (f / "unet/config.json").write_text('{"_class_name": "UNet3DModel"}'),
        ArtifactError,
        "did you mean 'UNet2DModel'",
    ),
    "no weights": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
        MissingInput,
        "no diffusion_pytorch_model.safetensors",
    ),
    "pickled weights": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(
            f / "unet/diffusion_pytorch_model.bin"
        ),
        MissingInput,
        "is a pickle, which is not read",
    ),
    "weights cut short": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"{}"),
        ArtifactError,
        "does not load",
    ),
    "weights of another": (
        lambda f: save_file({"conv.weight": torch.ones(1)}, f / "unet/diffusion_pytorch_model.safetensors"),
        ArtifactError,
        "missing keys: ",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders_are_refused_in_one_line(what: str, tmp_path: Path) -> None:
    damage, error, words = BROKEN[what]
    make(tmp_path, "UNet2DModel")
    damage(tmp_path)
    with pytest.raises(error, match=words) as caught:
        reopen(tmp_path, "UNet2DModel")
    assert len(str(caught.value).splitlines()) <= 2


def test_a_network_that_takes_more_than_a_latent_is_refused(tmp_path: Path) -> None:
    """Inpainting: 4 channels of latent, 4 of a picture, 1 of a mask."""
    make(tmp_path, "UNet2DConditionModel", in_channels=9)
    with pytest.raises(ArtifactError, match="unet: 9 channels in, 4 out"):
        reopen(tmp_path, "UNet2DConditionModel")


def test_names_that_are_neither_folder_nor_in_reach() -> None:
    with pytest.raises(MissingInput, match="no such folder"):
        pipelines.open_pipeline("no/such/folder", Options())
    with pytest.raises(MissingInput, match="not to be had from the hub"):
        pipelines.open_pipeline("nobody/nothing", Options())


def test_of_the_hub_only_data_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr(foreign.load("huggingface_hub"), "snapshot_download", fetch)
    assert hub.locate("owner/model-1.5@refs/pr/3", "unet") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model-1.5", "refs/pr/3")
    files = [
        "unet/model.safetensors",
        "unet/model.bin",
        "unet/config.json",
        "model.ckpt",
        "setup.py",
        "README.md",
    ]
    kept = [file for file in files if any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])]
    assert kept == ["unet/model.safetensors", "unet/config.json", "README.md"]


def test_half_precision_variants_and_shards_are_found(tmp_path: Path) -> None:
    model = make(tmp_path, "UNet2DModel")
    x, time = draw("UNet2DModel"), torch.tensor([3.0, 500.0])
    for saved in ({"variant": "fp16"}, {"max_shard_size": "10KB"}):
        for file in (tmp_path / "unet").glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(tmp_path / "unet", **saved)
        with torch.no_grad():
            found = reopen(tmp_path, "UNet2DModel").network(x, time, None)
            torch.testing.assert_close(found, model(x, time).sample)


def test_the_digest_follows_weights_configs_and_prompts(tmp_path: Path) -> None:
    make(tmp_path, "UNet2DConditionModel")
    options = Options(prompts=str(tmp_path / "embeddings.safetensors"))
    seen = {pipelines.identify(str(tmp_path), options)}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert pipelines.identify(str(tmp_path), options) in seen
    for file in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "embeddings.safetensors",
    ):
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes() + b" ")
        seen.add(pipelines.identify(str(tmp_path), options))
    seen.add(pipelines.identify(str(tmp_path), Options(prompts=options.prompts, pixels=(32, 32))))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: cc-by-nc-4.0\ntags: [x]\n---\n# Model", "cc-by-nc-4.0"),
        ("---\nlicense: other\nlicense_name: flux-1-dev\n---\n", "flux-1-dev"),
        ("# license: mit", "unknown"),
        (None, "unknown"),
    ],
)
def test_licences_of_model_cards(card: str | None, licence: str, tmp_path: Path) -> None:
    make(tmp_path, "UNet2DModel")
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert reopen(tmp_path, "UNet2DModel").card.licence == licence


# --- latents and pictures -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TINY if "autoencoder" in TINY[name]])
def test_decoded_pictures_are_the_pipelines(name: str, made: Made, tmp_path: Path) -> None:
    _, model, _ = made(name)
    make(tmp_path, name)
    config = dict(TINY[name]["autoencoder"])
    autoencoder = randomised(getattr(package(), config.pop("_class_name"))(**config))
    for key, buffer in autoencoder.named_buffers():
        if key.endswith(("_mean", "_var", "_std")):
            buffer.copy_(torch.linspace(0.5, 1.5, len(buffer)))
    autoencoder.save_pretrained(tmp_path / "vae")
    decode = Decoder(tmp_path)
    space, shape = decode.space, TINY[name]["shape"]
    frames = [(shape[1] - 1) * space.frame_factor + 1] if len(shape) == 4 else []
    size = (*frames, shape[-2] * space.factor, shape[-1] * space.factor)
    prompts_file = str(tmp_path / "embeddings.safetensors")
    opened = pipelines.open_pipeline(str(tmp_path), Options(prompts=prompts_file, pixels=size))
    assert opened.card.shape == tuple(shape) and opened.card.latent == space.latent
    pipe = pipeline(name, model, tmp_path, vae=autoencoder)
    given = conditions(name, load_file(prompts_file), False)
    # SANA's pipeline looks only whether the size is divisible by 32, where latents are given.
    asked = {"num_inference_steps": 2, "pixels": TINY[name]["pixels"] if name.startswith("Sana") else size}
    x = call(pipe, name, draw(name), False, **given, **asked)
    expected = call(pipe, name, draw(name), False, output_type="pt", **given, **asked)
    expected = expected.transpose(1, 2) if frames else expected
    result = decode(x) / 2 + 0.5
    assert result.shape == (2, 3, *size) and result.std() > 0.01
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


# --- prompts --------------------------------------------------------------------------------------


def spell(texts: str | list[str], *size: int) -> Tensor:
    """Numbers that depend on the text alone."""
    texts = [texts] if isinstance(texts, str) else texts
    return torch.stack(
        [torch.randn(*size, generator=torch.Generator().manual_seed(zlib.crc32(t.encode()))) for t in texts]
    )


def spelt(width: int) -> Callable[..., Tensor]:
    return lambda prompt, **options: spell(prompt, 7, width)


def masked(width: int, length: int = 7) -> Callable[..., tuple[Tensor, Tensor]]:
    def find(prompt: list[str], *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([3 + len(text) % 4 for text in prompt])
        return spell(prompt, length, width), torch.arange(length) < lengths[:, None]

    return find


ENCODERS: Mapping[str, dict[str, Callable[..., Any]]] = {
    "SD3Transformer2DModel": {
        "_get_clip_prompt_embeds": lambda prompt, **options: (spell(prompt, 5, 8), spell(prompt, 32)),
        "_get_t5_prompt_embeds": spelt(32),
    },
    "FluxTransformer2DModel": {
        "_get_clip_prompt_embeds": lambda prompt, **options: spell(prompt, 32),
        "_get_t5_prompt_embeds": spelt(32),
    },
    "Flux2Transformer2DModel": {"_get_mistral_3_small_prompt_embeds": spelt(32)},
    "QwenImageTransformer2DModel": {"_get_qwen_prompt_embeds": masked(16)},
    "ZImageTransformer2DModel": {
        "_encode_prompt": lambda prompt, **options: [spell(text, 3 + len(text) % 4, 16)[0] for text in prompt]
    },
    "Lumina2Transformer2DModel": {"_get_gemma_prompt_embeds": masked(16)},
    "SanaTransformer2DModel": {"_get_gemma_prompt_embeds": masked(8, 300)},
    "WanTransformer3DModel": {"_get_t5_prompt_embeds": spelt(16)},
    "LTXVideoTransformer3DModel": {"_get_t5_prompt_embeds": masked(16)},
}
"""What stands for the text encoders: methods of the pipelines that only they would be needed for."""


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_prompts_are_encoded_as_the_pipeline_would(
    name: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From text to latents: the pipeline's call, against a file of embeddings and our own Euler steps."""
    folder, model, _ = made(name)
    pipe = pipeline(name, model, folder)
    for method, stub in ENCODERS[name].items():
        monkeypatch.setattr(pipe, method, stub)
    monkeypatch.setattr(prompts, "_text_part", lambda folder, kind: pipe)
    texts, guided = ["a red cube", "two green spheres"], not name.startswith("Flux2")
    tensors = pipelines.encode(str(folder), texts)
    save_file(tensors, tmp_path / "texts.safetensors")
    opened = pipelines.open_pipeline(
        str(folder), Options(prompts=str(tmp_path / "texts.safetensors"), pixels=tuple(TINY[name]["pixels"]))
    )
    x = draw(name)
    negative = {"negative_prompt": ["", ""]} if name.startswith(("FluxT", "Qwen")) else {}
    if name.startswith("Sana"):
        negative = {"negative_prompt": ""}  # its own default
    expected = call(pipe, name, x, guided, prompt=texts, **negative)
    guidance = Guidance(scale=3.0) if name.startswith("FluxT") else opened.card.guidance
    result = euler(opened, x, sigmas(pipe), LABELS, guidance)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def clip(width: int) -> tuple[Any, Any]:
    """A tiny CLIP: its tokens are letters."""
    found = foreign.load("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = found.CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77
    )
    config = found.CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=len(names) - 2,
        eos_token_id=len(names) - 1,
    )
    return randomised(found.CLIPTextModel(config)), tokenizer


def test_a_whole_pipeline_from_text_to_latents(tmp_path: Path) -> None:
    """Saved as diffusers saves it, with a text encoder, which alone is read to encode."""
    name = "UNet2DConditionModel"
    model = make(tmp_path, name, changes={"steps_offset": 1, "clip_sample": False})
    encoder, tokenizer = clip(16)
    pipe = pipeline(name, model, tmp_path, text_encoder=encoder, tokenizer=tokenizer)
    pipe.save_pretrained(tmp_path)
    texts = ["a red cube", "two green spheres"]
    tensors = pipelines.encode(str(tmp_path), texts, negative="blurry")
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "prompt_embeds": (2, 77, 16),
        "null.prompt_embeds": (1, 77, 16),
    }
    save_file(tensors, tmp_path / "embeddings.safetensors")
    opened = reopen(tmp_path, name)
    x = draw(name)
    expected = call(pipe, name, x, True, prompt=texts, negative_prompt=["blurry"] * 2, num_inference_steps=1)
    index = int(pipe.scheduler.timesteps[0])
    convention = convention_in(opened)
    alpha, sigma = convention.interpolant.alpha_sigma(torch.tensor([index], dtype=torch.float64))
    z = x.double() / float(alpha + sigma)
    t = (sigma / (alpha + sigma)).expand(2)
    with torch.no_grad():
        v = convention.canonical(lambda x, time: opened.network(x, time, LABELS), z, t)
        null = convention.canonical(lambda x, time: opened.network(x, time, None), z, t)
    assert opened.card.guidance is not None
    result = z - float(t[0]) * opened.card.guidance.combine(v, null, t)
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=1e-4)
    assert "null.prompt_embeds" not in pipelines.encode(str(tmp_path), texts, guided=False)


def edit(**changes: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {**tensors, **{key.replace("__", "."): value for key, value in changes.items()}}
        return {key: value for key, value in changed.items() if value is not None}

    return change


EMBEDDINGS: Mapping[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no prompts": ("SanaTransformer2DModel", edit(prompt_embeds=None), "has no tensor 'prompt_embeds'"),
    "a name misspelt": (
        "SanaTransformer2DModel",
        edit(prompt_embedding=torch.ones(1)),
        "did you mean 'prompt_embeds'",
    ),
    "not three-dimensional": (
        "SanaTransformer2DModel",
        edit(prompt_embeds=torch.ones(7, 8)),
        r"is \[7, 8\], expected",
    ),
    "another width": ("WanTransformer3DModel", edit(prompt_embeds=torch.ones(2, 7, 15)), "expected"),
    "pooled is missing": (
        "FluxTransformer2DModel",
        edit(pooled=None, null__pooled=None),
        "pooled is not there",
    ),
    "pooled is too much": (
        "WanTransformer3DModel",
        edit(pooled=torch.ones(2, 4), null__pooled=torch.ones(1, 4)),
        r"pooled is \[2, 4\], expected none",
    ),
    "pooled of one alone": ("FluxTransformer2DModel", edit(null__pooled=None), "null.pooled is not there"),
    "many null prompts": (
        "WanTransformer3DModel",
        edit(null__prompt_embeds=torch.ones(2, 7, 16)),
        "must have one row, found 2",
    ),
    "lengths without a mask": (
        "WanTransformer3DModel",
        edit(null__prompt_embeds=torch.ones(1, 6, 16)),
        "both must be as long",
    ),
    "a mask with gaps": (
        "Lumina2Transformer2DModel",
        edit(prompt_mask=torch.tensor([[True] * 7, [True, False, True] + [False] * 4])),
        "true at the first tokens",
    ),
    "a mask of another length": (
        "Lumina2Transformer2DModel",
        edit(prompt_mask=torch.ones(2, 6, dtype=torch.bool)),
        r"prompt_mask is \[2, 6\]",
    ),
}


@pytest.mark.parametrize("what", EMBEDDINGS)
def test_embeddings_that_do_not_fit_are_refused(what: str, made: Made, tmp_path: Path) -> None:
    name, change, words = EMBEDDINGS[what]
    folder, model, _ = made(name)
    path = tmp_path / "changed.safetensors"
    save_file(change(load_file(folder / "embeddings.safetensors")), path)
    with pytest.raises(ArtifactError, match=words) as caught:
        prompts.table(prompts.read(path), FAMILIES[name], model.config, str(path))
    assert str(path) in str(caught.value)


def test_prompts_of_any_length_share_a_table_where_there_is_a_mask(made: Made) -> None:
    """A longer null prompt: rows are padded, which changes nothing for the shorter."""
    name = "QwenImageTransformer2DModel"
    folder, model, opened = made(name)
    tensors = load_file(folder / "embeddings.safetensors")
    del tensors["null.prompt_mask"]
    tensors["null.prompt_embeds"] = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(5))
    table = prompts.table(tensors, FAMILIES[name], model.config, "file")
    assert (table.prompts, table.tokens, table.null) == (2, 9, True)
    assert table.buffers["prompt_mask"].sum(1).tolist() == [7, 4, 9]
    network = DiffusersModel(**{**opened.card.arguments, "tokens": 9})
    network.load_state_dict(
        {
            **opened.network.state_dict(),
            **{f"conditions.{key}": value for key, value in table.buffers.items()},
        }
    )
    x, time = draw(name), torch.tensor([0.7, 0.3])
    with torch.no_grad():
        torch.testing.assert_close(network(x, time, LABELS), opened.network(x, time, LABELS))


def test_without_a_null_prompt_there_is_no_guidance(made: Made, tmp_path: Path) -> None:
    name = "WanTransformer3DModel"
    folder, _, opened = made(name)
    tensors = load_file(folder / "embeddings.safetensors")
    save_file({"prompt_embeds": tensors["prompt_embeds"]}, tmp_path / "texts.safetensors")
    options = Options(prompts=str(tmp_path / "texts.safetensors"), pixels=tuple(TINY[name]["pixels"]))
    bare = pipelines.open_pipeline(str(folder), options)
    assert bare.card.guidance is None and opened.card.guidance is not None
    with pytest.raises(ValueError, match="there is no null prompt"):
        bare.network(draw(name), torch.tensor([700.0, 300.0]), None)


def test_options_that_do_not_fit_are_refused(made: Made) -> None:
    folder, _, _ = made("WanTransformer3DModel")
    prompts_file = str(folder / "embeddings.safetensors")
    pixels: tuple[int, ...]
    for pixels, words in (
        ((64, 64), "frames, height and width"),
        ((5, 64, 60), "divisible by 16"),
        ((6, 64, 64), "6 frames must be one more than a multiple of 4"),
        ((0, 64, 64), "found"),
    ):
        with pytest.raises(UsageError, match=words):
            pipelines.open_pipeline(str(folder), Options(prompts=prompts_file, pixels=pixels))
    with pytest.raises(UsageError, match="no embedded guidance"):
        pipelines.open_pipeline(str(folder), Options(prompts=prompts_file, embedded_guidance=3.0))
    with pytest.raises(MissingInput, match="give prompts"):
        pipelines.open_pipeline(str(folder), Options())


NETWORKS: Mapping[str, tuple[dict[str, Any], str]] = {
    "a class of no family": ({"name": "UNet1DModel", "config": {}}, "no such family"),
    "an unknown key": ({"config": {"depth": 3}}, "no config key 'depth'"),
    "inpainting": ({"config": {**TINY["UNet2DModel"]["config"], "in_channels": 9}}, "9 channels in, 3 out"),
    "prompts": ({"prompts": 2}, "not conditioned on text"),
    "constants": ({"constants": {"guidance": 3.5}}, "constants are guidance, expected none"),
    "no prompts": (
        {"name": "WanTransformer3DModel", "config": TINY["WanTransformer3DModel"]["config"]},
        "on text",
    ),
}


@pytest.mark.parametrize("what", NETWORKS)
def test_arguments_that_do_not_fit_are_refused(what: str) -> None:
    changes, words = NETWORKS[what]
    arguments = {"name": "UNet2DModel", "config": TINY["UNet2DModel"]["config"], **changes}
    with pytest.raises(ArtifactError, match=words):
        networks.build(pipelines.ARCHITECTURE, arguments)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingInput, match="package 'nowhere_to_be_found' is not installed"):
        foreign.load("nowhere_to_be_found")
    with pytest.raises(MissingInput, match=f"diffusers {package().__version__} has no 'FluxCapacitor'"):
        foreign.member("diffusers", "FluxCapacitor")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingInput, match=r"pip install 'flowdistill\[diffusers\]'"):
        foreign.load("diffusers")
