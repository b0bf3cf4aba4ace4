"""Pairs of rf++: images in `samples.zip`, states of the noise's generator in `z.zip`, labels in a CSV file.

    samples.zip         NAME.png, 8 bits: x0 = byte / 127.5 - 1
    z.zip               NAME.bin, 32 bytes: state and increment of a PCG64 before it draws, highest byte first
    images_labels.csv   rows `NAME.png,label`; empty for networks without classes

NAME is `K/00000` with K = i // 60000 in sets of more than 60,000 pairs, else `00000`. rf++ appends to all
three files and begins at 0 when it is started again, so a run that was cut off leaves names twice; it writes
a label before its image, so such a run can also leave labels without an image. The directories of the
archives are in memory while they are read or written, about 600 bytes a member.
"""

from __future__ import annotations

import csv
import io
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flowdistill import artifact, randomness
from flowdistill.errors import UsageError, bare, listed
from flowdistill.exchange.growing import Growing, new_folder
from flowdistill.exchange.sources import Source, batches, damaged
from flowdistill.pairstore import Block, PairStore

SAMPLES, NOISES, LABELS = "samples.zip", "z.zip", "images_labels.csv"
_PNG, _BIN = ".png", ".bin"
_IN_A_FOLDER = 60_000
_PNG_BYTES_AT_MOST = 64 << 20
_PIXELS_AT_MOST = 4096 * 4096
_BITS_AT = 24
"""Where a PNG has the number of bits of a channel."""
_LINE_BYTES_AT_MOST = 4096
_CHANNELS = {"L": 1, "RGB": 3}
_ENCRYPTED = 1
_OWNER_READS_AND_WRITES = 0o600 << 16


@contextmanager
def opened(folder: Path) -> Iterator[Source]:
    """The pairs of a folder, in the order of the names of their images.

    Raises:
        MissingInput: an archive is not there.
        ArtifactError: an archive is damaged, or the names, records, images and labels do not fit together.
    """
    samples, labels_path = folder / SAMPLES, folder / LABELS
    names, records = _records(folder / NOISES)
    with _archive(samples) as archive:
        members = _members(samples, archive, _PNG)
        _check_counterparts(folder, [info.filename for info in members], names)
        shape = _pixels(samples, archive, members[0]).shape
        labels, notes = _labels(labels_path, names) if labels_path.exists() else (None, ())

        def read(rows: Sequence[int]) -> Block:
            images = np.empty((len(rows), *shape), np.uint8)
            for image, row in zip(images, rows, strict=True):
                image[...] = _same_shape(
                    samples, members[row], _pixels(samples, archive, members[row]), shape
                )
            chosen = torch.as_tensor(rows)
            return Block(
                eps=randomness.pcg64_noise(records[chosen], shape),
                x0=torch.from_numpy(images).float() / 127.5 - 1,
                labels=None if labels is None else labels[chosen],
                record=records[chosen],
            )

        files = {SAMPLES: samples, NOISES: folder / NOISES}
        yield Source(
            format="rfpp",
            path=folder,
            files=files if labels is None else files | {LABELS: labels_path},
            count=len(members),
            shape=shape,
            read=read,
            noise="pcg64",
            dtype="uint8",
            classes=0 if labels is None else 1 + int(labels.max()),
            orientation="t=0 data, t=1 noise",
            notes=notes,
        )


def export(store: PairStore, folder: Path) -> list[Path]:
    """Write the pairs as rf++ does; x0 that is not stored as bytes is rounded to them.

    Raises:
        UsageError: the store's noise has no records, its data are no images, or the folder is there already.
        ResourceError: the disk is full or fails.
    """
    _check_exportable(store)
    classes = store.spec.classes
    with new_folder(folder) as temporary:
        names = (SAMPLES, NOISES, LABELS) if classes else (SAMPLES, NOISES)
        files = {name: Growing(temporary / name) for name in names}
        with ZipFile(files[SAMPLES], "w") as samples, ZipFile(files[NOISES], "w") as noises:
            for rows in batches(range(len(store)), store.spec.shape):
                images = _bytes(store.column("x0", rows)).permute(0, 2, 3, 1).numpy()
                for row, image, record in zip(rows, images, store.column("record", rows), strict=True):
                    stem = _stem(row, len(store))
                    samples.writestr(_entry(stem + _PNG), _png(image))
                    noises.writestr(_entry(stem + _BIN), record.numpy().tobytes())
                if classes:
                    files[LABELS].write(_csv(rows, store.column("labels", rows), len(store)))
                for file in files.values():
                    file.store()
        for file in files.values():
            file.close()
    return [folder / name for name in files]


