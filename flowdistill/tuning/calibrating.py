"""What a model's own fine trajectory tells of every jump: followed once, kept as a small Gram matrix.

The error of a jump, and of any rule that is linear in velocities, is a combination of the trajectory's
increments and velocities. All of these follow from the M velocities that were evaluated, and so from the
first of them and how each differs from the one before. Differences are small where a jump's error is, so
that their inner products can be taken in float32 and no error drowns in rounding; and M rows are half as
many as the increments and velocities, a quarter of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flowdistill.errors import ArtifactError, Diverged
from flowdistill.schedule import Schedule, bellman, local_cost
from flowdistill.solvers import SOLVERS, integrate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from flowdistill.flow import VelocityField

    Floats: TypeAlias = NDArray[np.float64]
    Push: TypeAlias = Callable[[Tensor, Tensor], Tensor]
    """(end of a trajectory [*shape], rows [R, *shape]) -> the rows as a distance sees them there [R, F]"""

Reference = Literal["heun", "euler"]
Cost = Literal["l2", "rms", "perceptual"]
PARTS = "checkpoints"
FORMAT = 1
"""Of what is kept there; another one where it would come out otherwise."""
_RESAMPLED = 20
"""So often are trajectories drawn anew, to tell whether there are enough of them."""
_COLUMNS = 4096
"""So many products are summed in float32 before the sum goes on in float64."""
_PUSHED = 32
"""Rows that go through a feature network at once."""


@dataclass(frozen=True)
class Frame:
    """A fine grid of M steps, how it is followed, and how all of it follows from M evaluations.

    `euler` evaluates at all knots, as in the paper. `heun` takes Heun's steps between every other knot and
    Hermite's cubics between: a cubic has the states and velocities of both its ends, and its slope is the
    velocity in the middle.
    """

    fine: Schedule
    reference: Reference

    @cached_property
    def nodes(self) -> Schedule:
        """The knots that steps are taken between."""
        times = self.fine.times
        return self.fine if self.reference == "euler" else Schedule((*times[:-1:2], times[-1]), "nodes")

    def walk(
        self, field: VelocityField, noise: Tensor, labels: Tensor | None, room: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The end of the trajectories [B, *shape] and their turns [B, M, *shape] in the order of evaluation:
        the first velocity, and how each differs from the one before; in `room`, if that is given."""
        import torch

        turns = noise.new_empty(len(noise), self.fine.steps, *noise.shape[1:]) if room is None else room
        latest: Tensor | None = None
        count = 0

        def noting(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            nonlocal latest, count
            v = field(x, t, labels).to(x.dtype)
            if latest is None:
                turns[:, 0] = v
            else:
                torch.sub(v, latest, out=turns[:, count])
            latest, count = v, count + 1
            return v

        end = integrate(noting, noise, self.nodes, SOLVERS[self.reference], labels)
        if count < self.fine.steps:  # a cubic leads to the last knot, and needs the velocity there
            noting(end, end.new_zeros(len(end)), labels)
        return end, turns

    @cached_property
    def spread(self) -> Floats:
        """S [2M, M]: the increments x_{i+1} - x_i and the velocities v_i of the fine grid are S turns."""
        import numpy as np

        steps, lengths = self.nodes.steps, np.diff(self.nodes.times)[:, None]
        seen = np.tri(self.fine.steps)
        if self.reference == "euler":
            return np.concatenate([lengths * seen, seen])
        speeds, predicted = seen[::2], seen[1::2]
        if self.fine.steps % 2 == 0:  # what was evaluated last is no prediction
            speeds, predicted = np.concatenate([speeds, seen[-1:]]), predicted[:-1]
        moves = lengths * speeds[:steps]
        moves[:-1] += lengths[:-1] / 2 * (predicted - speeds[: steps - 1])
        increments, slopes = [], []
        for k, (t, s) in enumerate(self.nodes.intervals):
            move, v = moves[k], speeds[k]
            if 2 * k + 1 == self.fine.steps:
                increments.append(move)
                slopes.append(v)
                break
            w = speeds[k + 1]
            half = move / 2 + (s - t) / 8 * (v - w)
            increments += [half, move - half]
            slopes += [v, 1.5 * move / (s - t) - (v + w) / 4]
        return np.stack([*increments, *slopes])


def inner_products(rows: Tensor) -> Tensor:
    """<row_i, row_j> [M, M] of rows [M, D] in float64: of so many columns at a time as float32 sums well."""
    import torch

    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for piece in rows.split(_COLUMNS, dim=1):  # type: ignore[no-untyped-call]
        if piece.device.type == "cpu":
            array = piece.numpy()
            total += torch.from_numpy(array @ array.T)  # numpy sees that it is symmetric, and does half
        else:
            total += piece @ piece.T
    return total


def pushed(features: Callable[[Tensor], Tensor]) -> Push:
    """Rows times the Jacobian of `features` [B, *shape] -> [B, F] at the end of their trajectory.

    ||f(x + e) - f(x)||^2 is ||J e||^2 to first order, so a cost of J's rows prices what the distance sees of
    an error, as if it reached the data as it is.
    """
    import torch
    from torch.autograd import forward_ad

    def push(end: Tensor, rows: Tensor) -> Tensor:
        found = []
        with torch.no_grad(), forward_ad.dual_level():
            for part in rows.split(_PUSHED):  # type: ignore[no-untyped-call]
                here = end.expand(len(part), *end.shape).contiguous()
                dual = features(forward_ad.make_dual(here, part))  # type: ignore[no-untyped-call]
                found.append(forward_ad.unpack_dual(dual).tangent)  # type: ignore[no-untyped-call]
        return torch.cat(found)

    return push


@dataclass(frozen=True)
class Calibration:
    """Gram matrices [N, M, M] of the turns of N trajectories, and what follows from them."""

    frame: Frame
    cost: Cost
    grams: Floats

    @cached_property
    def gram(self) -> Floats:
        """Mean Gram matrix [2M, 2M] of increments and velocities, as `schedule.local_cost` takes it."""
        return self._spread(self.grams.mean(axis=0))

    @cached_property
    def mean_cost(self) -> Floats:
        """Of every jump [M + 1, M + 1]."""
        import numpy as np

        return self._mean_cost(np.full(len(self.grams), 1 / len(self.grams)))

    def _mean_cost(self, weights: Floats) -> Floats:
        import numpy as np

        if self.cost != "rms":  # of squares the mean of the Gram matrices tells all
            return local_cost(self._spread(np.tensordot(weights, self.grams, 1)), self.frame.fine.times)
        found: Floats = np.tensordot(weights, self._roots, 1)
        return found

    @cached_property
    def _roots(self) -> Floats:
        """Root of every jump's cost, trajectory by trajectory [N, M + 1, M + 1]."""
        import numpy as np

        times = self.frame.fine.times
        return np.stack([np.sqrt(local_cost(self._spread(each), times)) for each in self.grams])

    def _spread(self, gram: Floats) -> Floats:
        found: Floats = self.frame.spread @ gram @ self.frame.spread.T
        return found

    def regret(self, evaluations: list[int], seed: int) -> dict[int, float]:
        """Shares by which schedules of trajectories drawn with replacement cost more than the best."""
        import numpy as np

        chance, count, cost = np.random.default_rng(seed), len(self.grams), self.mean_cost
        least = bellman(cost).totals
        found: dict[int, list[float]] = {k: [] for k in evaluations}
        for _ in range(_RESAMPLED):
            drawn = np.bincount(chance.integers(count, size=count), minlength=count)
            resampled = bellman(self._mean_cost(drawn / count))
            for k in evaluations:
                found[k].append(sum(float(cost[i, j]) for i, j in pairwise(resampled.path(k))))
        return {
            k: float(np.mean(each)) / float(least[k]) - 1 if least[k] else 0.0 for k, each in found.items()
        }


@dataclass(frozen=True)
class Parts:
    """Where Gram matrices are kept, batch by batch, under a name that is all they were computed from.

    They are looked for in the folder of the stage and in those of its neighbours: of other runs of the stage,
    and of the runs beside this one.
    """

    folder: Path
    made_from: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """Digest of what they were computed from."""
        from flowdistill import artifact

        return artifact.digest(self.made_from)

    def read(self, noises: range) -> Floats | None:
        """Gram matrices [B, M, M] of these noises; None where nobody has kept them, whole."""
        for folder in self._places():
            found = self._whole(folder / _file_name(noises))
            if found is not None:
                return found
        return None

    def write(self, noises: range, grams: Floats) -> None:
        """Keep them."""
        import torch

        from flowdistill import artifact

        artifact.create_folder(self.folder / PARTS / self._name)
        path = self.folder / PARTS / self._name / _file_name(noises)
        artifact.save_tensors(path, {"grams": torch.from_numpy(grams)}, self._header)

    @property
    def _name(self) -> str:
        return f"calibration-{self.key[:16]}"

    @property
    def _header(self) -> dict[str, Any]:
        return {"kind": "calibration", "key": self.key}

    def _places(self) -> Iterator[Path]:
        yield self.folder / PARTS / self._name
        run = self.folder.absolute().parent
        yield from sorted(run.glob(f"*/{PARTS}/{self._name}"))
        yield from sorted(run.parent.glob(f"*/*/{PARTS}/{self._name}"))

    def _whole(self, path: Path) -> Floats | None:
        from flowdistill import artifact

        if not path.is_file():
            return None
        try:
            tensors, header = artifact.load_tensors(path)
        except ArtifactError:  # what is damaged is computed again
            return None
        return tensors["grams"].numpy() if header.items() >= self._header.items() else None


def _file_name(noises: range) -> str:
    return f"{noises.start:06d}-{noises.stop:06d}.safetensors"


@dataclass
class Follower:
    """Follows trajectories, batch by batch, in memory for the turns of one batch, which is used again."""

    frame: Frame
    field: VelocityField
    push: Push | None = None
    _room: Tensor | None = None

    def __call__(self, noise: Tensor, labels: Tensor | None) -> Floats:
        """Gram matrices [B, M, M] of the turns of a batch; Diverged where they are not finite."""
        import torch

        if self._room is None or len(self._room) < len(noise):
            self._room = noise.new_empty(len(noise), self.frame.fine.steps, *noise.shape[1:])
        end, turns = self.frame.walk(self.field, noise, labels, self._room[: len(noise)])
        found = []
        for b, rows in enumerate(turns):
            seen = rows if self.push is None else self.push(end[b], rows)
            found.append(inner_products(seen.flatten(1)))
        grams = torch.stack(found).cpu()
        if not grams.isfinite().all():
            raise Diverged("the model's velocity is not finite along its trajectory: it is of no use")
        return grams.numpy()
