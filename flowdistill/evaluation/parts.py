"""The parts of an evaluation: each is made once, by all processes in step, and kept in `checkpoints/`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowdistill import artifact
from flowdistill.work import Progress, Work, batches

_CHECKPOINTS = "checkpoints"

Part: TypeAlias = tuple[dict[str, Tensor], dict[str, Any]]
"""What was measured of one thing: tensors with a row for each sample, and figures for JSON."""


class Parts:
    """Parts of an evaluation whose figures depend on all that is `described`.

    A batch is the unit of work, so that its bits are the same whoever computes it: the processes take the
    batches of a part in turn and leave their rows in files for the first, which goes on alone and writes.
    `total` evaluations of a network are reported as progress.
    """

    def __init__(self, work: Work, batch_size: int, described: object, total: int) -> None:
        self.work, self.batch_size, self.total = work, batch_size, total
        self._described = described
        self._done = self._gathers = 0
        self._folder = work.folder / _CHECKPOINTS
        artifact.create_folder(self._folder)

    def path(self, part: str, facts: Mapping[str, Any]) -> Path:
        """The file of a part."""
        key = artifact.digest([self._described, facts])[:16]
        return self._folder / f"{part}-{key}.safetensors"

    def kept(self, part: str, facts: Mapping[str, Any], cost: int, make: Callable[[], Part | None]) -> Part:
        """What `make` gives, or gave before an interruption; `cost` in evaluations of the network.

        In all processes but the first, `make` may give None.
        """
        path = self.path(part, facts)
        if self.any(not path.exists()):
            made = make()
            if made is not None and not self.work.world.rank:
                artifact.save_tensors(path, *made)
            self.work.world.wait()
        else:
            self.advance(cost)
        return artifact.load_tensors(path)

    def batches(self, count: int) -> list[slice]:
        """The numbers below `count`, batch by batch."""
        return [slice(part.start, part.stop) for part in batches(range(count), self.batch_size)]

    def gathered(
        self, parts: Iterable[slice], read: Callable[[slice], dict[str, Tensor]], evaluations: int = 0
    ) -> dict[str, Tensor] | None:
        """What `read` gives for each batch, joined in order; None in all processes but the first.

        `evaluations` of a network for one sample are reported for the batches that other processes have.
        """
        world = self.work.world
        found: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            if number % world.size == 0:
                self.check()
            if number % world.size == world.rank:
                found |= {f"{number:06}.{name}": each for name, each in read(part).items()}
            else:
                self.advance(evaluations * (part.stop - part.start))
        rows = found if world.size == 1 else self._exchanged(found)
        if world.rank:
            return None
        columns: dict[str, list[Tensor]] = {}
        for key in sorted(rows):
            columns.setdefault(key[7:], []).append(rows[key])
        return {name: torch.cat(column) for name, column in columns.items()}

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; all have to ask together."""
        return bool(self.work.world.largest(int(here), self.work.device))

    def advance(self, evaluations: int) -> None:
        """Report that so many evaluations are done."""
        self._done += evaluations
        self.work.report(Progress(self._done, self.total, "evaluation"))

    def check(self) -> None:
        """End where a signal or the time says so, all processes together: what one hears is for all."""
        stop = self.work.stop
        if self.work.world.size > 1:
            stop.signum = self.work.world.largest(stop.signum, self.work.device)
        stop.check()

    def _exchanged(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of all processes in the first, those of its own in the others."""
        world = self.work.world
        self._gathers += 1
        files = [self._folder / f"rows-{self._gathers}-{rank}.safetensors" for rank in range(world.size)]
        if world.rank:
            artifact.save_tensors(files[world.rank], mine, {})
        world.wait()
        if not world.rank:
            for file in files[1:]:
                mine |= artifact.load_tensors(file)[0]
                file.unlink()
        return mine
