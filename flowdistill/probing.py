"""Does a model point the right way? Laws that a velocity field obeys whatever its data, asked of the network.

With u = eps - x0 and z = (1 - t) x0 + t eps, the field v(z, t) = E[u | z] obeys:

    projection   E[(u - v) z] = 0 and E[(u - v) v] = 0, at each t
    skill        E|u - v|^2 is no more than that of the best guess which is linear in z
    spread       along its own paths, E|z_t|^2 = (1 - t)^2 E|z_0|^2 + t^2
    direction    at t = 1, where z is noise, v has slope 1 on z

The data are real ones where they are given, else the model's own samples. Of a model that was made from
another (`distilled` in its card) noise and data are not independent, and less is asked: that v points to the
noise at all, and that it agrees with u on pairs of its own.

A reversed sign or clock, labels of time on the wrong scale, or an output that is taken for another prediction
break at least one of these. If one is broken, the same laws are asked under other readings of the network,
the nearest first; the one that obeys them is the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import ValidationError

from flowdistill import flow
from flowdistill.conventions import Clock, Convention, Linear, Prediction
from flowdistill.errors import ArtifactError
from flowdistill.interpolants import DDPM
from flowdistill.schedule import uniform
from flowdistill.solvers import SOLVERS, integrate

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.flow import VelocityField
    from flowdistill.teachers import Model

Verdict = Literal["ok", "wrong", "skipped", "note"]

SAMPLES = 1024
"""More real samples are not looked at."""
_TIMES = (0.1, 0.3, 0.5, 0.7, 0.95)
_STEPS = 10
"""Of Heun, for the model's own samples."""
_VALUES = 6_144
"""Numbers in the samples of one judgement: averages over so many are good to a few percent."""
_SEED = 20_240_531
_LIMITS = {"direction": 0.25, "spread": 0.1, "skill": 0.1, "projection": 0.25, "scale": 0.3}
"""How far each law may be off: slope and correlation by themselves, ratios by their logarithm."""
_STD = (0.05, 10.0)
"""Deviation of data as models have it, 0.3 to 0.8 for pixels and about 1 for latents, with room to spare."""
_LIKELY = (0.15, 3.0)
"""The same of a reading that nobody has declared."""
_DISTILLED = {"direction": 0.9, "skill": -0.3}
"""Of distilled models: how far the slope may be from 1, and the log of the error on own pairs, at most."""
_TRUSTED: set[str] = set()
"""Digests of the models that have obeyed."""


@dataclass(frozen=True)
class Finding:
    """One thing that was measured, and what it says."""

    name: str
    verdict: Verdict
    text: str
    value: float | None = None


@dataclass(frozen=True)
class Report:
    """All findings; where one is wrong, what it looks like and the card's stanza that would mend it."""

    findings: tuple[Finding, ...]
    diagnosis: str = ""
    remedy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """Whether the model does not do what its card says."""
        return any(finding.verdict == "wrong" for finding in self.findings)


