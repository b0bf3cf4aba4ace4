"""Pipelines of diffusers as teachers: `diffusers:PATH-OR-ID`.

What a pipeline's folder says is read, never assumed: the network's class and config, its scheduler, the
normalisation of its autoencoder, its licence. Importing this module imports neither torch nor diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from flowdistill import artifact, foreign
from flowdistill.errors import ArtifactError, MissingInput, UsageError, unknown
from flowdistill.settings import Settings
from flowdistill.teachers import hub, latents, prompts
from flowdistill.teachers.cards import Card
from flowdistill.teachers.families import FLOWS, UNETS, convention_of, guidance_of
from flowdistill.teachers.latents import Space

if TYPE_CHECKING:
    from flowdistill.networks.diffusersmodel import DiffusersModel

ARCHITECTURE = "diffusersmodel"


_PARTS = ("transformer", "unet", "scheduler", "vae")
"""Folders that a teacher is read from."""


class Options(Settings):
    """What is not in a pipeline's folder."""

    prompts: str | None = Field(
        None, description="safetensors file of embeddings, for networks that read text"
    )
    pixels: tuple[int, ...] | None = Field(
        None,
        description="[height, width] of samples, of videos [frames, height, width]; default: the pipeline's",
    )
    embedded_guidance: float | None = Field(
        None,
        ge=0,
        description="scale that a guidance-distilled network (FLUX) is told; default: the pipeline's",
    )
    frames_a_second: float = Field(25.0, gt=0, description="of videos, where the network is told (LTX)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights in memory"
    )


@dataclass(frozen=True)
class Opened:
    """A pipeline as a model: its card, and the raw network with the weights in it, that the card describes.

    `networks.build(card.architecture, card.arguments)` rebuilds the network. `folder` is where it was read
    from, and where `latents.Decoder` finds the autoencoder.
    """

    card: Card
    network: DiffusersModel
    folder: Path


def identify(source: str, options: Options) -> str:
    """SHA-256 that changes whenever what `open_pipeline` gives does; without torch."""
    folder = hub.locate(source, *_PARTS)
    return artifact.digest(
        {
            "pipeline": hub.digest(folder, _PARTS),
            "index": artifact.sha256(folder / "model_index.json"),
            "prompts": artifact.sha256(Path(options.prompts)) if options.prompts else None,
            "options": options.model_dump(mode="json", exclude={"prompts"}),
        }
    )


def open_pipeline(source: str, options: Options) -> Opened:
    """Open the pipeline in a folder, or of a hub id OWNER/NAME or OWNER/NAME@REVISION.

    Raises `MissingInput` where a file or package is not there, `ArtifactError` for content that does not fit
    together or is not supported, `UsageError` for options that do not fit the network.
    """
    import torch

    from flowdistill.networks.diffusersmodel import FAMILIES

    folder = hub.locate(source, *_PARTS)
    index, part = _index(folder), _part(folder)
    stated = hub.config(part / "config.json")
    name = _class_name(stated, part)
    scheduler = hub.config(folder / "scheduler" / "scheduler_config.json")
    convention = convention_of(index, name, stated, scheduler)
    model = hub.weights(foreign.member("diffusers", name), part, getattr(torch, options.dtype))
    config, family = model.config, FAMILIES[name]
    try:
        channels = family.channels(config)
    except ValueError as error:
        raise ArtifactError(f"{part}: {error}") from error
    space = latents.of_pipeline(folder)
    pixels = _pixels(name, config, space, options)
    table = _table(family, config, options, f"{folder}")
    constants = _constants(name, family.constants(config), pixels, space, options)
    arguments = {
        "name": name,
        "config": _plain(model, config),
        "prompts": table.prompts,
        "tokens": table.tokens,
        "null": table.null,
        "constants": constants,
    }
    card = Card(
        architecture=ARCHITECTURE,
        arguments=arguments,
        convention=convention,
        shape=(channels, *_size(name, pixels, space, _multiple(config, family.packing))),
        classes=table.prompts or config.get("num_class_embeds") or 0,
        guidance=guidance_of(index, name, config, table.null),
        latent=space.latent if space else None,
        distilled="guidance" in constants or index.get("_class_name") == "RectifiedFlowPipeline",
        licence=hub.licence(folder) or "unknown",
    )
    return Opened(card, _assemble(arguments, model, table), folder)


def encode(
    source: str, texts: Sequence[str], negative: str | None = None, guided: bool = True
) -> dict[str, Any]:
    """Embeddings of `texts` by the pipeline's own encoders, the tensors of a file; see `prompts.encode`."""
    folder = hub.locate(
        source, *(f"{kind}{nth}" for kind in ("tokenizer", "text_encoder") for nth in ("", "_2", "_3"))
    )
    return prompts.encode(folder, str(_index(folder).get("_class_name")), texts, negative, guided)


# --- what the folder says -------------------------------------------------------------------------


