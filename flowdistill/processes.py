"""Several processes at one stage: joining those that a launcher has started, and starting some here.

accelerate, on torch.distributed, says who is there; torchrun's launcher starts processes. What they do
together is agreed on through files (`pairstore`), so that one that dies is no loss to the others.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from flowdistill.errors import FlowdistillError, Interrupted, ResourceError, UsageError

LAUNCHED = "FLOWDISTILL_LAUNCHED"
"""In the environment of processes that another one of ours has started, and speaks for."""
_STARTS = 4
"""So often are all processes started where one was killed each time."""
_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class WorkersFailed(FlowdistillError):
    """A process that was started failed, and has `said` why; `exit_code` is its own."""

    def __init__(self, rank: int, exit_code: int, said: str) -> None:
        why = said.strip().removeprefix("error: ") or "what it said is above"
        super().__init__(f"process {rank} ended with exit code {exit_code}: {why}")
        self.exit_code = exit_code  # type: ignore[misc]


@dataclass(frozen=True)
class World:
    """The processes of one launch, of which this is number `rank`."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def largest(self, number: int, device: Any) -> int:
        """The largest of the numbers that the processes have; all have to ask together."""
        if self.size == 1:
            return number
        import torch
        from accelerate.utils import gather

        return int(gather(torch.tensor([number], device=device)).max())


def launched() -> int:
    """How many processes torchrun, accelerate or another launcher has started; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined(device: str, collective: bool) -> Iterator[World]:
    """The world that a launcher has set up, once all are there; of one process where there is none.

    Where the work is not `collective`, nothing but the roll is called, by gloo on GPUs too, which does not
    mind a process that dies.

    Raises `UsageError` where fewer processes came up than were asked for.
    """
    asked = launched()
    if asked == 1:
        yield World()
        return
    from accelerate import PartialState

    backend = None if collective else "gloo"
    state = PartialState(cpu=device == "cpu", backend=backend, timeout=_PATIENCE)
    try:
        if state.num_processes != asked:
            raise UsageError(
                f"{asked} processes were asked for, and accelerate came up with {state.num_processes}"
            )
        yield World(state.process_index, state.num_processes)
    finally:
        # What still holds the group (accelerate ties models into cycles) would outlive it, and at exit gloo's
        # threads end in an abort.
        gc.collect()
        with suppress(Exception):  # others may be gone
            state.destroy_process_group()


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process, which was waited for, is gone."""
    torch = sys.modules.get("torch")
    by_type = isinstance(error, getattr(getattr(torch, "distributed", None), "DistBackendError", ()))
    return by_type or (isinstance(error, RuntimeError) and "gloo" in str(error))


def launch(arguments: Callable[[], Sequence[str]], count: int, tell: Callable[[str], None]) -> None:
    """Run `flowdistill ARGUMENTS` in so many processes of this machine, and wait for them.

    Where one is killed, all begin again with the arguments as they are then, and continue. Raises
    `WorkersFailed` where one fails, and `Interrupted` after a signal, when all have saved their state.
    """
    import tempfile

    for _ in range(_STARTS):
        with _as_before(count), tempfile.TemporaryDirectory() as logs:
            killed = _launch(arguments(), count, Path(logs))
        if killed is None:
            return
        tell(f"process {killed} of {count} was killed; all begin again, and continue")
    raise ResourceError(
        f"{_STARTS} times one of {count} processes was killed: is there too little memory for so many?"
    )


def _launch(arguments: Sequence[str], count: int, logs: Path) -> int | None:
    """One try; the number of the process that was killed, None where all is done."""
    import uuid

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The first process shows how far all are; this one prints the result.
    shown = {rank: Std.ALL if rank else Std.OUT for rank in range(count)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=shown),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "flowdistill", *arguments)
    except SignalException as error:
        raise Interrupted(error.sigval) from None
    except ChildFailedError as error:
        exit_codes = {failure.exitcode: rank for rank, failure in error.failures.items()}
        if -signal.SIGKILL in exit_codes:  # the others may have failed for want of it
            return exit_codes[-signal.SIGKILL]
        for signum in (signal.SIGINT, signal.SIGTERM):
            if 128 + signum in exit_codes:  # one was told to stop, or its time is up, and all agreed
                raise Interrupted(signum) from None
        rank, failure = error.get_first_failure()
        if 0 in error.failures and error.failures[0].exitcode == failure.exitcode:
            rank = 0  # it has said the same already
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        said = "".join(each.read_text(errors="replace") for each in logs.rglob(f"{rank}/stderr.log"))
        raise WorkersFailed(rank, code, said) from None
    return None


@contextmanager
def _as_before(count: int) -> Iterator[None]:
    """What a launch changes in this process is put back: signal handlers, the environment, logging."""
    import logging

    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ[LAUNCHED] = "1"
    logging.disable(logging.ERROR)  # the launcher's own words about what we say ourselves
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
