"""What pairs cost besides the network, against the way of rf++, and whether large stores stay fast.

    python benchmarks/pairs.py [overhead|store|share|growth] [--repeats 7] [--quick] [--check] ...

overhead  noise, solver and store, without the network: 3x32x32, Heun, 18 steps of EDM's grid (35
          evaluations), batches of 256, x0 as uint8. The network, preconditioning included, knows the images
          it leads to, so that both ways must store the same; the time in its calls is taken off, that of
          changing the type of the state for it is not.
store     only what puts pairs on the disk, from images and records at hand: 10,240 of them into an empty
          store, and into one of 250,000, which rf++ rewrites the index of whenever it opens its zip files
          again. (Its published sets have 1,000,000 and 5,000,000.) Ours also takes distances and two
          hashes, and syncs; the other does not.
share     of our wall time that is spent in EDM's CIFAR-10 network (DDPM++, 55.7 M parameters, random
          weights): on the CPU for 4 pairs and 3 steps, on a GPU, if there is one, for 1024 and 18 steps
growth    a store of 1,000,000 tiny pairs (one number, one Euler step): its last 10,000, the finish among
          them, against the first of a new store, in turns, shard by shard. Then a process that has imported
          everything opens it, draws the order of an epoch and reads four shuffled batches of 512; the memory
          is its peak less what it had before.

The other way is written anew from its description: float64 noise, a record of the generator for each sample,
a float64 state, every intermediate state kept on the CPU in float64, a PNG and a record a sample in two zip
files, labels in a CSV file. On a CPU no state has to be copied to get there, and none is.

Times are of this process on one thread (share: all), once of the CPU and once of the clock on the wall; the
stores lie in the temporary folder (TMPDIR). Both sides take turns, after one turn that does not count.
`ratio` is that of the medians, behind it its 95 % interval, by bootstrap over the turns; both rows must
reach the goal.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flowdistill import randomness, schedule
from flowdistill.conventions import Convention
from flowdistill.flow import VelocityField, expand
from flowdistill.importing.families import FAMILIES
from flowdistill.networks import build
from flowdistill.networks.songunet import PRESETS
from flowdistill.pairstore import Block, PairSpec, PairStore, PairWriter
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.teachers.canonical import Canonical
from flowdistill.work import batches

SHAPE = (3, 32, 32)
CLASSES = 10
STEPS = 18
BATCH = 256
SHARD = 1024
TINY_SHARD, WINDOW = 1000, 10
"""Pairs of a shard, and shards at either end of the large store."""

CHEAPER, CHEAPER_STORED, SHARE, AS_FAST = 8.0, 20.0, 0.97, 0.95
OPEN_S, OPEN_MB = 1.0, 200.0
"""The goals: ratios to reach, and what opening may take."""

OPENING = """
import json, sys, time
from pathlib import Path
import torch
from flowdistill import randomness
from flowdistill.pairstore import PairStore

def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

before, started = memory("VmRSS"), time.perf_counter()
store = PairStore.open(Path(sys.argv[1]))
order = randomness.permutation(0, "order", 0, len(store))
for batch in order.split(512)[:4]:
    store.batch(batch)
print(json.dumps([time.perf_counter() - started, (memory("VmHWM") - before) / 1e6]))
"""


@dataclass(frozen=True)
class Cost:
    """Seconds of this process's CPU, all threads together, and of the clock on the wall."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> Cost:
        return cls(time.process_time(), time.perf_counter())

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.cpu - other.cpu, self.wall - other.wall)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cpu + other.cpu, self.wall + other.wall)


NOTHING = Cost(0.0, 0.0)


def cost_of(action: Callable[[], object]) -> Cost:
    started = Cost.now()
    action()
    return Cost.now() - started


