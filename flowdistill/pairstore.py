"""Pairs on disk: what a teacher made of which noise, exact, resumable and checked.

A store is a folder:

    store.json                  the `PairSpec`; written first, fixed for ever
    shards/00000.safetensors    x0 of `shard_size` pairs, labels, and eps if it was asked for
    journal.jsonl               one line a shard: CRC-32, then its number and SHA-256 as JSON

A synced journal line is the point at which a shard counts; what a killed writer left behind it is
made again. The noise of pair i is a function of (seed, i), so it is regenerated, not stored. A
finished store has the same bytes in whatever order, and with how many interruptions, it was made.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt, ValidationError
from torch import Tensor

from flowdistill import artifact
from flowdistill.artifact import Entry
from flowdistill.errors import ArtifactError, Diverged, MissingInput, UsageError
from flowdistill.randomness import noise

STORE = "store.json"
JOURNAL = "journal.jsonl"
SHARDS = "shards"

_OPEN_SHARDS_AT_MOST = 64  # each mapping holds a file descriptor
# numpy has no bfloat16; its bits travel as int16.
_NUMPY = {
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
    """Number of classes; pairs of a store with none have no labels."""
    shard_size: PositiveInt = 1024
    dtype: Literal["uint8", "float16", "bfloat16", "float32"]
    """How x0 is stored; uint8 keeps round(127.5 (x0 + 1)) and is for images in [-1, 1]."""
    seed: int
    store_noise: bool = False
    orientation: Literal["t=0 data, t=1 noise"] = "t=0 data, t=1 noise"
    origin: dict[str, JsonValue] = {}
    """What else the pairs depend on: the teacher's digest, solver, schedule."""

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
        columns: dict[str, tuple[str, tuple[int, ...]]] = {"x0": (self.dtype, self.shape)}
        if self.classes:
            columns["labels"] = ("int16" if self.classes <= 2**15 else "int32", ())
        if self.store_noise:
            columns["eps"] = ("float32", self.shape)
        return columns


@dataclass(frozen=True)
class _Committed:
    """A line of the journal."""

    shard: int
    first: int
    count: int
    size_bytes: int
    sha256: str

    def line(self) -> bytes:
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()
        return b"%08x %b\n" % (zlib.crc32(text), text)


class PairWriter:
    """Makes a store or continues one; holds the folder against other writers until it is closed.

    Raises:
        UsageError: the folder holds a store of another spec (the differences are named), something
            else, or is in use; nothing is touched.
        ArtifactError: the store or its journal is corrupt.
    """

    def __init__(self, folder: Path, spec: PairSpec) -> None:
        self.folder = folder
        self.spec = spec
        artifact.create_folder(folder)
        with ExitStack() as held:
            held.enter_context(artifact.lock(folder))
            _claim(folder, spec)
            artifact.create_folder(folder / SHARDS)
            artifact.sweep(folder)
            artifact.sweep(folder / SHARDS)
            committed, self._journal_bytes = _read_journal(folder, spec)
            self._committed = {
                number: entry
                for number, entry in committed.items()
                if _size_bytes(shard_path(folder, number)) == entry.size_bytes
            }
            self._put_journal_in_order()
            self._held = held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other writers in."""
        self._held.close()

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be made."""
        return [number for number in range(self.spec.shards) if number not in self._committed]

    def commit(self, shard: int, x0: Tensor, labels: Tensor | None = None, eps: Tensor | None = None) -> None:
        """Store the pairs `spec.indices(shard)`: x0 [B, *shape], labels [B], eps [B, *shape].

        When this returns, the shard survives a power cut; when it raises, all that were committed
        before still do. labels are given exactly if there are classes, eps if `store_noise` is set.

        Raises:
            Diverged: x0 is not finite.
            UsageError: a label is not one of the classes.
            ResourceError: the disk is full or fails.
        """
        if shard in self._committed:
            raise ValueError(f"shard {shard} is committed already")
        indices = self.spec.indices(shard)
        tensors = _encode(self.spec, shard, x0, labels, eps)
        header = {"kind": "pairs", "shard": shard, "first": indices.start, "store": self._digest()}
        path = shard_path(self.folder, shard)
        sha = artifact.save_tensors(path, tensors, header)
        entry = _Committed(shard, indices.start, len(indices), os.stat(path).st_size, sha)
        self._journal_bytes = artifact.append(self.folder / JOURNAL, entry.line(), at=self._journal_bytes)
        self._committed[shard] = entry
        self._put_journal_in_order()

    def files(self) -> list[str]:
        """Files of the finished store, relative to its folder."""
        return [STORE, JOURNAL, *(_shard_name(number) for number in range(self.spec.shards))]

    def _digest(self) -> str:
        return artifact.digest(self.spec.model_dump(mode="json"))

    def _put_journal_in_order(self) -> None:
        """Give the journal of a complete store the one form that all ways of making it lead to."""
        if len(self._committed) < self.spec.shards:
            return
        ordered = b"".join(self._committed[number].line() for number in range(self.spec.shards))
        if _journal(self.folder) != ordered:
            artifact.atomic_write(self.folder / JOURNAL, ordered)
            self._journal_bytes = len(ordered)


