"""A multilayer perceptron as velocity field of vector data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowdistill.networks.unet import time_features

_TIME_FEATURES = 32


class MLP(nn.Module):
    """Velocity field for vectors: (x [B, *shape], t [B], labels [B] | None) -> v [B, *shape].

    `depth` hidden layers of `width`. With `classes` > 0, labels None means no class: a learned vector of
    its own, number `classes`; without classes the labels are ignored. Besides the perceptron there is
    a factor of each coordinate of x for each t: the velocity between Gaussians is linear in x.
    """

    def __init__(
        self, shape: Sequence[int] = (2,), classes: int = 0, width: int = 128, depth: int = 3
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth {depth} must be at least 1")
        size = math.prod(shape)
        self.classes = classes
        self.condition = nn.Linear(_TIME_FEATURES, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.first = nn.Linear(size, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.out = nn.Linear(width, size)
        self.affine = nn.Linear(_TIME_FEATURES, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = x.flatten(1)
        features = time_features(t.float()).to(x.dtype)
        condition = self.condition(features)
        if self.label is not None:
            if labels is None:
                labels = torch.full(t.shape, self.classes, dtype=torch.int64, device=t.device)
            condition = condition + self.label(labels)
        h = nn.functional.silu(self.first(flat) + condition)
        for layer in self.hidden:
            h = nn.functional.silu(layer(h) + condition)
        velocity: Tensor = self.out(h) + self.affine(features) * flat
        return velocity.reshape(x.shape)
