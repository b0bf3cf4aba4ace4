"""Folders of diffusers' format, on this disk or on the Hugging Face Hub: configs, weights, licence.

Of what such a folder can hold only JSON and safetensors are read; nothing in it is executed. A hub id is
fetched by `huggingface_hub`, which heeds HF_HUB_OFFLINE and keeps what it has fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdistill import artifact, foreign
from flowdistill.errors import ArtifactError, MissingInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_WEIGHTS = "diffusion_pytorch_model"
_CONFIG_BYTES_AT_MOST = 10_000_000


def locate(source: str, *parts: str) -> Path:
    """The folder of `source`: itself, or the snapshot of the hub id `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Of a hub id the configs, the model card and the folders `parts` are fetched.
    """
    if Path(source).is_dir():
        return Path(source)
    match = _ID.fullmatch(source)
    if match is None:
        raise MissingInput(f"{source}: no such folder; expected one, or a hub id OWNER/NAME")
    hub = foreign.load("huggingface_hub")
    kinds = ("safetensors", "txt", "model")  # weights; two of the kinds of vocabulary, the rest is JSON
    wanted = ["*.json", "README.md", *(f"{part}/*.{kind}" for part in parts for kind in kinds)]
    try:
        return Path(hub.snapshot_download(match["id"], revision=match["revision"], allow_patterns=wanted))
    except (OSError, hub.errors.HfHubHTTPError, hub.errors.HFValidationError) as error:
        raise MissingInput(
            f"{source}: not a folder, and not to be had from the hub ({str(error).splitlines()[0]})"
        ) from error


def config(path: Path) -> dict[str, Any]:
    """A JSON object of a few kilobytes."""
    with artifact.opened(path) as file:
        data = file.read(_CONFIG_BYTES_AT_MOST + 1)
    try:
        content = json.loads(data) if len(data) <= _CONFIG_BYTES_AT_MOST else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: not a JSON object of a model's config")
    return content


def weights(constructor: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of class `constructor` in `folder`, from safetensors alone; every weight must be there."""
    import torch

    (first, *_) = _files(folder)
    variant = first.name.removesuffix(".safetensors").removeprefix(_WEIGHTS).partition("-0")[0].strip(".")
    try:
        model, report = constructor.from_pretrained(
            folder,
            torch_dtype=dtype or torch.float32,
            use_safetensors=True,
            local_files_only=True,
            variant=variant or None,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ArtifactError(f"{folder}: does not load ({str(error).strip().splitlines()[0]})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise ArtifactError(f"{folder}: {what.replace('_', ' ')}: {sorted(map(str, report[what]))[0]}")
    return model


def tensors(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """A few tensors of a model's weights, the rest unread."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name).float() for name in names if name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ArtifactError(f"{path}: not a safetensors file ({error})") from error
    for name in names:
        if name not in found:
            raise ArtifactError(f"{folder}: its weights have no tensor '{name}'")
    return found


def digest(folder: Path, parts: Sequence[str]) -> str:
    """SHA-256 that changes whenever a config or weight in the folders `parts` does."""
    files = [path for part in parts for path in sorted((folder / part).glob("*"))]
    kept = [path for path in files if path.suffix in (".json", ".safetensors")]
    return artifact.digest({path.relative_to(folder).as_posix(): artifact.sha256(path) for path in kept})


def licence(folder: Path) -> str:
    """The licence that the folder's model card states; empty where it states none."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    with artifact.opened(card) as file:
        start = file.read(20_000).decode(errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", start, re.DOTALL)
    stated = dict(
        re.findall(r"^(license(?:_name)?):[ \t]*([^\n]+?)[ \t]*$", front[1] if front else "", re.MULTILINE)
    )
    name: str = stated.get("license", "").strip("'\"")
    return str(stated.get("license_name", name)).strip("'\"") if name == "other" else name


def _files(folder: Path) -> list[Path]:
    """The weights' files: those of full precision where there are several variants."""
    found = sorted(folder.glob(f"{_WEIGHTS}*.safetensors"))
    plain = [path for path in found if re.fullmatch(rf"{_WEIGHTS}(-\d+-of-\d+)?", path.stem)]
    if not found:
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.ckpt"))
        also = f"; {pickled[0].name} is a pickle, which is not read" if pickled else ""
        raise MissingInput(f"{folder}: no {_WEIGHTS}.safetensors{also}")
    return plain or found
