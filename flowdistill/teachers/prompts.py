"""Prompts as numbers: a safetensors file of embeddings, made once, whose rows are a network's labels.

Tensors of the file, floats of any width:

    prompt_embeds       [P, L, D]  one row a prompt
    prompt_mask         [P, L]     which of the L count; for networks that heed a mask, default all
    pooled              [P, D']    for networks that take a pooled embedding (SD3, FLUX.1, SDXL)
    null.prompt_embeds  [1, N, D]  the empty or negative prompt, for guidance, and its mask and pooled

`encode` makes them with the encoders of a pipeline's own folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdistill import artifact, foreign
from flowdistill.errors import ArtifactError, MissingInput, UsageError, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.networks.diffusersmodel import Family

_NAMES = ("prompt_embeds", "prompt_mask", "pooled")
_NULL = "null."

_PAIRS = ("prompt_embeds", "null.prompt_embeds")
_POOLED_PAIRS = (*_PAIRS, "pooled", "null.pooled")
_MASKED_PAIRS = ("prompt_embeds", "prompt_mask", "null.prompt_embeds", "null.prompt_mask")
_RETURNED: Mapping[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": _PAIRS,
    "StableDiffusionXLPipeline": _POOLED_PAIRS,
    "StableDiffusion3Pipeline": _POOLED_PAIRS,
    "FluxPipeline": ("prompt_embeds", "pooled"),
    "Flux2Pipeline": ("prompt_embeds",),
    "Flux2KleinPipeline": ("prompt_embeds",),
    "QwenImagePipeline": ("prompt_embeds", "prompt_mask"),
    "ZImagePipeline": _PAIRS,
    "Lumina2Pipeline": _MASKED_PAIRS,
    "SanaPipeline": _MASKED_PAIRS,
    "LTXPipeline": _MASKED_PAIRS,
    "WanPipeline": _PAIRS,
}
"""What `encode_prompt` of each pipeline returns, in its order."""
_NOT_FOR_TEXT = (
    "transformer",
    "transformer_2",
    "unet",
    "vae",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)


@dataclass(frozen=True)
class Table:
    """Embeddings as the buffers of `networks.diffusersmodel.Conditions`, and their sizes."""

    buffers: dict[str, Tensor]
    prompts: int = 0
    tokens: int = 0
    null: bool = False


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of embeddings."""
    tensors, _ = artifact.load_tensors(path)
    known = [*_NAMES, *(_NULL + name for name in _NAMES)]
    for name in tensors:
        if name not in known:
            raise ArtifactError(f"{path}: {unknown('tensor', name, known)}")
    if "prompt_embeds" not in tensors:
        raise ArtifactError(f"{path}: has no tensor 'prompt_embeds' [prompts, tokens, width]")
    return tensors


def table(tensors: Mapping[str, Tensor], family: Family, config: Mapping[str, Any], where: str) -> Table:
    """The tensors of a file as the table of a network; `where` names the file in errors.

    Rows of different lengths are padded where the network heeds a mask, and refused where it does not.
    """
    import torch

    null = any(name.startswith(_NULL) for name in tensors)
    groups = [_group(tensors, prefix, family, config, where) for prefix in ("", _NULL)[: 1 + null]]
    lengths = [group["prompt_embeds"].shape[1] for group in groups]
    if null and len(groups[1]["prompt_embeds"]) != 1:
        found = len(groups[1]["prompt_embeds"])
        raise ArtifactError(f"{where}: null.prompt_embeds must have one row, found {found}")
    if len(set(lengths)) > 1 and not family.masked:
        raise ArtifactError(
            f"{where}: prompts have {lengths[0]} tokens, the null prompt {lengths[1]}; "
            "this network has no mask, so both must be as long"
        )
    buffers = {
        name: torch.cat([_padded(group[name], max(lengths), name) for group in groups]) for name in groups[0]
    }
    return Table(buffers, len(groups[0]["prompt_embeds"]), max(lengths), null)


def encode(
    folder: Path, kind: str, prompts: Sequence[str], negative: str | None = None, guided: bool = True
) -> dict[str, Tensor]:
    """Embeddings of `prompts` by the encoders of the pipeline in `folder`, of class `kind` in diffusers.

    Everything about the text is as the pipeline itself has it by default: templates, lengths, layers.
    `negative` is the null prompt, None the pipeline's own; without `guided` there is none. The tensors are
    those of a file.
    """
    import torch

    pipeline = _text_part(folder, kind)
    names = _RETURNED[_text_class(kind)]
    inside = any(name.startswith(_NULL) for name in names)
    own = {} if negative is None else {"negative_prompt": [negative] * len(prompts)}
    with torch.no_grad():
        tensors = _encoded(pipeline, names, list(prompts), do_classifier_free_guidance=guided, **own)
        if guided and not inside:
            null = _encoded(pipeline, names, [negative or ""])
            tensors |= {_NULL + name: value for name, value in null.items()}
    return {
        name: (value[:1] if name.startswith(_NULL) else value).contiguous() for name, value in tensors.items()
    }


