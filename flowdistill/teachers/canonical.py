"""A foreign network as a velocity field, with gradients, for training as well as for sampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowdistill.conventions import Convention


class Canonical(nn.Module):
    """`network` (x, label of the time, class labels) -> output, as (z, t, labels) -> v.

    The network computes in the type of its weights; z [B, *shape] and v keep theirs, float32 or better, so
    that an ODE's state is not rounded at every step.
    """

    def __init__(self, network: nn.Module, convention: Convention) -> None:
        super().__init__()
        self.network = network
        self.convention = convention

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        dtype = next((each.dtype for each in self.network.parameters()), z.dtype)
        clock = torch.promote_types(dtype, torch.float32)

        def call(x: Tensor, label: Tensor) -> Tensor:
            output: Tensor = self.network(x.to(dtype), label.to(clock), labels)
            return output

        return self.convention.canonical(call, z, t)
