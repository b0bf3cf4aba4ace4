"""NCSN++ and DDPM++ (Song et al. 2021, score_sde), as Rectified Flow, BOSS and SlimFlow train them.

Weights have the names and the order of the official checkpoints (without the prefix `module.`): all stand
in one flat list `all_modules`, which `forward` walks once from its first entry to its last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HALF = math.sqrt(0.5)
"""Sums of two branches are scaled by this, which keeps their variance."""

_SILENT = 1e-5
"""Gain of the last layer of a branch: a block starts as (nearly) the identity."""


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _conv(inputs: int, outputs: int, size: int, gain: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def _waves(time: Tensor, count: int) -> Tensor:
    """Sines and cosines [B, count] of the time [B], of frequencies from 1 down to 1 / 10000."""
    half = count // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time[:, None] * torch.exp(steps * (-math.log(10_000) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Fourier(nn.Module):
    """Sines and cosines [B, 2 count] of log time [B] at random frequencies, which are never trained."""

    def __init__(self, count: int, scale: float) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(count) * scale, requires_grad=False)

    def forward(self, log_time: Tensor) -> Tensor:
        angles = log_time[:, None] * self.W.float() * 2.0 * math.pi
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Filter(nn.Module):
    """The separable filter 1 3 3 1 over each channel by itself."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def weights(self, x: Tensor) -> Tensor:
        return self.kernel.expand(x.shape[1], 1, 4, 4)


class Grow(Filter):
    """Filtered to twice the side."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, 4.0 * self.weights(x), stride=2, padding=1, groups=x.shape[1])


class Shrink(Filter):
    """Filtered to half the side."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weights(x), stride=2, padding=1, groups=x.shape[1])


