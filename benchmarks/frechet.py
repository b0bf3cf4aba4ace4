"""The Fréchet distance of features: ours beside scipy's matrix square root and torch-fidelity's eigenvalues.

    python benchmarks/frechet.py
    python benchmarks/frechet.py --dimensions 768 --rounds 5

Prints a Markdown table. All take the same two covariances, on the same number of threads, and take turns;
times are medians. The root of the reference, which ours computes once for all that is compared with it, has a
row of its own. The last column is how far the value is from ours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

from flowdistill.evaluation import metrics
from flowdistill.randomness import noise

Moments = tuple[torch.Tensor, torch.Tensor]


def features(seed: int, count: int, dimensions: int, shift: float) -> torch.Tensor:
    """Correlated and not negative, with variances over some decades, as Inception's are."""
    mixing = noise(0, range(dimensions), (dimensions,)) / dimensions**0.5
    scale = torch.logspace(0, -2, dimensions)
    return ((noise(seed, range(count), (dimensions,)) * scale + shift * scale) @ mixing).relu()


def of_trace(one: Moments, two: Moments, trace: float) -> float:
    """The distance, given tr (S1 S2)^(1/2)."""
    shift = float(((one[0] - two[0]) ** 2).sum())
    return shift + float(one[1].trace() + two[1].trace()) - 2 * trace


def by_square_root(one: Moments, two: Moments) -> float:
    """scipy.linalg.sqrtm of the product, as in most implementations."""
    root = scipy.linalg.sqrtm(one[1].numpy() @ two[1].numpy())
    return of_trace(one, two, float(np.trace(root).real))


def by_eigenvalues(one: Moments, two: Moments) -> float:
    """Eigenvalues of the product, as in torch-fidelity."""
    values = np.linalg.eigvals(one[1].numpy() @ two[1].numpy()).astype("complex128")
    return of_trace(one, two, float(np.sqrt(values).sum().real))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    count, made = 2 * asked.dimensions, features(2, 2 * asked.dimensions, asked.dimensions, 0.1)
    one = metrics.moments(features(1, count, asked.dimensions, 0.0))
    two = metrics.moments(made)
    reference = metrics.Reference(*one)
    ways: dict[str, Callable[[], object]] = {
        "root of the reference, once": lambda: metrics.Reference(*one).root.sum(),
        "ours, value": lambda: reference.distance(*two),
        "ours, with interval and influence, from features": lambda: reference.measure(made)[0].value,
        "eigenvalues of the product (torch-fidelity)": lambda: by_eigenvalues(one, two),
        "scipy.linalg.sqrtm": lambda: by_square_root(one, two),
    }
    assert reference.root.isfinite().all()
    times: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, float] = {}
    for _ in range(asked.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            values[name] = float(way())  # type: ignore[arg-type]
            times[name].append(time.perf_counter() - started)
    ours = statistics.median(times["ours, value"])
    print(f"d = {asked.dimensions}, {count} features, {asked.threads} threads, scipy {scipy.__version__}\n")
    print("| way | seconds | times ours | value | from ours |\n|---|---|---|---|---|")
    for name, taken in times.items():
        middle, value = statistics.median(taken), values[name]
        apart = abs(value - values["ours, value"]) / value
        told = "| | |" if name.startswith("root") else f"| {value:.8g} | {apart:.1e} |"
        print(f"| {name} | {middle:.2f} | {middle / ours:.1f} {told}")


if __name__ == "__main__":
    main()
