"""Numbers that are the same on every machine: fixtures made with them need not store inputs and weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

_MASK = 2**32 - 1


def numbers(name: str, *shape: int) -> Tensor:
    """Uniform multiples of 1/1024 in [-1, 1), from the name alone (murmur3's finaliser of a counter)."""
    h = torch.arange(math.prod(shape)) * 0x9E3779B1 + zlib.crc32(name.encode()) & _MASK
    h = (h ^ h >> 16) * 0x85EBCA6B & _MASK
    h = (h ^ h >> 13) * 0xC2B2AE35 & _MASK
    return (((h ^ h >> 16) >> 21) - 1024).reshape(shape) / 1024.0


@torch.no_grad()
def fill(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Random weights that keep activations of order one; no layer is left at zero."""
    for name, weights in parameters:
        drawn = numbers(name, *weights.shape)
        if weights.ndim > 1:
            drawn *= 2.0 ** round(math.log2(3.0 / weights[0].numel()) / 2.0)
        elif name.endswith("W"):
            drawn *= 16.0
        else:
            drawn = 1.0 + drawn / 4.0 if name.endswith("weight") else drawn / 4.0
        weights.copy_(drawn)
