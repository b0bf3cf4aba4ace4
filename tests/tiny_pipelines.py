"""Pipelines of diffusers with tiny random networks: folders, and their own way from noise to latents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowdistill import foreign
from flowdistill.networks.diffusersmodel import FAMILIES
from flowdistill.teachers import pipelines
from flowdistill.teachers.pipelines import Opened, Options

TINY = json.loads((Path(__file__).parent / "fixtures/diffusers/tiny.json").read_text())
"""Class of network -> its config, scheduler, pipeline, and a latent shape with its size in pixels."""
TRANSFORMERS = [name for name in TINY if "Transformer" in name]
STEPS = 4


@cache
def package() -> Any:
    found = foreign.load("diffusers")
    found.utils.logging.set_verbosity_error()
    found.utils.logging.disable_progress_bar()
    return found


# --- folders --------------------------------------------------------------------------------------


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """Weights drawn anew: fresh networks have an output of zero, which agrees with everything.

    Those of norms are near 1, or attention would hardly attend, and positions hardly matter.
    """
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scales = weight.ndim == 1 and name.endswith("weight")
            spread = min(0.13, (weight[0].numel() if weight.ndim > 1 else 1) ** -0.5)
            weight.copy_(spread * torch.randn(weight.shape, generator=source) + scales)
    return model.eval()


def embeddings(name: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Two prompts and a null prompt, of different lengths where the network heeds a mask."""
    family, source = FAMILIES[name], torch.Generator().manual_seed(2)
    width, pooled = family.width(config), family.pooled(config)
    tensors = {
        "prompt_embeds": torch.randn(2, 7, width, generator=source),
        "null.prompt_embeds": torch.randn(1, 7, width, generator=source),
    }
    if pooled:
        tensors["pooled"] = torch.randn(2, pooled, generator=source)
        tensors["null.pooled"] = torch.randn(1, pooled, generator=source)
    if family.masked:
        tensors["prompt_mask"] = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
        tensors["null.prompt_mask"] = torch.tensor([[True] * 5 + [False] * 2])
    return tensors


def make(
    folder: Path, name: str, scheduler: str = "", changes: Mapping[str, Any] | None = None, **config: Any
) -> nn.Module:
    """A pipeline's folder with a tiny network, and embeddings.safetensors; the network is returned."""
    tiny = TINY[name]
    model = randomised(getattr(package(), name)(**{**tiny["config"], **config}))
    flow = name in TRANSFORMERS
    scheduler = scheduler or ("FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler")
    model.save_pretrained(folder / ("transformer" if flow else "unet"))
    getattr(package(), scheduler)(**tiny["scheduler"], **(changes or {})).save_pretrained(
        folder / "scheduler"
    )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": tiny["pipeline"]}))
    if FAMILIES[name].width(model.config):
        save_file(embeddings(name, model.config), folder / "embeddings.safetensors")
    return model


def reopen(folder: Path, name: str, **options: Any) -> Opened:
    prompts = folder / "embeddings.safetensors"
    return pipelines.open_pipeline(
        str(folder),
        Options(
            prompts=str(prompts) if prompts.exists() else None, pixels=tuple(TINY[name]["pixels"]), **options
        ),
    )