class Metered:
    """A network, and what its calls have cost."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self.call = call
        self.cost = NOTHING

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        started = Cost.now()
        output = self.call(*arguments)
        self.cost += Cost.now() - started
        return output


class Archive:
    """A zip file that is closed, and opened to append, whenever `flush` entries are in."""

    def __init__(self, path: Path, flush: int) -> None:
        self.path = path
        self.flush = flush
        self.entries = 0
        self.file = zipfile.ZipFile(path, "a")

    def add(self, name: str, data: bytes) -> None:
        if self.entries and self.entries % self.flush == 0:
            self.file.close()
            self.file = zipfile.ZipFile(self.path, "a")
        self.file.writestr(name, data)
        self.entries += 1

    def close(self) -> None:
        self.file.close()


class ZipStore:
    """Samples and noise records in the layout of rf++."""

    def __init__(self, folder: Path, flush: int) -> None:
        folder.mkdir()
        self.samples = Archive(folder / "samples.zip", flush)
        self.noise = Archive(folder / "z.zip", flush)
        self.labels = folder / "images_labels.csv"

    def add_noise(self, index: int, generator: np.random.PCG64) -> None:
        """The state from which the noise of a sample is about to be drawn."""
        state = generator.state["state"]
        record = b"".join(int(state[key]).to_bytes(16, "big") for key in ("state", "inc"))
        self.noise.add(f"{index:05d}.bin", record)

    def add_records(self, first: int, count: int) -> None:
        """Records of 32 bytes that are at hand."""
        for index in range(first, first + count):
            self.noise.add(f"{index:05d}.bin", bytes(32))

    def fill(self, count: int) -> None:
        """Entries as large as those of real pairs."""
        for index in range(count):
            self.samples.add(f"{index:05d}.png", bytes(2000))
        self.add_records(0, count)

    def add_batch(self, first: int, x0: Tensor, labels: Tensor) -> None:
        pixels = (x0 * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        names = [f"{index:05d}.png" for index in range(first, first + len(x0))]
        for name, picture in zip(names, pixels, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            self.samples.add(name, buffer.getvalue())
        with self.labels.open("a", newline="") as file:
            csv.writer(file).writerows(zip(names, labels.tolist(), strict=True))

    def close(self) -> None:
        self.samples.close()
        self.noise.close()


def edm_sampler(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor], noise: Tensor, labels: Tensor
) -> Tensor:
    """Heun's rule in EDM's coordinates, state [B, *shape] float64, as rf++ runs it."""
    knots = torch.arange(STEPS, dtype=torch.float64) / (STEPS - 1)
    sigmas = (80 ** (1 / 7) + knots * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigmas = torch.cat([sigmas, torch.zeros(1)])

    def slope(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised = denoiser(x.float(), sigma.float(), labels).double()
        return denoised, (x - denoised) / sigma

    x = noise * sigmas[0]
    kept = [x.cpu()]
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        denoised, d = slope(x, sigma)
        ahead = x + (following - sigma) * d
        if following > 0:
            denoised, d_ahead = slope(ahead, following)
            ahead = x + (following - sigma) * (d + d_ahead) / 2
        x = ahead
        kept += [denoised.cpu(), x.cpu()]
    return kept[-1]


def rfpp_pairs(denoiser: Callable[..., Tensor], folder: Path, count: int, flush: int) -> None:
    """Make `count` pairs as rf++ does."""
    store = ZipStore(folder, flush)
    generator = np.random.PCG64(0)
    stream = np.random.Generator(generator)
    for part in batches(range(count), BATCH):
        drawn = []
        for index in part:
            store.add_noise(index, generator)
            drawn.append(stream.standard_normal(SHAPE))
        labels = torch.randint(CLASSES, (len(part),))
        x0 = edm_sampler(denoiser, torch.from_numpy(np.stack(drawn)), labels)
        store.add_batch(part.start, x0, labels)
    store.close()


def our_shards(
    field: VelocityField, writer: PairWriter, steps: int, batch: int, device: str = "cpu"
) -> Iterator[int]:
    """Make the pairs of a store, a shard at a time: Heun on EDM's grid, or one Euler step."""
    spec = writer.spec
    solver = SOLVERS["heun" if steps > 1 else "euler"]
    grid = schedule.edm(steps) if steps > 1 else schedule.uniform(1)
    for shard in writer.claims():
        parts = []
        for part in batches(spec.indices(shard), batch):
            eps, _ = spec.draw(part)
            labels = randomness.integers(spec.seed, "labels", part, spec.classes)
            x0 = integrate(field, eps.to(device), grid, solver, labels.to(device))
            parts.append(Block(eps, x0.cpu(), labels))
        writer.commit(shard, *parts)
        yield shard


def our_pairs(
    field: VelocityField, folder: Path, spec: PairSpec, steps: int, batch: int, device: str = "cpu"
) -> None:
    """Make a store."""
    with PairWriter(folder, spec) as writer:
        for _ in our_shards(field, writer, steps, batch, device):
            pass


