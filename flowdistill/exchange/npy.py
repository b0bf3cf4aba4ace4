"""Pairs of RectifiedFlow and SlimFlow: `z0.npy` (noise), `z1.npy` (data) and `label.npy` in a folder.

Both toolkits make a sub-folder for each seed and read all of them. Arrays are [n, *shape] float32. SlimFlow's
labels are one-hot rows [n, classes] float32, which its networks take as they are; a dataset's own are [n].
Their clock runs from noise at t = 0 to data at t = 1. Pairs have no clock; the store's origin names it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowdistill.errors import MissingInput, listed
from flowdistill.exchange.growing import Growing, new_folder
from flowdistill.exchange.sources import Source, batches, check_shape, damaged
from flowdistill.pairstore import Block, PairStore

NOISE, DATA, LABELS = "z0.npy", "z1.npy", "label.npy"
_LABELS_AT_ONCE = 1 << 16
_WIDER_THAN_STORED = ("float64", "longdouble")


@dataclass(frozen=True)
class _Part:
    """What one folder holds; arrays are mapped anew by each who reads, so that many parts need no memory."""

    folder: Path
    count: int
    shape: tuple[int, ...]
    labelled: bool
    dtypes: frozenset[str]

    def array(self, name: str) -> NDArray[Any]:
        return _mapped(self.folder / name)


@contextmanager
def opened(folder: Path) -> Iterator[Source]:
    """The pairs of a folder, or of its sub-folders one after another in the order of their names.

    Raises:
        MissingInput: a file is not there.
        ArtifactError: a file is no array of numbers, or does not fit to the others.
    """
    folders = [folder] if _has_pairs(folder) else sorted(filter(_has_pairs, _sub_folders(folder)))
    if not folders:
        raise MissingInput(f"{folder}: no {NOISE} and {DATA} in it or in its sub-folders")
    parts = [_part(each) for each in folders]
    for part in parts:
        check_shape(part.folder / DATA, part.shape, parts[0].shape)
    classes = _classes(parts)
    files = (NOISE, DATA, LABELS) if classes else (NOISE, DATA)
    yield Source(
        format="npy",
        path=folder,
        files={
            (p.folder / name).relative_to(folder).as_posix(): p.folder / name for p in parts for name in files
        },
        count=sum(part.count for part in parts),
        shape=parts[0].shape,
        read=lambda rows: _read(parts, rows),
        noise="stored",
        dtype="float32",
        classes=classes,
        orientation="t=0 noise, t=1 data",
        notes=_notes(parts),
    )


def export(store: PairStore, folder: Path) -> list[Path]:
    """Write the store's pairs as float32, and its labels as SlimFlow's one-hot rows.

    Raises:
        UsageError: the folder is there already.
        ResourceError: the disk is full or fails.
    """
    count, shape, classes = len(store), store.spec.shape, store.spec.classes
    shapes = {NOISE: (count, *shape), DATA: (count, *shape)} | ({LABELS: (count, classes)} if classes else {})
    with new_folder(folder) as temporary:
        files = {name: _begun(temporary / name, of) for name, of in shapes.items()}
        for rows in batches(range(count), (math.prod(shape) + classes,)):
            eps, x0, labels = store.batch(rows)
            files[NOISE].write(_raw(eps))
            files[DATA].write(_raw(x0))
            if labels is not None:
                files[LABELS].write(_raw(torch.nn.functional.one_hot(labels, classes)))
            for file in files.values():
                file.store()
        for file in files.values():
            file.close()
    return [folder / name for name in files]


def _has_pairs(folder: Path) -> bool:
    return (folder / NOISE).exists() or (folder / DATA).exists()


def _sub_folders(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if each.is_dir()]


def _mapped(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise MissingInput(f"{path}: no such file; a set has {NOISE} and {DATA}")
    try:
        return np.lib.format.open_memmap(path, mode="r")  # which takes no array of objects
    except Exception as error:  # numpy raises what it likes on damaged files
        raise damaged(path, f"cannot be read as an array of numbers ({error})") from None


def _part(folder: Path) -> _Part:
    noise, data = _mapped(folder / NOISE), _mapped(folder / DATA)
    for name, array in ((NOISE, noise), (DATA, data)):
        if array.dtype.kind != "f":
            raise damaged(folder / name, f"holds {array.dtype}, expected float32")
        if array.ndim < 2:
            raise damaged(folder / name, f"has shape {list(array.shape)}, expected [n, ...]")
    check_shape(folder / DATA, data.shape, noise.shape)
    labelled = (folder / LABELS).exists()
    types = frozenset(array.dtype.name for array in (noise, data))
    return _Part(folder, len(noise), noise.shape[1:], labelled, types)


def _notes(parts: Sequence[_Part]) -> tuple[str, ...]:
    wide = sorted(frozenset[str]().union(*(part.dtypes for part in parts)).intersection(_WIDER_THAN_STORED))
    return (f"numbers of type {', '.join(wide)} are rounded to float32",) if wide else ()


def _classes(parts: Sequence[_Part]) -> int:
    """How many classes the labels of all parts need; 0 if there are none."""
    labelled = [part for part in parts if part.labelled]
    if not labelled:
        return 0
    if without := [part.folder.name for part in parts if not part.labelled]:
        raise MissingInput(
            f"{labelled[0].folder.parent}: no {LABELS} in {listed(without)}, but in others\n"
            "put it there, or take it away from all"
        )
    widths = [_width(part) for part in parts]
    if len(set(widths)) > 1 and 0 in widths:
        raise damaged(parts[0].folder.parent, f"{LABELS} is one-hot in some sub-folders and not in others")
    return max(widths) or 1 + max(_highest(part) for part in parts)


def _width(part: _Part) -> int:
    """Classes of one-hot labels; 0 where they are numbers."""
    path, array = part.folder / LABELS, part.array(LABELS)
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2) or 0 in array.shape:
        raise damaged(path, f"holds {array.dtype} {list(array.shape)}, expected labels [n] or [n, classes]")
    if len(array) != part.count:
        raise damaged(path, f"holds {len(array)} labels, expected {part.count}")
    return int(array.shape[1]) if array.ndim == 2 else 0


def _highest(part: _Part) -> int:
    array, path = part.array(LABELS), part.folder / LABELS
    starts = range(0, part.count, _LABELS_AT_ONCE)
    return max(int(_labels(path, array[start : start + _LABELS_AT_ONCE]).max()) for start in starts)


def _labels(path: Path, found: NDArray[Any]) -> NDArray[np.int64]:
    """Labels [B] of numbers [B] or one-hot rows [B, classes]; ArtifactError for anything else."""
    if found.ndim == 2:
        if not ((found == 0) | (found == 1)).all() or not (found.sum(1) == 1).all():
            raise damaged(path, "has rows that are not one 1 among zeros, expected one-hot labels")
        found = found.argmax(1)
    elif not ((found >= 0) & (found < 2**31) & (found == np.floor(found))).all():
        raise damaged(path, "holds labels that are not whole numbers from 0 on")
    labels: NDArray[np.int64] = found.astype(np.int64)
    return labels


def _read(parts: Sequence[_Part], rows: Sequence[int]) -> Block:
    starts = np.array([0, *accumulate(part.count for part in parts)])
    wanted = np.asarray(rows, dtype=np.int64)
    owners = np.searchsorted(starts, wanted, side="right") - 1
    noise, data = (np.empty((len(wanted), *parts[0].shape), np.float32) for _ in range(2))
    labels = np.empty(len(wanted), np.int64) if parts[0].labelled else None
    for owner in np.unique(owners):
        part, places = parts[owner], np.flatnonzero(owners == owner)
        local = wanted[places] - starts[owner]
        with np.errstate(over="ignore"):  # what becomes infinite is refused later
            noise[places] = part.array(NOISE)[local]
            data[places] = part.array(DATA)[local]
        if labels is not None:
            labels[places] = _labels(part.folder / LABELS, part.array(LABELS)[local])
    given = None if labels is None else torch.from_numpy(labels)
    return Block(torch.from_numpy(noise), torch.from_numpy(data), given)


def _begun(path: Path, shape: Sequence[int]) -> Growing:
    header = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(header, described)
    file = Growing(path)
    file.write(header.getvalue())
    return file


def _raw(values: torch.Tensor) -> bytes:
    return values.numpy().astype("<f4", copy=False).tobytes()
