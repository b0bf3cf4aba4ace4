"""Pairs of FastGen's knowledge distillation: `KEY.latent.pth` (data) and `KEY.noise.pth`, a tensor in each.

They are members of WebDataset shards (.tar, the key ends at the first dot of the file's name), or files of a
folder. Or a folder holds one `latent.pth` and one `noise.pth`, with a tensor [n, *shape] in each, or a single
sample. Embeddings of prompts (`KEY.txt_emb.pth`) have no place in a store of pairs. Every .pth is read as
data, by `checkpoints`; of an archive only the bytes of a member are used, never its name as a path.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowdistill import artifact, checkpoints
from flowdistill.errors import ArtifactError, MissingInput, ResourceError, UsageError, bare
from flowdistill.exchange import tars
from flowdistill.exchange.sources import Source, check_shape, damaged
from flowdistill.pairstore import Block

DATA, NOISE = "latent.pth", "noise.pth"
_PATH, _PROMPT = "path.pth", "txt_emb.pth"
_ROUNDED = {
    "float16": "",
    "bfloat16": "",
    "float32": "",
    "float64": "numbers of type float64 are rounded to float32",
}
_DIMENSIONS_OF_A_SAMPLE = (1, 3)
"""Of a `latent.pth` that stands alone: a vector, or channels and two sides. Others hold several samples."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a .pth lies: a file, or a part of an archive."""

    file: Path
    member: tars.Member | None = None

    def __str__(self) -> str:
        return str(self.file) if self.member is None else f"{self.file}: {bare(self.member.name)}"


Pair = tuple[_Place, _Place]
"""Noise and data."""


@contextmanager
def opened(source: Path) -> Iterator[Source]:
    """The pairs of a shard, of a folder of shards, or of a folder of .pth files.

    Their order is that of the shards' names and in them of the members, or of the files' names.

    Raises:
        MissingInput: there are no such files.
        ArtifactError: a file is damaged or hostile, or noise and data do not fit together.
        UsageError: there are trajectories in place of pairs.
    """
    shards = [source] if source.is_file() else sorted(source.glob("*.tar"))
    if not shards and ((source / DATA).exists() or (source / NOISE).exists()):
        yield _batch(source)
        return
    pairs, notes = _pairs(source, shards)
    with tempfile.TemporaryDirectory() as scratch:

        def load(place: _Place) -> Tensor:
            return _member(place, Path(scratch)) if place.member else _tensor(place.file, str(place))

        def read(rows: Sequence[int]) -> Block:
            noise, data = (_samples(load, [pairs[row][which] for row in rows], shape) for which in (0, 1))
            return Block(noise, data)

        first = load(pairs[0][0])
        shape = tuple(first.shape)
        files = shards or [place.file for pair in pairs for place in pair]
        notes += _rounding(first)
        del first  # which is a mapped file
        yield _source(source, files, len(pairs), shape, read, notes)


def _batch(folder: Path) -> Source:
    noise, data = (_tensor(folder / name, str(folder / name)) for name in (NOISE, DATA))
    check_shape(folder / DATA, data.shape, noise.shape)
    if not noise.ndim:
        raise damaged(folder / NOISE, "holds one number, expected [n, ...]")
    if noise.ndim in _DIMENSIONS_OF_A_SAMPLE:
        noise, data = noise[None], data[None]
    count, shape = len(noise), tuple(noise.shape[1:])
    note = f"{DATA} {list(data.shape)} is read as {count} samples of shape {list(shape)}"

    def read(rows: Sequence[int]) -> Block:
        chosen = torch.as_tensor(rows)
        return Block(noise[chosen].float(), data[chosen].float())

    files = [folder / NOISE, folder / DATA]
    return _source(folder, files, count, shape, read, [note, *_rounding(noise)])


def _source(
    source: Path,
    files: Iterable[Path],
    count: int,
    shape: tuple[int, ...],
    read: Callable[[Sequence[int]], Block],
    notes: Sequence[str],
) -> Source:
    return Source(
        format="fastgen",
        path=source,
        files={file.name: file for file in files},
        count=count,
        shape=shape,
        read=read,
        noise="stored",
        dtype="float32",
        classes=0,
        orientation="t=0 data, t=1 noise",
        notes=tuple(notes),
    )