def image_spec(count: int, dtype: str = "uint8") -> PairSpec:
    return PairSpec(count=count, shape=SHAPE, classes=CLASSES, dtype=dtype, shard_size=SHARD, seed=0)


def pictures(count: int) -> Tensor:
    """Smooth images of 256 levels in [-1, 1], [B, 3, 32, 32]: noise would be no fair work for PNG."""
    coarse = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(0.5 * coarse, SHAPE[1:], mode="bicubic").clamp(-1, 1)
    return (smooth * 127.5 + 127.5).round() / 127.5 - 1


def in_turns(
    repeats: int, sides: Mapping[str, Callable[[int], Cost]], warm: bool = True
) -> dict[str, list[Cost]]:
    """What each side costs in each turn; turn 0 does not count if it only warms."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for turn in range(repeats + warm):
        for name, side in sides.items():
            cost = side(turn)
            if turn or not warm:
                costs[name].append(cost)
    return costs


def interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """95 % of the ratio of the medians, by bootstrap over the turns."""
    drawn = np.random.default_rng(0).integers(len(above), size=(2000, len(above)))
    ratios = np.median(np.array(above)[drawn], axis=1) / np.median(np.array(below)[drawn], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def compare(
    what: str, ours: Sequence[Cost], theirs: Sequence[Cost], pairs: int, goal: float | None = None
) -> bool:
    """Print a row for the CPU and one for the wall; whether theirs / ours reaches the goal in both."""
    reached = []
    for clock in ("cpu", "wall"):
        mine, other = ([getattr(cost, clock) for cost in costs] for costs in (ours, theirs))
        a, b = statistics.median(mine), statistics.median(other)
        low, high = interval(other, mine)
        reached.append(goal is None or b / a >= goal)
        print(
            f"{what + ', ' + clock:34}{a / pairs * 1e6:10.1f}{b / pairs * 1e6:10.1f}{b / a:8.2f}"
            f"{f'({low:.2f}-{high:.2f})':>16}   {judged(reached[-1], f'at least {goal:g}') if goal else ''}",
            flush=True,
        )
    return all(reached)


def judged(met: bool, goal: str) -> str:
    return f"{goal:15}{'met' if met else 'missed'}"


def head(ours: str, theirs: str) -> None:
    print(f"\n{'us a pair':34}{ours:>10}{theirs:>10}{'ratio':>8}{'(95 %)':>16}   goal")


def overhead(chosen: argparse.Namespace, scratch: Path) -> bool:
    """All but the network."""
    images = pictures(BATCH)
    spec = image_spec(chosen.pairs)
    ours, theirs = scratch / "ours", scratch / "rf++"
    inside: dict[Path, list[Cost]] = {ours: [], theirs: []}

    def field(z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return (z - images[: len(z)]) / expand(t, z)

    def denoiser(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return images[: len(x)].clone()

    def net_of_network(network: Metered, folder: Path, make: Callable[[], None]) -> Cost:
        shutil.rmtree(folder, ignore_errors=True)
        network.cost = NOTHING
        started = Cost.now()
        make()
        spent = Cost.now() - started - network.cost
        inside[folder].append(network.cost)
        return spent

    leading, denoising = Metered(field), Metered(denoiser)
    costs = in_turns(
        chosen.repeats,
        {
            "ours": lambda _: net_of_network(
                leading, ours, lambda: our_pairs(leading, ours, spec, STEPS, BATCH)
            ),
            "rf++": lambda _: net_of_network(
                denoising, theirs, lambda: rfpp_pairs(denoising, theirs, chosen.pairs, chosen.flush)
            ),
        },
    )
    check_same(ours, theirs)
    head("ours", "rf++")
    reached = compare("all but the network", costs["ours"], costs["rf++"], chosen.pairs, CHEAPER)
    calls = (
        f"{folder.name} {statistics.median(cost.cpu for cost in each) / chosen.pairs * 1e6:.1f}"
        for folder, each in inside.items()
    )
    print(f"{chosen.pairs} pairs a turn, the same images in both; taken off: {', '.join(calls)}")
    return reached


def check_same(ours: Path, theirs: Path) -> None:
    """End the benchmark unless both stores hold the same images."""
    found = PairStore.open(ours).column("x0")
    with zipfile.ZipFile(theirs / "samples.zip") as file:
        other = [np.asarray(Image.open(io.BytesIO(file.read(name)))) for name in file.namelist()]
    if not np.array_equal(found.permute(0, 2, 3, 1).numpy(), np.stack(other)):
        raise SystemExit("the two stores do not hold the same images")


def store(chosen: argparse.Namespace, scratch: Path) -> bool:
    """Only what puts pairs on the disk: first into empty stores, then into stores that hold many."""
    shards = -(-chosen.flush // SHARD)
    reached = True
    for stored in (0, chosen.stored):
        folder = scratch / str(stored)
        folder.mkdir()
        costs = stored_in_turns(folder, stored, shards, chosen)
        head("ours", "rf++")
        what = f"to {stored:,}" if stored else "to none"
        goal = CHEAPER_STORED if stored else None
        reached = compare(f"{what}, uint8", costs["uint8"], costs["rf++"], shards * SHARD, goal) and reached
        compare(f"{what}, float16", costs["float16"], costs["rf++"], shards * SHARD)
    print(f"{shards * SHARD:,} pairs a turn")
    return reached


def stored_in_turns(
    folder: Path, stored: int, shards: int, chosen: argparse.Namespace
) -> dict[str, list[Cost]]:
    """What it costs each side to add so many shards' pairs to those that it has already."""
    indices = range(SHARD)
    x0, labels = pictures(SHARD), randomness.integers(0, "labels", indices, CLASSES)
    block = Block(randomness.noise(0, indices, SHAPE), x0, labels)
    before = stored // SHARD
    enough = (before + (chosen.repeats + 1) * shards) * SHARD
    zips = ZipStore(folder / "zips", chosen.flush)
    zips.fill(stored)
    with (
        PairWriter(folder / "uint8", image_spec(enough)) as exact,
        PairWriter(folder / "float16", image_spec(enough, "float16")) as half,
    ):

        def ours(writer: PairWriter) -> None:
            for shard in writer.missing()[:shards]:
                writer.commit(shard, block)

        def theirs(turn: int) -> None:
            for shard in range(turn * shards, (turn + 1) * shards):
                zips.add_batch(stored + shard * SHARD, x0, labels)
                zips.add_records(stored + shard * SHARD, SHARD)

        for writer in (exact, half):
            for shard in range(before):
                writer.commit(shard, block)
        costs = in_turns(
            chosen.repeats,
            {
                "uint8": lambda _: cost_of(lambda: ours(exact)),
                "rf++": lambda turn: cost_of(lambda: theirs(turn)),
                "float16": lambda _: cost_of(lambda: ours(half)),
            },
        )
    zips.close()
    return costs