def draw(name: str, batch: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(batch, *TINY[name]["shape"], generator=torch.Generator().manual_seed(seed))


# --- the pipelines' own way -----------------------------------------------------------------------


def pack(x: Tensor) -> Tensor:
    """Tokens of 2 x 2 places, channels slowest: FLUX.1, Qwen-Image."""
    return nn.functional.unfold(x, 2, stride=2).transpose(1, 2)


def ragged(tensors: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    embeds, mask = tensors[prefix + "prompt_embeds"], tensors[prefix + "prompt_mask"]
    return [row[: int(count)] for row, count in zip(embeds, mask.sum(1), strict=True)]


def twice(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One group of embeddings; the null prompt for both samples."""
    found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value.expand(2, *value.shape[1:]) for key, value in found.items()}


def conditions(name: str, tensors: Mapping[str, Tensor], guided: bool) -> dict[str, Any]:
    """Embeddings under the names that the pipeline's call has for them."""
    if name == "ZImageTransformer2DModel":
        null = ragged(tensors, "null.") * 2 if guided else None
        return {"prompt_embeds": ragged(tensors, ""), "negative_prompt_embeds": null}
    mask = "prompt_embeds_mask" if name.startswith("Qwen") else "prompt_attention_mask"
    theirs = {"prompt_embeds": "prompt_embeds", "prompt_mask": mask, "pooled": "pooled_prompt_embeds"}
    given = {theirs[key]: value for key, value in tensors.items() if key in theirs}
    if guided:
        null = twice(tensors, "null.")
        given |= {f"negative_{theirs[key]}": value for key, value in null.items()}
    return given


def pipeline(name: str, model: nn.Module, folder: Path, **parts: Any) -> Any:
    """The pipeline with its network and scheduler, and with no other parts than those given."""
    kind = getattr(package(), TINY[name]["pipeline"])
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    scheduler = getattr(package(), config["_class_name"]).from_pretrained(folder / "scheduler")
    part = "transformer" if name in TRANSFORMERS else "unet"
    settings = {"boundary_ratio", "expand_timesteps", "requires_safety_checker"}
    absent = {key: None for key in kind.__init__.__annotations__.keys() - settings}
    pipe = kind(**{**absent, part: model, "scheduler": scheduler, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


# By default FLUX.1 has no true guidance, and SANA wants certain sizes and to hear of no negative prompt.
SPECIAL: Mapping[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {"true_cfg_scale": 3.0},
    "SanaTransformer2DModel": {"use_resolution_binning": False, "negative_prompt": None},
}
UNGUIDED: Mapping[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {"true_cfg_scale": 1.0},
    "QwenImageTransformer2DModel": {"true_cfg_scale": 1.0},
    "Flux2Transformer2DModel": {},
    "ZImageTransformer2DModel": {"guidance_scale": 0.0},
}


def packed(name: str, x: Tensor) -> Tensor:
    """Latents as the pipeline's call takes them."""
    if name.startswith(("FluxT", "Qwen")):
        return pack(x)
    return x.flatten(2).transpose(1, 2) if name.startswith("LTX") else x


def call(pipe: Any, name: str, x: Tensor, guided: bool, **arguments: Any) -> Tensor:
    """What the pipeline makes of latents x, by its own default guidance or none, in space."""
    *frames, height, width = arguments.pop("pixels", TINY[name]["pixels"])
    result: Tensor = pipe(
        **{
            **SPECIAL.get(name, {}),
            **({} if guided else UNGUIDED.get(name, {"guidance_scale": 1.0})),
            "height": height,
            "width": width,
            **({"num_frames": frames[0]} if frames else {}),
            "output_type": "latent",
            "num_inference_steps": STEPS,
            **arguments,
        },
        latents=packed(name, x),
        return_dict=False,
    )[0]
    if result.ndim == 3 and name.startswith(("FluxT", "Qwen")):
        return nn.functional.fold(result.transpose(1, 2), x.shape[-2:], 2, stride=2)
    return result.transpose(1, 2).unflatten(2, x.shape[2:]) if result.ndim == 3 else result


def run(
    name: str, model: nn.Module, folder: Path, x: Tensor, guided: bool, **extra: Any
) -> tuple[Tensor, list[float]]:
    """The pipeline's latents from x for the folder's embeddings, and the sigmas that it went through."""
    pipe = pipeline(name, model, folder)
    given = conditions(name, load_file(folder / "embeddings.safetensors"), guided)
    return call(pipe, name, x, guided, **given, **extra), sigmas(pipe)


def sigmas(pipe: Any) -> list[float]:
    return [float(sigma) for sigma in getattr(pipe.scheduler, "sigmas", ())]