@dataclass(frozen=True)
class Judgement:
    """How far a field is from each law, in units of the law's limit, and what was measured."""

    excess: Mapping[str, float]
    figures: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest excess; at most 1 where all laws hold."""
        return max(self.excess.values())


@dataclass(frozen=True)
class Trial:
    """The noises, labels and known moments that fields are judged with."""

    shape: tuple[int, ...]
    labels: Tensor | None
    device: str
    count: int
    data: Tensor | None = None
    """Real data, if the laws can be asked on them: labels of theirs are not known."""
    moments: tuple[float, float] | None = None
    """Mean and deviation of the data, where they are known."""

    def judge(self, model: Model, convention: Convention | None = None) -> Judgement:
        """Ask a model for the laws, read as its card says or otherwise; the first alone if that is broken."""
        velocity = _field(model, convention)
        top = _top(convention or model.card.convention or Convention())
        if model.card.distilled:
            return self._judge_distilled(velocity, top)
        figures = {"top": top, "direction": self._direction(velocity, top)}
        excess = {"direction": abs(figures["direction"] - 1) / _LIMITS["direction"]}
        if excess["direction"] > 1:
            return Judgement(excess, figures)
        samples, figures["spread"] = self._own(velocity)
        x0 = samples if self.data is None else self.data
        figures["skill"], figures["projection"] = self._regress(velocity, x0)
        figures["mean"], figures["std"] = float(samples.mean()), float(samples.std())
        excess["spread"] = abs(_log(figures["spread"])) / _LIMITS["spread"]
        excess["skill"] = _log(figures["skill"]) / _LIMITS["skill"]
        excess["projection"] = figures["projection"] / _LIMITS["projection"]
        excess["scale"] = self._scale(figures["mean"], figures["std"])
        return Judgement(_finite(excess), figures)

    def _judge_distilled(self, velocity: VelocityField, top: float) -> Judgement:
        """Direction, and the error of v on the model's own pairs of noise and sample."""
        figures = {"top": top, "direction": self._direction(velocity, top)}
        excess = {"direction": abs(figures["direction"] - 1) / _DISTILLED["direction"]}
        if excess["direction"] > 1:
            return Judgement(excess, figures)
        eps = self.noise("path")
        x0, _ = self._own(velocity)
        figures["mean"], figures["std"] = float(x0.mean()), float(x0.std())
        u, errors = flow.velocity(x0, eps), []
        for t in _TIMES:
            times = x0.new_full((len(x0),), t)
            v = velocity(flow.interpolate(x0, eps, times), times, self.labels)
            errors.append(float((u - v).square().mean() / u.square().mean()))
        figures["own"] = sum(errors) / len(errors)
        excess["own"] = math.exp(_log(figures["own"]) - _DISTILLED["skill"])
        excess["scale"] = self._scale(figures["mean"], figures["std"])
        return Judgement(_finite(excess), figures)

    def noise(self, purpose: str) -> Tensor:
        """eps [count, *shape], the same for every field."""
        from flowdistill import randomness

        eps = randomness.noise(randomness.key(_SEED, purpose), range(self.count), self.shape)
        return eps.to(self.device)

    def _direction(self, velocity: VelocityField, top: float) -> float:
        """Slope of v on z at the top, where z is noise."""
        z = self.noise("direction")
        v = velocity(z, z.new_full((self.count,), top), self.labels)
        return float((v * z).mean() / z.square().mean())

    def _own(self, velocity: VelocityField) -> tuple[Tensor, float]:
        """The field's own samples, and how far E|z_t|^2 strays from its law on the way there, as a ratio."""
        sizes: list[tuple[float, float]] = []

        def note(step: int, t: float, z: Tensor, v: Tensor) -> None:
            sizes.append((t, float(z.square().mean())))

        x0 = integrate(velocity, self.noise("path"), uniform(_STEPS), SOLVERS["heun"], self.labels, note)
        (_, start), *rest = sizes
        end = float(x0.square().mean())
        ratios = [size / ((1 - t) ** 2 * end + t**2 * start) for t, size in rest]
        return x0, max(ratios, key=lambda ratio: abs(_log(ratio)))

    def _regress(self, velocity: VelocityField, x0: Tensor) -> tuple[float, float]:
        """At the worst time: error in units of the best linear guess's, correlation of error and input."""
        skill = projection = 0.0
        for t in _TIMES:
            eps, times = self.noise(f"regress {t}"), x0.new_full((len(x0),), t)
            z, u = flow.interpolate(x0, eps, times), flow.velocity(x0, eps)
            v = velocity(z, times, self.labels)
            skill = max(skill, float((u - v).square().mean() / (u - _linear(x0, z, t)).square().mean()))
            for other in (z, v):
                size = (other.square().mean() * u.square().mean()).sqrt()
                projection = max(projection, abs(float(((u - v) * other).mean() / size)))
        return skill, projection

    def _scale(self, mean: float, std: float) -> float:
        """How far the samples' moments are from the data's or, if those are not known, from all data's."""
        if self.moments is None:
            low, high = _STD
            return max(low / max(std, 1e-9), std / high)
        known_mean, known_std = self.moments
        ratio = abs(_log(std / known_std)) / _LIMITS["scale"]
        return max(ratio, abs(mean - known_mean) / known_std / _LIMITS["scale"])


