"""Real samples: what they look like to the instruments, and as the reference of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowdistill import artifact
from flowdistill.errors import FlowdistillError, UsageError
from flowdistill.evaluation import extractors, metrics, targets
from flowdistill.evaluation.kinds import distances
from flowdistill.evaluation.targets import Compared, Given, Reader, Target
from flowdistill.work import batches

if TYPE_CHECKING:
    from flowdistill.evaluation.instruments import Instruments
    from flowdistill.evaluation.parts import Part, Parts
    from flowdistill.evaluation.rows import Plan

_BLOCK = 16
"""Batches of a reference whose features are in memory at once."""


class RealData:
    """Fresh samples of the data that the models imitate, or the user's own, in all features."""

    def __init__(
        self, plan: Plan, instruments: Instruments, parts: Parts, given: Given | None, seed: int
    ) -> None:
        self.plan, self.parts, self.given, self.seed = plan, parts, given, seed
        self.readers = instruments.readers
        self.card, self.device = plan.accurate.model.card, parts.work.device
        self.of_moments = _matched(given, plan, self.readers)

    @cached_property
    def _part(self) -> Part:
        return self.parts.kept("real", {}, 0, self._measure)

    @property
    def figures(self) -> dict[str, Any]:
        """Of fresh real samples, which no model can beat."""
        return self._part[1]

    @property
    def samples(self) -> dict[str, Tensor]:
        """Index and label of all samples, drawn as those of real ones are."""
        return {name: each for name, each in self._part[0].items() if name in ("index", "label")}

    @cached_property
    def targets(self) -> dict[str, Target]:
        """By the key of the extractor, for all processes; those without a reference are missing."""
        return self._targets(self._part[0])

    def facts(self) -> dict[str, dict[str, str]]:
        """Extractor and reference of all distances, for JSON; the digest is that of what it was made from."""
        made_of = self.given.fingerprint if self.given else [self.seed, self.plan.samples]
        return {
            reader.key: {
                "extractor": reader.label,
                "reference": target.of,
                "digest": artifact.digest([reader.label, target.of, made_of])[:16],
            }
            for reader in self.readers
            if (target := self.targets.get(reader.key))
        }

    def read(self, x: Tensor) -> dict[str, Tensor]:
        """What all readers find in samples [B, *shape]: features by their key, and `classes`."""
        found = {}
        for reader in self.readers if len(x) else ():
            found[reader.key], classes = reader.read(x)
            if classes is not None:
                found["classes"] = classes
        return found

    # --- fresh samples ----------------------------------------------------------------------------

    def _measure(self) -> Part | None:
        """Tensors: `samples`, and the fresh ones as a reference by extractor."""
        indices = torch.arange(self.plan.samples)
        real = extractors.real(self.card)
        if real is None:
            drawn = self.plan.accurate.model.labels(self.seed, range(len(indices)))
            kinds = [kind for reader in self.readers for kind in distances(reader.key)]
            reason = f"there is no way to draw from data '{self.card.data}'"
            skipped = dict.fromkeys(("fd", "accuracy", *kinds), reason)
            return _present(index=indices, label=drawn), {"metrics": {}, "skipped": skipped}
        count = min(real.count or len(indices), len(indices))

        def read(part: slice) -> dict[str, Tensor]:
            x, label = real.batch(indices[part], self.seed)
            return {"label": label, **self.read(x[: max(0, count - part.start)].to(self.device))}

        own = self._own  # read by all processes together
        found = self.parts.gathered(self.parts.batches(len(indices)), read)
        if found is None:
            return None
        tensors = _present(index=indices, label=found["label"] if self.card.classes else None)
        for reader in self.readers:
            features = found[reader.key]
            moments = reader.moments or metrics.Reference(*metrics.moments(features))
            tensors |= _stored(reader.key, Target(moments, features[: targets.kept(reader.key)], ""))
        compared = [_real(reader, found[reader.key], own.get(reader.key)) for reader in self.readers]
        return tensors, targets.summary(self.readers, compared, found.get("classes"), tensors.get("label"))[1]

    def _targets(self, drawn: dict[str, Tensor]) -> dict[str, Target]:
        found = {}
        for reader in self.readers:
            if reader.key in self._own:
                found[reader.key] = self._own[reader.key]
            elif stored := _under(reader.key, drawn):
                of = f"{self.card.data}, {len(stored['features'])} real samples"
                found[reader.key] = targets.restored(stored, of)
        return found

    # --- a reference of the user's own ------------------------------------------------------------

    @cached_property
    def _own(self) -> dict[str, Target]:
        """The reference that the user gave, by the key of the extractor; empty where there is none."""
        given = self.given
        if given is None or given.samples is None:
            return self.of_moments
        found, _ = self.parts.kept("reference", {}, 0, self._read_given)
        of = f"{Path(given.path).name}, {given.samples.count} samples"
        return {reader.key: targets.restored(_under(reader.key, found), of) for reader in self.readers}

    def _read_given(self) -> Part | None:
        """Moments and features of the user's samples, read now or, with the same instruments, before."""
        assert self.given is not None
        found: dict[str, Tensor] | None = None
        if all(reader.moments is not None for reader in self.readers):  # which takes no time
            found = self._read_samples()
            return None if found is None else (found, {})
        labels = [reader.label for reader in self.readers]
        key = [targets.content(Path(self.given.path)), self.card.shape, labels, self.parts.batch_size]
        path = targets.cache(artifact.digest(key))
        with suppress(FlowdistillError):
            found = artifact.load_tensors(path)[0]
        if self.parts.any(found is None):
            found = self._read_samples()
            if found is not None:
                with suppress(FlowdistillError, OSError):  # a folder that cannot be written costs time only
                    artifact.create_folder(path.parent)
                    artifact.save_tensors(path, found, {"kind": "reference", "of": self.given.path})
        return None if found is None else (found, {})

    def _read_samples(self) -> dict[str, Tensor] | None:
        """In blocks, so that features which only the moments need are not kept."""
        assert self.given is not None and self.given.samples is not None
        samples = self.given.samples
        assert samples.count is not None
        moments = {reader.key: metrics.Moments() for reader in self.readers}
        kept: dict[str, list[Tensor]] = {reader.key: [] for reader in self.readers}

        def read(part: slice) -> dict[str, Tensor]:
            return self.read(samples.read(range(part.start, part.stop))[0].to(self.device))

        for block in batches(range(samples.count), _BLOCK * self.parts.batch_size):
            parts = [slice(each.start, each.stop) for each in batches(block, self.parts.batch_size)]
            found = self.parts.gathered(parts, read)
            if found is None:
                continue
            for key, seen in moments.items():
                seen.add(found[key])
                if block.start < targets.kept(key):
                    kept[key].append(found[key][: targets.kept(key) - block.start])
        if self.parts.work.world.rank:
            return None
        stored: dict[str, Tensor] = {}
        for key, seen in moments.items():
            stored |= _stored(key, Target(metrics.Reference(*seen.result()), torch.cat(kept[key]), ""))
        return stored