def _archive(path: Path) -> ZipFile:
    with artifact.opened(path):  # which has the words for one that cannot be opened
        pass
    try:
        return ZipFile(path)
    except Exception as error:  # zipfile raises what it likes on damaged files
        raise damaged(path, f"cannot be read as a zip archive ({error})") from None


def _members(path: Path, archive: ZipFile, suffix: str) -> list[ZipInfo]:
    """The archive's members but folders, in the order of their images' names, none of which occurs twice."""
    found = [info for info in archive.infolist() if not info.is_dir()]
    if other := next((info for info in found if not info.filename.endswith(suffix)), None):
        raise damaged(path, f"holds {bare(other.filename)}, expected names that end in {suffix}")
    if not found:
        raise damaged(path, f"holds no {suffix}")
    found.sort(key=lambda info: _image_name(info, suffix))
    for info, other in pairwise(found):
        if info.filename == other.filename:
            raise damaged(
                path,
                f"holds {bare(info.filename)} twice: rf++ was cut off and started again, which appends",
                "make the pairs again into an empty folder",
            )
    return found


def _image_name(info: ZipInfo, suffix: str) -> str:
    return info.filename.removesuffix(suffix) + _PNG


def _records(path: Path) -> tuple[list[str], Tensor]:
    """The names of all images and the records [n, 32] of their noise."""
    with _archive(path) as archive:
        members = _members(path, archive, _BIN)
        data = bytearray()
        for info in members:
            if info.file_size != randomness.PCG64_BYTES:
                raise damaged(
                    path,
                    f"{bare(info.filename)} has {info.file_size} bytes, expected {randomness.PCG64_BYTES}: "
                    "state and increment of a PCG64",
                )
            data += _content(path, archive, info)
    records = torch.frombuffer(data, dtype=torch.uint8).reshape(-1, randomness.PCG64_BYTES)
    even = (records[:, -1] & 1 == 0).nonzero()
    if len(even):
        name = bare(members[int(even[0])].filename)
        raise damaged(path, f"{name} is no state of a PCG64: its increment is even")
    return [_image_name(info, _BIN) for info in members], records


def _content(path: Path, archive: ZipFile, info: ZipInfo) -> bytes:
    """A member whose size was found to be acceptable."""
    name = bare(info.filename)
    if info.flag_bits & _ENCRYPTED or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise damaged(path, f"{name} is encrypted or packed in an unusual way, expected stored or deflated")
    try:
        with archive.open(info) as member:
            data = member.read(info.file_size)
    except Exception as error:  # zipfile and zlib raise what they like on damaged files
        raise damaged(path, f"{name} is damaged ({error})") from None
    if len(data) != info.file_size:
        raise damaged(path, f"{name} has {len(data)} bytes, its directory says {info.file_size}")
    return data


def _pixels(path: Path, archive: ZipFile, info: ZipInfo) -> NDArray[np.uint8]:
    """An image [channels, height, width]."""
    name = bare(info.filename)
    if info.file_size > _PNG_BYTES_AT_MOST:
        raise damaged(path, f"{name} has {info.file_size} bytes, expected {_PNG_BYTES_AT_MOST} at most")
    data = _content(path, archive, info)
    bits = data[_BITS_AT] if len(data) > _BITS_AT else 0  # Pillow makes 8 of 16 without a word
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            mode, size = image.mode, image.size
            if mode in _CHANNELS and bits == 8 and size[0] * size[1] <= _PIXELS_AT_MOST:
                pixels = np.asarray(image).reshape(size[1], size[0], _CHANNELS[mode])
                return pixels.transpose(2, 0, 1)
    except Exception as error:  # Pillow raises what it likes on damaged files, and on decompression bombs
        raise damaged(path, f"{name} cannot be read as a PNG ({error})") from None
    raise damaged(
        path,
        f"{name} is a PNG of mode {mode}, {bits} bits, {size[0]} x {size[1]} pixels; "
        f"expected RGB or L, 8 bits, {_PIXELS_AT_MOST} pixels at most",
    )


