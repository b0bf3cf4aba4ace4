"""Checkpoints of others, read as data: nothing that a file contains is imported, called or executed.

`read` takes a safetensors file, a file of `torch.save` (zip or older) or a pickle, and returns its content
as dicts, lists, numbers, texts, inert names and records, and tensors that still lie in the mapped file. A
pickle may only use names from a fixed list (`meanings`); what is not on it is refused by name. Sizes,
shapes, names and references are claims of the file, and are checked before they are used.

What is promised: no byte of a file is ever run, whatever it holds, and a hostile file costs a second or
two. A damaged file is noticed where it has checksums (zip), contradicts itself or leaves its bounds.
Another number among the raw ones of a pickle, an old torch file or a safetensors file cannot be seen; the
SHA-256 is for that.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from threading import Event

from flowdistill import artifact
from flowdistill.checkpoints.archives import read_archive
from flowdistill.checkpoints.content import Content, Global, Record, Refusal, StoredTensor
from flowdistill.checkpoints.meanings import PERSISTENT_OBJECT
from flowdistill.checkpoints.nodes import Budget
from flowdistill.checkpoints.sniffing import form
from flowdistill.checkpoints.streams import read_stream
from flowdistill.errors import ArtifactError, UsageError

__all__ = ["PERSISTENT_OBJECT", "Checkpoint", "Content", "Global", "Record", "StoredTensor", "read"]

_HASHED_AT_ONCE_BYTES = 64 << 20  # much, since between parts it waits for the interpreter
_HEADER_BYTES_AT_MOST = 4 << 20  # of a safetensors file; a thousand tensors need 0.1 MB


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. `format` is one of `safetensors`, `zip`, `pickle` and `legacy torch`.

    The content of a safetensors file is `{"tensors": {name: StoredTensor}, "metadata": {key: text}}`, of the
    others what was saved.
    """

    path: Path
    format: str
    sha256: str
    content: Content


def read(path: Path) -> Checkpoint:
    """The content of a checkpoint; its tensors are read from the file only when they are loaded.

    Raises:
        ArtifactError: the file is damaged, hostile or of no known kind; says what, where and what to do.
        MissingInput: there is no such file.
        UsageError: it is a folder or no regular file.
    """
    _check_kind(path)
    with artifact.opened(path) as file:
        data = _mapped(path, file)
    with _hashing(data) as sha256:
        try:
            kind, content = _content(path, data)
        except Refusal as refusal:
            raise ArtifactError(f"{path}: {refusal}") from None
        return Checkpoint(path, kind, sha256.result(), content)


def _check_kind(path: Path) -> None:
    """Refuse what would wait for somebody to write into it; `opened` has words for all else."""
    with suppress(OSError):
        if not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)):
            raise UsageError(f"{path}: is no regular file")


def _mapped(path: Path, file: BufferedReader) -> memoryview:
    if not os.fstat(file.fileno()).st_size:
        raise ArtifactError(f"{path}: is empty\ndownload or copy it again")
    # Private, so that tensors can lie in it: torch takes only memory that may be written.
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _content(path: Path, data: memoryview) -> tuple[str, Content]:
    match form(data):
        case "zip":
            return "zip", read_archive(data, Budget())
        case "pickle":
            return read_stream(data, Budget())
        case kind:
            return kind, _safetensors(path, data)


def _safetensors(path: Path, data: memoryview) -> Content:
    if int.from_bytes(data[:8], "little") > _HEADER_BYTES_AT_MOST:
        raise Refusal("is no safetensors file, or one with a header that is far too long")
    layout = artifact.layout(path)
    metadata = json.loads(bytes(data[8 : layout.start])).get("__metadata__", {})
    tensors = {
        name: StoredTensor.whole(entry.dtype, data[entry.start : entry.stop]).filled(entry.shape)
        for name, entry in layout.tensors.items()
    }
    return {"tensors": tensors, "metadata": metadata}


@contextmanager
def _hashing(data: memoryview) -> Iterator[Future[str]]:
    """The SHA-256 of a file, computed beside whatever is done; given up if that fails."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(_sha256, data, stop)
        finally:
            stop.set()


def _sha256(data: memoryview, stop: Event) -> str:
    seen = hashlib.sha256()
    for start in range(0, len(data), _HASHED_AT_ONCE_BYTES):
        if not stop.is_set():
            seen.update(data[start : start + _HASHED_AT_ONCE_BYTES])
    return seen.hexdigest()