def _real(reader: Reader, features: Tensor, own: Target | None) -> Compared:
    """Fresh real samples, compared with the user's reference or, where they are it themselves, with none."""
    if own is not None:
        return targets.compare(reader.key, features, own)
    reason = "these samples are the reference"
    if reader.moments is None:
        return Compared({}, {}, dict.fromkeys(distances(reader.key), reason))
    found = targets.compare(reader.key, features, Target(reader.moments, None, ""))
    found.skipped.update(dict.fromkeys(distances(reader.key)[1:], reason))
    return found


def _stored(key: str, target: Target) -> dict[str, Tensor]:
    return {f"{key}.{name}": each for name, each in targets.stored(target).items()}


def _under(key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: those whose names begin with the key."""
    prefix = f"{key}."
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}


def _matched(given: Given | None, plan: Plan, readers: Sequence[Reader]) -> dict[str, Target]:
    """Published moments for each extractor that they can be of."""
    if given is None or given.moments is None:
        return {}
    if not plan.wanted.asked:
        raise UsageError(
            f"reference_data: {given.path} has moments of {len(given.moments.mean)} published features; ask "
            "for those, as in `features: {inception: {}}`, or give samples"
        )
    found = {}
    for reader in readers:
        if given.concerns(reader):
            size = reader.read(torch.zeros(1, *plan.accurate.model.card.shape))[0].shape[1]
            found[reader.key] = targets.of_moments(given.moments, reader, size, given.path)
    return found
