"""Weights of LPIPS: where they lie, whether they are what they should be, and what is in them.

The linear heads come with the `lpips` package. The networks below them are torchvision's and are not
shipped; a recipe names their file, or it lies where torchvision would have put it. Nothing is downloaded
unless a recipe says so, and files are read as data, never executed.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flowdistill import checkpoints, foreign
from flowdistill.checkpoints import Checkpoint, StoredTensor
from flowdistill.durable import create_folder
from flowdistill.errors import ArtifactError, MissingInput, bare, quoted

URL = "https://download.pytorch.org/models/"
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_SHIFT_AND_SCALE = ("scaling_layer.shift", "scaling_layer.scale")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """A file of torchvision's; the end of its name is how its SHA-256 begins."""

    file: str
    size: str

    @property
    def sha256(self) -> str:
        """The first digits."""
        return Path(self.file).stem.rpartition("-")[2]


PUBLISHED: Mapping[str, Published] = {
    "vgg": Published("vgg16-397923af.pth", "528 MiB"),
    "alex": Published("alexnet-owt-7be5be79.pth", "233 MiB"),
    "squeeze": Published("squeezenet1_1-b8a52dc0.pth", "4.7 MiB"),
}


@dataclass(frozen=True)
class Weights:
    """What was found: tensors by the names of the `lpips` package, float32, and the file's SHA-256."""

    body: dict[str, Tensor]
    """`slice1.0.weight` and so on."""
    heads: list[Tensor]
    """One a slice, [1, C, 1, 1]."""
    scaling: tuple[Tensor, Tensor] | None
    """Shift and scale [1, 3, 1, 1] of the images, where the file has its own."""
    sha256: str


def cache() -> Path:
    """The folder in which torchvision keeps what it has downloaded."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{caches}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def read(net: str, body: Shapes, heads: Shapes, path: Path | None) -> Weights:
    """Weights for the network `net` of LPIPS, whose tensors have the shapes `body` and `heads`.

    `path` is a safetensors file or one of `torch.save`, with torchvision's state dict, the features alone, or
    all of an LPIPS. None is torchvision's cache, whose files must have the SHA-256 that their names promise.

    Raises:
        MissingInput: there is no such file; says how to get it.
        ArtifactError: it is damaged, hostile, or of another network; names the tensor.
    """
    checkpoint = _cached(net) if path is None else checkpoints.read(path)
    found = _Found(checkpoint, net)
    read_body = {name: found.take(found.spelled(name), shape) for name, shape in body.items()}
    linear = found if found.whole else _Found(_package_heads(net), net)
    read_heads = [linear.take(linear.head(name), shape) for name, shape in heads.items()]
    scaling = None
    if all(name in found.tensors for name in _SHIFT_AND_SCALE):
        shift, scale = (found.take(name, (1, 3, 1, 1)) for name in _SHIFT_AND_SCALE)
        scaling = (shift, scale)
    found.refuse_more()
    return Weights(read_body, read_heads, scaling, checkpoint.sha256)


def _package_heads(net: str) -> Checkpoint:
    """The linear heads, version 0.1, that the `lpips` package holds."""
    folder = Path(str(foreign.load("lpips").__file__)).parent
    return checkpoints.read(folder / "weights" / "v0.1" / f"{net}.pth")


def _command(path: Path, url: str) -> str:
    return f"curl -L --create-dirs -o {shlex.quote(str(path))} {url}"


def locate(net: str) -> Path:
    """Where torchvision keeps the weights of `net`; MissingInput, with how to get them, where it does not."""
    wanted = PUBLISHED[net]
    path = cache() / wanted.file
    command = _command(path, URL + wanted.file)
    if not path.exists():
        raise MissingInput(
            f"{path}: no such file; LPIPS with net: {net} needs these weights of torchvision's "
            f"({wanted.size}, SHA-256 {wanted.sha256}…), and nothing is downloaded by itself\n"
            f"get them: {command}\n"
            "or have them downloaded, distance: {name: lpips, weights: download}, or name a file there"
        )
    return path


def fetch(net: str) -> Path:
    """Where torchvision keeps the weights of `net`, downloaded if need be.

    Raises `MissingInput` where that fails. The file is there whole, with the SHA-256 of its name, or not.
    """
    wanted = PUBLISHED[net]
    path = cache() / wanted.file
    if not path.exists():
        download(URL + wanted.file, path, wanted.sha256)
    return path


def download(url: str, path: Path, sha256: str) -> None:
    """Put a file there whole, with a SHA-256 that begins so, or raise `MissingInput`."""
    create_folder(path.parent)
    from torch.hub import download_url_to_file

    try:
        download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:  # no network; another SHA-256
        raise MissingInput(
            f"{url}: cannot be downloaded: {str(error).partition(chr(10))[0]}\n"
            f"get it on another machine: {_command(path, url)}"
        ) from None


def _cached(net: str) -> Checkpoint:
    wanted, path = PUBLISHED[net], locate(net)
    command = _command(path, URL + wanted.file)
    checkpoint = checkpoints.read(path)
    if not checkpoint.sha256.startswith(wanted.sha256):
        raise ArtifactError(
            f"{path}: its SHA-256 is {checkpoint.sha256[: len(wanted.sha256)]}…, its name promises "
            f"{wanted.sha256}…\ndelete it and get it again: {command}"
        )
    return checkpoint


class _Found:
    """The tensors of a file, taken one by one under the names that its layout has for them."""

    def __init__(self, checkpoint: Checkpoint, net: str) -> None:
        self.path, self.net = checkpoint.path, net
        content = checkpoint.content
        if checkpoint.format == "safetensors":
            content = content["tensors"]
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, StoredTensor) for name, value in content.items()
        ):
            raise ArtifactError(
                f"{self.path}: holds no state dict; expected {PUBLISHED[net].file} of torchvision's, its "
                "features alone, or an LPIPS"
            )
        self.tensors: dict[str, StoredTensor] = dict(content)
        self.whole = any(name.startswith("net.slice") for name in self.tensors)
        """Whether it is all of an LPIPS."""
        self._full = any(name.startswith("features.") for name in self.tensors)

    def spelled(self, name: str) -> str:
        """How the file calls `slice1.0.weight`."""
        number = name.partition(".")[2]
        return f"net.{name}" if self.whole else f"features.{number}" if self._full else number

    def head(self, name: str) -> str:
        """How the file calls the head `lin0`; before it may stand a layer of dropout."""
        plain = f"{name}.model.0.weight"
        return plain if plain in self.tensors else f"{name}.model.1.weight"

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor, float32, in memory of its own."""
        stored = self.tensors.pop(name, None)
        if stored is None:
            raise ArtifactError(f"{self.path}: tensor '{name}' of net: {self.net} is missing")
        if stored.shape != shape or stored.dtype not in _FLOATS:
            found = f"{stored.dtype} {quoted(list(stored.shape))}"
            raise ArtifactError(
                f"{self.path}: tensor '{name}' is {found}, expected {list(shape)} for net: {self.net}"
            )
        tensor = stored.load().float().clone()
        if not tensor.isfinite().all():
            raise ArtifactError(f"{self.path}: tensor '{name}' holds values that are not finite")
        return tensor

    def refuse_more(self) -> None:
        """Refuse what is left, but for a classifier's last layers and what an LPIPS holds twice."""
        known = r"lins\.\d+\.model\.[01]\.weight" if self.whole else r"classifier\..+" if self._full else ""
        for name in self.tensors:
            if not re.fullmatch(known, name):
                raise ArtifactError(
                    f"{self.path}: tensor '{bare(name)}' does not belong to net: {self.net} of LPIPS"
                )
