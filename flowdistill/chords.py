"""Chords of a flow's paths: between the times of which schedules, and which of them a step of training sees.

Straightening (BOSS, arXiv 2312.16414, Sec. 3.3) teaches a network the mean velocity (x_t - x_s) / (t - s) of
its own path between two neighbouring times t > s of a schedule. The states are those of a store of pairs that
keeps its paths, so one store is enough for every schedule whose times are among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowdistill.errors import UsageError
from flowdistill.schedule import Schedule, uniform

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.sources import Draws, PairSource

_CLOSE = 1e-9
"""Times that differ by less are the same, written or computed in another way."""


def merged(times: Iterable[float], others: Iterable[float]) -> tuple[float, ...]:
    """`times`, and those of the `others` that are not close to any that is there, falling."""
    found = list(times)
    for t in others:
        if all(abs(t - each) > _CLOSE for each in found):
            found.append(t)
    return tuple(sorted(found, reverse=True))


def bellman_schedules(folder: Path, model: str, key: str) -> dict[int, Schedule]:
    """The schedules of the paper's dynamic programme in a boss stage's folder, for each of its `nfe`.

    UsageError, with the recipe's `key`, where they are of another model than that of the digest `model`.
    """
    from flowdistill import artifact

    path = folder / "boss.safetensors"
    tensors, header = artifact.load_tensors(path)
    if header.get("model") != model:
        raise UsageError(f"{key}: {path} was made for another model; name the boss stage of the model itself")
    times = uniform(len(tensors["times"]) - 1).times
    return {
        nfe: Schedule(tuple(times[knot] for knot in tensors[f"path.{nfe}"].tolist()), "boss")
        for nfe in header["settings"]["nfe"]
    }


@dataclass(frozen=True)
class Chord:
    """What the samples of a batch are shown: [B] each, but for the times [B, K + 1] of their schedules."""

    grid: Tensor
    """Filled up with 0 where a schedule is shorter."""
    number: Tensor
    """Of the interval that the chord spans."""
    own: bool
    """Whether they begin at the states where the student itself arrives."""

    @property
    def start(self) -> Tensor:
        """t at the noisier end."""
        return self._at(self.number)

    @property
    def end(self) -> Tensor:
        """t at the other; exactly 0 for the last interval."""
        return self._at(self.number + 1)

    def _at(self, number: Tensor) -> Tensor:
        return self.grid.gather(1, number[:, None])[:, 0]


@dataclass(frozen=True)
class Drawn:
    """Which chord each sample gets: every schedule, and every interval of it, equally often.

    A share `own` of all steps begins at the student's own states. All of it is a function of the step.
    """

    schedules: Sequence[Schedule]
    own: float = 0.0

    def at(self, draw: Draws) -> Chord:
        """The chords of one step's batch, on the CPU in float64."""
        import torch

        from flowdistill import randomness

        longest = max(each.steps for each in self.schedules)
        rows = [[*each.times, *[0.0] * (longest - each.steps)] for each in self.schedules]
        of = (draw.uniform("schedule") * len(rows)).long()
        steps = torch.tensor([each.steps for each in self.schedules])[of]
        number = (draw.uniform("interval") * steps).long()
        own = float(randomness.uniforms(draw.seed, "own states", draw.step, 1)[0]) < self.own
        return Chord(torch.tensor(rows, dtype=torch.float64)[of], number, own)


class ChordSource:
    """Both ends of chords as the batches of a training: x0 is the later state, eps the earlier one.

    Where the student is to walk to the chord itself, eps is the noise that it starts from. UsageError, with
    the recipe's `key`, where the stores have kept no state at a time of the schedules.
    """

    def __init__(self, pairs: PairSource, drawn: Drawn, key: str) -> None:
        import torch

        self.pairs, self.drawn = pairs, drawn
        first = pairs.stores[0]
        self._times = torch.tensor(first.spec.times, dtype=torch.float64)
        for store in pairs.stores[1:]:
            if store.spec.path != first.spec.path:
                raise UsageError(f"{key}: {store.folder} keeps its states at other times than {first.folder}")
        for schedule in drawn.schedules:
            wanted = torch.tensor(schedule.times, dtype=torch.float64)
            missing = wanted[(wanted - self._times[self._which(wanted)]).abs() > _CLOSE]
            if len(missing):
                shown = ", ".join(f"{t:g}" for t in missing.tolist()[:4])
                raise UsageError(
                    f"{key}: {first.folder} has kept no states at t = {shown} of {schedule.steps} steps "
                    f"'{schedule.name}'; make the pairs with path: {{schedule: STAGE}} or "
                    f"{{uniform: [{schedule.steps}]}}"
                )

    def batch(self, draw: Draws) -> tuple[Tensor, Tensor, Tensor | None]:
        chord = self.drawn.at(draw)
        start = self._which(chord.start)
        earlier = start.new_zeros(len(start)) if chord.own else start
        later = self.pairs.states(draw, self._which(chord.end))
        return later, self.pairs.states(draw, earlier), self.pairs.labels(draw)

    def _which(self, times: Tensor) -> Tensor:
        """Numbers of the kept states nearest to `times` [B], [B] int64."""
        return (self._times - times[:, None]).abs().argmin(1)
