"""What a step of reflow costs with LPIPS on, against the step of rf++: time, memory, and the drawing of t.

    python benchmarks/reflow.py [step|distance|timesteps|memory] [--repeats 5] [--quick] [--check] ...

step       a whole step of training: pairs at hand, t, network, (1 - t) H + LPIPS (rf++'s config E),
           gradient, Adam, average. The network is rf++'s for CIFAR-10 (NCSN++, 56.4 M parameters), LPIPS is
           VGG16 on 224 pixels, pooling by the average, both with random weights. For an image the network
           takes 3 x 43 GFLOP and LPIPS 92, whatever the batch; what is done once for each weight has a
           larger share here than in a real batch
distance   LPIPS of a batch alone, with its slope at the student's image
timesteps  128 draws of t, the batch of one GPU in rf++
memory     what two steps add to the memory of a fresh process, at the highest

The other step is written anew from its description: scipy inverts the density of t by numbers; both images
are enlarged and pass through VGG16 in turn, layer by layer, in float32, with what autograd keeps; vectors are
scaled, subtracted, squared and weighed one after another; every gradient is looked at for values that are
not finite, one by one; Adam in Python; weights of one shape are stacked anew for each step of their average.

Both have the same network, pairs and weights. Before anything is timed, losses and gradients on one batch
and t must agree. Rows with other arithmetic than rf++'s say so; their loss may differ.

Times are of this process, on one thread unless --threads says otherwise: `cpu` is its processor time, `wall`
the clock's. Sides take turns, after one that does not count. `ratio` is that of the medians, rf++ / ours,
behind it its 95 % interval, by bootstrap over the turns; goals are for both clocks.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pairs import Cost, cost_of, in_turns, interval, judged, processor
from torch import Tensor, nn

from flowdistill import randomness, teachers
from flowdistill.conventions import Convention
from flowdistill.evaluation.lpipsdistance import LpipsDistance, Network, lpips_distance
from flowdistill.networks.songunet import PRESETS
from flowdistill.objectives import Lpips
from flowdistill.sources import Draws
from flowdistill.stages.reflow import Reflow
from flowdistill.teachers import Card, Model
from flowdistill.timesteps import UShaped
from flowdistill.training.batches import Batch
from flowdistill.training.loop import _Trainer
from flowdistill.work import Stop, Work

SHAPE = (3, 32, 32)
PRESET = "rfpp-cifar10"
CONVENTION = {
    "interpolant": {"name": "edm", "sigma_min": 1e-5, "sigma_max": 1e5},
    "prediction": "v",
    "sign": -1,
    "clock": {"name": "logarithmic", "scale": 0.25},
}
QUICK = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
A, MARGIN, DECAY = 4.0, 1e-5, 0.9999
MAPS = (3, 8, 15, 22, 29)
"""Layers of VGG16 whose maps are compared."""

LOSS_WITHIN, GRADIENT_WITHIN = 1e-4, 1e-3
FASTER, FASTER_DRAWS, LARGER = 1.3, 1000.0, 1.0
"""The goals: ratios of time to reach, and the ratio of memory, ours / rf++, not to exceed."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "same arithmetic": {},
    "same, channels-last": {"channels_last": True},
    "LPIPS in bf16": {"lpips": {"precision": "bf16"}},
    "the same, channels-last": {"channels_last": True, "lpips": {"precision": "bf16"}},
    "all in bf16, channels-last": {
        "channels_last": True,
        "precision": "bf16",
        "lpips": {"precision": "bf16"},
    },
    "LPIPS at native size": {"lpips": {"resolution": "native"}},
}
SAME, RECOMMENDED = "same arithmetic", "LPIPS in bf16"
THEIRS = "rf++"


# The step of rf++ ------------------------------------------------------------------------------------------


