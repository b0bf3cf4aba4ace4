"""What each metric is: its title, its unit, and which way is better. Comparisons, gates and reports ask here.

A figure of an `eval.json` is named `kind@n`, with n samples behind it: `fid@5000`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of figure."""

    title: str
    better: int
    """-1 where less is better, 1 where more is."""
    unit: str = ""


KINDS: dict[str, Kind] = {
    "endpoint_error": Kind("endpoint error", -1),
    "endpoint_error_median": Kind("endpoint error, median", -1),
    "endpoint_error_p95": Kind("endpoint error, 95th percentile", -1),
    "lpips": Kind("LPIPS to the accurate solution", -1),
    "psnr": Kind("PSNR to the accurate solution", 1, "dB"),
    "inversion": Kind("inversion round trip", -1),
    "fd": Kind("Fréchet distance", -1),
    "fid": Kind("FID", -1),
    "kid": Kind("KID", -1),
    "precision": Kind("precision", 1),
    "recall": Kind("recall", 1),
    "accuracy": Kind("class accuracy", 1),
    "straightness": Kind("straightness", -1),
    "straightness_per_dim": Kind("straightness by dimension", -1),
    "straightness_norm": Kind("straightness, not squared", -1),
    "curvature": Kind("curvature", -1),
    "latency": Kind("latency", -1, "ms"),
    "throughput": Kind("throughput", 1, "samples/s"),
    "memory": Kind("peak memory", -1, "MB"),
}


def kind(metric: str) -> str:
    """`fid` of `fid@5000`."""
    return metric.partition("@")[0]
