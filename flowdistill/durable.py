"""One way to write: a file on disk is whole or absent, whatever happens to the writer.

A file is written beside its place, synced and renamed, and the folder is synced, so a reader never
meets half a file and what was acknowledged survives a power cut. Failures of the system become
errors that say what to do. Callers reach this through `flowdistill.artifact`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flowdistill.errors import FlowdistillError, ResourceError, UsageError

_SWEEP_S = 10.0
"""Others may hold a folder alone for as long as it takes to sweep it."""
CLAIMS = ".claims"
"""Folder, within one that is joined, of what its holders have claimed."""
UNSEALED = "0" * 64
"""In the place of a seal while it is computed."""


def atomic_write(path: Path, data: bytes) -> str:
    """Put `data` at `path`, whole and durable, or leave what was there; returns its SHA-256.

    Raises:
        ResourceError: the disk is full (with bytes needed and free) or fails.
        UsageError: the folder does not exist or cannot be written.
    """
    with _replacing(path, len(data)) as file:
        _write_all(file, data)
        os.fsync(file)
    return hashlib.sha256(data).hexdigest()


def write_sealed(path: Path, head: Callable[[str], bytes], payload: Sequence[memoryview]) -> str:
    """`atomic_write` of head(seal) and the payload; returns the SHA-256 of the file.

    The seal is the SHA-256 of head(UNSEALED) and the payload, of the same length as UNSEALED. Hashing goes on
    beside writing and syncing, all of which let go of the interpreter.
    """
    from concurrent.futures import ThreadPoolExecutor

    start = head(UNSEALED)
    seal = hashlib.sha256(start)
    with _replacing(path, len(start) + sum(map(len, payload))) as file, ThreadPoolExecutor(1) as hashing:
        _write_all(file, start)
        for chunk in payload:
            done = hashing.submit(seal.update, chunk)
            _write_all(file, chunk)
            done.result()
        start = head(seal.hexdigest())
        os.lseek(file, 0, os.SEEK_SET)
        _write_all(file, start)
        whole = hashing.submit(_sha256, (start, *payload))
        os.fsync(file)
        return whole.result()


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another name, durably."""
    with _writing(target):
        os.replace(path, target)
        _sync_folder(target.parent)


def append(path: Path, data: bytes, at: int) -> int:
    """Make `data` the end of the file from byte `at` on, durably; returns the new length.

    Whatever lay behind `at`, such as the rest of an append that failed, is cut off first.
    """
    create = os.O_CREAT if at == 0 else 0
    with _writing(path, len(data)):
        file = os.open(path, os.O_WRONLY | create | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(file, at)
            os.lseek(file, at, os.SEEK_SET)
            _write_all(file, data)
            os.fsync(file)
        finally:
            os.close(file)
        if create:  # then the name has to be made durable too
            _sync_folder(path.parent)
    return at + len(data)


def create_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing, durably."""
    with _writing(path):
        if path.is_dir():
            return
        if path.parent != path:
            create_folder(path.parent)
        with suppress(FileExistsError):
            os.mkdir(path)
        if not path.is_dir():
            raise UsageError(f"{path}: is a file, expected a folder")
        _sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Remove the unfinished files of dead writers, here and in the folders below.

    Call it while holding `lock(folder)`: only then is every unfinished file known to be abandoned.
    """
    with _writing(folder):
        for temporary in folder.rglob(".*.tmp"):
            temporary.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold the folder against other writers; `shared`, only against those who want it for themselves.

    Readers need no lock. The kernel releases the lock when the process ends in whatever way, so there are no
    stale ones; the file `.lock` stays behind and only names the last holder.

    Raises:
        UsageError: another writer holds the folder, named by process and host.
    """
    path = folder / ".lock"
    with _writing(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(file, path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # the lock is gone even where closing reports an error
            os.close(file)


@contextmanager
def joined(folder: Path) -> Iterator[None]:
    """Hold the folder together with all others that have joined it, against those who `lock` it.

    Whoever is alone with it, at the beginning or at the end, removes what killed writers left in it.
    """
    path = folder / ".lock"
    with _writing(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _sweep_alone(file, folder)
        _acquire(file, path, fcntl.LOCK_SH, patience_s=_SWEEP_S)
        try:
            yield
        finally:
            _sweep_alone(file, folder)
    finally:
        with suppress(OSError):
            os.close(file)


def _sweep_alone(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    with suppress(OSError, FlowdistillError):  # the next one may succeed
        shutil.rmtree(folder / CLAIMS, ignore_errors=True)
        sweep(folder)


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone may do what the name `path` stands for; with `wait`, once it may.

    The kernel lets go of the claims of a process that ends in whatever way, also on another machine that
    shares the file system. Whoever gives a claim back removes its file.
    """
    create_folder(path.parent)
    file = _claim(path, wait)
    try:
        yield file is not None
    finally:
        if file is not None:
            with suppress(OSError):
                os.unlink(path)  # before others can have it: a name must stand for one file
            with suppress(OSError):
                os.close(file)


def _claim(path: Path, wait: bool) -> int | None:
    while True:
        with _writing(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is(path, file):
                    return file
            except BlockingIOError:
                os.close(file)
                return None
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # the one before has removed it in the meantime


def _is(path: Path, file: int) -> bool:
    """Whether the file still has this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _acquire(file: int, path: Path, kind: int, patience_s: float = 0.0) -> None:
    with _writing(path):
        try:
            _flock(file, kind, time.monotonic() + patience_s)
        except BlockingIOError:
            holder = os.pread(file, 1024, 0).decode(errors="replace").strip() or "another process"
            raise UsageError(
                f"{path.parent}: in use by {holder}\nwait for it to end, or write to another folder"
            ) from None
    with suppress(OSError):  # only the text of a later message
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _flock(file: int, kind: int, until: float) -> None:
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.02)


@contextmanager
def _replacing(path: Path, size_bytes: int) -> Iterator[int]:
    """A file to fill, which then takes the place of `path`, durably; nothing is left of it on failure."""
    # The temporary's name is independent of the final one, which may be as long as names can be.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    with _writing(path, size_bytes):
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                yield file
            finally:
                os.close(file)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


def _sha256(chunks: Iterable[bytes | memoryview]) -> str:
    seen = hashlib.sha256()
    for chunk in chunks:
        seen.update(chunk)
    return seen.hexdigest()


def _write_all(file: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(file)


@contextmanager
def _writing(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_error(error, path, needed_bytes) from error


def _write_error(error: OSError, path: Path, needed_bytes: int) -> FlowdistillError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"{path}: disk full ({error.strerror}), "
            f"{needed_bytes} bytes needed, {_free_bytes(path)} free\n"
            "what was there is intact: make room and run the same command again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"{path.parent}: folder is not writable ({error.strerror})")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return UsageError(f"{path.parent}: no such folder")
    if error.errno in (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return UsageError(f"{path}: no file of this name can be written ({error.strerror})")
    return ResourceError(f"{path}: writing failed ({error.strerror})")


def _free_bytes(path: Path) -> str:
    with suppress(OSError):
        return str(shutil.disk_usage(path.parent).free)
    return "an unknown number"
