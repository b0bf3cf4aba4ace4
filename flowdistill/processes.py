"""Several processes at one stage: joining those that a launcher has started, and starting some here.

accelerate, on torch.distributed, says who is there; torchrun's launcher starts processes. What they do
together is agreed on through files (`pairstore`), so that one that dies is no loss to the others.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

from flowdistill.errors import FlowdistillError, Interrupted, UsageError

_RESTARTS = 3
"""So often are all processes started again after one was killed."""
_ROLL_CALL = timedelta(minutes=5)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class WorkersFailed(FlowdistillError):
    """A process that was started failed, and has said why; `exit_code` is its own."""

    def __init__(self, rank: int, exit_code: int) -> None:
        super().__init__(f"process {rank} ended with exit code {exit_code}; what it said is above")
        self.exit_code = exit_code  # type: ignore[misc]


@dataclass(frozen=True)
class World:
    """The processes of one launch, of which this is number `rank`."""

    rank: int = 0
    size: int = 1


def launched() -> int:
    """How many processes torchrun, accelerate or another launcher has started; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that a launcher has set up, once all are there; of one process where there is none.

    Raises `UsageError` where fewer processes came up than were asked for.
    """
    asked = launched()
    if asked == 1:
        yield World()
        return
    from accelerate import PartialState

    # gloo on GPUs too: nothing but the roll is called, and it does not mind a process that dies.
    state = PartialState(cpu=device == "cpu", backend="gloo", timeout=_ROLL_CALL)
    try:
        if state.num_processes != asked:
            raise UsageError(
                f"{asked} processes were asked for, and accelerate came up with {state.num_processes}"
            )
        yield World(state.process_index, state.num_processes)
    finally:
        with suppress(Exception):  # others may be gone
            state.destroy_process_group()


def launch(arguments: Sequence[str], count: int, tell: Callable[[str], None]) -> None:
    """Run `flowdistill ARGUMENTS` in so many processes of this machine, and wait for them.

    Where one is killed, all begin again, and continue. Raises `WorkersFailed` where one fails, and
    `Interrupted` after a signal, when all have saved their state.
    """
    with _handlers_kept(), tempfile.TemporaryDirectory() as logs:
        for left in reversed(range(_RESTARTS + 1)):
            killed = _launch(arguments, count, logs)
            if killed is None:
                return
            if not left:
                raise WorkersFailed(killed, 128 + signal.SIGKILL)
            tell(f"process {killed} of {count} was killed; all begin again, and continue")


def _launch(arguments: Sequence[str], count: int, logs: str) -> int | None:
    """One try; the number of the process that was killed, None where all is done."""
    import logging
    import sys
    import uuid

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=Std.OUT),  # this process prints the result
    )
    try:
        elastic_launch(config, sys.executable)("-m", "flowdistill", *arguments)
    except SignalException as error:
        raise Interrupted(error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == -signal.SIGKILL:
            return rank
        raise WorkersFailed(
            rank, failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        ) from None
    return None


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """The launcher sets handlers of its own and leaves them."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