def _pairs(source: Path, shards: Sequence[Path]) -> tuple[list[Pair], list[str]]:
    """The pairs of all shards, or of the folder where there are none; and what is to be said about them."""
    pairs: list[Pair] = []
    prompts = trajectories = False
    for shard in shards or [source]:
        samples = _grouped(shard, _in_shard(shard) if shards else _in_folder(source))
        prompts |= any(_PROMPT in each for each in samples.values())
        trajectories |= any(_PATH in each and NOISE not in each for each in samples.values())
        if not trajectories:
            pairs += _whole(shard, samples)
    if trajectories:
        raise UsageError(
            f"{source}: holds trajectories ({_PATH}), not pairs ({NOISE} and {DATA})\n"
            "make pairs with FastGen, or with `flowdistill run`"
        )
    if not pairs:
        raise MissingInput(f"{source}: no KEY.{DATA} and KEY.{NOISE} in it")
    return pairs, [f"prompt embeddings ({_PROMPT}) are left out: pairs are without labels"] if prompts else []


def _in_shard(path: Path) -> Iterator[tuple[str, _Place]]:
    return ((member.name, _Place(path, member)) for member in tars.members(path))


def _in_folder(folder: Path) -> Iterator[tuple[str, _Place]]:
    return ((each.name, _Place(each)) for each in sorted(folder.glob("*.pth")))


def _grouped(path: Path, found: Iterable[tuple[str, _Place]]) -> dict[str, dict[str, _Place]]:
    """What is there of each key, by kind; ArtifactError if a name occurs twice."""
    samples: dict[str, dict[str, _Place]] = {}
    for name, place in found:
        folder, slash, base = name.rpartition("/")
        key, _, kind = base.partition(".")
        kind = kind.lower()
        if not key or kind not in (DATA, NOISE, _PATH, _PROMPT):
            continue
        sample = samples.setdefault(folder + slash + key, {})
        if kind in sample:
            raise damaged(path, f"holds {bare(name)} twice")
        sample[kind] = place
    return samples


def _whole(path: Path, samples: dict[str, dict[str, _Place]]) -> list[Pair]:
    pairs = []
    for key, sample in samples.items():
        if NOISE in sample and DATA in sample:
            pairs.append((sample[NOISE], sample[DATA]))
        elif NOISE in sample or DATA in sample:
            missing = DATA if NOISE in sample else NOISE
            raise damaged(path, f"lacks {bare(f'{key}.{missing}')}, whose counterpart is there")
    return pairs


def _samples(load: Callable[[_Place], Tensor], places: Sequence[_Place], shape: tuple[int, ...]) -> Tensor:
    """[B, *shape] float32, copied, so that no file stays mapped."""
    values = torch.empty((len(places), *shape))
    for row, place in zip(values, places, strict=True):
        found = load(place)
        check_shape(str(place), found.shape, shape)
        row.copy_(found)
    return values


def _member(place: _Place, scratch: Path) -> Tensor:
    """The tensor in a part of an archive, by way of a file of our own; it stays mapped while it is used."""
    assert place.member is not None
    own = scratch / DATA
    with artifact.opened(place.file) as file:
        file.seek(place.member.start)
        data = file.read(place.member.size)
    try:
        own.write_bytes(data)
        return _tensor(own, str(place))
    except OSError as error:
        raise ResourceError(f"{own}: writing failed ({error.strerror})") from error
    finally:
        own.unlink(missing_ok=True)  # the next one is a new file: this one may still be mapped


def _tensor(path: Path, name: str) -> Tensor:
    """The one tensor of a .pth, in the type that it has."""
    try:
        content = checkpoints.read(path).content
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {str(error).removeprefix(f'{path}: ')}") from None
    if not isinstance(content, checkpoints.StoredTensor):
        raise damaged(name, f"holds a {type(content).__name__}, expected one tensor")
    if content.dtype not in _ROUNDED or not math.prod(content.shape):
        raise damaged(name, f"holds {content.dtype} {list(content.shape)}, expected floating-point numbers")
    return content.load()


def _rounding(tensor: Tensor) -> list[str]:
    note = _ROUNDED[str(tensor.dtype).removeprefix("torch.")]
    return [note] if note else []
