"""The state of a training, which is all that a checkpoint has to hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill import artifact
from flowdistill.errors import UsageError
from flowdistill.training.averages import Average
from flowdistill.training.batches import nothing_measured
from flowdistill.training.sharding import placed, whole

_MEMORY = 0.99
"""A step later the measured losses count this much of what they did."""


class State:
    """Weights, their averages, the optimizer, the step and what was measured on the way."""

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, averages: Sequence[Average]
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.rules = averages
        self.averages = [
            {name: value.detach().clone() for name, value in network.state_dict().items()} for _ in averages
        ]
        self.step = 0
        self.setbacks = 0
        """How often the loss was not finite, and the training went on all the same."""
        self.skipped = 0
        """Batches that were drawn and do not count, after the training was rolled back."""
        self.window = Window()
        self.measured = nothing_measured()
        """The loss by t, of late."""

    @property
    def draws(self) -> int:
        """Which batch, and which random numbers, the next step takes."""
        return self.step + self.skipped

    @torch.no_grad()
    def advance(self, terms: Mapping[str, float], by_time: Tensor) -> None:
        """Count an update: move the averages, and keep what was measured; buffers are copied."""
        self.step += 1
        weights = dict(self.network.named_parameters(remove_duplicate=False))
        for rule, average in zip(self.rules, self.averages, strict=True):
            rate = 1.0 - rule.decay_at(self.step)
            torch._foreach_lerp_([average[name] for name in weights], list(weights.values()), rate)
            for name, value in self.network.named_buffers():
                if name in average:
                    average[name].copy_(value)
        self.window.add(terms, by_time)
        self.measured = _MEMORY * self.measured + by_time

    def save(self, path: Path, key: str, scaler: dict[str, Any], write: bool) -> None:
        """Write all of it, which takes all processes where it is dealt out; `key` names the run it is of."""
        tensors: dict[str, Tensor] = {}
        for group, values in (("network", self.network.state_dict()), *self._named_averages()):
            tensors |= {f"{group}.{name}": whole(value) for name, value in values.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": whole(value) for name, value in moments.items()}
        header = {
            "key": key,
            "step": self.step,
            "setbacks": self.setbacks,
            "skipped": self.skipped,
            "window": self.window.as_dict(),
            "measured": self.measured.tolist(),
            "scaler": scaler,
        }
        if write:
            artifact.save_tensors(path, tensors, header)

    def load(self, path: Path, key: str) -> dict[str, Any]:
        """Read what `save` wrote and return the loss scaler's state; another run's file is refused."""
        tensors, header = artifact.load_tensors(path)
        if header["key"] != key:
            raise UsageError(
                f"{path}: this checkpoint belongs to other settings or inputs; "
                "restore the recipe, choose another --out, or start over with --fresh"
            )
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = value
        for group, values in (("network", self.network.state_dict()), *self._named_averages()):
            for name, value in groups[group].items():
                values[name].copy_(placed(value, values[name]))
        self.optimizer.load_state_dict(
            self.optimizer.state_dict() | {"state": self._moments(groups.get("optimizer", {}))}
        )
        self.step, self.setbacks, self.skipped = (header[name] for name in ("step", "setbacks", "skipped"))
        self.window = Window(**header["window"])
        self.measured = torch.tensor(header["measured"], dtype=torch.float64)
        return dict(header["scaler"])

    def _named_averages(self) -> Iterable[tuple[str, dict[str, Tensor]]]:
        return [(f"average{number or ''}", each) for number, each in enumerate(self.averages)]

    def _moments(self, named: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """The optimizer's state by parameter, each moment laid out in memory as its parameter is.

        Fused kernels walk parameter and moments in the order of memory and would pair the wrong entries.
        """
        parameters = list(self.network.parameters())
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in named.items():
            index, _, moment = name.partition(".")
            like = parameters[int(index)]
            alike = value
            if value.shape == like.shape:
                alike = torch.empty_like(like, requires_grad=False).copy_(placed(value, like))
            moments.setdefault(int(index), {})[moment] = alike
        return moments


class Window:
    """Means of the loss terms, and of the loss by t, since the last line of the log."""

    def __init__(
        self, sums: Mapping[str, float] | None = None, by_time: Sequence[Sequence[float]] | None = None
    ) -> None:
        self.sums = dict(sums or {})
        self.by_time = nothing_measured()
        if by_time is not None:
            self.by_time += torch.tensor(by_time, dtype=torch.float64)

    def add(self, terms: Mapping[str, float], by_time: Tensor) -> None:
        for name, value in {**terms, "count": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.by_time = self.by_time + by_time

    def take(self) -> tuple[dict[str, float], list[float | None]]:
        """Means so far, and the loss in each stretch of t that was seen; starts a new window.

        The list is empty where no loss has a time.
        """
        count = self.sums.pop("count", 1.0)
        means = {name: total / count for name, total in sorted(self.sums.items())}
        sums, numbers = self.by_time.tolist()
        by_time = [total / number if number else None for total, number in zip(sums, numbers, strict=True)]
        self.sums, self.by_time = {}, nothing_measured()
        return means, by_time if any(numbers) else []

    def as_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "by_time": self.by_time.tolist()}
