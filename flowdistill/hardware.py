"""The device that a run uses, and what its manifests say of it."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from typing import Any

from flowdistill.errors import MissingInput, UsageError, unknown

_PACKAGES = ("flowdistill", "torch", "accelerate", "safetensors", "numpy")


def resolve(name: str) -> str:
    """The device meant by `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    `auto` is a GPU, else the CPU. Of several processes that a launcher started on a machine, each has a GPU
    of its own, as long as there are so many. Raises `UsageError` for other names and `MissingInput` where
    the machine has no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UsageError(f"--device: {unknown('device', name, ('auto', 'cpu', 'cuda', 'cuda:N', 'mps'))}")
    present = {
        "cpu": True,
        "cuda": int(index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present[kind]:
        raise MissingInput(f"--device {name}: this machine has none; `flowdistill doctor` lists what it has")
    if kind == "cuda" and not index and "LOCAL_RANK" in os.environ:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return name


def peak_memory_bytes() -> int:
    """The most that was in use so far: of the GPU where it is used, else of the process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(device: str) -> dict[str, Any]:
    """Versions and device, for manifests."""
    import torch

    name = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else platform.processor() or platform.machine()
    )
    return {
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        "device": f"{device} ({name}, {torch.get_num_threads()} threads)",
    }