class PlainLpips(nn.Module):
    """LPIPS as piq 0.8.0 computes it, on images in [-1, 1] of any size."""

    def __init__(self, network: Network, resolution: int) -> None:
        super().__init__()
        parts = [network.body.get_submodule(f"slice{number + 1}") for number in range(network.depths)]
        layers = [copy.deepcopy(layer) for part in parts for layer in part.children()]
        self.layers = nn.Sequential(*layers, nn.AvgPool2d(2, 2)).to(memory_format=torch.contiguous_format)
        self.heads = [network.get_buffer(f"lin{number}").clone() for number in range(network.depths)]
        self.mean = torch.tensor((0.485, 0.456, 0.406)).reshape(1, 3, 1, 1)
        self.std = torch.tensor((0.229, 0.224, 0.225)).reshape(1, 3, 1, 1)
        self.resolution = resolution

    def maps(self, images: Tensor) -> list[Tensor]:
        x = (images - self.mean) / self.std
        found = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in MAPS:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """x_hat, x [B, 3, H, W] -> [B]."""
        size = (self.resolution, self.resolution)
        x_hat = F.interpolate(x_hat, size=size, mode="bilinear", align_corners=False)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        ours, target = self.maps(x_hat * 0.5 + 0.5), self.maps(x * 0.5 + 0.5)
        squares = [(a - b) ** 2 for a, b in zip(ours, target, strict=True)]
        weighed = [each * head for each, head in zip(squares, self.heads, strict=True)]
        return torch.stack([each.sum(1).mean((1, 2)) for each in weighed]).sum(0)


class PlainTimes:
    """Draws of the U-shaped density from one half of it, inverted by scipy."""

    def __init__(self) -> None:
        from scipy.stats import rv_continuous

        class Exponential(rv_continuous):
            def _pdf(self, s: np.ndarray) -> np.ndarray:
                return A * np.exp(A * s) / (np.exp(A) - 1)

        self.half = Exponential(a=0.0, b=1.0)
        self.chance = np.random.default_rng(0)

    def draw(self, count: int) -> Tensor:
        s = self.half.rvs(size=count, random_state=self.chance)
        both = self.chance.permutation(np.concatenate([s, 1 - s]))[:count]
        return torch.from_numpy(both * (1 - 2 * MARGIN) + MARGIN).float()


class Stacked:
    """An average of the weights that holds those of one shape together."""

    def __init__(self, network: nn.Module) -> None:
        self.alike: dict[torch.Size, list[nn.Parameter]] = {}
        for weights in network.parameters():
            self.alike.setdefault(weights.shape, []).append(weights)
        self.values = {shape: torch.stack([w.detach() for w in some]) for shape, some in self.alike.items()}

    @torch.no_grad()
    def update(self) -> None:
        for shape, some in self.alike.items():
            self.values[shape].mul_(DECAY).add_(torch.stack(list(some)), alpha=1 - DECAY)