def _encoded(pipeline: Any, names: Sequence[str], prompts: list[str], **options: Any) -> dict[str, Tensor]:
    """What the pipeline's `encode_prompt` returns, by name; arguments that it lacks are left out."""
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    offered = {
        **{name: p.default for name, p in inspect.signature(pipeline.__call__).parameters.items()},
        "device": "cpu",
        **options,
        "prompt": prompts,
    }
    returned = pipeline.encode_prompt(
        **{
            name: value
            for name, value in offered.items()
            if name in accepted and value is not inspect.Parameter.empty
        }
    )
    tensors: dict[str, Tensor] = {}
    for name, value in zip(names, returned, strict=False):
        if isinstance(value, list):
            tensors |= _stacked(name, value)
        elif value is not None:
            tensors[name] = value
    return tensors


def _stacked(name: str, rows: list[Tensor]) -> dict[str, Tensor]:
    """Embeddings of different lengths as one tensor and its mask."""
    import torch

    if not rows:
        return {}
    longest = max(map(len, rows))
    embeds = torch.stack([_padded(row[None], longest, name)[0] for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(longest)] for row in rows])
    return {name: embeds, name.replace("prompt_embeds", "prompt_mask"): mask}


def _text_class(kind: str) -> str:
    return "StableDiffusionPipeline" if kind == "RectifiedFlowPipeline" else kind


def _text_part(folder: Path, kind: str) -> Any:
    """The pipeline without what only pictures need."""
    name = _text_class(kind)
    if name not in _RETURNED:
        raise UsageError(unknown("pipeline with encoders", name, _RETURNED))
    foreign.load("transformers")
    constructor = foreign.member("diffusers", name)
    accepted = inspect.signature(constructor.__init__).parameters
    left_out = {part: None for part in _NOT_FOR_TEXT if part in accepted}
    try:
        return constructor.from_pretrained(folder, use_safetensors=True, local_files_only=True, **left_out)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise MissingInput(
            f"{folder}: its text encoders do not load ({str(error).splitlines()[0]}); "
            "give the embeddings in a file instead"
        ) from error


def _group(
    tensors: Mapping[str, Tensor], prefix: str, family: Family, config: Mapping[str, Any], where: str
) -> dict[str, Tensor]:
    """The tensors of the prompts or of the null prompt, as the network takes them, without prefix."""
    import torch

    group = {name: tensors[prefix + name] for name in _NAMES if prefix + name in tensors}
    embeds = group.get("prompt_embeds")
    rows, tokens = embeds.shape[:2] if embeds is not None and embeds.ndim == 3 else (1, 1)
    wanted: dict[str, tuple[int, ...]] = {
        "prompt_embeds": (max(rows, 1), max(tokens, 1), family.width(config))
    }
    if family.masked:
        wanted["prompt_mask"] = (rows, tokens)
        group.setdefault("prompt_mask", torch.ones(rows, tokens))
    if family.pooled(config):
        wanted["pooled"] = (rows, family.pooled(config))
    for name in _NAMES:
        found = tuple(group[name].shape) if name in group else None
        if found != wanted.get(name):
            raise ArtifactError(
                f"{where}: {prefix}{name} is {list(found) if found else 'not there'}, "
                f"expected {list(wanted[name]) if name in wanted else 'none'}"
            )
    if family.masked:
        _refuse_gaps(group["prompt_mask"].bool(), f"{where}: {prefix}prompt_mask")
    return {name: value.bool() if name == "prompt_mask" else value.float() for name, value in group.items()}


def _padded(value: Tensor, tokens: int, name: str) -> Tensor:
    """Zeros, or False, after the tokens of embeddings or masks."""
    import torch

    if name.endswith("pooled"):
        return value
    missing = value.new_zeros(len(value), tokens - value.shape[1], *value.shape[2:])
    return torch.cat([value, missing], dim=1)


def _refuse_gaps(mask: Tensor, where: str) -> None:
    """Rotary positions and trimming take it that the embeddings that count come first."""
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask[:, 0].all()):
        raise ArtifactError(f"{where} must be true at the first tokens of a row and false after")
