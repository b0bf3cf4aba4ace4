"""Feature extractors of torch-fidelity: Inception for FID and KID, DINOv2 and CLIP.

Their weights are not shipped. A recipe names the file, or it lies where torch.hub keeps what it has
downloaded, or the recipe says `download`. Files are read as data, never unpickled as code; an archive of
TorchScript, which is how CLIP is published, is opened only where its SHA-256 is the published one. Images go
in as bytes in memory; torch-fidelity enlarges them as the first implementation of FID did.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flowdistill import artifact, checkpoints, foreign
from flowdistill.checkpoints import StoredTensor
from flowdistill.errors import ArtifactError, MissingInput
from flowdistill.evaluation import lpipsweights

PREPROCESSING = "native-uint8"
"""Images as bytes at their own size; the extractor enlarges them."""

_IMAGES_AT_ONCE = 32
"""Fixed, since the last bits of features may depend on the size of the batch; bounds the memory too."""

Read: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Samples [B, *shape] -> features [B, D] and classes [B] int64, None where none are known, on the CPU."""


@dataclass(frozen=True)
class Asked:
    """An extractor that a recipe asks for: `inception`, and torch-fidelity's name for it."""

    key: str
    name: str
    weights: Path | None
    """None stands for torch.hub's cache."""


@dataclass(frozen=True)
class Published:
    """Weights that others publish: names that torch.hub's cache may have them by, and where they are."""

    files: tuple[str, ...]
    url: str
    sha256: str
    """As much of it as the publisher tells; may be empty."""


_INCEPTION = Published(
    ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
)
_DINOV2_CODE = "facebookresearch/dinov2"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"


def fetch(asked: Asked) -> None:
    """Download what an extractor needs into torch.hub's cache, unless it is there; or raise MissingInput."""
    published = _published(asked.name)
    folder = lpipsweights.cache()
    if asked.key == "dinov2" and not _dinov2_code().is_dir():
        try:
            torch.hub.list(_DINOV2_CODE, trust_repo=True)  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever the network or the code that came says
            raise MissingInput(f"{_DINOV2_CODE}: cannot be downloaded: {_first_line(error)}") from None
    if not any((folder / file).exists() for file in published.files):
        lpipsweights.download(published.url, folder / published.files[0], published.sha256)


def reader(asked: Asked, device: str) -> tuple[str, Read]:
    """The label of an extractor, with the first digits of its weights' SHA-256, and what it reads in images.

    Images are [B, 1 or 3, H, W] in [-1, 1]; grey ones count as coloured.

    Raises:
        MissingInput: its weights are not at hand; says how to get them.
        ArtifactError: they are damaged, hostile, or of another network.
    """
    path = _locate(asked) if asked.weights is None else asked.weights
    kind = _kind(asked)
    layer = kind.get_default_feature_layer_for_metric("fid")
    sha256, state = _state(asked, path)
    try:
        with _giving(asked, state):
            network = kind(asked.name, [layer])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: holds no weights of {asked.name}: {_first_line(error)}") from None
    network.to(device)

    @torch.inference_mode()
    def read(x: Tensor) -> tuple[Tensor, None]:
        parts = torch.split(as_bytes(x), _IMAGES_AT_ONCE)
        return torch.cat([network(part.to(device))[0].float().cpu() for part in parts]), None

    return f"{asked.name}@{sha256[:8]}", read


