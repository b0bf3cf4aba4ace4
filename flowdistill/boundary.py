"""The edge between the program and the shell: signals come in, one message and an exit code go out.

An error that the user can act on is its message, without a traceback. The first SIGINT or SIGTERM lets work
that saves its state do so; the second ends the process at once, which is safe at any moment, since files are
written whole or not at all.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from flowdistill.errors import FlowdistillError, Interrupted, RecipeError, ResourceError, UsageError
from flowdistill.processes import LAUNCHED, is_loss

if TYPE_CHECKING:
    from flowdistill.work import Stop

BROKEN_PIPE = 141
"""128 + SIGPIPE, as shells report it."""

_EXIT_CODES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ResourceError.exit_code),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), UsageError.exit_code),
}
"""Of failures of the system that reach the boundary as they are."""


class _Stopped(BaseException):
    """Ends work that has nothing to save, past every `except Exception` on the way.

    Not a KeyboardInterrupt: one that crosses an `exec` makes Python end itself by the signal in the end, so
    the exit code would depend on where it struck.
    """


class Invocation:
    """One command: how it was called, and what the shell has asked of it since."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self.verbose = False
        self.signum = 0
        self.stop: Stop | None = None
        """Set by work that saves its state when asked to stop."""

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Ask the work to stop, or stop at once where there is nothing to save or it was asked before."""
        if self.signum:
            _show_cursor()
            os._exit(128 + signum)
        self.signum = signum
        if self.stop is None:
            raise _Stopped
        self.stop.receive(signum)
        # Not sys.stderr: a signal may arrive in the middle of a write to it.
        name = signal.Signals(signum).name
        below_the_bar = "\n" if os.isatty(2) else ""
        os.write(2, f"{below_the_bar}{name}: saving the state; once more ends at once\n".encode())

    def farewell(self) -> str:
        """What to print after an interruption."""
        text = f"interrupted by {signal.Signals(self.signum).name}"
        if self.stop is None:
            return text
        if self.stop.is_late:
            text = f"the time ({self.stop.limit}) is up"
        # With --fresh the same command would begin anew.
        again = [argument for argument in self.arguments if argument != "--fresh"]
        return f"{text}, the state is saved\ncontinue: {shlex.join(['flowdistill', *again])}"


@contextmanager
def signals(invocation: Invocation) -> Iterator[None]:
    """Hand SIGINT and SIGTERM to the invocation."""
    before = {
        number: signal.signal(number, invocation.on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def guard(action: Callable[[], int], invocation: Invocation) -> int:
    """Exit code of `action`, whatever it raises, which is told on stderr."""
    try:
        code = action()
        sys.stdout.flush()
        return code
    except (BrokenPipeError, SystemExit):
        # The reader of our output has left, as in `| head`; typer turns that into a SystemExit, and we raise
        # none. Nothing more may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    except BaseException as error:
        cut_short = invocation.signum and invocation.stop is None  # whatever an import made of it
        if cut_short or isinstance(error, Interrupted | _Stopped):
            if isinstance(error, Interrupted):  # the signal may have reached a launcher's handler, not ours
                invocation.signum = error.signum
            if LAUNCHED not in os.environ:  # else the process that started this one says so, for all of them
                tell(invocation.farewell())
            return 128 + invocation.signum
        message, code = describe(error)
        if invocation.verbose:
            traceback.print_exception(error)
        tell(message)
        return code


def describe(error: BaseException) -> tuple[str, int]:
    """Message and exit code of an error.

    Mistakes in a recipe stand as `file:line:column: ...`, as compilers and editors have it; all other
    messages begin with `error: `.
    """
    if isinstance(error, RecipeError):
        return str(error), error.exit_code
    if isinstance(error, FlowdistillError):
        return f"error: {error}", error.exit_code
    if memory := _out_of_memory(error):
        return f"error: {memory}", ResourceError.exit_code
    if is_loss(error):
        text = "another process of this training is gone; run the same command again, it continues"
        return f"error: {text}", ResourceError.exit_code
    if isinstance(error, OSError) and error.errno in _EXIT_CODES:
        place = f"{error.filename}: " if error.filename else ""
        return f"error: {place}{error.strerror}", _EXIT_CODES[error.errno]
    kind, text = type(error).__name__, str(error).partition("\n")[0]
    return (
        f"error: a bug in flowdistill, {kind}: {text}\n"
        "please report it with the traceback that -v shows; what was finished before is intact",
        1,
    )


def _out_of_memory(error: BaseException) -> str:
    torch = sys.modules.get("torch")
    if isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return "the device's memory is full; lower batch_size, or choose another --device"
    # The CPU's allocator has no exception of its own.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "the memory is full; lower batch_size, or end other programs"
    return ""


def tell(message: str) -> None:
    """Print a message on stderr."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def _show_cursor() -> None:
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # the progress bar hides it