def probe(model: Model, data: Tensor | None = None) -> Report:
    """Ask for all laws and, where they hold, for the round trip, the effect of classes and half precision.

    `data` [n, *shape] are images or raw latents; the card's `latent` is applied to them. Without classes the
    laws are asked on them, else they serve to compare moments.
    """
    trial = _trial(model, data)
    judgement = trial.judge(model)
    findings = list(_laws(trial, judgement))
    if judgement.worst <= 1:
        more = tuple(_more(model, trial))
        deaf = any(finding.verdict == "wrong" for finding in more)
        return Report((*findings, *more), "looks deaf to its classes" if deaf else "")
    return Report(tuple(findings), *_remedy(model, trial, judgement))


def strict(model: Model, what: str) -> None:
    """Refuse a model that breaks a law before compute is spent on it; `what` names it in the message.

    A model is asked once in a process.
    """
    if model.digest in _TRUSTED:
        return
    trial = _trial(model, None)
    judgement = trial.judge(model)
    if judgement.worst <= 1:
        _TRUSTED.add(model.digest)
        return
    diagnosis, _ = _remedy(model, trial, judgement)
    raise ArtifactError(
        f"{what}: {diagnosis}\n`flowdistill probe {what}` shows the figures and what would mend it; "
        "`teacher: {name: ..., probe: false}` in the recipe uses it as it is"
    )


