"""A small convolutional classifier: offline features and perceptual feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 64
"""Width of the penultimate layer, whatever the images."""


class Classifier(nn.Module):
    """Images [B, C, H, W] in [-1, 1] -> logits [B, classes].

    Three stages of `channels`, each two convolutions and half the size of the one before it. The buffers
    `reference_mean` [64] and `reference_covariance` [64, 64] hold the moments of `features` over the
    training data, once measured.
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
        self.penultimate = nn.Linear(2 * channels[-1], FEATURES)
        self.logits = nn.Linear(FEATURES, classes)
        self.register_buffer("reference_mean", torch.zeros(FEATURES))
        self.register_buffer("reference_covariance", torch.zeros(FEATURES, FEATURES))

    def stages(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, C_k, H_k, W_k], fine to coarse: what a perceptual distance compares."""
        maps: list[Tensor] = []
        for block in self.blocks:
            maps.append(block(F.avg_pool2d(maps[-1], 2, ceil_mode=True) if maps else x))
        return maps

    def features(self, x: Tensor) -> Tensor:
        """Penultimate activations [B, 64]."""
        last = self.stages(x)[-1]
        # The mean sees textures and areas, the maximum sees parts wherever they lie.
        pooled = torch.cat([last.mean((2, 3)), last.amax((2, 3))], dim=1)
        return F.silu(self.penultimate(pooled))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.features(x))
        return logits
