"""The command line: arguments in, one call into the package, results on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flowdistill.boundary import Invocation, guard, signals


def main() -> None:
    """The console script."""
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Do what the arguments say and return the exit code; nothing is raised."""
    invocation = Invocation(arguments)
    with signals(invocation):
        return guard(lambda: _invoke(invocation), invocation)


def _invoke(invocation: Invocation) -> int:
    # Within the boundary: even this import may be interrupted.
    from flowdistill.cli.application import invoke

    return invoke(invocation)
