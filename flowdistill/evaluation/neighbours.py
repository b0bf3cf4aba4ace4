"""Precision and recall of features: are samples like real ones, and are real ones covered by samples.

Kynkäänniemi et al., "Improved Precision and Recall Metric" (arXiv 1904.06991), as torch-fidelity has it: a
set covers a point that is no farther from one of its members than the third nearest other member is.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOUR = 3
"""Which neighbour's distance is a member's radius."""
_DISTANCES_AT_ONCE = 2**23


def radii(members: Tensor) -> Tensor:
    """How far each of the features [m, D], m > 3, covers, [m]."""
    members = members.double()
    # A member's nearest is itself.
    nearest = [
        torch.cdist(part, members).topk(NEIGHBOUR + 1, largest=False).values[:, -1]
        for part in torch.split(members, max(1, _DISTANCES_AT_ONCE // len(members)))
    ]
    return torch.cat(nearest)


def covered(points: Tensor, members: Tensor, radii: Tensor) -> Tensor:
    """Whether features [n, D] are within the set of features [m, D], which cover so far, [m]: [n] bool.

    The mean over samples, with real members, is the precision; over real ones, with samples as members, the
    recall.
    """
    points, members = points.double(), members.double()
    rows = max(1, _DISTANCES_AT_ONCE // len(members))
    return torch.cat([(torch.cdist(part, members) <= radii).any(1) for part in torch.split(points, rows)])
