"""What a sample costs: time, memory, multiply-adds.

Times are of the host's clock and differ from run to run, so they stand apart from all other figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flowdistill import hardware, sizing
from flowdistill.errors import FlowdistillError

if TYPE_CHECKING:
    from flowdistill.teachers import Card

_TIMED_MS, _TIMED_LEAST, _TIMED_MOST = 1000.0, 5, 50
"""A latency comes from runs of about so long in all, but from at least and at most so many."""


def latency(once: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a call that waits for the device; the first is not counted, it warms up."""
    runs: list[float] = []
    while len(runs) <= _TIMED_LEAST or (len(runs) <= _TIMED_MOST and sum(runs) < _TIMED_MS):
        started = time.perf_counter()
        once()
        runs.append(1000 * (time.perf_counter() - started))
    middle, late = torch.tensor(runs[1:]).quantile(torch.tensor([0.5, 0.95])).tolist()
    return {"p50_ms": middle, "p95_ms": late, "runs": len(runs) - 1}


def throughput(batches: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Samples per second of one process, from the sizes and seconds of its batches, of which smaller ones
    than the largest do not count; the first warms up where there are more.
    """
    size = max(count for count, _ in batches)
    whole = [seconds for count, seconds in batches if count == size]
    middle = float(torch.tensor(whole[1:] or whole).median())
    return {"samples_per_second": size / middle, "batch_size": size, "batches": len(whole)}


def forget_peak(device: str) -> None:
    """Begin to look for the most memory anew, where the device can."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> dict[str, Any]:
    """The most memory in use: of the GPU since `forget_peak`, else of the process since its start."""
    if device.startswith("cuda"):
        return {"peak_mb": torch.cuda.max_memory_allocated(device) / 1e6, "of": "GPU"}
    return {"peak_mb": hardware.peak_memory_bytes() / 1e6, "of": "process, since its start"}


def macs(card: Card) -> int | None:
    """Multiply-adds of a pass through a model's network for one sample; None where they cannot be counted."""
    try:
        return sizing.size_of(card.architecture, card.arguments, card.shape).macs
    except (FlowdistillError, RuntimeError, NotImplementedError):  # no network of ours, or none without data
        return None
