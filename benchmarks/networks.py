"""How fast our networks are against a plain eager implementation of the same architecture.

    python benchmarks/networks.py [--preset edm-imagenet64-adm] [--device cuda] [--batch 64] [--compile] ...

The plain one computes as the published code does, in its order: filters apart from convolutions, biases
added afterwards, attention by einsum with a float32 softmax. It has the same weights, and both must give the
same output before anything is timed. A row times both in turns, so that a busy moment falls on both alike.

`ratio` is plain / ours in the setting of the row, above 1 where ours is faster; behind it stand the
smallest and the largest ratio of a single turn: a difference within that range is noise. `/ eager` is what
the plain network takes in the first row of that pass and precision, eager, against ours in this one.

On a CPU the network has 32 channels and computes in float32 where the options say nothing else: many
emulate bfloat16, ten times slower. `--compile` adds minutes there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.networks import build, dhariwalunet, songunet
from flowdistill.networks._edm_layers import Block, FilteredConv2d, Resample, ResampledConv2d

PRESETS = {
    **{name: ("songunet", arguments) for name, arguments in songunet.PRESETS.items()},
    **{name: ("dhariwalunet", arguments) for name, arguments in dhariwalunet.PRESETS.items()},
}
LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
PRECISIONS = ("float32", "bfloat16")
TOLERANCE = 1e-5

Inputs = tuple[Tensor, Tensor, Tensor | None]


class PlainConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return _biased(F.conv2d(x, self.weight, padding=self.padding), self.bias)


class PlainResample(Resample):
    def forward(self, x: Tensor) -> Tensor:
        return _resampled(x, self.resample_filter, self.resize.__name__ == "double")


class PlainResampledConv2d(ResampledConv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = _resampled(x, self.resample_filter, self.direction == "up")
        return _biased(F.conv2d(x, self.weight, padding=self.padding), self.bias)


class PlainFilteredConv2d(FilteredConv2d):
    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.weight, padding=(self.resample_filter.shape[-1] + 1) // 2)
        kernel = self.resample_filter.to(h.dtype).tile(h.shape[1], 1, 1, 1)
        return _biased(F.conv2d(h, kernel, groups=h.shape[1], stride=2), self.bias)


class PlainBlock(Block):
    def _attention(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm2(x)).reshape(len(x) * self.heads, x.shape[1] // self.heads, 3, -1)
        query, key, value = split.unbind(2)
        scores = torch.einsum("ncq,nck->nqk", query.float(), key.float() / math.sqrt(key.shape[1]))
        weights = scores.softmax(dim=2).to(value.dtype)
        return self.proj(torch.einsum("nqk,nck->ncq", weights, value).reshape(x.shape))


def _biased(h: Tensor, bias: Tensor | None) -> Tensor:
    return h if bias is None else h.add_(bias.to(h.dtype).reshape(1, -1, 1, 1))


def _resampled(x: Tensor, kernel: Tensor, up: bool) -> Tensor:
    channels, padding = x.shape[1], (kernel.shape[-1] - 1) // 2
    kernel = kernel.to(x.dtype).tile(channels, 1, 1, 1)
    if up:
        return F.conv_transpose2d(x, 4 * kernel, groups=channels, stride=2, padding=padding)
    return F.conv2d(x, kernel, groups=channels, stride=2, padding=padding)


PLAIN = {
    nn.Conv2d: PlainConv2d,
    Resample: PlainResample,
    ResampledConv2d: PlainResampledConv2d,
    FilteredConv2d: PlainFilteredConv2d,
    Block: PlainBlock,
}


class Setting(NamedTuple):
    """What a row measures."""

    backward: bool
    precision: str
    layout: str
    compiled: bool

    def __str__(self) -> str:
        work = "forward + backward" if self.backward else "forward"
        return f"{work:20}{self.precision:10}{self.layout:16}{'compiled' if self.compiled else 'eager':9}"


class Timed(NamedTuple):
    """Seconds of every turn."""

    ours: list[float]
    plain: list[float]


def plain(network: nn.Module) -> nn.Module:
    """A copy that has the same weights and computes in the plain way."""
    copy = deepcopy(network)
    for module in copy.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return copy


def randomised(network: nn.Module) -> nn.Module:
    """Weights of order one everywhere: at the start many are zero."""
    with torch.no_grad():
        for weights in network.parameters():
            if weights.ndim > 1:
                weights.normal_(std=1 / math.sqrt(weights[0].numel()))
    return network


def check(ours: nn.Module, theirs: nn.Module, inputs: Inputs) -> float:
    """The largest relative difference of the outputs. Ends the benchmark if it is not rounding."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = theirs(*inputs)
        error = float((ours(*inputs) - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE:
        raise SystemExit(f"the two networks differ by {error:.1e} of the largest output")
    return error


def work(network: nn.Module, setting: Setting, inputs: Inputs) -> Callable[[], None]:
    """One pass, to the end of what the device does."""
    x = inputs[0]
    network.train(setting.backward)

    def once() -> None:
        with (
            torch.set_grad_enabled(setting.backward),
            torch.autocast(x.device.type, torch.bfloat16, enabled=setting.precision == "bfloat16"),
        ):
            output = network(*inputs)
        if setting.backward:
            output.square().mean().backward()
            network.zero_grad()
        if x.device.type != "cpu":
            torch.accelerator.synchronize()

    return once


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(pair: tuple[nn.Module, nn.Module], setting: Setting, inputs: Inputs, runs: int) -> Timed:
    """Both networks in turns, after two passes each that compile, choose algorithms and fill caches."""
    shaped = (inputs[0].contiguous(memory_format=LAYOUTS[setting.layout]), *inputs[1:])
    torch.compiler.reset()  # Else the variants of earlier rows count, and after eight nothing is compiled.
    passes = []
    for network in pair:
        network = network.to(memory_format=LAYOUTS[setting.layout])
        passes.append(work(torch.compile(network) if setting.compiled else network, setting, shaped))
    for _ in range(2):
        for run in passes:
            run()
    ours, theirs = zip(*([seconds(run) for run in passes] for _ in range(runs)), strict=True)
    return Timed(list(ours), list(theirs))


def settings(chosen: argparse.Namespace) -> Iterator[Setting]:
    precisions = chosen.precision or (PRECISIONS[:1] if chosen.device == "cpu" else PRECISIONS)
    compiled = (False, True) if chosen.compile else (False,)
    return (Setting(*choice) for choice in product((False, True), precisions, chosen.layout, compiled))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="edm-cifar10-ve")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="default: 2 on a CPU, 64 elsewhere")
    parser.add_argument("--channels", type=int, help="default: 32 on a CPU, the preset's own elsewhere")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, help="default: float32 on a CPU, else both"
    )
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--compile", action="store_true", help="rows with torch.compile as well")
    return parser.parse_args()


