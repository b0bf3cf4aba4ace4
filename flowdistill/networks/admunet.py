"""The U-Net of guided diffusion (Dhariwal and Nichol 2021, "ADM"), as torchcfm and LFM train it.

Weights have the names of the original's checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


def _waves(time: Tensor, count: int) -> Tensor:
    """Cosines and sines [B, count] of the time [B], of frequencies from 1 down towards 1 / 10000."""
    half = count // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time[:, None] * torch.exp(steps * (-math.log(10_000) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def _silence(layer: Layer) -> Layer:
    """The layer with zero weights, so that a block starts as the identity."""
    for weights in layer.parameters():
        nn.init.zeros_(weights)
    return layer


class Grow(nn.Module):
    """To twice the side by repeating, then a convolution if `learned`."""

    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(F.interpolate(x, scale_factor=2.0))
        return result


class Shrink(nn.Module):
    """To half the side by a convolution if `learned`, else by averaging."""

    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.op(x)
        return result


class ResidualBlock(nn.Module):
    """Residual block: the embedding shifts the features or, by `scale_shift`, modulates the second norm.

    `outputs` None means as many channels as inputs. `resample` acts behind the first activation and in the
    shortcut.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int | None = None,
        *,
        embedding: int,
        dropout: float,
        scale_shift: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        outputs = inputs if outputs is None else outputs
        self.scale_shift = scale_shift
        self.resample = nn.Identity() if resample is None else resample
        self.in_layers = nn.Sequential(_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs * (2 if scale_shift else 1)))
        last = _silence(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.out_layers = nn.Sequential(_norm(outputs), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        told = self.emb_layers(embedding)[:, :, None, None]
        norm, activation, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = norm(h) * (1.0 + scale) + shift
        else:
            h = norm(h + told)
        result: Tensor = self.skip_connection(self.resample(x)) + conv(dropout(activation(h)))
        return result


class Attention(nn.Module):
    """Residual self-attention over all pixels, with `heads` heads or, unless it is -1, of `head_channels`.

    `split_first` tells how the 3 C projected channels lie: all queries, all keys, all values, or else head
    after head.
    """

    def __init__(self, channels: int, heads: int, head_channels: int, split_first: bool) -> None:
        super().__init__()
        divisor = heads if head_channels == -1 else head_channels
        if divisor < 1 or channels % divisor:
            raise ValueError(
                f"{channels} channels do not divide into num_heads {heads}, num_head_channels {head_channels}"
            )
        self.heads = heads if head_channels == -1 else channels // head_channels
        self.split_first = split_first
        self.norm = _norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _silence(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        pixels = _pointwise(self.qkv, self.norm(x).flatten(2).transpose(1, 2))
        batch, count, _ = pixels.shape
        if self.split_first:
            parts = pixels.reshape(batch, count, 3, self.heads, -1)
        else:
            parts = pixels.reshape(batch, count, self.heads, 3, -1).transpose(2, 3)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        change = _pointwise(self.proj_out, mixed)
        return x + change.transpose(1, 2).reshape(x.shape)


def _pointwise(conv: nn.Conv1d, pixels: Tensor) -> Tensor:
    """A convolution of one pixel on [B, N, C]: the layout that attention wants."""
    return F.linear(pixels, conv.weight[:, :, 0], conv.bias)


class Stage(nn.ModuleList):
    """Layers in a row; the residual blocks among them are told the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class ADMUNet(nn.Module):
    """U-Net of square images: (x [B, C, H, W], time [B], labels [B] | None) -> [B, C, H, W].

    `time` is what the original is fed: torchcfm t, 1 being data; LFM t, 1 being noise; guided diffusion
    the number of the step. With `num_classes`, labels None means class `null_label`, or where that is None no
    class at all (a zero embedding); without, labels are ignored. Of `out_channels` beyond those of x
    (a learned variance) the first C are returned.

    The arguments are the original's: `model_channels` times `channel_mult` at each level, `num_res_blocks`
    blocks a level on the way down and one more on the way up, attention where the side is `image_size`
    divided by one of `attention_resolutions`. Attention has heads of `num_head_channels` or, if that
    is -1, `num_heads` heads, on the way up `num_heads_upsample` (-1: as many). Raises ValueError for
    sizes that do not fit.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        model_channels: int = 64,
        out_channels: int = 3,
        num_res_blocks: int = 1,
        attention_resolutions: Sequence[int] = (2,),
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 2),
        conv_resample: bool = True,
        num_classes: int | None = None,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        null_label: int | None = None,
    ) -> None:
        super().__init__()
        _check(image_size, channel_mult, num_classes, null_label)
        self.model_channels = model_channels
        self.null_label = null_label
        embedding = 4 * model_channels
        widths = [int(model_channels * multiplier) for multiplier in channel_mult]
        attended = [2**level in attention_resolutions for level in range(len(widths))]
        block = partial(ResidualBlock, embedding=embedding, dropout=dropout, scale_shift=use_scale_shift_norm)
        attention = partial(Attention, head_channels=num_head_channels, split_first=use_new_attention_order)
        shrink: _Layers = partial(Shrink, learned=conv_resample)
        grow: _Layers = partial(Grow, learned=conv_resample)
        if resblock_updown:
            shrink = partial(block, resample=nn.AvgPool2d(2))
            grow = partial(block, resample=nn.Upsample(scale_factor=2))

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, embedding)
        down = _descent(widths, attended, num_res_blocks, block, partial(attention, heads=num_heads), shrink)
        stem = Stage([nn.Conv2d(in_channels, widths[0], 3, padding=1)])
        self.input_blocks = nn.ModuleList([stem, *down])
        lowest = widths[-1]
        self.middle_block = Stage([block(lowest), attention(lowest, num_heads), block(lowest)])
        heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        up = _ascent(widths, attended, num_res_blocks, block, partial(attention, heads=heads), grow)
        self.output_blocks = nn.ModuleList(up)
        last = _silence(nn.Conv2d(widths[0], out_channels, 3, padding=1))
        self.out = nn.Sequential(_norm(widths[0]), nn.SiLU(), last)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self.time_embed(_waves(time.float(), self.model_channels).to(x.dtype))
        if labels is None and self.null_label is not None:
            labels = torch.full(time.shape, self.null_label, dtype=torch.int64, device=time.device)
        if labels is not None and self.label_emb is not None:
            embedding = embedding + self.label_emb(labels)
        h = x
        skips = []
        for stage in self.input_blocks:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        result: Tensor = self.out(h)[:, : x.shape[1]]
        return result.contiguous()


