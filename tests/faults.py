"""A file system that fails on demand: for tests of what survives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "write", "ftruncate", "lseek", "fsync", "close", "replace", "mkdir")


class Calls:
    """What was asked of the system, in order, as (call, what it was about)."""

    def __init__(self) -> None:
        self.trace: list[tuple[str, str]] = []
        self.names: dict[int, str] = {}

    def note(self, call: str, subject: Any) -> None:
        name = self.names.get(subject, "?") if isinstance(subject, int) else Path(subject).name
        self.trace.append((call, "*.tmp" if name.endswith(".tmp") else name))


@contextmanager
def watched(fail_at: int | None = None, code: int = 0, more: Sequence[str] = ()) -> Iterator[Calls]:
    """Record the calls, and `more`; call number `fail_at` (from 0) fails with errno `code`.

    A write that fails has written half, a close that fails has closed.
    """
    calls = Calls()

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(subject: Any, *rest: Any, **options: Any) -> Any:
            number = len(calls.trace)
            calls.note(name, subject)
            if number == fail_at:
                if name == "write":
                    real(subject, rest[0][: len(rest[0]) // 2])
                elif name == "close":
                    real(subject)
                raise OSError(code, os.strerror(code))
            result = real(subject, *rest, **options)
            if name == "open":
                calls.names[result] = Path(subject).name
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (*CALLS, *more):
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield calls


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but locks, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
