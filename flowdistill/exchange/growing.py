"""New files and folders that grow: written from front to back, and there only once they are whole."""

from __future__ import annotations

import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowdistill import artifact
from flowdistill.errors import UsageError

_PART_BYTES = 8 << 20


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name once everything in it is on the disk; nothing stays on failure.

    Raises:
        UsageError: there is something of that name already.
        ResourceError: the disk is full or fails.
    """
    if os.path.lexists(folder):
        raise UsageError(f"{folder}: is there already; choose another name, or delete it first")
    artifact.create_folder(folder.parent)
    temporary = folder.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        artifact.create_folder(temporary)
        yield temporary
        artifact.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class Growing:
    """A new file that is kept in parts: the one at the end is in memory and can still be corrected.

    It has what `zipfile` needs to write an archive without data descriptors behind the members.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stored_bytes = 0
        self._part = io.BytesIO()

    def write(self, data: bytes) -> int:
        return self._part.write(data)

    def tell(self) -> int:
        return self._stored_bytes + self._part.tell()

    def seek(self, position: int) -> int:
        return self._stored_bytes + self._part.seek(position - self._stored_bytes)

    def flush(self) -> None:
        """Nothing: `store` and `close` write."""

    def close(self) -> None:
        """Put all that is left on the disk."""
        self.store(at_least=0)

    def store(self, at_least: int = _PART_BYTES) -> None:
        """Put the part on the disk if it is large enough; from then on it stays as it is."""
        if self._part.tell() >= at_least:
            self._stored_bytes = artifact.append(self._path, self._part.getvalue(), at=self._stored_bytes)
            self._part = io.BytesIO()
