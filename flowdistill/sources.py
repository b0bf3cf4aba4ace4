"""Where the batches of a training come from: data with fresh noise, or the pairs of stores.

A batch is a function of the step alone. Which sample is number n of a training is computed, not remembered,
so a position in the data is restored by knowing the step, in any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flowdistill import randomness
from flowdistill.errors import UsageError

if TYPE_CHECKING:
    from flowdistill.data import Dataset
    from flowdistill.pairstore import PairStore
    from flowdistill.stages import Feed
    from flowdistill.teachers import Card

_CYCLE = 1000
"""Shares of a mixture are kept to this part exactly."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step, of which a process takes its part of the batch.

    They depend neither on the number of processes nor on the device.
    """

    seed: int
    step: int
    part: slice
    total: int
    device: torch.device

    @property
    def numbers(self) -> Tensor:
        """Which of all samples of the training these are, [B] int64."""
        first = self.step * self.total
        return torch.arange(first, first + self.total)[self.part]

    def uniform(self, purpose: str) -> Tensor:
        """[B] in [0, 1), float64, on the CPU: not every device has this type."""
        return randomness.uniforms(self.seed, purpose, self.step, self.total)[self.part]

    def chosen(self, purpose: str, count: int) -> Tensor:
        """Whether each is among `count` of the whole batch, all equally likely, [B] bool on the CPU."""
        return randomness.permutation(self.seed, purpose, self.step, self.total)[self.part] < count

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """[B, *shape] standard normal, float32."""
        return randomness.noise(randomness.key(self.seed, purpose), self.numbers, shape).to(self.device)


class Source(Protocol):
    """Data as a function of the step, so that its position is restored at no cost."""

    def batch(self, draw: Draws) -> tuple[Tensor, Tensor, Tensor | None]:
        """x0, eps [B, *shape] and labels [B] of one step."""
        ...


@dataclass(frozen=True)
class DataSource:
    """Samples of a data set with fresh noise (independent coupling); endless data are simply read on."""

    data: Dataset

    def batch(self, draw: Draws) -> tuple[Tensor, Tensor, Tensor | None]:
        count = self.data.count
        numbers = draw.numbers if count is None else shuffled(draw.seed, "order", draw.numbers, count)
        x0, labels = self.data.batch(numbers, draw.seed)
        return x0, draw.normal("noise", self.data.shape), labels


class PairSource:
    """The pairs of one or more stores, shuffled anew in each epoch, as a recipe's `feed` selects them.

    Of several stores each has its share of every stretch of `_CYCLE` samples, evenly spread, and runs through
    epochs of its own. Raises `UsageError` where the stores do not go together or nothing is left of one.
    """

    def __init__(self, stores: Sequence[PairStore], feed: Feed) -> None:
        _check_alike(stores)
        self.stores = list(stores)
        self.feed = feed
        self.rows = [_selected(store, feed) for store in stores]
        """Indices of the pairs that take part, [n] a store; a range where they are all there."""
        if feed.flip and len(stores[0].spec.shape) != 3:
            raise UsageError(
                f"feed.flip: pairs of shape {list(stores[0].spec.shape)} cannot be flipped, expected images"
            )
        self._slots, self._before = _cycle(feed.weights or [float(len(rows)) for rows in self.rows], stores)

    def batch(self, draw: Draws) -> tuple[Tensor, Tensor, Tensor | None]:
        parts = [(places, store.batch(rows)) for places, store, rows in self._chosen(draw)]
        eps, x0, labels = _merged(parts, len(draw.numbers))
        return self._flipped(x0, draw), self._flipped(eps, draw), labels

    def states(self, draw: Draws, which: Tensor) -> Tensor:
        """The state [B, *shape] of each pair of `batch` at time `which` [B] of its store's path."""
        states = torch.empty(len(which), *self.stores[0].spec.shape)
        for places, store, rows in self._chosen(draw):
            states[places] = store.states(rows, which[places])
        return self._flipped(states, draw)

    def labels(self, draw: Draws) -> Tensor | None:
        """The labels [B] of `batch`."""
        if not self.stores[0].spec.classes:
            return None
        labels = torch.empty(len(draw.numbers), dtype=torch.int64)
        for places, store, rows in self._chosen(draw):
            labels[places] = store.column("labels", rows).long()
        return labels

    def _chosen(self, draw: Draws) -> Iterator[tuple[Tensor, PairStore, Tensor]]:
        """Places in the batch, the store that they are taken from, and which of its pairs."""
        round_, slot = draw.numbers // len(self._slots), draw.numbers % len(self._slots)
        of = self._slots[slot]
        for number, (store, rows) in enumerate(zip(self.stores, self.rows, strict=True)):
            places = (of == number).nonzero()[:, 0]
            if not len(places):
                continue
            in_a_round = int((self._slots == number).sum())
            positions = round_[places] * in_a_round + self._before[slot[places], number]
            purpose = f"order {number}" if number else "order"
            chosen = shuffled(draw.seed, purpose, positions, len(rows))
            yield places, store, rows[chosen] if isinstance(rows, Tensor) else chosen

    def _flipped(self, x: Tensor, draw: Draws) -> Tensor:
        """x [B, *shape], half of it mirrored where the feed says so; always the same of a batch."""
        if self.feed.flip:
            coin = (draw.uniform("flip") < 0.5).nonzero()[:, 0]
            x[coin] = x[coin].flip(-1)
        return x


