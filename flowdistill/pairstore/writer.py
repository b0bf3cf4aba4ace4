"""Making a store, alone or with others: shards are claimed, made, and committed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from flowdistill import artifact
from flowdistill.errors import ArtifactError, MissingInput, UsageError, listed
from flowdistill.pairstore.journal import JOURNAL, Committed, Journal
from flowdistill.pairstore.spec import (
    SHARDS,
    STORE,
    Block,
    PairSpec,
    encode,
    read_spec,
    shard_name,
    shard_path,
    write_spec,
)

_BESIDE = ("started.json", "check.safetensors")
"""What a stage puts into the folder before there is a store."""
_POLL_S = 0.2
"""Between two looks at whether a shard of another process has come free."""


class PairWriter:
    """Makes a store or continues one, together with the other processes that do so.

    What is made does not depend on who makes it, so a shard that two processes make is the same twice; claims
    only spare the second the work.

    Raises:
        UsageError: the folder holds a store of another spec (the differences are named), something
            else, or is held by somebody alone; nothing is touched.
        ArtifactError: the store or its journal is corrupt.
    """

    def __init__(self, folder: Path, spec: PairSpec) -> None:
        self.folder = folder
        self.spec = spec
        self._mine: ExitStack = ExitStack()
        refuse_others(folder, spec)
        artifact.create_folder(folder)
        with ExitStack() as held:
            held.enter_context(artifact.joined(folder))
            with self._exclusive():
                if not refuse_others(folder, spec):
                    write_spec(folder, spec)
            artifact.create_folder(folder / SHARDS)
            self._journal = Journal(folder, spec)
            self._journal.refresh()
            self._gone = {
                shard for shard, entry in self._journal.committed.items() if not _is_there(folder, entry)
            }
            self._finish()
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
        """Give back what this process holds."""
        self._mine.close()
        self._held.close()

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be made, as of the last look."""
        return sorted(self._gone.union(self._journal.left))

    @property
    def committed_pairs(self) -> int:
        """Pairs that count, whoever made them, as of the last look."""
        left = len(self._gone.union(self._journal.left)) if self._gone else len(self._journal.left)
        return max(0, self.spec.count - left * self.spec.shard_size)

    def claims(self, idle: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Shards for this process to make, each until the next is asked for; ends when none is missing.

        Those that others make are waited for, and taken over where the others die; `idle` is called while
        waiting and may raise.
        """
        while missing := self._look():
            worked = False
            for shard in missing:
                with ExitStack() as self._mine:
                    claim = self.folder / artifact.CLAIMS / str(shard)
                    if self._is_missing(shard) and self._mine.enter_context(artifact.claimed(claim)):
                        self._journal.refresh()
                        if not self._is_missing(shard):  # made by another in the meantime
                            continue
                        worked = True
                        yield shard
            if not worked:
                idle()
                time.sleep(_POLL_S)

    def commit(self, shard: int, *blocks: Block) -> None:
        """Store the pairs `spec.indices(shard)`, in blocks that follow each other.

        When this returns, the shard survives a power cut; when it raises, all that were committed before
        still do.

        Raises:
            Diverged: x0 is not finite, or too large for its type.
            UsageError: a label is not one of the classes.
            ResourceError: the disk is full or fails.
        """
        indices = self.spec.indices(shard)
        if not self._is_missing(shard):
            raise ValueError(f"shard {shard} is committed already")
        tensors = encode(self.spec, shard, blocks)
        header = {"kind": "pairs", "shard": shard, "first": indices.start, "store": self.spec.digest}
        path = shard_path(self.folder, shard)
        sha = artifact.save_tensors(path, tensors, header)
        with self._exclusive():
            self._journal.append(Committed(shard, indices.start, len(indices), os.stat(path).st_size, sha))
        self._gone.discard(shard)
        self._finish()

    def files(self) -> dict[str, str]:
        """Files of the finished store, relative to its folder, and their SHA-256 as it was written."""
        named = {shard_name(shard): entry.sha256 for shard, entry in sorted(self._journal.committed.items())}
        return {name: artifact.sha256(self.folder / name) for name in (STORE, JOURNAL)} | named

    def _look(self) -> list[int]:
        self._journal.refresh()
        return self.missing()

    def _is_missing(self, shard: int) -> bool:
        return shard in self._journal.left or shard in self._gone

    def _exclusive(self) -> AbstractContextManager[bool]:
        """What all writers of the store do in turn."""
        return artifact.claimed(self.folder / artifact.CLAIMS / "journal", wait=True)

    def _finish(self) -> None:
        if not (self._gone or self._journal.left):
            with self._exclusive():
                self._journal.refresh()
                self._journal.put_in_order()


def mend(folder: Path, spec: PairSpec) -> list[str]:
    """Put right or remove what is damaged of a store, and return the names of those files.

    The shards among them have to be made again. Nobody else may be at work on it. Raises `UsageError` where
    the shards that are whole are not of this spec.
    """
    try:
        there = (folder / STORE).exists() and refuse_others(folder, spec)
    except ArtifactError:
        there = False
    whole, damaged = _sorted_out(folder, spec)
    for shard in whole[:1]:
        if artifact.read_header(shard_path(folder, shard)).get("store") != spec.digest:
            raise UsageError(
                f"{folder}: its shards were made from other settings or inputs than it would be made from now"
            )
    names = []
    if not there:
        write_spec(folder, spec)
        names.append(STORE)
    if Journal(folder, spec).mend():
        names.append(JOURNAL)
    for shard in damaged:
        shard_path(folder, shard).unlink(missing_ok=True)
    return [*names, *map(shard_name, damaged)]


def _sorted_out(folder: Path, spec: PairSpec) -> tuple[list[int], list[int]]:
    """Shards that are as the journal has them, and those that are not."""
    committed = Journal(folder, spec).whole_lines()
    whole = [
        shard
        for shard, entry in committed.items()
        if not artifact.differs(folder, shard_name(shard), entry.sha256)
    ]
    return whole, sorted(set(range(spec.shards)).difference(whole))


def refuse_others(folder: Path, spec: PairSpec) -> bool:
    """Whether the folder is a store of this spec already; UsageError where it is anything else."""
    # In this order: another writer may be at it, and makes a store's spec first.
    there = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    strangers = [name for name in there if name not in _BESIDE and not name.startswith(".")]
    if (folder / STORE).exists():
        found, asked = read_spec(folder).flat(), spec.flat()
        keys = sorted(key for key in found | asked if found.get(key) != asked.get(key))
        if keys:
            changes = ", ".join(f"{key} {found.get(key)!r} -> {asked.get(key)!r}" for key in keys)
            raise UsageError(
                f"{folder}: holds other pairs ({changes})\n"
                "restore these settings, or write to another folder; nothing was changed"
            )
        return True
    if strangers:
        raise UsageError(
            f"{folder}: holds something else ({listed(strangers)}, and no {STORE}), nothing was changed\n"
            "remove the folder, or write to another one"
        )
    return False


def _is_there(folder: Path, entry: Committed) -> bool:
    try:
        with artifact.opened(shard_path(folder, entry.shard)) as file:
            return os.fstat(file.fileno()).st_size == entry.size_bytes
    except MissingInput:
        return False
