"""Samples of a user's own: a folder of images, a .npz, a .safetensors, or a data set that ships."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowdistill import artifact, data
from flowdistill.errors import ArtifactError, MissingInput, UsageError, listed

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ARRAYS = (".npz", ".safetensors")
_LABELS = ("labels", "label", "y", "arr_1")


@dataclass(frozen=True)
class Samples:
    """Samples by number: `read` takes n of them to x0 [n, *shape] float32 and labels [n] int64 or None."""

    count: int | None
    """None where they never end."""
    read: Callable[[Sequence[int]], tuple[Tensor, Tensor | None]]


def samples(source: str, shape: Sequence[int], count: int) -> Tensor:
    """Up to `count` samples [n, *shape] float32, as `open_samples` has them."""
    found = open_samples(source, shape)
    return found.read(range(count if found.count is None else min(count, found.count)))[0]


def open_samples(source: str, shape: Sequence[int]) -> Samples:
    """Samples of this shape; images and whole numbers become -1 to 1, others stay.

    A folder's images are read when they are asked for, in the order of their names, cut to the middle square
    and resized; where all lie in sub-folders, the number of the sub-folder is the label. Arrays have the
    shape, or [n, H, W, C] of bytes as in the .npz files that evaluations of diffusion models exchange, and
    labels under `labels`, `label`, `y` or `arr_1`.

    Raises:
        MissingInput: there is nothing of that name.
        UsageError: what is there has another shape.
        ArtifactError: it cannot be read.
    """
    if source in data.DATASETS:
        chosen = data.dataset(source)
        _check_shape(chosen.shape, source, shape)
        return Samples(chosen.count, lambda numbers: chosen.batch(_numbers(numbers)))
    path = Path(source)
    if path.is_dir():
        return _pictures(path, shape)
    if path.suffix in ARRAYS:
        return among(arrays(path), path, shape)
    if not path.exists():
        raise MissingInput(
            f"{path}: no such file or folder; expected images in a folder, a .npz, a .safetensors, or one of "
            f"{', '.join(data.DATASETS)}"
        )
    raise UsageError(f"{path}: expected a folder of images, a .npz or a .safetensors")


def _numbers(numbers: Sequence[int]) -> Tensor:
    import torch

    return torch.tensor(list(numbers), dtype=torch.int64)


def _pictures(folder: Path, shape: Sequence[int]) -> Samples:
    files = sorted(each for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES)
    if not files:
        raise MissingInput(f"{folder}: no images ({', '.join(SUFFIXES)}) in it")
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(f"{folder}: the model's samples have shape {list(shape)} and are no images")
    classes = sorted({each.relative_to(folder).parts[0] for each in files})
    sorted_in = all(len(each.relative_to(folder).parts) > 1 for each in files)

    def read(numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        import torch

        chosen = [files[number] for number in numbers]
        labels = [classes.index(each.relative_to(folder).parts[0]) for each in chosen] if sorted_in else None
        images = torch.stack([_picture(each, shape) for each in chosen])
        return images, None if labels is None else _numbers(labels)

    return Samples(len(files), read)


def _picture(file: Path, shape: Sequence[int]) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"{file}: cannot be read as an image ({error})") from None
    pixels = torch.from_numpy(np.asarray(fitted).copy()).reshape(height, width, channels)
    return _scaled(pixels.permute(2, 0, 1))


def arrays(path: Path) -> dict[str, Tensor]:
    """All that a .npz or .safetensors holds, by name; MissingInput and ArtifactError as `open_samples`."""
    return _npz(path) if path.suffix == ".npz" else artifact.load_tensors(path)[0]


def _npz(path: Path) -> dict[str, Tensor]:
    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays}
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file") from None
    except Exception as error:  # numpy, zipfile and zlib raise what they like on damaged files
        raise ArtifactError(f"{path}: cannot be read as an array ({error})") from None


def among(found: Mapping[str, Tensor], path: Path, shape: Sequence[int]) -> Samples:
    """The samples and labels among named arrays."""
    labels = next((found[name] for name in _LABELS if name in found and found[name].ndim == 1), None)
    named = [name for name in sorted(found) if found[name].ndim > 1]
    chosen = next((name for name in ("samples", "arr_0") if name in named), named[0] if named else "")
    if not chosen or (len(named) > 1 and chosen not in ("samples", "arr_0")):
        raise UsageError(
            f"{path}: holds {listed(sorted(found)) or 'nothing'}; expected one array, or one that is named "
            "'samples' or 'arr_0'"
        )
    array = _fitting(found[chosen], path, shape)
    if labels is not None and (len(labels) != len(array) or labels.is_floating_point()):
        raise UsageError(f"{path}: expected {len(array)} labels, found {len(labels)} of {labels.dtype}")

    def read(numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        rows = _numbers(numbers)
        return _scaled(array[rows]), None if labels is None else labels[rows].long()

    return Samples(len(array), read)


def _check_shape(found: Sequence[int], source: object, shape: Sequence[int]) -> None:
    if tuple(found) != tuple(shape):
        raise UsageError(f"{source}: has samples of shape {list(found)}, the model's have {list(shape)}")


def _fitting(array: Tensor, path: Path, shape: Sequence[int]) -> Tensor:
    """[n, *shape], from channels first or last."""
    if tuple(array.shape[1:]) == (*shape[1:], shape[0]) != tuple(shape):
        array = array.movedim(-1, 1)
    if tuple(array.shape[1:]) != tuple(shape) or not len(array):
        raise UsageError(f"{path}: has shape {list(array.shape)}, expected [n, {', '.join(map(str, shape))}]")
    return array


def _scaled(array: Tensor) -> Tensor:
    """Bytes as -1 to 1; numbers as they are."""
    import torch

    return array.float() / 127.5 - 1 if array.dtype == torch.uint8 else array.float()