class PairStore:
    """A finished store, read by index from memory-mapped files; make one with `open`."""

    def __init__(self, folder: Path, spec: PairSpec, committed: Mapping[int, _Committed]) -> None:
        self.folder = folder
        self.spec = spec
        self._committed = committed
        self._layouts: dict[int, dict[str, Entry]] = {}
        self._mapped: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()

    @classmethod
    def open(cls, folder: Path | str) -> PairStore:
        """Open a store without reading its shards.

        Raises:
            MissingInput: there is no store here.
            ArtifactError: it is corrupt or not finished.
        """
        folder = Path(folder)
        spec = _read_spec(folder)
        committed, _ = _read_journal(folder, spec)
        if len(committed) < spec.shards:
            raise ArtifactError(
                f"{folder}: incomplete, {len(committed)} of {spec.shards} shards are there\n"
                "run the command that makes these pairs again, it continues"
            )
        return cls(folder, spec, committed)

    def __len__(self) -> int:
        return self.spec.count

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """eps, x0 [B, *shape] float32, labels [B] int64 or None, of the pairs with these indices.

        A shard is checked against its SHA-256 when this process first touches it; an ArtifactError
        names the shard that differs.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64).cpu().numpy()
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"pair indices {rows.min()}..{rows.max()} of a store of {len(self)}")
        columns = self._gather(rows)
        x0 = _decode(columns["x0"], self.spec.dtype)
        labels = torch.from_numpy(columns["labels"]).long() if "labels" in columns else None
        if "eps" in columns:
            return torch.from_numpy(columns["eps"]), x0, labels
        return noise(self.spec.seed, torch.from_numpy(rows), self.spec.shape), x0, labels

    def verify(self) -> list[str]:
        """Every shard that is missing, unreadable or altered, one line each."""
        return [
            line
            for number, entry in sorted(self._committed.items())
            for line in artifact.differs(self.folder, _shard_name(number), entry.sha256)
        ]

    def _gather(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        shards, local = np.divmod(rows, self.spec.shard_size)
        gathered = {
            name: np.empty((len(rows), *shape), _NUMPY[dtype])
            for name, (dtype, shape) in self.spec.columns().items()
        }
        for shard in np.unique(shards).tolist():
            at = np.flatnonzero(shards == shard)
            for name, column in self._columns(shard).items():
                gathered[name][at] = column[local[at]]
        return gathered

    def _columns(self, shard: int) -> dict[str, NDArray[Any]]:
        """What a shard holds, mapped; the least recently used mapping makes room."""
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
            return self._mapped[shard]
        if shard not in self._layouts:
            self._layouts[shard] = self._checked_layout(shard)
        if len(self._mapped) == _OPEN_SHARDS_AT_MOST:
            self._mapped.popitem(last=False)
        self._mapped[shard] = self._map(shard)
        return self._mapped[shard]

    def _map(self, shard: int) -> dict[str, NDArray[Any]]:
        path = shard_path(self.folder, shard)
        with artifact.opened(path) as file:
            if os.fstat(file.fileno()).st_size != self._committed[shard].size_bytes:
                raise artifact.corrupt(path, "its size changed after it was checked")
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            name: np.frombuffer(memory, _NUMPY[entry.dtype], math.prod(entry.shape), entry.start).reshape(
                entry.shape
            )
            for name, entry in self._layouts[shard].items()
        }

    def _checked_layout(self, shard: int) -> dict[str, Entry]:
        path = shard_path(self.folder, shard)
        if artifact.sha256(path) != self._committed[shard].sha256:
            raise artifact.corrupt(path, "its SHA-256 does not match the journal")
        return artifact.layout(path).tensors


def shard_path(folder: Path, shard: int) -> Path:
    """Where a store keeps a shard."""
    return folder / _shard_name(shard)


def _shard_name(shard: int) -> str:
    return f"{SHARDS}/{shard:05d}.safetensors"


def _size_bytes(path: Path) -> int | None:
    try:
        with artifact.opened(path) as file:
            return os.fstat(file.fileno()).st_size
    except MissingInput:
        return None


def _claim(folder: Path, spec: PairSpec) -> None:
    """Make the folder a store of this spec, or refuse it."""
    if (folder / STORE).exists():
        found, asked = _flat(_read_spec(folder)), _flat(spec)
        keys = sorted(key for key in found | asked if found.get(key) != asked.get(key))
        if keys:
            listed = ", ".join(f"{key} {found.get(key)!r} -> {asked.get(key)!r}" for key in keys)
            raise UsageError(
                f"{folder}: holds other pairs ({listed})\n"
                "restore these settings, or write to another folder; nothing was changed"
            )
    elif (folder / JOURNAL).exists() or (folder / SHARDS).exists():
        raise UsageError(
            f"{folder}: holds something else ({STORE} is missing), nothing was changed\n"
            "remove the folder, or write to another one"
        )
    else:
        content = {"format": artifact.FORMAT, "kind": "pairs", "spec": spec.model_dump(mode="json")}
        artifact.save_json(folder / STORE, content)


def _flat(spec: PairSpec) -> dict[str, JsonValue]:
    content = spec.model_dump(mode="json")
    origin = content.pop("origin")
    return content | {f"origin.{key}": value for key, value in origin.items()}


def _read_spec(folder: Path) -> PairSpec:
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


def _read_journal(folder: Path, spec: PairSpec) -> tuple[dict[int, _Committed], int]:
    """The committed shards, and where the next line goes: behind the last whole one.

    A last line without its end is a commit that was cut off. A whole line that does not match its
    CRC was damaged later, which is an error. Of two lines for a shard the later one counts.
    """
    data = _journal(folder)
    end = data.rfind(b"\n") + 1
    committed = {}
    for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
        entry = _parse_line(line, spec)
        if entry is None:
            raise ArtifactError(
                f"{folder / JOURNAL}: line {number} is damaged\n"
                "remove that line and run the command that makes these pairs again"
            )
        committed[entry.shard] = entry
    return committed, end


def _journal(folder: Path) -> bytes:
    try:
        with artifact.opened(folder / JOURNAL) as file:
            return file.read()
    except MissingInput:
        return b""


def _parse_line(line: bytes, spec: PairSpec) -> _Committed | None:
    crc, _, text = line.partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        return None
    try:
        entry = _Committed(**json.loads(text))
        indices = spec.indices(entry.shard)
    except (ValueError, TypeError, IndexError):
        return None
    return entry if (entry.first, entry.count) == (indices.start, len(indices)) else None


def _encode(
    spec: PairSpec, shard: int, x0: Tensor, labels: Tensor | None, eps: Tensor | None
) -> dict[str, Tensor]:
    given = {"x0": x0, "labels": labels, "eps": eps}
    tensors = {name: tensor.detach().cpu() for name, tensor in given.items() if tensor is not None}
    columns, size = spec.columns(), len(spec.indices(shard))
    expected = {name: (size, *shape) for name, (_, shape) in columns.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"shard {shard}: found {found}, expected {expected}")
    if not all(math.isfinite(extreme) for extreme in tensors["x0"].aminmax()):
        raise Diverged(f"shard {shard}: x0 holds values that are not finite, nothing was written")
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < spec.classes:
        span = f"{int(labels.min())}..{int(labels.max())}"
        raise UsageError(f"shard {shard}: labels {span}, expected 0..{spec.classes - 1}")
    if spec.dtype == "uint8":
        tensors["x0"] = tensors["x0"].float().add(1).mul(127.5).round().clamp(0, 255)
    return {name: tensor.to(getattr(torch, columns[name][0])) for name, tensor in tensors.items()}


def _decode(column: NDArray[Any], dtype: str) -> Tensor:
    x0 = torch.from_numpy(column)
    if dtype == "uint8":
        return x0.float() / 127.5 - 1
    return x0.view(torch.bfloat16).float() if dtype == "bfloat16" else x0.float()
