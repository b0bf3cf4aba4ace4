"""A light U-Net for small images, made for many images a CPU second.

Skips are projected and added instead of concatenated (as in LinkNet, Chaurasia and Culurciello 2017): the
residual blocks at full resolution, where small channels make convolutions slow, then keep their width. In
equal CPU time this reached a lower loss than concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FREQUENCIES = 8
_CLOCK_MARGIN = 1e-3
"""The log-odds clock saturates this far from t = 0 and t = 1."""


def time_features(t: Tensor) -> Tensor:
    """Sines and cosines [B, 32] of t [B] in [0, 1] and of its log-odds, smooth and finite at both ends.

    The log-odds (the log of sigma = t / (1 - t)) resolve the ends, where t itself hardly moves.
    """
    odds = (t + _CLOCK_MARGIN) / (1.0 - t + _CLOCK_MARGIN)
    clock = odds.log() / math.log1p(1.0 / _CLOCK_MARGIN)
    frequencies = math.pi * torch.arange(1, _FREQUENCIES + 1, device=t.device, dtype=t.dtype)
    angles = torch.cat([t[:, None] * frequencies, clock[:, None] * (0.5 * frequencies)], dim=1)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with zero weights, so that a block starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Residual block: the embedding scales and shifts the second normalisation."""

    def __init__(self, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = _norm(channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.norm_out = _norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = _zero(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm_out(h), 1.0 + scale))
        change: Tensor = self.conv_out(self.dropout(h))
        return x + change


class Attention(nn.Module):
    """Residual self-attention over all pixels, heads of about 32 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 32))
        self.norm = _norm(channels)
        self.queries_keys_values = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        split = self.queries_keys_values(self.norm(x)).reshape(
            batch, 3, self.heads, channels // self.heads, height * width
        )
        query, key, value = split.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        change: Tensor = self.out(mixed.transpose(-1, -2).reshape(batch, channels, height, width))
        return x + change


class Level(nn.Module):
    """Blocks at one resolution, each followed by attention where `attention` is set."""

    def __init__(self, channels: int, blocks: int, embedding: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, embedding, dropout) for _ in range(blocks))
        self.attentions = nn.ModuleList(Attention(channels) for _ in range(blocks * attention))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, embedding)
            if self.attentions:
                x = self.attentions[number](x)
        return x


class UNet(nn.Module):
    """Velocity field for images: (x [B, C, H, W], t [B], labels [B] | None) -> v [B, C, H, W].

    `multipliers` gives the channels of each level, each half as wide and high as the one before it;
    `blocks` residual blocks a level on the way down and one more on the way up; `attention` names the
    levels with self-attention, -1 being the lowest. Labels None means no class: a learned embedding of
    its own, number `classes`. Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        shape: Sequence[int] = (3, 16, 16),
        classes: int = 8,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 1,
        attention: Sequence[int] = (-1,),
        embedding: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(shape, multipliers, attention)
        self.classes = classes
        widths = [channels * multiplier for multiplier in multipliers]
        attended = {range(len(widths))[level] for level in attention}
        self.time = nn.Sequential(
            nn.Linear(4 * _FREQUENCIES, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label = nn.Embedding(classes + 1, embedding)
        self.stem = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        pairs = list(zip(widths, widths[1:], strict=False))
        self.shrink = nn.ModuleList(nn.Conv2d(w, n, 3, stride=2, padding=1) for w, n in pairs)
        self.widen = nn.ModuleList(nn.Conv2d(n, w, 1) for w, n in pairs)
        self.down = nn.ModuleList(
            Level(w, blocks, embedding, dropout, level in attended) for level, w in enumerate(widths)
        )
        self.up = nn.ModuleList(
            Level(w, blocks + 1, embedding, dropout, level in attended) for level, w in enumerate(widths[:-1])
        )
        self.norm = _norm(widths[0])
        self.out = _zero(nn.Conv2d(widths[0], shape[0], 3, padding=1))
        # Convolutions with few channels run 5 to 15 % faster on CPU with channels last.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            labels = torch.full(t.shape, self.classes, dtype=torch.int64, device=t.device)
        features = time_features(t.float()).to(x.dtype)
        embedding = F.silu(self.time(features) + self.label(labels))
        h = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for level, shrink in zip(self.down, self.shrink, strict=False):
            h = level(h, embedding)
            skips.append(h)
            h = shrink(h)
        h = self.down[-1](h, embedding)
        for level, widen in zip(reversed(self.up), reversed(self.widen), strict=True):
            h = level(F.interpolate(widen(h), scale_factor=2.0) + skips.pop(), embedding)
        result: Tensor = self.out(F.silu(self.norm(h)))
        return result.contiguous()


def _check(shape: Sequence[int], multipliers: Sequence[int], attention: Sequence[int]) -> None:
    levels = len(multipliers)
    if levels == 0:
        raise ValueError("multipliers must name at least one level")
    if len(shape) != 3 or any(size % 2 ** (levels - 1) for size in shape[1:]):
        raise ValueError(
            f"shape {tuple(shape)} must be channels, height, width with sides divisible by "
            f"{2 ** (levels - 1)} for {levels} levels"
        )
    if not all(-levels <= level < levels for level in attention):
        raise ValueError(f"attention {tuple(attention)} must name levels from {-levels} to {levels - 1}")