class Stopwatch:
    """Seconds in the forward passes of a network; on a GPU by its own clock, so that nothing waits for it."""

    def __init__(self, network: nn.Module, device: str) -> None:
        self.on_gpu = device != "cpu"
        self.marks: list[Any] = []
        network.register_forward_pre_hook(lambda *_: self.mark())
        network.register_forward_hook(lambda *_: self.mark())

    def mark(self) -> None:
        if not self.on_gpu:
            return self.marks.append(time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> float:
        """Since the last call."""
        spans = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks.clear()
        if not self.on_gpu:
            return sum(end - start for start, end in spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000


def share(chosen: argparse.Namespace, scratch: Path) -> bool:
    """Of the wall time, that of a real network."""
    print(f"\n{'network in all of the wall time':34}{'share':>10}{'pairs/s':>10}{'(turns)':>24}   goal")
    settings = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        settings += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    torch.set_num_threads(chosen.threads)
    reached = [share_on(device, dtype, scratch) for device, dtype in settings]
    torch.set_num_threads(1)
    return all(reached)


def share_on(device: str, dtype: torch.dtype, scratch: Path) -> bool:
    """Print a row; whether it reaches the goal."""
    count, steps = (4, 3) if device == "cpu" else (SHARD, STEPS)
    network = build("songunet", dict(PRESETS["edm-cifar10-cond-vp"])).to(device, dtype).eval()
    field = Canonical(network, Convention.model_validate(FAMILIES["edm"].card["convention"]))
    watch = Stopwatch(network, device)
    shares, rates = [], []
    for turn in range(4):  # the first chooses algorithms and fills caches
        folder = scratch / f"{device} {dtype} {turn}"
        started = time.perf_counter()
        with torch.no_grad():
            our_pairs(field, folder, image_spec(count), steps, BATCH, device)
        wall, inside = time.perf_counter() - started, watch.seconds()
        if turn:
            shares.append(inside / wall)
            rates.append(count / wall)
    median, rate = statistics.median(shares), statistics.median(rates)
    spread = f"({min(shares):.4f}-{max(shares):.4f})"
    print(
        f"{device + ', ' + str(dtype).removeprefix('torch.'):34}{median:10.4f}{rate:10.3g}{spread:>24}   "
        f"{judged(median >= SHARE, f'at least {SHARE}')}",
        flush=True,
    )
    return median >= SHARE


def growth(chosen: argparse.Namespace, scratch: Path) -> bool:
    """Whether a store that is large is as fast as a new one."""
    shards = 100 if chosen.quick else 1000
    count = shards * TINY_SHARD
    spec = PairSpec(count=count, shape=(1,), classes=2, dtype="float32", shard_size=TINY_SHARD, seed=0)
    large, new, old = scratch / "large", scratch / "new", scratch / "old"

    def opened(folder: Path) -> tuple[PairWriter, Iterator[int]]:
        writer = PairWriter(folder, spec)
        return writer, our_shards(lambda z, t, labels: -z, writer, steps=1, batch=TINY_SHARD)

    def window() -> dict[str, Cost]:
        """What the first and the last shards cost."""
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(large, old)
        (new_writer, first), (old_writer, final) = opened(new), opened(old)
        with new_writer, old_writer:
            sides = {
                "first": lambda _: cost_of(lambda: next(first)),
                "last": lambda _: cost_of(lambda: next(final)),
            }
            costs = in_turns(WINDOW, sides, warm=False)
        return {name: sum(each, NOTHING) for name, each in costs.items()}

    writer, made = opened(large)
    with writer:
        for _ in range(shards - WINDOW):
            next(made)
    # The turns are short, so there are more of them.
    windows = [window() for _ in range(3 * chosen.repeats + 1)][1:]
    head("last", "first")
    reached = compare(
        f"{WINDOW * TINY_SHARD:,} of {count:,}",
        [each["last"] for each in windows],
        [each["first"] for each in windows],
        WINDOW * TINY_SHARD,
        AS_FAST,
    )
    return opening(old, chosen.repeats) and reached


def opening(folder: Path, repeats: int) -> bool:
    """Time and memory until the first shuffled batches of a store are there."""
    command = [sys.executable, "-c", OPENING, str(folder)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(repeats)
    ]
    print(f"\n{'to the first shuffled batches':34}{'median':>10}{'(turns)':>34}   goal")
    seconds, megabytes = zip(*runs, strict=True)
    reached = []
    for what, values, goal in (("wall, s", seconds, OPEN_S), ("memory, MB", megabytes, OPEN_MB)):
        median = statistics.median(values)
        reached.append(median < goal)
        spread = f"({min(values):.3f}-{max(values):.3f})"
        print(f"{what:34}{median:10.3f}{spread:>34}   {judged(reached[-1], f'under {goal:g}')}")
    return all(reached)


PARTS = {"overhead": overhead, "store": store, "share": share, "growth": growth}


def processor() -> str:
    """The CPU's name."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: all")
    parser.add_argument("--repeats", type=int, help="turns that count (default: 7, with --quick 3)")
    parser.add_argument("--pairs", type=int, default=SHARD, help="pairs of a turn of overhead")
    parser.add_argument(
        "--flush", type=int, default=10_000, help="entries after which rf++ reopens its zip files"
    )
    parser.add_argument("--stored", type=int, default=250_000, help="pairs that the larger store has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for share only")
    parser.add_argument("--quick", action="store_true", help="fewer turns, and 100,000 pairs for growth")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a goal is missed")
    chosen = parser.parse_args()
    chosen.repeats = chosen.repeats or (3 if chosen.quick else 7)
    return chosen


def main(chosen: argparse.Namespace) -> bool:
    """Measure and print; whether every goal is met."""
    torch.set_num_threads(1)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(
        f"{processor()}{gpu}, 1 thread (share: {chosen.threads}), torch {torch.__version__}; "
        f"medians of {chosen.repeats} turns"
    )
    fine = []
    for name in [chosen.part] if chosen.part else PARTS:
        with tempfile.TemporaryDirectory() as folder:
            fine.append(PARTS[name](chosen, Path(folder)))
    return all(fine)


if __name__ == "__main__":
    asked = options()
    raise SystemExit(0 if main(asked) or not asked.check else 1)