def main(chosen: argparse.Namespace) -> None:
    on_cpu = chosen.device == "cpu"
    torch.set_num_threads(chosen.threads)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    batch = chosen.batch or (2 if on_cpu else 64)
    architecture, arguments = PRESETS[chosen.preset]
    channels = chosen.channels or (32 if on_cpu else None)
    ours = build(architecture, {**arguments, **({"model_channels": channels} if channels else {})})
    ours = randomised(ours).to(chosen.device).eval()
    side, classes = arguments["img_resolution"], arguments.get("label_dim", 0)
    inputs = (
        torch.randn(batch, 3, side, side, device=chosen.device),
        torch.linspace(-1.5, 1.0, batch, device=chosen.device),
        torch.randint(classes, (batch,), device=chosen.device) if classes else None,
    )
    theirs = plain(ours)
    error = check(ours, theirs, inputs)
    name = torch.cuda.get_device_name(chosen.device) if "cuda" in chosen.device else chosen.device
    million = sum(weights.numel() for weights in ours.parameters()) / 1e6
    print(
        f"{chosen.preset}, {million:.1f} M parameters, batch {batch}, {name}, {chosen.threads} threads, "
        f"torch {torch.__version__}\n"
        f"same output within {error:.0e}; seconds, medians of {chosen.runs} turns\n"
    )
    print(f"{'':55}{'ours':>9}{'plain':>9}{'ratio':>7}{'(turns)':>14}{'/ eager':>9}")
    eager: dict[tuple[bool, str], float] = {}
    for setting in settings(chosen):
        timed = measure((ours, theirs), setting, inputs, chosen.runs)
        row(setting, timed, eager)


def row(setting: Setting, timed: Timed, eager: dict[tuple[bool, str], float]) -> None:
    """Print it; the first of its precision and pass is the plain eager one that others are compared with."""
    mine, plain_one = statistics.median(timed.ours), statistics.median(timed.plain)
    base = eager.setdefault((setting.backward, setting.precision), plain_one)
    turns = sorted(other / own for own, other in zip(*timed, strict=True))
    spread = f"({turns[0]:.2f}-{turns[-1]:.2f})"
    print(
        f"{setting}{mine:9.4f}{plain_one:9.4f}{plain_one / mine:7.2f}{spread:>14}{base / mine:9.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main(options())
