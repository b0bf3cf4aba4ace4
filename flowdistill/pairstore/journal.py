"""The journal of a store: a line a shard, whose sync to the disk is the moment at which the shard counts."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from flowdistill import artifact
from flowdistill.errors import ArtifactError, MissingInput
from flowdistill.pairstore.spec import PairSpec

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Committed:
    """A line of the journal."""

    shard: int
    first: int
    count: int
    size_bytes: int
    sha256: str

    def line(self) -> bytes:
        text = json.dumps(vars(self), sort_keys=True, separators=(",", ":")).encode()
        return b"%08x %b\n" % (zlib.crc32(text), text)


class Journal:
    """The lines of one store, read as they come in from several writers.

    A last line without its end is a commit that was cut off. A whole line that does not match its CRC was
    damaged later, which is an error. Of two lines for a shard the later one counts.
    """

    def __init__(self, folder: Path, spec: PairSpec) -> None:
        self.path = folder / JOURNAL
        self.spec = spec
        self.committed: dict[int, Committed] = {}
        self.left = dict.fromkeys(range(spec.shards))
        """The shards that do not count yet, in order."""
        self._read_bytes = 0
        self._in_order = True
        self._file = (0, 0, 0)
        """Device, inode and length of the file as it was last read."""

    def refresh(self) -> None:
        """Read what others have added; ArtifactError names a damaged line."""
        try:
            with artifact.opened(self.path) as file:
                status = os.fstat(file.fileno())
                found = (status.st_dev, status.st_ino, status.st_size)
                if found == self._file:
                    return
                if found[:2] != self._file[:2] or found[2] < self._read_bytes:  # another file
                    self._forget()
                file.seek(self._read_bytes)
                data = file.read()
        except MissingInput:
            return self._forget()
        self._take(data)
        self._file = found

    def append(self, entry: Committed) -> None:
        """Make a shard count. No other writer may do so at the same time."""
        self.refresh()
        if self.committed.get(entry.shard) == entry:
            return
        self._read_bytes = artifact.append(self.path, entry.line(), at=self._read_bytes)
        self._note(entry)

    def put_in_order(self) -> None:
        """Give a complete journal the one form that all ways of making it lead to."""
        if self._in_order and self._file[2] == self._read_bytes:
            return
        ordered = b"".join(self.committed[shard].line() for shard in sorted(self.committed))
        if _content(self.path) != ordered:
            artifact.atomic_write(self.path, ordered)

    def whole_lines(self) -> dict[int, Committed]:
        """What the lines say that are not damaged."""
        parsed = (_parse(line, self.spec) for line in _content(self.path).split(b"\n"))
        return {entry.shard: entry for entry in parsed if entry is not None}

    def mend(self) -> bool:
        """Drop damaged lines, whose shards have to be made again; whether there were any."""
        whole = b"".join(entry.line() for entry in self.whole_lines().values())
        if damaged := whole != _content(self.path):
            artifact.atomic_write(self.path, whole)
        return damaged

    def _forget(self) -> None:
        self.committed = {}
        self.left = dict.fromkeys(range(self.spec.shards))
        self._read_bytes, self._file, self._in_order = 0, (0, 0, 0), True

    def _note(self, entry: Committed) -> None:
        self._in_order = self._in_order and entry.shard == len(self.committed)
        self.committed[entry.shard] = entry
        self.left.pop(entry.shard, None)

    def _take(self, data: bytes) -> None:
        end = data.rfind(b"\n") + 1
        before = len(self.committed)
        for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
            entry = _parse(line, self.spec)
            if entry is None:
                number = number if not self._read_bytes else before + number
                raise ArtifactError(
                    f"{self.path}: line {number} is damaged\n"
                    f"`flowdistill verify --repair {self.path.parent}` makes its shard again"
                )
            self._note(entry)
        self._read_bytes += end


def _content(path: Path) -> bytes:
    try:
        with artifact.opened(path) as file:
            return file.read()
    except MissingInput:
        return b""


def _parse(line: bytes, spec: PairSpec) -> Committed | None:
    crc, _, text = line.partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        return None
    try:
        entry = Committed(**json.loads(text))
        indices = spec.indices(entry.shard)
    except (ValueError, TypeError, IndexError):
        return None
    return entry if (entry.first, entry.count) == (indices.start, len(indices)) else None
