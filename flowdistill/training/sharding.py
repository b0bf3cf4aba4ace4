"""Weights, averages and moments dealt out to processes by torch's FSDP2, on any backend.

accelerate's plugin for it falls back to copies on every process where there is no GPU, and says nothing. This
is `torch.distributed.fsdp.fully_shard` itself, which does on gloo what it does on NCCL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flowdistill.errors import UsageError


def shard(network: nn.Module, accelerator: Any, stage: str) -> None:
    """Deal out the weights of a network, block by block; UsageError where there is nobody to share with."""
    if accelerator.num_processes == 1:
        raise UsageError(
            f"{stage}.sharded: there is one process only; start several with --procs or a launcher such as "
            "torchrun, or leave `sharded` out"
        )
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP knows no other
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that are one of a row of such, and have weights."""
    for child in module.children():
        in_a_row = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        if not in_a_row or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


@contextmanager
def unsynchronised(network: nn.Module) -> Iterator[None]:
    """Within, gradients stay with the process that computed them."""
    assert isinstance(network, FSDPModule)
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor: of one that is dealt out on the host, for which all processes have to ask together."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor dealt out as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
