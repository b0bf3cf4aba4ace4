"""Pairs of another toolkit once they are open, and their way into a store, shard by shard."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue, ValidationError

from flowdistill import artifact, work
from flowdistill.errors import ArtifactError, UsageError
from flowdistill.pairstore import Block, PairSpec, PairWriter
from flowdistill.work import Indices

_SHARD_BYTES = 256 << 20
_BATCH_BYTES = 16 << 20
_AGAIN = "copy it again, or make it again with the toolkit that wrote it"


@dataclass(frozen=True)
class Source:
    """Pairs of another toolkit; names and sizes are checked, what the files hold is checked as it is read."""

    format: str
    path: Path
    files: Mapping[str, Path]
    """All that the pairs depend on, by names that do not depend on where the set lies."""
    count: int
    shape: tuple[int, ...]
    read: Callable[[Sequence[int]], Block]
    """What is said to be noise and data [B, *shape] float32 of pairs with ascending numbers."""
    noise: Literal["pcg64", "stored"]
    dtype: str
    """How x0 is stored without loss."""
    classes: int
    """How many the labels need; 0 where there are none."""
    orientation: str
    """The clock of the toolkit."""
    notes: tuple[str, ...] = ()

    def swapped(self) -> Source:
        """The same pairs with noise and data exchanged."""

        def read(rows: Sequence[int]) -> Block:
            block = self.read(rows)
            return replace(block, eps=block.x0, x0=block.eps)

        return replace(self, read=read)


def damaged(path: Path | str, found: str, fix: str = _AGAIN) -> ArtifactError:
    """The error for a file of another toolkit that is not as that toolkit writes it."""
    return ArtifactError(f"{path}: {found}\n{fix}")


def describe(
    source: Source,
    *,
    classes: int | None,
    dtype: str | None,
    shard_size: int,
    found: Mapping[str, JsonValue],
) -> PairSpec:
    """The spec of the store: a function of the source and what was asked, so that an import can go on.

    A shard has `shard_size` pairs at most; of large ones fewer, since a shard is made in memory.

    Raises:
        UsageError: there can be no such store of these pairs.
    """
    if classes and not source.classes:
        raise UsageError(f"{source.path}: its pairs have no labels; leave `classes` out")
    if classes is not None and 0 < classes < source.classes:
        raise UsageError(
            f"{source.path}: its labels need {source.classes} classes, found `classes` {classes}"
        )
    identity = artifact.digest({name: artifact.sha256(path) for name, path in source.files.items()})
    fields: dict[str, Any] = {
        "count": source.count,
        "shape": source.shape,
        "classes": source.classes if classes is None else classes,
        "shard_size": min(shard_size, fitting(source.shape, _SHARD_BYTES)),
        "dtype": source.dtype if dtype is None else dtype,
        "seed": 0,
        "noise": source.noise,
        "origin": {
            "format": source.format,
            "source": Path(os.path.abspath(source.path)).name,
            "sha256": identity,
            "orientation": source.orientation,
            **found,
        },
    }
    try:
        return PairSpec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def fill(folder: Path, spec: PairSpec, source: Source) -> dict[str, str]:
    """Make the store or what is missing of it; its files and their SHA-256.

    Raises:
        ArtifactError: a pair holds numbers that are not finite.
    """
    with PairWriter(folder, spec) as writer:
        for shard in writer.claims():
            indices = spec.indices(shard)
            block = source.read(indices)
            _refuse_non_finite(source, indices, block)
            writer.commit(shard, block if spec.classes else replace(block, labels=None))
        return writer.files()


def fitting(shape: Sequence[int], size_bytes: int) -> int:
    """How many pairs of float32 fit, at least one."""
    return max(1, size_bytes // (2 * 4 * math.prod(shape)))


def batches(indices: Indices, shape: Sequence[int]) -> Iterator[Indices]:
    """Pieces of `indices` whose pairs take little memory."""
    return work.batches(indices, fitting(shape, _BATCH_BYTES))


def check_shape(path: Path | str, shape: Sequence[int], expected: Sequence[int]) -> None:
    """ArtifactError for one that differs from those before it, or has no numbers."""
    if tuple(shape) != tuple(expected):
        raise damaged(path, f"has shape {list(shape)}, expected {list(expected)}")
    if not math.prod(shape):
        raise damaged(path, f"has shape {list(shape)}, which holds nothing")


def _refuse_non_finite(source: Source, indices: range, block: Block) -> None:
    for name, values in (("noise", block.eps), ("data", block.x0)):
        if not artifact.all_finite(values):
            bad = next(i for i, row in zip(indices, values, strict=True) if not row.isfinite().all())
            raise damaged(source.path, f"the {name} of pair {bad} holds values that are not finite")
