"""Samples of a user's own: a folder of images, a .npz, a .safetensors, or a data set that ships."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowdistill import artifact, data
from flowdistill.errors import ArtifactError, MissingInput, UsageError, listed

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def samples(source: str, shape: Sequence[int], count: int) -> Tensor:
    """Up to `count` samples [n, *shape] float32; images and whole numbers become -1 to 1, others stay.

    Images are cut to the middle square and resized. Arrays must have the shape, or [n, H, W, C] of bytes as
    in the .npz files that evaluations of diffusion models exchange.

    Raises:
        MissingInput: there is nothing of that name.
        UsageError: what is there has another shape.
        ArtifactError: it cannot be read.
    """
    if source in data.DATASETS:
        return data.dataset(source).batch(_first(count))[0]
    path = Path(source)
    if path.is_dir():
        return _pictures(path, shape, count)
    if path.suffix == ".npz":
        return _fitting(_npz(path), path, shape)[:count]
    if path.suffix == ".safetensors":
        return _fitting(_tensor(path), path, shape)[:count]
    if not path.exists():
        raise MissingInput(
            f"{path}: no such file or folder; expected images in a folder, a .npz, a .safetensors, or one of "
            f"{', '.join(data.DATASETS)}"
        )
    raise UsageError(f"{path}: expected a folder of images, a .npz or a .safetensors")


def _first(count: int) -> Tensor:
    import torch

    return torch.arange(count)


def _pictures(folder: Path, shape: Sequence[int], count: int) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    files = sorted(each for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES)[:count]
    if not files:
        raise MissingInput(f"{folder}: no images ({', '.join(SUFFIXES)}) in it")
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(f"{folder}: the model's samples have shape {list(shape)} and are no images")
    channels, height, width = shape
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                fitted = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ArtifactError(f"{file}: cannot be read as an image ({error})") from None
        images.append(torch.from_numpy(np.asarray(fitted).copy()).reshape(height, width, channels))
    return _scaled(torch.stack(images).permute(0, 3, 1, 2))


def _npz(path: Path) -> Tensor:
    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as arrays:
            name = "arr_0" if "arr_0" in arrays else sorted(arrays)[0]
            return torch.from_numpy(arrays[name])
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file") from None
    except Exception as error:  # numpy, zipfile and zlib raise what they like on damaged files
        raise ArtifactError(f"{path}: cannot be read as an array ({error})") from None


def _tensor(path: Path) -> Tensor:
    tensors, _ = artifact.load_tensors(path)
    name = "samples" if "samples" in tensors else next(iter(tensors), "")
    if name != "samples" and len(tensors) != 1:
        raise UsageError(
            f"{path}: holds {listed(sorted(tensors))}; expected one tensor, or one named 'samples'"
        )
    return tensors[name]


def _fitting(array: Tensor, path: Path, shape: Sequence[int]) -> Tensor:
    """[n, *shape], from channels first or last."""
    if tuple(array.shape[1:]) == (*shape[1:], shape[0]) != tuple(shape):
        array = array.movedim(-1, 1)
    if tuple(array.shape[1:]) != tuple(shape) or not len(array):
        raise UsageError(f"{path}: has shape {list(array.shape)}, expected [n, {', '.join(map(str, shape))}]")
    return _scaled(array)


def _scaled(array: Tensor) -> Tensor:
    """Bytes as -1 to 1; numbers as they are."""
    import torch

    return array.float() / 127.5 - 1 if array.dtype == torch.uint8 else array.float()