def _same_shape(
    path: Path, info: ZipInfo, pixels: NDArray[np.uint8], shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    if pixels.shape != shape:
        raise damaged(
            path, f"{bare(info.filename)} has shape {list(pixels.shape)}, the first image has {list(shape)}"
        )
    return pixels


def _check_counterparts(folder: Path, images: Sequence[str], noises: Sequence[str]) -> None:
    if images == noises:
        return
    for missing, archive, suffix in (
        (sorted(set(images).difference(noises)), NOISES, _BIN),
        (sorted(set(noises).difference(images)), SAMPLES, _PNG),
    ):
        if missing:
            names = listed([name.removesuffix(_PNG) + suffix for name in missing])
            other = SAMPLES if archive == NOISES else NOISES
            raise damaged(folder / archive, f"lacks {names}, whose counterparts are in {other}")


def _labels(path: Path, names: Sequence[str]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels [n] of all images, None if the file is empty; and what is to be said about it."""
    labels = np.full(len(names), -1)
    without_image = 0
    with artifact.opened(path) as file:
        for name, label in _rows(path, file):
            place = bisect_left(names, name)
            if place == len(names) or names[place] != name:
                without_image += 1
            elif labels[place] not in (-1, label):
                raise damaged(
                    path,
                    f"{bare(name)} has two labels, {labels[place]} and {label}: rf++ was cut off and "
                    "started again, which appends",
                    "make the pairs again into an empty folder",
                )
            else:
                labels[place] = label
    missing = np.flatnonzero(labels < 0).tolist()
    if len(missing) == len(names) and not without_image:
        return None, ()
    if missing:
        raise damaged(path, f"has no label for {listed([names[place] for place in missing])}")
    return torch.from_numpy(labels), (
        f"{LABELS} has {without_image} labels without an image",
    ) if without_image else ()


def _rows(path: Path, file: BufferedReader) -> Iterator[tuple[str, int]]:
    reader = csv.reader(_lines(path, file), strict=True)
    try:
        for row in reader:
            if row and (len(row) != 2 or not re.fullmatch("[0-9]{1,9}", row[1])):
                raise damaged(path, f"line {reader.line_num} is not `name.png,label`")
            if row:
                yield row[0], int(row[1])
    except csv.Error as error:
        raise damaged(path, f"line {reader.line_num} is not `name.png,label` ({error})") from None


def _lines(path: Path, file: BufferedReader) -> Iterator[str]:
    while line := file.readline(_LINE_BYTES_AT_MOST + 1):
        if len(line) > _LINE_BYTES_AT_MOST:
            raise damaged(path, f"has a line of more than {_LINE_BYTES_AT_MOST} bytes")
        try:
            yield line.decode()
        except UnicodeDecodeError:
            raise damaged(path, "is not UTF-8") from None


def _check_exportable(store: PairStore) -> None:
    spec = store.spec
    if spec.noise != "pcg64":
        raise UsageError(
            f"{store.folder}: its noise is {spec.noise}, and rf++ keeps states of PCG64\n"
            "make the pairs with `pairs.noise: pcg64`, or export them as npy"
        )
    if len(spec.shape) != 3 or spec.shape[0] not in _CHANNELS.values():
        raise UsageError(
            f"{store.folder}: its data have shape {list(spec.shape)}, and rf++ keeps grey or RGB images\n"
            "export them as npy"
        )


def _bytes(x0: Tensor) -> Tensor:
    """Images as 8 bits, from how they are stored."""
    if x0.dtype == torch.uint8:
        return x0
    return x0.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def _png(image: NDArray[np.uint8]) -> bytes:
    """[height, width, channels] as a file."""
    file = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else np.ascontiguousarray(image)).save(file, "PNG")
    return file.getvalue()


def _entry(name: str) -> ZipInfo:
    """A stored member without a date, as on any system."""
    info = ZipInfo(name)
    info.create_system = 3  # Unix
    info.external_attr = _OWNER_READS_AND_WRITES
    return info


def _stem(row: int, count: int) -> str:
    return f"{row // _IN_A_FOLDER}/{row:05d}" if count > _IN_A_FOLDER else f"{row:05d}"


def _csv(rows: Sequence[int], labels: Tensor, count: int) -> bytes:
    lines = (
        f"{_stem(row, count)}{_PNG},{label}\r\n" for row, label in zip(rows, labels.tolist(), strict=True)
    )
    return "".join(lines).encode()