class Blur(Filter):
    """Filtered, with a margin of 2 pixels at each side: one pixel wider and higher."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weights(x), padding=2, groups=x.shape[1])


class FilteredConv(nn.Module):
    """A convolution to half the side that filters first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.blur = Blur()
        self.Conv2d_0 = _conv(inputs, outputs, 3)
        self.Conv2d_0.stride, self.Conv2d_0.padding = (2, 2), (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.Conv2d_0(self.blur(x))
        return result


class Combine(nn.Module):
    """Adds an image to features."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.Conv_0 = _conv(channels, width, 1)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        added: Tensor = self.Conv_0(image)
        return added + features


class NIN(nn.Module):
    """A linear map of channels-last pixels [B, N, C], stored inputs first."""

    def __init__(self, channels: int, gain: float = math.sqrt(0.1)) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(channels, channels))
        self.b = nn.Parameter(torch.zeros(channels))
        nn.init.xavier_uniform_(self.W, gain)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.linear(pixels, self.W.T, self.b)


class Attention(nn.Module):
    """Residual self-attention over all pixels, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = _norm(channels)
        self.NIN_0 = NIN(channels)
        self.NIN_1 = NIN(channels)
        self.NIN_2 = NIN(channels)
        self.NIN_3 = NIN(channels, _SILENT)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.GroupNorm_0(x).flatten(2).transpose(1, 2).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(self.NIN_0(pixels), self.NIN_1(pixels), self.NIN_2(pixels))
        change = self.NIN_3(mixed).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        result: Tensor = (x + change) * _HALF
        return result


class ResidualBlock(nn.Module):
    """BigGAN's residual block: `resample` acts behind the first activation and in the shortcut."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, dropout: float, resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.resample = nn.Identity() if resample is None else resample
        self.GroupNorm_0 = _norm(inputs)
        self.Conv_0 = _conv(inputs, outputs, 3)
        self.Dense_0 = _linear(embedding, outputs)
        self.GroupNorm_1 = _norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.Conv_1 = _conv(outputs, outputs, 3, _SILENT)
        straight = inputs == outputs and resample is None
        self.Conv_2 = nn.Identity() if straight else _conv(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.Conv_0(self.resample(F.silu(self.GroupNorm_0(x))))
        h = h + self.Dense_0(embedding)[:, :, None, None]
        h = self.Conv_1(self.dropout(F.silu(self.GroupNorm_1(h))))
        result: Tensor = (self.Conv_2(self.resample(x)) + h) * _HALF
        return result


class NCSNpp(nn.Module):
    """Score network of square images: (x [B, C, H, W], time [B], labels) -> [B, C, H, W].

    `time` is what the original is fed: 999 t for the flows, t = 1 being data. With `embedding_type`
    fourier it must be above 0. There are no classes; the labels are ignored. The arguments are the keys of
    score_sde's configurations, but for those that no published flow varies (BigGAN blocks, swish,
    rescaled skips, pyramids that are summed, the filter 1 3 3 1).

    `nf` channels times `ch_mult` at each level, `num_res_blocks` blocks a level on the way down and one more
    on the way up, attention where the side is one of `attn_resolutions`. `fir` resamples with the filter
    instead of by repeating and averaging. `progressive` (none, output_skip) sums the output over the
    levels, `progressive_input` (none, input_skip, residual) feeds the image in at each. `centered` False
    means x in [0, 1]. `scale_by_sigma` divides by the time (positional: by entry `time` of `num_scales`
    noise levels). Raises ValueError for sizes and names that do not fit.
    """

    sigmas: Tensor

    def __init__(
        self,
        image_size: int = 32,
        num_channels: int = 3,
        centered: bool = True,
        nf: int = 64,
        ch_mult: Sequence[int] = (1, 1, 2),
        num_res_blocks: int = 1,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        fir: bool = False,
        progressive: str = "none",
        progressive_input: str = "none",
        embedding_type: str = "positional",
        fourier_scale: float = 16.0,
        scale_by_sigma: bool = False,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        num_scales: int = 1000,
    ) -> None:
        super().__init__()
        _check_sizes(image_size, nf, ch_mult)
        _check_name("progressive", progressive, ("none", "output_skip"))
        _check_name("progressive_input", progressive_input, ("none", "input_skip", "residual"))
        _check_name("embedding_type", embedding_type, ("positional", "fourier"))
        if progressive_input == "residual" and not fir:
            raise ValueError("progressive_input 'residual' needs fir")
        self.nf = nf
        self.centered = centered
        self.blocks = num_res_blocks
        self.attended = [image_size >> level in attn_resolutions for level in range(len(ch_mult))]
        self.fourier = embedding_type == "fourier"
        self.output_skip = progressive == "output_skip"
        self.progressive_input = progressive_input
        self.scale_by_sigma = scale_by_sigma
        self.grow = Grow() if fir else nn.Upsample(scale_factor=2)
        self.shrink = Shrink() if fir else nn.AvgPool2d(2)
        noise_levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), num_scales).exp()
        self.register_buffer("sigmas", noise_levels)
        block = partial(ResidualBlock, embedding=4 * nf, dropout=dropout)
        widths = [nf * multiplier for multiplier in ch_mult]
        self.all_modules = nn.ModuleList(
            [
                *([Fourier(nf, fourier_scale)] if self.fourier else []),
                _linear(2 * nf if self.fourier else nf, 4 * nf),
                _linear(4 * nf, 4 * nf),
                *self._encoder(num_channels, widths, block),
                block(widths[-1], widths[-1]),
                Attention(widths[-1]),
                block(widths[-1], widths[-1]),
                *self._decoder(num_channels, widths, block),
            ]
        )

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        modules = iter(self.all_modules)
        embedding = self._embed(time.float(), x.dtype, modules)
        skips = self._descend(x if self.centered else 2.0 * x - 1.0, embedding, modules)
        h = next(modules)(skips[-1], embedding)
        h = next(modules)(h)
        h = next(modules)(h, embedding)
        result = self._ascend(h, skips, embedding, modules)
        if self.scale_by_sigma:
            scale = time if self.fourier else self.sigmas[time.long()]
            result = result / scale.to(result.dtype)[:, None, None, None]
        return result.contiguous()

    def averaged_names(self) -> list[str]:
        """Names of the parameters in the order of a checkpoint's nameless list `ema.shadow_params`.

        It holds what is trained, in the order of registration: not `sigmas`, and not the random
        frequencies of a fourier embedding.
        """
        return [name for name, weights in self.named_parameters() if weights.requires_grad]

    def _encoder(
        self, channels: int, widths: Sequence[int], block: partial[ResidualBlock]
    ) -> Iterator[nn.Module]:
        yield _conv(channels, self.nf, 3)
        width, pyramid = self.nf, channels
        for level, wider in enumerate(widths):
            if level:
                yield block(width, width, resample=self.shrink)
                if self.progressive_input == "input_skip":
                    yield Combine(channels, width)
                elif self.progressive_input == "residual":
                    yield FilteredConv(pyramid, width)
                    pyramid = width
            for _ in range(self.blocks):
                yield block(width, wider)
                width = wider
                if self.attended[level]:
                    yield Attention(width)

    def _decoder(
        self, channels: int, widths: Sequence[int], block: partial[ResidualBlock]
    ) -> Iterator[nn.Module]:
        kept = [self.nf, *(width for width in widths for _ in range(self.blocks + 1))]
        width = kept.pop()  # the lowest level keeps nothing shrunk
        for level, wider in reversed(list(enumerate(widths))):
            for _ in range(self.blocks + 1):
                yield block(width + kept.pop(), wider)
                width = wider
            if self.attended[level]:
                yield Attention(width)
            if self.output_skip or level == 0:
                yield _norm(width)
                yield _conv(width, channels, 3, _SILENT)
            if level:
                yield block(width, width, resample=self.grow)

    def _embed(self, time: Tensor, dtype: torch.dtype, modules: Iterator[nn.Module]) -> Tensor:
        """What each block is told of the time, [B, 4 nf]."""
        features = next(modules)(time.log()) if self.fourier else _waves(time, self.nf)
        hidden = next(modules)(features.to(dtype))
        return F.silu(next(modules)(F.silu(hidden)))

    def _descend(self, x: Tensor, embedding: Tensor, modules: Iterator[nn.Module]) -> list[Tensor]:
        """The features that the way up takes back, first to last."""
        pyramid = x
        skips = [next(modules)(x)]
        for level, attended in enumerate(self.attended):
            if level:
                h = next(modules)(skips[-1], embedding)
                if self.progressive_input == "input_skip":
                    pyramid = self.shrink(pyramid)
                    h = next(modules)(pyramid, h)
                elif self.progressive_input == "residual":
                    h = pyramid = (next(modules)(pyramid) + h) * _HALF
                skips.append(h)
            for _ in range(self.blocks):
                h = next(modules)(skips[-1], embedding)
                skips.append(next(modules)(h) if attended else h)
        return skips

    def _ascend(
        self, h: Tensor, skips: list[Tensor], embedding: Tensor, modules: Iterator[nn.Module]
    ) -> Tensor:
        """The image at full size, from the lowest features `h`."""
        image: Tensor | None = None
        for level, attended in reversed(list(enumerate(self.attended))):
            for _ in range(self.blocks + 1):
                h = next(modules)(torch.cat([h, skips.pop()], dim=1), embedding)
            if attended:
                h = next(modules)(h)
            if self.output_skip or level == 0:
                activated = F.silu(next(modules)(h))
                change = next(modules)(activated)
                image = change if image is None else change + self.grow(image)
            if level:
                h = next(modules)(h, embedding)
        assert image is not None, "level 0 has one"
        return image


def _check_sizes(image_size: int, nf: int, ch_mult: Sequence[int]) -> None:
    if not ch_mult:
        raise ValueError("ch_mult must name at least one level")
    if nf < 4 or nf % 4:
        raise ValueError(f"nf {nf} must be a multiple of 4")
    factor = 2 ** (len(ch_mult) - 1)
    if image_size % factor:
        raise ValueError(f"image_size {image_size} must be divisible by {factor} for {len(ch_mult)} levels")


def _check_name(argument: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{argument} {name!r} must be one of {', '.join(known)}")


_CIFAR10: dict[str, Any] = {
    "image_size": 32,
    "nf": 128,
    "ch_mult": [1, 2, 2, 2],
    "num_res_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.15,
}
_FACES256: dict[str, Any] = {
    "image_size": 256,
    "nf": 128,
    "ch_mult": [1, 1, 2, 2, 2, 2, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "fir": True,
    "progressive": "output_skip",
    "progressive_input": "input_skip",
    "embedding_type": "fourier",
    "scale_by_sigma": True,
    "sigma_max": 378.0,
    "num_scales": 2000,
}


def _slim(**sizes: Any) -> dict[str, Any]:
    return _CIFAR10 | {"ch_mult": [1, 2, 2], "num_res_blocks": 2} | sizes


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "rf-cifar10": _CIFAR10,
    "rf-celebahq256": _FACES256,
    "rf-afhqcat256": _FACES256,
    "rf-church256": _FACES256 | {"centered": False, "sigma_max": 380.0},
    "rf-bedroom256": _FACES256 | {"centered": False},
    "slimflow-28m": _slim(),
    "slimflow-15m": _slim(nf=96),
    "slimflow-7m": _slim(nf=64),
    "slimflow-3m": _slim(nf=64, ch_mult=[1, 1, 2], num_res_blocks=1),
}
"""Arguments of the published networks. SlimFlow's for FFHQ have the same but for `image_size` 64."""