_Layers = Callable[..., nn.Module]


def _descent(
    widths: Sequence[int],
    attended: Sequence[bool],
    blocks: int,
    block: _Layers,
    attention: _Layers,
    shrink: _Layers,
) -> Iterator[nn.Module]:
    width = widths[0]
    for level, wider in enumerate(widths):
        if level:
            yield Stage([shrink(width)])
        for _ in range(blocks):
            layers = [block(width, wider)]
            width = wider
            if attended[level]:
                layers.append(attention(width))
            yield Stage(layers)


def _ascent(
    widths: Sequence[int],
    attended: Sequence[bool],
    blocks: int,
    block: _Layers,
    attention: _Layers,
    grow: _Layers,
) -> Iterator[nn.Module]:
    kept = [widths[0], *(width for width in widths for _ in range(blocks + 1))]
    width = kept.pop()  # the lowest level keeps nothing shrunk
    for level, wider in reversed(list(enumerate(widths))):
        for count in range(blocks + 1):
            layers = [block(width + kept.pop(), wider)]
            width = wider
            if attended[level]:
                layers.append(attention(width))
            if level and count == blocks:
                layers.append(grow(width))
            yield Stage(layers)


def _check(
    image_size: int, channel_mult: Sequence[float], num_classes: int | None, null_label: int | None
) -> None:
    if not channel_mult:
        raise ValueError("channel_mult must name at least one level")
    factor = 2 ** (len(channel_mult) - 1)
    if image_size % factor:
        raise ValueError(
            f"image_size {image_size} must be divisible by {factor} for {len(channel_mult)} levels"
        )
    if null_label is not None and not 0 <= null_label < (num_classes or 0):
        raise ValueError(f"null_label {null_label} must be one of the {num_classes or 0} classes")


_LFM: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 256,
    "out_channels": 4,
    "num_res_blocks": 2,
    "attention_resolutions": [16, 8],
    "channel_mult": [1, 2, 2, 2],
    "num_heads": 4,
    "use_scale_shift_norm": True,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cfm-cifar10": {
        "model_channels": 128,
        "num_res_blocks": 2,
        "dropout": 0.1,
        "channel_mult": [1, 2, 2, 2],
        "num_heads": 4,
        "num_head_channels": 64,
    },
    "lfm-celeb256-adm": _LFM,
    "lfm-celeb512-adm": _LFM | {"image_size": 64, "channel_mult": [1, 2, 2, 2, 4]},
    "lfm-church-adm": _LFM | {"channel_mult": [1, 2, 3, 4]},
}
"""Arguments of the published networks. LFM's other checkpoints called adm are of `dhariwalunet`."""