def _trial(model: Model, data: Tensor | None) -> Trial:
    card = model.card
    count = max(4, min(SAMPLES, _VALUES // math.prod(card.shape)))
    moments = None
    if card.statistics is not None:
        moments = _pooled(card.statistics.mean, card.statistics.std)
    if data is not None:
        data = (data if card.latent is None else card.latent.encode(data)).to(model.device)
        moments = float(data.mean()), float(data.std())
        data = None if card.classes else data[:count]
        count = count if data is None else len(data)
    labels = model.labels(_SEED, range(count))
    return Trial(card.shape, labels, model.device, count, data, moments)


def _top(convention: Convention) -> float:
    """The largest t at which a field is asked for its direction."""
    # From eps follows v by division by 1 - t, which blows up the network's errors.
    return min(convention.span[1], 0.95 if convention.prediction in ("eps", "score") else 0.999)


def _pooled(mean: Sequence[float], std: Sequence[float]) -> tuple[float, float]:
    """Mean and deviation over all channels, from those of each."""
    middle = sum(mean) / len(mean)
    square = sum(s * s + (m - middle) ** 2 for m, s in zip(mean, std, strict=True)) / len(std)
    return middle, math.sqrt(square)


def _field(model: Model, convention: Convention | None = None) -> VelocityField:
    """The field as the card reads the network, or as `convention` does; guidance, left out, obeys no law."""
    from flowdistill.teachers.canonical import Canonical

    network = model.network if convention is None else Canonical(model.weights, convention)
    card = model.card.model_copy(update={"guidance": None})
    return replace(model, card=card, network=network).field


def _linear(x0: Tensor, z: Tensor, t: float) -> Tensor:
    """The best guess of eps - x0 that is linear in z, from mean and variance of the data in each channel."""
    dims = (0, *range(2, x0.ndim))
    mean, variance = x0.mean(dims, keepdim=True), x0.var(dims, keepdim=True)
    slope = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
    return slope * (z - (1 - t) * mean) - mean


def _finite(excess: Mapping[str, float]) -> dict[str, float]:
    """A law whose figure is no number is broken."""
    return {name: value if math.isfinite(value) else math.inf for name, value in excess.items()}


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 1e-9 else -math.inf


def _laws(trial: Trial, judgement: Judgement) -> Iterator[Finding]:
    """The laws in words."""
    figures = judgement.figures

    def finding(name: str, law: str, text: str) -> Finding:
        return Finding(name, "ok" if judgement.excess[law] <= 1 else "wrong", text, figures.get(law))

    slope = figures["direction"]
    words = "noise-ward" if slope > 0.5 else "data-ward" if slope < -0.5 else "towards neither noise nor data"
    yield finding(
        "direction", "direction", f"at t = {figures['top']:.3g} v has slope {slope:.2f} on noise: {words}"
    )
    if "std" not in figures:
        yield Finding("clock", "skipped", "says nothing while the direction is wrong")
        return
    known = "" if trial.moments is None else ", the data {:.2f} and {:.2f}".format(*trial.moments)
    scale = f"its samples have mean {figures['mean']:.2f} and deviation {figures['std']:.2f}{known}"
    if "own" in figures:
        text = f"error of v on its own pairs is {figures['own']:.2f} of what 0 would have"
        yield finding("own pairs", "own", text)
        yield finding("scale", "scale", scale)
        return
    of = "its own samples" if trial.data is None else "real data"
    yield finding(
        "path", "spread", f"|z|^2 on its own paths is {figures['spread']:.2f} times what its samples imply"
    )
    yield finding(
        "denoising",
        "skill",
        f"error of v on {of} is {figures['skill']:.2f} of the best linear guess's or less",
    )
    yield finding(
        "clock", "projection", f"error and input of v correlate by {figures['projection']:.2f} or less"
    )
    yield finding("scale", "scale", scale)


def _more(model: Model, trial: Trial) -> Iterator[Finding]:
    """What is worth knowing of a model that obeys the laws."""
    yield _round_trip(model, trial)
    yield _conditioning(model, trial)
    yield _half_precision(model, trial)


def _round_trip(model: Model, trial: Trial) -> Finding:
    """Midpoint steps from noise to data, back to noise and to data again."""
    velocity, few = _field(model), 4
    labels = None if trial.labels is None else trial.labels[:few]

    def solve(x: Tensor, inverse: bool = False) -> Tensor:
        return integrate(velocity, x, uniform(25), SOLVERS["midpoint"], labels, inverse=inverse)

    x0 = solve(trial.noise("path")[:few])
    error = float((solve(solve(x0, inverse=True)) - x0).square().mean().sqrt() / x0.square().mean().sqrt())
    text = f"data to noise and back in 25 midpoint steps each: relative error {error:.3f}"
    return Finding("round trip", "ok" if error < 0.05 else "note", text, error)


def _conditioning(model: Model, trial: Trial) -> Finding:
    """How much v changes with the class."""
    if trial.labels is None or model.card.classes < 2:
        return Finding("conditioning", "skipped", "the model has no classes to choose from")
    z = trial.noise("path")
    t = z.new_full((len(z),), 0.8)
    other = (trial.labels + 1) % model.card.classes
    velocity = _field(model)
    v = velocity(z, t, trial.labels)
    change = float((velocity(z, t, other) - v).square().mean().sqrt() / v.square().mean().sqrt())
    text = f"another class changes v by {change:.3f} of its size at t = 0.8"
    return Finding("conditioning", "ok" if change > 1e-3 else "wrong", text, change)


def _half_precision(model: Model, trial: Trial) -> Finding:
    """How far v moves when the network computes in bfloat16."""
    import torch

    z, velocity = trial.noise("path"), _field(model)
    t = z.new_full((len(z),), 0.5)
    v = velocity(z, t, trial.labels)
    with torch.autocast(torch.device(model.device).type, torch.bfloat16):
        rough = velocity(z, t, trial.labels)
    error = float((rough.float() - v).square().mean().sqrt() / v.square().mean().sqrt())
    text = f"in bfloat16 v differs by {error:.4f} of its size at t = 0.5"
    return Finding("half precision", "ok" if error < 0.05 else "note", text, error)


def _remedy(model: Model, trial: Trial, judgement: Judgement) -> tuple[str, Mapping[str, Any]]:
    """What the model looks like, and the stanza of the card that says so."""
    declared = model.card.convention or Convention()
    broken = [law for law, value in judgement.excess.items() if value > 1]
    if broken == ["scale"]:
        return _rescaling(model, trial, judgement)
    for level in _readings(declared):
        judged = [(trial.judge(model, reading), reading) for reading in level]
        found, best = min(judged, key=lambda pair: pair[0].worst)
        # A guess has to be likely as well: almost any network is the x0-prediction of some odd data.
        if found.worst <= 1 and (trial.moments or _LIKELY[0] < found.figures["std"] < _LIKELY[1]):
            stanza = best.model_dump(mode="json", exclude_none=True)
            return f"looks {_difference(declared, best)}", {"convention": stanza}
    return (
        f"breaks the laws of a velocity field ({', '.join(broken)}), and no usual reading of the network "
        "mends it; is it trained to the end, or made from another model (`distilled: true` in its card)?"
    ), {}


def _rescaling(model: Model, trial: Trial, judgement: Judgement) -> tuple[str, Mapping[str, Any]]:
    std = judgement.figures["std"]
    if trial.moments is None:
        return f"looks wrongly scaled: its samples have deviation {std:.3g}", {}
    factor = std / trial.moments[1]
    text = f"looks wrongly scaled: the data would have to be {factor:.3g} times as large"
    latent = model.card.latent
    if latent is None:
        return text, {"latent": {"scale": [round(factor, 4)]}}
    scale = [round(factor * each, 5) for each in latent.scale]
    return text, {"latent": {**latent.model_dump(mode="json", exclude_none=True), "scale": scale}}


def _readings(declared: Convention) -> Iterator[list[Convention]]:
    """Other conventions: first those that differ from the card's in one respect, then in two, and so on."""
    levels: dict[int, list[Convention]] = {}
    for sign, clock, prediction in product((1, -1), _clocks(declared), get_args(Prediction)):
        if prediction == "score":  # eps but for a factor that its skill does not tell
            continue
        try:
            reading = Convention.model_validate(
                {**declared.model_dump(), "sign": sign, "clock": clock.model_dump(), "prediction": prediction}
            )
        except ValidationError:
            continue
        levels.setdefault(len(list(_differences(declared, reading))), []).append(reading)
    return (levels[count] for count in sorted(levels) if count)


def _clocks(declared: Convention) -> Iterator[Clock]:
    clock = declared.clock
    if not isinstance(clock, Linear):
        yield clock
        return
    steps = isinstance(declared.interpolant, DDPM)
    for scale in sorted({clock.scale, 1.0, *(() if steps or clock.scale > 500 else (1000.0,))}):
        for backwards in (False, True):
            yield Linear(scale=scale, reversed=backwards)


def _differences(declared: Convention, found: Convention) -> Iterator[str]:
    if found.sign != declared.sign:
        yield (
            "data-ward: sign is reversed"
            if declared.prediction == "velocity"
            else "negative: sign is reversed"
        )
    if isinstance(found.clock, Linear) and isinstance(declared.clock, Linear):
        if found.clock.reversed != declared.clock.reversed:
            yield "backwards in time: clock is reversed"
        if found.clock.scale != declared.clock.scale:
            factor = found.clock.scale / declared.clock.scale
            yield f"deaf to time: labels are to be {factor:g} times as large"
    if found.prediction != declared.prediction:
        yield f"like a prediction of {found.prediction}, read as {declared.prediction}"


def _difference(declared: Convention, found: Convention) -> str:
    return " and ".join(_differences(declared, found))
