"""Reading a finished store by index, from memory-mapped files."""

from __future__ import annotations

import math
import mmap
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowdistill import artifact, randomness
from flowdistill.artifact import Entry
from flowdistill.errors import ArtifactError
from flowdistill.pairstore.journal import Committed, Journal
from flowdistill.pairstore.spec import NUMPY, PairSpec, decode, read_spec, shard_name, shard_path, tensor


class PairStore:
    """A finished store, read by index from memory-mapped files; make one with `open`."""

    def __init__(self, folder: Path, spec: PairSpec, committed: Mapping[int, Committed]) -> None:
        self.folder = folder
        self.spec = spec
        self.committed = committed
        """The shards that are there, by number."""
        self._layouts: dict[int, dict[str, Entry]] = {}
        self._mapped: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()
        # Each mapping holds a file descriptor; the others are left to the rest of the program.
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._mapped_at_most = _MAPPED if limit == resource.RLIM_INFINITY else max(16, limit // 4)

    @classmethod
    def open(cls, folder: Path | str, finished: bool = True) -> PairStore:
        """Open a store without reading its shards; one that need not be `finished`, with what is there.

        Raises:
            MissingInput: there is no store here.
            ArtifactError: it is corrupt or not finished.
        """
        folder = Path(folder)
        spec = read_spec(folder)
        journal = Journal(folder, spec)
        journal.refresh()
        if finished and journal.left:
            raise ArtifactError(
                f"{folder}: incomplete, {len(journal.committed)} of {spec.shards} shards are there\n"
                "run the command that makes these pairs again, it continues"
            )
        return cls(folder, spec, journal.committed)

    def __len__(self) -> int:
        return self.spec.count

    def committed_indices(self) -> Tensor:
        """Indices of the pairs that are there, [n] int64; all of them in a finished store."""
        ranges = (self.spec.indices(shard) for shard in sorted(self.committed))
        return torch.cat([torch.arange(0), *(torch.arange(each.start, each.stop) for each in ranges)])

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """eps, x0 [B, *shape] float32, labels [B] int64 or None, of the pairs with these indices.

        A shard is checked against its SHA-256 when this process first touches it; an ArtifactError
        names the shard that differs.
        """
        rows = self._rows(indices)
        columns = self._gather(rows, [name for name in self.spec.columns() if name in _OF_A_PAIR])
        x0 = decode(columns["x0"])
        labels = columns["labels"].long() if "labels" in columns else None
        if "eps" in columns:
            return columns["eps"], x0, labels
        if "record" in columns:
            return randomness.pcg64_noise(columns["record"], self.spec.shape), x0, labels
        return randomness.noise(self.spec.seed, torch.from_numpy(rows), self.spec.shape), x0, labels

    def states(self, indices: Sequence[int] | Tensor, which: Tensor) -> Tensor:
        """The state [B, *shape] float32 of each of these pairs at `spec.times[which]`, which [B] int64."""
        rows, last = self._rows(indices), len(self.spec.times) - 1
        if which.numel() and not 0 <= int(which.min()) <= int(which.max()) <= last:
            raise IndexError(f"states {int(which.min())}..{int(which.max())} of a path with {last + 1}")
        states = torch.empty(len(rows), *self.spec.shape)
        for shard, places, local in _by_shard(rows, self.spec.shard_size):
            columns, chosen = self._columns(shard), which.numpy()[places]
            inner = (chosen > 0) & (chosen < last)
            if inner.any():
                found = columns["path"][local[inner], chosen[inner] - 1]
                states[places[inner]] = tensor(found, self.spec.columns()["path"][0]).float()
            at_end = chosen == last
            if at_end.any():
                states[places[at_end]] = decode(tensor(columns["x0"][local[at_end]], self.spec.dtype))
        at_noise = (which == 0).numpy()
        if at_noise.any():
            states[at_noise] = self.batch(torch.from_numpy(rows[at_noise]))[0]
        return states

    def column(self, name: str, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """One number (or record, or x0 as it is stored) of these pairs, of all by default.

        Names are those of `PairSpec.columns`; KeyError for one that this store does not have. `distance` is
        the RMS per dimension of eps - x0, `error` of what the solver is off by.
        """
        if name not in self.spec.columns():
            raise KeyError(name)
        every = range(len(self)) if indices is None else indices
        return self._gather(self._rows(every), [name])[name]

    def verify(self) -> list[str]:
        """Every shard that is missing, unreadable or altered, one line each."""
        return [
            line
            for number, entry in sorted(self.committed.items())
            for line in artifact.differs(self.folder, shard_name(number), entry.sha256)
        ]

    def _rows(self, indices: Sequence[int] | Tensor) -> NDArray[np.int64]:
        if isinstance(indices, range):
            rows = np.arange(indices.start, indices.stop, indices.step, dtype=np.int64)
        else:
            rows = torch.as_tensor(indices, dtype=torch.int64).cpu().numpy()
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"pair indices {rows.min()}..{rows.max()} of a store of {len(self)}")
        return rows

    def _gather(self, rows: NDArray[np.int64], names: Sequence[str]) -> dict[str, Tensor]:
        described = {name: self.spec.columns()[name] for name in names}
        gathered = {
            name: np.empty((len(rows), *shape), NUMPY[dtype]) for name, (dtype, shape) in described.items()
        }
        for shard, places, local in _by_shard(rows, self.spec.shard_size):
            columns = self._columns(shard)
            for name in names:
                gathered[name][places] = columns[name][local]
        return {name: tensor(column, described[name][0]) for name, column in gathered.items()}

    def _columns(self, shard: int) -> dict[str, NDArray[Any]]:
        """What a shard holds, mapped; the least recently used mapping makes room."""
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
            return self._mapped[shard]
        if shard not in self._layouts:
            self._layouts[shard] = self._checked_layout(shard)
        if len(self._mapped) >= self._mapped_at_most:
            self._mapped.popitem(last=False)
        self._mapped[shard] = self._map(shard)
        return self._mapped[shard]

    def _map(self, shard: int) -> dict[str, NDArray[Any]]:
        path = shard_path(self.folder, shard)
        with artifact.opened(path) as file:
            if os.fstat(file.fileno()).st_size != self.committed[shard].size_bytes:
                raise artifact.corrupt(path, "its size changed after it was checked")
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            memory.madvise(mmap.MADV_RANDOM)  # shuffled reading gains nothing from what lies around
        return {
            name: np.frombuffer(memory, NUMPY[entry.dtype], math.prod(entry.shape), entry.start).reshape(
                entry.shape
            )
            for name, entry in self._layouts[shard].items()
        }

    def _checked_layout(self, shard: int) -> dict[str, Entry]:
        path = shard_path(self.folder, shard)
        if artifact.sha256(path) != self.committed[shard].sha256:
            raise artifact.corrupt(
                path,
                "its SHA-256 does not match the journal",
                f"`flowdistill verify --repair {self.folder}` makes it again",
            )
        return artifact.layout(path).tensors


_MAPPED = 4096
"""Shards that are mapped at a time where the system sets no limit."""
_OF_A_PAIR = ("x0", "labels", "eps", "record")


def _by_shard(
    rows: NDArray[np.int64], shard_size: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """(shard, places in `rows`, places in the shard) of every shard that is touched."""
    shards, local = np.divmod(rows, shard_size)
    order = np.argsort(shards, kind="stable")
    starts = np.flatnonzero(np.diff(shards[order], prepend=-1))
    for places in np.split(order, starts[1:]):
        if places.size:
            yield int(shards[places[0]]), places, local[places]