class PlainStep:
    """A training step by step."""

    def __init__(self, network: nn.Module, perceptual: PlainLpips) -> None:
        self.network = network
        self.perceptual = perceptual
        self.times = PlainTimes()
        self.optimizer = torch.optim.Adam(network.parameters(), lr=2e-4)
        self.average = Stacked(network)

    def loss(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """[B] of a batch."""
        wide = t[:, None, None, None]
        z_t = (1 - wide) * x0 + wide * eps
        v_hat, d = self.network(z_t, t, None), x0[0].numel()
        c = 0.00054 * d
        norm = torch.sum((v_hat - (eps - x0)) ** 2, dim=(1, 2, 3))
        huber = (torch.sqrt(norm + c**2) - c) / d
        return (1 - t) * huber + self.perceptual(z_t - wide * v_hat, x0)

    def step(self, x0: Tensor, eps: Tensor) -> None:
        loss = self.loss(x0, eps, self.times.draw(len(x0))).mean()
        loss.backward()
        finite = [bool(w.grad.isfinite().all()) for w in self.network.parameters() if w.grad is not None]
        if all(finite):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        loss.item()


# Ours ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The same batch at every step."""

    x0: Tensor
    eps: Tensor

    @classmethod
    def drawn(cls, batch: int) -> Pairs:
        chance = torch.Generator().manual_seed(0)
        coarse = F.interpolate(torch.randn(batch, 3, 6, 6, generator=chance), SHAPE[1:], mode="bicubic")
        return cls(coarse.tanh(), torch.randn(batch, *SHAPE, generator=chance))

    def batch(self, draw: Draws) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.x0, self.eps, None


class Measured(Reflow):
    """Reflow of a student that is made, not opened."""

    def new_student(self, work: Work) -> Model:
        return made(bool(work.settings["quick"]))


class Setting:
    """What all sides share: the options, the pairs and a file with weights for VGG16."""

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self.chosen = chosen
        self.folder = folder
        self.pairs = Pairs.drawn(chosen.batch)
        self.weights = folder / "vgg.pth"
        if not self.weights.exists():
            torch.save(vgg16(), self.weights)
        self.card = Card(architecture="songunet", shape=SHAPE)

    def distance(self, **changes: Any) -> LpipsDistance:
        settings = {"resolution": self.chosen.resolution, **changes}
        return lpips_distance(Lpips.model_validate(settings), self.card, self.weights)

    def plain_distance(self) -> PlainLpips:
        return PlainLpips(self.distance().network, self.chosen.resolution)

    def trainer(self, lpips: Mapping[str, Any] | None = None, **changes: Any) -> _Trainer:
        distance = {"name": "lpips", "resolution": self.chosen.resolution, **(lpips or {})}
        stage = Measured.model_validate(
            {
                "steps": 1000,
                "batch_size": self.chosen.batch,
                "timesteps": {"name": "u-shaped", "a": A},
                "loss": {"name": "lpips-huber", "distance": distance},
                "optimizer": {"name": "adam", "lr": 2e-4},
                "ema": {"decay": DECAY},
                **changes,
            }
        )
        work = Work(
            stage="reflow",
            folder=self.folder,
            seed=0,
            device="cpu",
            inputs={"loss.distance.weights": str(self.weights)},
            parents={},
            settings={"quick": self.chosen.quick},
            report=lambda _: None,
            stop=Stop(),
        )
        return _Trainer(stage, work, self.pairs)

    def plain(self) -> PlainStep:
        return PlainStep(made(self.chosen.quick).network.train(), self.plain_distance())

    def side(self, name: str) -> Callable[[], object]:
        """One step of rf++ or of a variant of ours."""
        if name == THEIRS:
            plain = self.plain()
            return lambda: plain.step(self.pairs.x0, self.pairs.eps)
        trainer = self.trainer(**VARIANTS[name])
        return lambda: trainer.state.advance(*trainer.update())


def made(quick: bool) -> Model:
    """A student, always with the same weights, of order one everywhere: at the start many are zero."""
    card = Card(
        architecture="songunet",
        arguments={**PRESETS[PRESET], **(QUICK if quick else {})},
        shape=SHAPE,
        convention=Convention.model_validate(CONVENTION),
    )
    torch.manual_seed(0)
    student = teachers.new(card)
    with torch.no_grad():
        for weights in student.network.parameters():
            if weights.ndim > 1:
                weights.normal_(std=weights[0].numel() ** -0.5)
    return student


def vgg16() -> dict[str, Tensor]:
    """Weights under torchvision's names that let about half of everything through."""
    chance, found = torch.Generator().manual_seed(0), {}
    for name, value in Network(Lpips()).body.state_dict().items():
        scale = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.05
        number = name.partition(".")[2]
        found[f"features.{number}"] = scale * torch.randn(value.shape, generator=chance)
    return found


# What is measured ------------------------------------------------------------------------------------------


def check(setting: Setting) -> None:
    """End the benchmark unless both ways have the same loss and gradient on one batch and t."""
    trainer, plain = setting.trainer(), setting.plain()
    draw = Draws(0, 0, slice(0, setting.chosen.batch), setting.chosen.batch, torch.device("cpu"))
    pairs = setting.pairs
    batch = Batch(pairs.x0, pairs.eps, None, 0, draw, 0.0, trainer.perceptual)
    torch.manual_seed(1)  # both have the same dropout
    loss, terms = trainer.stage.per_sample(trainer.network, batch)
    torch.manual_seed(1)
    other = plain.loss(pairs.x0, pairs.eps, terms["t"])
    off = ((loss - other) / other).abs().max().item()
    slopes, others = (
        torch.cat([w.flatten() for w in torch.autograd.grad(each.mean(), heard(network))])
        for each, network in ((loss, trainer.network), (other, plain.network))
    )
    turned = ((slopes - others).norm() / others.norm()).item()
    print(f"same loss within {off:.0e}, same gradient within {turned:.0e}")
    if not (off < LOSS_WITHIN and turned < GRADIENT_WITHIN):
        raise SystemExit("the two ways do not compute the same")


def heard(network: nn.Module) -> list[nn.Parameter]:
    """The weights that matter: there are no augmented images, and a layer that is for their labels."""
    return [weights for name, weights in network.named_parameters() if "map_augment" not in name]


def head(unit: str) -> None:
    print(f"\n{unit:34}{'clock':>6}{'ours':>10}{'rf++':>10}{'ratio':>9}{'(95 %)':>18}   goal")


def compare(
    what: str, ours: Sequence[Cost], theirs: Sequence[Cost], scale: float, goal: float | None
) -> bool:
    """Print a row for each clock; whether rf++ / ours reaches the goal in both."""
    reached = []
    for clock in ("cpu", "wall"):
        mine, other = ([getattr(cost, clock) * scale for cost in costs] for costs in (ours, theirs))
        a, b = statistics.median(mine), statistics.median(other)
        low, high = interval(other, mine)
        reached.append(goal is None or b / a >= goal)
        spread = f"({low:.2f}-{high:.2f})"
        verdict = judged(reached[-1], f"at least {goal:g}") if goal else ""
        print(f"{what:34}{clock:>6}{a:10.3f}{b:10.3f}{b / a:9.2f}{spread:>18}   {verdict}", flush=True)
    return all(reached)


def step(setting: Setting) -> bool:
    """The whole step."""
    sides = {name: setting.side(name) for name in (THEIRS, *names(setting))}
    return in_rows("step, s", setting, sides)


def distance(setting: Setting) -> bool:
    """LPIPS alone."""
    x, noise = setting.pairs.x0, setting.pairs.eps
    plain = setting.plain_distance()

    def slope(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
        x_hat = (x + 0.1 * noise).requires_grad_()
        measure(x_hat, x).sum().backward()

    sides: dict[str, Callable[[], object]] = {THEIRS: lambda: slope(plain)}
    for name in names(setting):
        changes = VARIANTS[name]
        if "channels_last" not in changes:  # which is the network's
            ours = setting.distance(**changes.get("lpips", {}))
            sides[name] = lambda ours=ours: slope(ours)
    return in_rows("LPIPS and its slope, s", setting, sides, goals={})


def in_rows(
    unit: str,
    setting: Setting,
    sides: Mapping[str, Callable[[], object]],
    goals: Mapping[str, float] | None = None,
) -> bool:
    goals = {RECOMMENDED: FASTER} if goals is None else goals
    turns = {name: lambda _, side=side: cost_of(side) for name, side in sides.items()}
    costs = in_turns(setting.chosen.repeats, turns)
    theirs = costs.pop(THEIRS)
    head(unit)
    rows = [compare(name, ours, theirs, 1.0, goals.get(name)) for name, ours in costs.items()]
    return all(rows)


def timesteps(setting: Setting) -> bool:
    """Draws of t."""
    count, repeats = (16, 20) if setting.chosen.quick else (128, 200)
    plain, ours = PlainTimes(), UShaped(a=A)
    at_hand = randomness.uniforms(0, "timesteps", 0, count)

    def often(draw: Callable[[], object]) -> Cost:
        """Of one draw: it is too short for the clock."""
        cost = cost_of(lambda: [draw() for _ in range(repeats)])
        return Cost(cost.cpu / repeats, cost.wall / repeats)

    sides = {
        "inverse CDF": lambda _: often(lambda: ours.from_uniform(at_hand)),
        "uniform numbers, inverse CDF": lambda turn: often(
            lambda: ours.from_uniform(randomness.uniforms(0, "timesteps", turn, count))
        ),
        THEIRS: lambda _: cost_of(lambda: plain.draw(count)),
    }
    costs = in_turns(setting.chosen.repeats, sides)
    theirs = costs.pop(THEIRS)
    head(f"a draw of t, {count} at a time, us")
    goals = {"inverse CDF": FASTER_DRAWS}
    rows = [compare(name, each, theirs, 1e6 / count, goals.get(name)) for name, each in costs.items()]
    return all(rows)


def memory(setting: Setting) -> bool:
    """Two steps, each side in a process of its own."""
    passed = [f"--{name}={getattr(setting.chosen, name)}" for name in ("batch", "threads", "resolution")]
    passed += ["--quick"] if setting.chosen.quick else []
    print(f"\n{'memory of two steps, MB':34}{'ours':>10}{'rf++':>10}{'ratio':>9}   goal")
    found = {}
    for name in (THEIRS, *([SAME] if setting.chosen.quick else VARIANTS)):
        command = [sys.executable, __file__, "memory", "--alone", name, "--folder", str(setting.folder)]
        done = subprocess.run([*command, *passed], check=True, capture_output=True, text=True)
        found[name] = float(done.stdout.splitlines()[-1])
    theirs = found.pop(THEIRS)
    for name, megabytes in found.items():
        verdict = judged(megabytes <= LARGER * theirs, f"at most {LARGER:g}")
        print(f"{name:34}{megabytes:10.0f}{theirs:10.0f}{megabytes / theirs:9.2f}   {verdict}", flush=True)
    return all(megabytes <= LARGER * theirs for megabytes in found.values())


def alone(setting: Setting) -> None:
    """Print by how many MB two steps raise the highest memory of this process."""
    before = resident("VmRSS")
    side = setting.side(setting.chosen.alone)
    side()
    side()
    print((resident("VmHWM") - before) / 1e6)


def resident(key: str) -> int:
    """Bytes, from the kernel."""
    lines: Iterator[str] = iter(Path("/proc/self/status").read_text().splitlines())
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def names(setting: Setting) -> list[str]:
    """The variants that are measured: all, but a few if it has to be quick."""
    return [SAME, RECOMMENDED] if setting.chosen.quick else list(VARIANTS)


PARTS = {"step": step, "distance": distance, "timesteps": timesteps, "memory": memory}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: all")
    parser.add_argument("--repeats", type=int, help="turns that count (default: 5, with --quick 1)")
    parser.add_argument("--batch", type=int, help="pairs in a step (default: 4, with --quick 2)")
    parser.add_argument("--resolution", type=int, help="of LPIPS (default: 224, with --quick 64)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny network, few turns: does it run?")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a goal is missed")
    for name in ("--alone", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    for name, usual, quick in (("repeats", 5, 1), ("batch", 4, 2), ("resolution", 224, 64)):
        setattr(chosen, name, getattr(chosen, name) or (quick if chosen.quick else usual))
    return chosen


def main(chosen: argparse.Namespace) -> bool:
    """Measure and print; whether every goal is met."""
    torch.set_num_threads(chosen.threads)
    if chosen.alone:
        alone(Setting(chosen, Path(chosen.folder)))
        return True
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(chosen, Path(folder))
        million = sum(weights.numel() for weights in made(chosen.quick).network.parameters()) / 1e6
        print(
            f"{processor()}, threads: {chosen.threads}, torch {torch.__version__}\n"
            f"{million:.1f} M parameters, batch {chosen.batch}, LPIPS at {chosen.resolution} pixels; "
            f"medians of {chosen.repeats} turns"
        )
        check(setting)
        fine = [PARTS[name](setting) for name in ([chosen.part] if chosen.part else PARTS)]
    return all(fine)


if __name__ == "__main__":
    asked = options()
    raise SystemExit(0 if main(asked) or not asked.check else 1)
