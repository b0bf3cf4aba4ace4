"""What the networks of EDM (Karras et al. 2022) share, under the tensor names of its checkpoints.

Both families are U-Nets of one residual block, told apart by a `BlockStyle`. Filters and convolutions
commute: where the published order computes pixels that are dropped, or computes copies, ours does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Direction = Literal["up", "down"]


@dataclass(frozen=True)
class BlockStyle:
    """How the residual blocks of one network are made.

    `embedding` channels condition a block: they shift its second normalisation, where `scales` they scale it
    as well. Sums of two branches are multiplied by `sum_scale`. A skip connection that changes the resolution
    also has a convolution where `projects`.
    """

    embedding: int
    scales: bool
    projects: bool
    sum_scale: float
    epsilon: float
    dropout: float
    resample_filter: Sequence[int]


class Positional(nn.Module):
    """Angles [B, channels / 2] of the time [B] at frequencies from 1 down to 1 / 10000.

    `endpoint` tells whether 1 / 10000 itself is the last one.
    """

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        self.count = channels // 2
        self.steps = self.count - endpoint

    def forward(self, time: Tensor) -> Tensor:
        powers = torch.arange(self.count, device=time.device, dtype=torch.float32) / self.steps
        return time.float()[:, None] * (1 / 10000) ** powers


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which operations on the device of x keep the precision of their inputs."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class Norm(nn.GroupNorm):
    """Group normalisation in the precision of its input; sums are float32 inside.

    Under autocast the plain layer returns float32 on a GPU, twice the memory to move.
    """

    def __init__(self, channels: int, epsilon: float) -> None:
        if channels < 4:
            raise ValueError(
                f"{channels} channels are too few for group normalisation, which takes 4 a group"
            )
        super().__init__(min(32, channels // 4), channels, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def low_pass(taps: Sequence[float]) -> Tensor:
    """The separable filter [1, 1, k, k] of sum 1. Raises ValueError unless symmetric with k even."""
    if len(taps) % 2 or not taps or list(taps) != list(taps)[::-1]:
        raise ValueError(f"resample_filter {list(taps)} must be symmetric, of an even number of taps")
    line = torch.tensor(list(taps), dtype=torch.float32)
    return (torch.outer(line, line) / line.sum() ** 2)[None, None]


def halve(x: Tensor, kernel: Tensor) -> Tensor:
    """Every second pixel of x [B, C, H, W] after the filter [1, 1, k, k]: [B, C, H / 2, W / 2]."""
    taps = kernel.shape[-1]
    if taps == 2:  # symmetric, so a mean
        return F.avg_pool2d(x, 2)
    return F.conv2d(x, _each(kernel, x), stride=2, padding=(taps - 1) // 2, groups=x.shape[1])


def double(x: Tensor, kernel: Tensor) -> Tensor:
    """Pixels of x [B, C, H, W] interpolated by the filter [1, 1, k, k]: [B, C, 2 H, 2 W]."""
    taps = kernel.shape[-1]
    if taps == 2:  # symmetric, so copies
        return F.interpolate(x, scale_factor=2.0)
    return F.conv_transpose2d(x, 4.0 * _each(kernel, x), stride=2, padding=(taps - 1) // 2, groups=x.shape[1])


def _each(kernel: Tensor, x: Tensor) -> Tensor:
    """The same filter for every channel of x."""
    return kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)


class Resample(nn.Module):
    """Doubles or halves height and width, channel by channel."""

    resample_filter: Tensor

    def __init__(self, direction: Direction, taps: Sequence[float]) -> None:
        super().__init__()
        self.resize = double if direction == "up" else halve
        self.register_buffer("resample_filter", low_pass(taps))

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(x, self.resample_filter)


class ResampledConv2d(nn.Conv2d):
    """A convolution of odd `size` at the doubled or halved resolution."""

    resample_filter: Tensor

    def __init__(
        self, inputs: int, outputs: int, size: int, direction: Direction, taps: Sequence[float]
    ) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)
        self.direction = direction
        self.register_buffer("resample_filter", low_pass(taps))

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "down":
            return super().forward(halve(x, self.resample_filter))
        if self.resample_filter.shape[-1] > 2:
            return super().forward(double(x, self.resample_filter))
        # Copied pixels share their products: 16 for 4 pixels instead of 36, as one transposed convolution.
        kernel = 4.0 * F.avg_pool2d(self.weight.transpose(0, 1).flip(2, 3), 2, stride=1, padding=1)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=self.kernel_size[0] // 2)


class FilteredConv2d(nn.Conv2d):
    """A 3x3 convolution, then the filter, then every second pixel; padded once, ahead of both.

    The filter comes first here, so that the convolution computes only the pixels that stay.
    """

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, taps: Sequence[float]) -> None:
        super().__init__(inputs, outputs, 3, stride=2)
        self.register_buffer("resample_filter", low_pass(taps))

    def forward(self, x: Tensor) -> Tensor:
        kernel = _each(self.resample_filter, x)
        return super().forward(F.conv2d(x, kernel, padding=(kernel.shape[-1] + 1) // 2, groups=x.shape[1]))


def _convolution(
    inputs: int, outputs: int, size: int, resample: Direction | None, taps: Sequence[float]
) -> nn.Conv2d:
    if resample is None:
        return nn.Conv2d(inputs, outputs, size, padding=size // 2)
    return ResampledConv2d(inputs, outputs, size, resample, taps)


class Block(nn.Module):
    """Residual block [B, inputs, H, W] -> [B, outputs, H, W], then self-attention where it has `heads`."""

    def __init__(
        self, style: BlockStyle, inputs: int, outputs: int, resample: Direction | None = None, heads: int = 0
    ) -> None:
        super().__init__()
        if heads and outputs % heads:
            raise ValueError(f"{outputs} channels do not split into {heads} attention heads")
        self.heads = heads
        self.dropout = style.dropout
        self.scales = style.scales
        self.sum_scale = style.sum_scale
        taps = style.resample_filter
        self.norm0 = Norm(inputs, style.epsilon)
        self.conv0 = _convolution(inputs, outputs, 3, resample, taps)
        self.affine = nn.Linear(style.embedding, 2 * outputs if style.scales else outputs)
        self.norm1 = Norm(outputs, style.epsilon)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip: nn.Module = nn.Identity()
        if resample and not style.projects:
            self.skip = Resample(resample, taps)
        elif resample or inputs != outputs:
            self.skip = _convolution(inputs, outputs, 1, resample, taps)
        if heads:
            self.norm2 = Norm(outputs, style.epsilon)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(embedding)[:, :, None, None]
        if self.scales:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), 1.0 + scale)
        else:
            h = self.norm1(h + condition)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = self._sum(h, self.skip(x))
        return self._sum(x, self._attention(x)) if self.heads else x

    def _sum(self, one: Tensor, other: Tensor) -> Tensor:
        total = one + other
        return total if self.sum_scale == 1.0 else total * self.sum_scale

    def _attention(self, x: Tensor) -> Tensor:
        batch, size = len(x), x.shape[1] // self.heads
        # Checkpoints order these channels by head, channel, kind; attention kernels want the kinds apart.
        assert self.qkv.bias is not None
        weight, bias = (
            each.reshape(self.heads, size, 3, -1).permute(2, 0, 1, 3).flatten(0, 2)
            for each in (self.qkv.weight, self.qkv.bias)
        )
        tokens = self.norm2(x).flatten(2).transpose(1, 2)
        split = F.linear(tokens, weight, bias[:, 0]).view(batch, -1, 3, self.heads, size)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        change = F.linear(mixed, self.proj.weight.flatten(1), self.proj.bias)
        return change.transpose(1, 2).view(x.shape)


class Level(NamedTuple):
    """One resolution of a U-Net, `blocks` residual blocks of `width` channels."""

    name: str
    width: int
    blocks: int
    attended: bool


def check_channels(in_channels: int, out_channels: int) -> None:
    """Raises ValueError where the output cannot hold what the input does."""
    if out_channels < in_channels:
        raise ValueError(f"out_channels {out_channels} must be at least in_channels {in_channels}")


def levels_of(
    img_resolution: int,
    model_channels: int,
    channel_mult: Sequence[int],
    num_blocks: int,
    attn_resolutions: Sequence[int],
) -> list[Level]:
    """The levels from fine to coarse. Raises ValueError for sizes of which no U-Net can be made."""
    if not channel_mult or num_blocks < 1:
        raise ValueError(f"{len(channel_mult)} levels of {num_blocks} blocks: there must be one of each")
    if img_resolution % 2 ** (len(channel_mult) - 1):
        raise ValueError(
            f"img_resolution {img_resolution} must be divisible by {2 ** (len(channel_mult) - 1)} "
            f"for the {len(channel_mult)} levels of channel_mult"
        )
    sides = [img_resolution >> number for number in range(len(channel_mult))]
    return [
        Level(f"{side}x{side}", model_channels * multiple, num_blocks, side in attn_resolutions)
        for side, multiple in zip(sides, channel_mult, strict=True)
    ]


def one_hot(labels: Tensor | None, classes: int, like: Tensor, dropout: float) -> Tensor:
    """Rows [B, classes] for labels [B], in the type and on the device of `like` [B, ...].

    Rows are zero without labels, for the label `classes`, and each with probability `dropout`.
    """
    if labels is None:
        return like.new_zeros(len(like), classes)
    rows = F.one_hot(labels, classes + 1)[:, :classes].to(like.dtype)
    if dropout:
        rows = rows * (torch.rand(len(like), 1, device=like.device) >= dropout)
    return rows
