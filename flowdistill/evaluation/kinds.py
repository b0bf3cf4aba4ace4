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


def distances(key: str) -> tuple[str, str, str, str]:
    """Kinds of the Fréchet distance, kernel distance, precision and recall by an extractor's key in a recipe.

    What ships for the data has the plain names, and FID and KID are those of Inception.
    """
    if key == "shipped":
        return "fd", "kd", "precision", "recall"
    if key == "inception":
        return "fid", "kid", "precision_inception", "recall_inception"
    return f"fd_{key}", f"kd_{key}", f"precision_{key}", f"recall_{key}"


def _distances_of(key: str, features: str) -> dict[str, Kind]:
    titles = ("Fréchet distance", "kernel distance", "precision", "recall")
    kinds = zip(distances(key), titles, (-1, -1, 1, 1), strict=True)
    return {name: Kind(f"{title}, {features}", better) for name, title, better in kinds}


KINDS: dict[str, Kind] = {
    "endpoint_error": Kind("endpoint error", -1),
    "endpoint_error_median": Kind("endpoint error, median", -1),
    "endpoint_error_p95": Kind("endpoint error, 95th percentile", -1),
    "perceptual": Kind("perceptual distance to the accurate solution", -1),
    "lpips": Kind("LPIPS to the accurate solution", -1),
    "psnr": Kind("PSNR to the accurate solution", 1, "dB"),
    "inversion": Kind("inversion round trip", -1),
    "fd": Kind("Fréchet distance", -1),
    "kd": Kind("kernel distance", -1),
    "precision": Kind("precision", 1),
    "recall": Kind("recall", 1),
    **_distances_of("inception", "Inception"),
    "fid": Kind("FID", -1),
    "kid": Kind("KID", -1),
    **_distances_of("dinov2", "DINOv2"),
    **_distances_of("clip", "CLIP"),
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