def _index(folder: Path) -> dict[str, Any]:
    index = hub.config(folder / "model_index.json")
    if index.get("boundary_ratio") is not None:
        raise ArtifactError(
            f"{folder}: has an expert for much noise and one for little, which is not supported"
        )
    return index


def _part(folder: Path) -> Path:
    """The folder of the network."""
    for part in ("transformer", "unet"):
        if (folder / part / "config.json").is_file():
            return folder / part
    raise MissingInput(f"{folder}: has neither transformer/config.json nor unet/config.json")


def _class_name(config: Mapping[str, Any], part: Path) -> str:
    name = str(config.get("_class_name"))
    if name not in (*FLOWS, *UNETS):
        raise ArtifactError(f"{part}: {unknown('network of diffusers', name, (*FLOWS, *UNETS))}")
    return name


# --- sizes ----------------------------------------------------------------------------------------


def _factors(name: str, space: Space | None) -> tuple[int, int]:
    """Frames that a latent frame stands for, and pixels along the side of a place."""
    if space is not None:
        return space.frame_factor, space.factor
    if name in FLOWS:
        return FLOWS[name].factors
    return 1, 8 if name == "UNet2DConditionModel" else 1


def _pixels(name: str, config: Mapping[str, Any], space: Space | None, options: Options) -> tuple[int, ...]:
    """Size of samples in pixels, (height, width) or (frames, height, width)."""
    dims = len(FLOWS[name].pixels) if name in FLOWS else 2
    if options.pixels is not None:
        if len(options.pixels) != dims or min(options.pixels) < 1:
            what = "frames, height and width" if dims == 3 else "height and width"
            raise UsageError(f"pixels must be {what}, found {list(options.pixels)}")
        return tuple(options.pixels)
    side = config.get("sample_size")
    if side is None:
        if name not in FLOWS:
            raise UsageError("the network's config has no sample_size: give pixels [height, width]")
        return FLOWS[name].pixels
    places = (side, side) if isinstance(side, int) else tuple(side)
    return tuple(place * _factors(name, space)[1] for place in places)


def _size(name: str, pixels: Sequence[int], space: Space | None, multiple: int) -> tuple[int, ...]:
    """The same in places of the latent; `multiple` places along a side are a token."""
    frame_factor, factor = _factors(name, space)
    *frames, height, width = pixels
    if height % (factor * multiple) or width % (factor * multiple):
        raise UsageError(f"height {height} and width {width} must be divisible by {factor * multiple}")
    for count in frames:
        if (count - 1) % frame_factor:
            raise UsageError(f"{count} frames must be one more than a multiple of {frame_factor}")
    return (*((count - 1) // frame_factor + 1 for count in frames), height // factor, width // factor)


def _multiple(config: Mapping[str, Any], packing: int) -> int:
    """Places along the side of a token."""
    if packing > 1:
        return math.isqrt(packing)
    patch = config.get("patch_size") or config.get("all_patch_size") or 1
    return int(patch if isinstance(patch, int) else patch[-1])


# --- the network ----------------------------------------------------------------------------------


def _table(family: Any, config: Mapping[str, Any], options: Options, where: str) -> prompts.Table:
    if not family.width(config):
        if options.prompts is not None:
            raise UsageError(f"{where}: its network is not conditioned on text, prompts must be left out")
        return prompts.Table({})
    if options.prompts is None:
        raise MissingInput(
            f"{where}: its network is conditioned on text; give prompts, a safetensors file of embeddings"
        )
    return prompts.table(prompts.read(Path(options.prompts)), family, config, str(options.prompts))


def _constants(
    name: str, wanted: Sequence[str], pixels: Sequence[int], space: Space | None, options: Options
) -> dict[str, Any]:
    """The numbers that the network is conditioned on besides the prompt."""
    if options.embedded_guidance is not None and "guidance" not in wanted:
        raise UsageError("this network has no embedded guidance; use a guidance scale and a null prompt")
    frame_factor, factor = _factors(name, space)
    height, width = pixels[-2:]
    given = options.embedded_guidance
    values = {
        "guidance": given if given is not None or name not in FLOWS else FLOWS[name].embedded,
        "time_ids": [height, width, 0, 0, height, width],
        "rope_interpolation_scale": [frame_factor / options.frames_a_second, factor, factor],
    }
    return {key: values[key] for key in wanted}


def _plain(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's entries that the constructor takes, tuples as lists, as they come back from JSON."""
    import inspect
    import json

    accepted = inspect.signature(type(model).__init__).parameters
    kept = {key: value for key, value in config.items() if key in accepted}
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def _assemble(arguments: Mapping[str, Any], model: Any, table: prompts.Table) -> DiffusersModel:
    """The adapter around a network that has its weights."""
    from accelerate import init_empty_weights

    from flowdistill.networks.diffusersmodel import DiffusersModel

    with init_empty_weights():
        network = DiffusersModel(**arguments)
    network.model = model
    for name, values in table.buffers.items():
        setattr(network.conditions, name, values)
    return network
