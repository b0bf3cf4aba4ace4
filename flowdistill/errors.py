"""Every failure that a user can meet, each with its exit code.

    FlowdistillError
    ├── UsageError        2   the command line asks for what does not exist or cannot be
    │   └── RecipeError   2   all mistakes of one recipe
    ├── MissingInput      3   a file, artifact, device or optional package is not there
    ├── ArtifactError     4   corrupt, incomplete, or of an incompatible version
    ├── ResourceError     5   out of memory or disk, a folder that cannot be written
    ├── Diverged          6   a loss or weight is not finite
    └── Interrupted  130/143  SIGINT or SIGTERM, with the state saved

A message is one to three lines: the file or key, what was found, what was expected and, where it is
not obvious, the fix. Any other exception is a bug of this package.
"""

from __future__ import annotations

import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar

LISTED_AT_MOST = 20
"""Known names, or problems of a recipe, beyond this many are only counted in a message."""

WIDTH = 60
"""A name or value of more characters than these is cut in a message."""


class FlowdistillError(Exception):
    """Base of all errors that are shown without a traceback; `exit_code` is the process's."""

    exit_code: ClassVar[int] = 1


class UsageError(FlowdistillError):
    """The command line asks for something that does not exist or cannot be."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe, printed as `file:line:column: key: message`.

    `line` and `column` count from 1. They are None where no text is at fault (a missing file), and
    for overrides of the command line, which stand for the `file`. `key` is dotted and begins with
    the stage's name, or is empty.
    """

    file: str
    line: int | None
    column: int | None
    key: str
    message: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"
        return ": ".join(part for part in (where, self.key, self.message) if part)


class RecipeError(UsageError):
    """All mistakes that were found in one recipe, in the order of its text."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:LISTED_AT_MOST]]
        if len(self.problems) > LISTED_AT_MOST:
            lines.append(f"and {len(self.problems) - LISTED_AT_MOST} more problems")
        super().__init__("\n".join(lines))


class MissingInput(FlowdistillError):
    """A file, artifact, device or optional package that the command needs is not there."""

    exit_code = 3


class ArtifactError(FlowdistillError):
    """An artifact is corrupt, incomplete or made by an incompatible version."""

    exit_code = 4


class ResourceError(FlowdistillError):
    """Memory or disk ran out, or the disk fails."""

    exit_code = 5


class Diverged(FlowdistillError):
    """Training met a loss or weight that is not finite."""

    exit_code = 6


class Interrupted(FlowdistillError):
    """SIGINT or SIGTERM (`signum`) arrived; the state is saved and the same command continues."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"interrupted by {name}; run the same command again to continue")
        self.signum = signum

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 + the signal's number, as shells report it: 130 or 143."""
        return 128 + self.signum


def unknown(what: str, name: str, known: Collection[str]) -> str:
    """Text about a name that is none of the `known` ones, with the nearest of them.

    >>> unknown("solver", "huen", ["euler", "heun"])
    "unknown solver 'huen', did you mean 'heun'? (euler, heun)"
    """
    names = f" ({listed(known)})" if known else ""
    return f"unknown {what} {quoted(name)}{did_you_mean(name, known)}{names}"


def did_you_mean(name: str, known: Collection[str]) -> str:
    """`, did you mean 'heun'?`, or nothing where no known name is near."""
    near = nearest(name, known)
    return f", did you mean {quoted(near)}?" if near else ""


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that `name` is probably a slip of, in whatever case; None if none is near."""
    folded = {other.casefold(): other for other in known}
    near = get_close_matches(name.casefold(), folded, n=1)
    return folded[near[0]] if near else None


def listed(names: Collection[str]) -> str:
    """`euler, heun`; of many names the first, and how many more there are."""
    shown = ", ".join(map(bare, list(names)[:LISTED_AT_MOST]))
    more = len(names) - LISTED_AT_MOST
    return f"{shown} and {more} more" if more > 0 else shown


def bare(name: str) -> str:
    """The name as it is, or quoted if it is empty, long or not printable."""
    return name if name.isprintable() and 0 < len(name) <= WIDTH else quoted(name)


def quoted(value: object) -> str:
    """`repr` of a value, cut to fit on one line whatever it holds."""
    text = repr(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
