"""What the pairs of a store are, and how they become the tensors of a shard and come back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt, ValidationError
from torch import Tensor

from flowdistill import artifact, randomness
from flowdistill.errors import ArtifactError, Diverged, UsageError

STORE = "store.json"
SHARDS = "shards"

_ROWS = 64
_BYTES_A_SHARD = 800
"""Of a shard's header and its line in the journal."""

# numpy has no bfloat16; its bits travel as int16.
NUMPY = {
    "uint8": "u1",
    "bfloat16": "<i2",
    "float16": "<f2",
    "float32": "<f4",
    "int16": "<i2",
    "int32": "<i4",
}


class PairSpec(BaseModel):
    """What the pairs of a store are; two stores of one spec hold the same pairs."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    count: PositiveInt
    shape: tuple[PositiveInt, ...] = Field(min_length=1)
    classes: int = Field(0, ge=0)
    """Number of classes, or of prompts; pairs of a store with none have no labels."""
    shard_size: PositiveInt = 1024
    dtype: Literal["uint8", "float16", "bfloat16", "float32"]
    """How x0 is stored; uint8 keeps round(127.5 (x0 + 1)) and is for images in [-1, 1]."""
    seed: int
    noise: Literal["seeded", "pcg64", "stored"] = "seeded"
    """eps is a function of (seed, index), or drawn from a stored state of PCG64 (as in rf++), or stored."""
    error: bool = False
    """Whether each pair carries an estimate of its solver's error."""
    evaluations: bool = False
    """Whether each pair carries the number of evaluations that it took."""
    path: tuple[float, ...] = Field((), exclude_if=lambda path: not path)
    """Times, falling from 1 to 0 without the ends, at which each pair's state is stored too."""
    orientation: Literal["t=0 data, t=1 noise"] = "t=0 data, t=1 noise"
    origin: dict[str, JsonValue] = {}
    """What else the pairs depend on: the model's digest, solver, schedule."""

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def indices(self, shard: int) -> range:
        """Global indices of a shard's pairs; the last shard may be shorter."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of {self.shards}")
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.count))

    def columns(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> stored type and shape of what a shard holds of each pair."""
        columns: dict[str, tuple[str, tuple[int, ...]]] = {
            "x0": (self.dtype, self.shape),
            "distance": ("float32", ()),
        }
        if self.classes:
            columns["labels"] = ("int16" if self.classes <= 2**15 else "int32", ())
        if self.noise == "stored":
            columns["eps"] = ("float32", self.shape)
        if self.noise == "pcg64":
            columns["record"] = ("uint8", (randomness.PCG64_BYTES,))
        if self.error:
            columns["error"] = ("float32", ())
        if self.evaluations:
            columns["nfe"] = ("int32", ())
        if self.path:  # on the way to an image a state is no image
            dtype = "float16" if self.dtype == "uint8" else self.dtype
            columns["path"] = (dtype, (len(self.path), *self.shape))
        return columns

    @property
    def times(self) -> tuple[float, ...]:
        """Of all states that a pair has: its noise, those on its path, its data."""
        return (1.0, *self.path, 0.0)

    @property
    def size_bytes(self) -> int:
        """What the finished store takes on the disk, but for the file system's own."""
        each = sum(
            math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize for dtype, shape in self.columns().values()
        )
        return self.count * each + self.shards * _BYTES_A_SHARD

    def draw(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The noise [B, *shape] of these pairs, and the records [B, 32] that it is from, for a new store."""
        if self.noise == "pcg64":
            records = randomness.pcg64_records(self.seed, indices)
            return randomness.pcg64_noise(records, self.shape), records
        return randomness.noise(self.seed, indices, self.shape), None

    @property
    def digest(self) -> str:
        return artifact.digest(self.model_dump(mode="json"))

    def flat(self) -> dict[str, JsonValue]:
        """Every field, those of the origin and what is in them by dotted names."""
        content = self.model_dump(mode="json")
        return {key: value for key, value in content.items() if key != "origin"} | _dotted(
            "origin", content["origin"]
        )


def _dotted(name: str, value: JsonValue) -> dict[str, JsonValue]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _dotted(f"{name}.{key}", inner).items()}


@dataclass(frozen=True)
class Block:
    """Pairs of successive indices: eps and x0 [B, *shape], and [B] what else the spec says they have."""

    eps: Tensor
    x0: Tensor
    labels: Tensor | None = None
    error: Tensor | None = None
    """RMS per dimension of what the solver is off by."""
    nfe: Tensor | None = None
    record: Tensor | None = None
    """[B, 32] uint8: state and increment of the PCG64 that drew eps."""
    path: Tensor | None = None
    """[B, K, *shape]: states at the times of the spec's path."""


def read_spec(folder: Path) -> PairSpec:
    """The spec of a store.

    Raises:
        MissingInput: there is no store here.
        ArtifactError: the file is damaged, or of another kind or format.
    """
    path = folder / STORE
    content = artifact.load_json(path)
    if content.get("kind") != "pairs" or content.get("format") != artifact.FORMAT:
        raise ArtifactError(
            f"{path}: {content.get('kind')} of format {content.get('format')}, "
            f"expected pairs of format {artifact.FORMAT}"
        )
    try:
        return PairSpec.model_validate(content.get("spec"))
    except ValidationError as error:
        first = error.errors()[0]
        raise artifact.corrupt(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def write_spec(folder: Path, spec: PairSpec) -> None:
    """Make a folder a store."""
    content = {"format": artifact.FORMAT, "kind": "pairs", "spec": spec.model_dump(mode="json")}
    artifact.save_json(folder / STORE, content)


def shard_name(shard: int) -> str:
    """Name of a shard's file, relative to the store."""
    return f"{SHARDS}/{shard:05d}.safetensors"


def shard_path(folder: Path, shard: int) -> Path:
    """Where a store keeps a shard."""
    return folder / shard_name(shard)


def encode(spec: PairSpec, shard: int, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """The tensors of a shard's file, from blocks that follow each other.

    Raises:
        Diverged: x0 is not finite, or too large for its type.
        UsageError: a label is not one of the classes.
    """
    columns, size = spec.columns(), len(spec.indices(shard))
    tensors = {
        name: torch.empty(size, *shape, dtype=getattr(torch, dtype))
        for name, (dtype, shape) in columns.items()
    }
    first = 0
    for block in blocks:
        _check(spec, shard, block)
        rows = slice(first, first + len(block.x0))
        first = rows.stop
        if first <= size:
            _put(tensors, rows, block)
    if first != size:
        raise ValueError(f"shard {shard}: {first} pairs, expected {size}")
    for name in tensors.keys() & {"x0", "path"}:
        if not artifact.all_finite(tensors[name]):
            raise Diverged(
                f"shard {shard}: {name} is too large for {columns[name][0]}, nothing was written; "
                "store it as float32"
            )
    return tensors


def _check(spec: PairSpec, shard: int, block: Block) -> None:
    wanted = {"eps": ("float32", spec.shape), **spec.columns()}
    expected = {name: (len(block.x0), *shape) for name, (_, shape) in wanted.items() if name != "distance"}
    found = {name: tuple(column.shape) for name, column in vars(block).items() if column is not None}
    if found != expected:
        raise ValueError(f"shard {shard}: found {found}, expected {expected}")
    if not artifact.all_finite(block.x0):
        raise Diverged(f"shard {shard}: x0 holds values that are not finite, nothing was written")
    labels = block.labels
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < spec.classes:
        span = f"{int(labels.min())}..{int(labels.max())}"
        raise UsageError(f"shard {shard}: labels {span}, expected 0..{spec.classes - 1}")


def _put(tensors: dict[str, Tensor], rows: slice, block: Block) -> None:
    """Fill in the rows of a block, few at a time: what is at work then stays in the processor's cache."""
    for name, column in vars(block).items():
        if name in tensors and name != "x0":
            tensors[name][rows] = column
    kept, distance = tensors["x0"][rows], tensors["distance"][rows]
    x0, eps = block.x0.detach().cpu(), block.eps.detach().cpu()
    for first in range(0, len(x0), _ROWS):
        part = slice(first, first + _ROWS)
        values = x0[part]
        if kept.dtype == torch.uint8:
            values = values.float().add(1).mul_(127.5).round_().clamp_(0, 255)
            # torch's own conversion to bytes takes twice as long.
            np.copyto(kept[part].numpy(), values.numpy(), casting="unsafe")
        else:
            kept[part] = values
        distance[part] = rms(eps[part], decode(kept[part]))


def decode(x0: Tensor) -> Tensor:
    """x0 as float32 of what is stored of it."""
    return x0.float() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.float()


def tensor(column: NDArray[Any], dtype: str) -> Tensor:
    """A column as it was stored."""
    found = torch.from_numpy(column)
    return found.view(torch.bfloat16) if dtype == "bfloat16" else found


def rms(a: Tensor, b: Tensor) -> Tensor:
    """||a - b|| / sqrt(d) of each pair [B], float32; summed in float64, so that no order of adding shows."""
    difference = (a.float() - b.float()).flatten(1)
    norm: Tensor = torch.linalg.vector_norm(difference, dim=1, dtype=torch.float64)
    return (norm / math.sqrt(difference.shape[1])).float()
