"""A small convolutional classifier: offline features and perceptual feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PENULTIMATE = 64


class Classifier(nn.Module):
    """Images [B, C, H, W] in [-1, 1] -> logits [B, classes].

    Three stages of `channels`, each two convolutions and half the size of the one before it. The buffers
    `reference_mean` [D] and `reference_covariance` [D, D] hold the moments of `features` over the data,
    once measured.
    """

    reference_mean: Tensor
    reference_covariance: Tensor

    def __init__(
        self,
        shape: Sequence[int] = (3, 16, 16),
        classes: int = 8,
        channels: Sequence[int] = (16, 32, 48),
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"shape {tuple(shape)} must be channels, height, width")
        inputs = [shape[0], *channels]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(1, width),
                nn.SiLU(),
            )
            for before, width in zip(inputs, channels, strict=False)
        )
        self.penultimate = nn.Linear(2 * channels[-1], _PENULTIMATE)
        self.logits = nn.Linear(_PENULTIMATE, classes)
        self.register_buffer("reference_mean", torch.zeros(sum(channels)))
        self.register_buffer("reference_covariance", torch.zeros(sum(channels), sum(channels)))

    def stages(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, C_k, H_k, W_k], fine to coarse: what a perceptual distance compares."""
        maps: list[Tensor] = []
        for block in self.blocks:
            maps.append(block(F.avg_pool2d(maps[-1], 2, ceil_mode=True) if maps else x))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.describe(x)[1]

    def describe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D], the mean of each map over its places at every scale, and logits [B, classes].

        The penultimate layer would not do as features: it keeps what tells classes apart and hardly sees
        that an image is blurred or noisy.
        """
        maps = self.stages(x)
        features = torch.cat([each.mean((2, 3)) for each in maps], dim=1)
        # The mean sees textures and areas, the maximum sees parts wherever they lie.
        pooled = torch.cat([maps[-1].mean((2, 3)), maps[-1].amax((2, 3))], dim=1)
        logits: Tensor = self.logits(F.silu(self.penultimate(pooled)))
        return features, logits