def shuffled(seed: int, purpose: str, numbers: Tensor, count: int) -> Tensor:
    """Which of `count` samples number n of an endless run is, [B]; each epoch is an order of all."""
    epochs, at = numbers // count, numbers % count
    chosen = torch.empty_like(numbers)
    for epoch in sorted(set(epochs.tolist())):
        here = epochs == epoch
        chosen[here] = _order(seed, purpose, epoch, count)[at[here]]
    return chosen


@lru_cache(maxsize=64)
def _order(seed: int, purpose: str, epoch: int, count: int) -> Tensor:
    return randomness.permutation(seed, purpose, epoch, count)


def _merged(
    parts: Sequence[tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]], count: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One batch of the parts of several stores, each at its places."""
    if len(parts) == 1:
        return parts[0][1]
    eps, x0, labels = (
        None if each is None else each.new_empty(count, *each.shape[1:]) for each in parts[0][1]
    )
    assert eps is not None and x0 is not None
    for places, (its_eps, its_x0, its_labels) in parts:
        eps[places], x0[places] = its_eps, its_x0
        if labels is not None and its_labels is not None:
            labels[places] = its_labels
    return eps, x0, labels


def _selected(store: PairStore, feed: Feed) -> Tensor | range:
    first, end = feed.subset or (0, len(store))
    if end > len(store):
        raise UsageError(f"feed.subset: [{first}, {end}], but {store.folder} has {len(store)} pairs")
    if not feed.drop_farthest:
        return torch.arange(first, end) if feed.subset else range(end)
    distance = store.column("distance", range(first, end))
    # The small number is for shares like 0.29 of 100, which is 29 pairs.
    kept = max(1, len(distance) - int(feed.drop_farthest * len(distance) + 1e-9))
    # Stable, so that of equal distances the first stay.
    return first + distance.argsort(stable=True)[:kept].sort().values


def check_for(card: Card, store: PairStore, stage: str) -> None:
    """Raise `UsageError` where pairs are not of the samples that a student of this card makes."""
    spec = store.spec
    differences = [
        f"{what} {found}, not {expected}"
        for what, found, expected in (
            ("shape", list(spec.shape), list(card.shape)),
            ("classes", spec.classes, card.classes),
            ("latent", *_latents(spec.origin, card)),
        )
        if found != expected
    ]
    if differences:
        raise UsageError(
            f"{stage}.pairs: those in {store.folder} are not for this student: {'; '.join(differences)}"
        )


def _latents(origin: Mapping[str, Any], card: Card) -> tuple[Any, Any]:
    """How pairs and a card scale an autoencoder's latents; a store that says nothing is taken to agree."""
    if "latent" not in origin:
        return None, None
    kept = card.latent.model_dump(mode="json", include={"scale", "shift"}) if card.latent else None
    return origin["latent"], kept


def _check_alike(stores: Sequence[PairStore]) -> None:
    for what in ("shape", "classes"):
        found = {getattr(store.spec, what): store.folder for store in stores}
        if len(found) > 1:
            differ = ", ".join(f"{folder} has {value}" for value, folder in found.items())
            raise UsageError(f"pairs that are mixed must agree in {what}: {differ}")


def _cycle(weights: Sequence[float], stores: Sequence[PairStore]) -> tuple[Tensor, Tensor]:
    """Store of each slot [L] of a round, and how many slots each store had before it, [L, stores]."""
    if len(weights) != len(stores):
        raise UsageError(f"feed.weights: {len(weights)} numbers for {len(stores)} stores of pairs")
    length = _CYCLE if len(stores) > 1 else 1
    exact = [weight / sum(weights) * length for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for number in range(length - sum(counts)):
        counts[by_rest[number % len(counts)]] += 1
    while sum(counts) > length:
        counts[counts.index(max(counts))] -= 1
    spread = sorted(((j + 0.5) / count, k) for k, count in enumerate(counts) for j in range(count))
    slots = torch.tensor([k for _, k in spread])
    taken = torch.nn.functional.one_hot(slots, len(stores)).cumsum(0)
    return slots, taken - torch.nn.functional.one_hot(slots, len(stores))
