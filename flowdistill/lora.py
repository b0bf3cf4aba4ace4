"""Low-rank adaptation: a network is trained by what is added to its weights, which stay (arXiv 2106.09685).

W + (alpha / rank) B A takes the place of the weight of every linear map and convolution, the projections of
attention among them, flattened to [out, rest]. A begins random and B at 0, so that a training begins with
the network as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

_MATRICES = ("weight", "W")
"""What modules call them; `W` are those of score_sde's projections of attention."""


class _Added(nn.Module):
    """W [out, ...] -> W + (alpha / rank) B A."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        flat = weight.detach().flatten(1)
        self.A = nn.Parameter(flat.new_empty(rank, flat.shape[1]))
        self.B = nn.Parameter(flat.new_zeros(len(flat), rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A).view_as(weight)


def attach(network: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a network, and add what is trained in its place, random by torch's global generator."""
    network.requires_grad_(False)
    for module, name in list(_matrices(network)):
        parametrize.register_parametrization(module, name, _Added(getattr(module, name), rank, alpha))


def merged(network: nn.Module) -> nn.Module:
    """A copy in which the sums have become the weights, under the names that they had before."""
    whole = copy.deepcopy(network)
    for module in list(whole.modules()):
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            weights = {name: getattr(module, name).detach() for name in module.parametrizations}
            # Not by torch's own removal: it empties the class, which the copy shares with the original.
            module.__class__ = type(module).__bases__[0]
            del module.parametrizations
            for name, weight in weights.items():
                module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return whole


def _matrices(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name in _MATRICES and parameter.ndim > 1:
                yield module, name