def as_bytes(images: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in [-1, 1] as [B, 3, H, W] uint8: the pixels that a PNG of them has."""
    pixels = ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1)


# --- weights --------------------------------------------------------------------------------------


def _published(name: str) -> Published:
    if name.startswith("clip"):
        found = foreign.member("torch_fidelity.feature_extractor_clip", "MODEL_METADATA")[name]
        url = foreign.member("torch_fidelity.feature_extractor_clip", "MODEL_URLS")[name]
        return Published((f"{name}-{found['hash']}.pt",), url, found["hash"])
    if name.startswith("dinov2"):
        entry = foreign.member("torch_fidelity.feature_extractor_dinov2", "MODEL_METADATA")[name]
        return Published((f"{entry}_pretrain.pth",), f"{_DINOV2}/{entry}/{entry}_pretrain.pth", "")
    return _INCEPTION


def _locate(asked: Asked) -> Path:
    """The file in torch.hub's cache, with the SHA-256 that is published."""
    published, folder = _published(asked.name), lpipsweights.cache()
    path = next((folder / file for file in published.files if (folder / file).exists()), None)
    if path is None:
        target = folder / published.files[0]
        raise MissingInput(
            f"{target}: no such file; {asked.name} needs these weights, and nothing is downloaded by itself\n"
            f"get them: curl -L --create-dirs -o {shlex.quote(str(target))} {published.url}\n"
            f"or have them downloaded, {asked.key}: {{weights: download}}, or name a file there"
        )
    found = artifact.sha256(path)
    if not found.startswith(published.sha256):
        raise ArtifactError(
            f"{path}: its SHA-256 is {found[:8]}…, that of {asked.name} is {published.sha256[:8]}…\n"
            f"delete it and get it again from {published.url}"
        )
    return path


def _state(asked: Asked, path: Path) -> tuple[str, dict[str, Tensor]]:
    """SHA-256 and tensors of a file of weights."""
    if asked.key == "clip" and (sha256 := artifact.sha256(path)) == _published(asked.name).sha256:
        return sha256, torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    checkpoint = checkpoints.read(path)
    content = checkpoint.content
    if checkpoint.format == "safetensors":
        content = content["tensors"]
    if not isinstance(content, dict) or not content:
        raise ArtifactError(f"{path}: holds no state dict, expected the weights of {asked.name}")
    return checkpoint.sha256, {str(name): _tensor(name, value, path) for name, value in content.items()}


def _tensor(name: object, value: object, path: Path) -> Tensor:
    if not isinstance(value, StoredTensor):
        raise ArtifactError(f"{path}: '{name}' is no tensor, expected a state dict")
    tensor = value.load().clone()
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ArtifactError(f"{path}: tensor '{name}' holds values that are not finite")
    return tensor


# --- networks -------------------------------------------------------------------------------------


_KINDS = {
    "inception": ("torch_fidelity.feature_extractor_inceptionv3", "FeatureExtractorInceptionV3"),
    "dinov2": ("torch_fidelity.feature_extractor_dinov2", "FeatureExtractorDinoV2"),
    "clip": ("torch_fidelity.feature_extractor_clip", "FeatureExtractorCLIP"),
}


def _kind(asked: Asked) -> Any:
    foreign.load("torch_fidelity")
    return foreign.member(*_KINDS[asked.key])


@contextmanager
def _giving(asked: Asked, state: Mapping[str, Tensor]) -> Iterator[None]:
    """While torch-fidelity builds a network, it gets these tensors where it would open a file or download.

    Its own readers unpickle whatever a file holds.
    """
    owner: Any = foreign.load(_KINDS[asked.key][0])
    opener = "load_state_dict_from_url"
    given: Any = state
    if asked.key == "clip":
        given = _Archive(state)
    elif asked.key == "dinov2":
        owner, opener, given = torch.hub, "load", _dinov2(owner.MODEL_METADATA[asked.name], state)
    before = getattr(owner, opener)
    setattr(owner, opener, lambda *_, **__: given)
    try:
        yield
    finally:
        setattr(owner, opener, before)


@dataclass(frozen=True)
class _Archive:
    """What torch-fidelity asks an archive of TorchScript for."""

    state: Mapping[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)


def _dinov2_code() -> Path:
    return lpipsweights.cache().parent / f"{_DINOV2_CODE.replace('/', '_')}_main"


def _dinov2(entry: str, state: Mapping[str, Tensor]) -> nn.Module:
    """The network of DINOv2, whose code is its makers': torch.hub runs it from its cache."""
    folder = _dinov2_code()
    if not folder.is_dir():
        raise MissingInput(
            f"{folder}: no such folder; nothing of {_DINOV2_CODE} is downloaded by itself\n"
            "have it downloaded, dinov2: {weights: download}, or clone it there"
        )
    network: nn.Module = torch.hub.load(str(folder), entry, source="local", pretrained=False)  # type: ignore[no-untyped-call]
    network.load_state_dict(state)
    return network


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])
