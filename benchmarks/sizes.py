"""What models cost: parameters, multiply-adds, latency and throughput, beside each other.

    python benchmarks/sizes.py builtin:shapes runs/ablation/0/e runs/slim/0/perceptual-two-step

Prints a Markdown table. Latency is the median time of one evaluation for one sample, throughput that of 64 at
once, both on this device and, on a CPU, one thread; models take turns, and ratios are to the first.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from flowdistill import hardware, sizing, teachers

BATCH, ROUNDS = 64, 15


def seconds(model: teachers.Model, batch: int) -> float:
    """One evaluation for so many samples."""
    x = torch.zeros(batch, *model.card.shape, device=model.device)
    t = torch.full((batch,), 0.5, device=model.device)
    labels = model.labels(0, range(batch))
    started = time.perf_counter()
    model.field(x, t, labels).cpu()  # the copy waits for the device
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="as flowdistill takes them")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    models = [teachers.open_model(name, hardware.resolve(asked.device)) for name in asked.models]
    times: dict[tuple[int, int], list[float]] = {}
    for turn in range(ROUNDS + 1):
        for number, model in enumerate(models):
            for batch in (1, BATCH):
                taken = seconds(model, batch)
                if turn:  # the first warms up
                    times.setdefault((number, batch), []).append(taken)
    print("| model | parameters | multiply-adds | ms for 1 | of the first | samples/s | of the first |")
    print("|---|---|---|---|---|---|---|")
    middle = {key: statistics.median(values) for key, values in times.items()}
    for number, (name, model) in enumerate(zip(asked.models, models, strict=True)):
        size = sizing.size_of(model.card.architecture, model.card.arguments, model.card.shape)
        one, many = middle[number, 1], middle[number, BATCH]
        figures = [
            f"{size.parameters:,}",
            f"{size.macs:,}",
            f"{1000 * one:.2f}",
            f"{one / middle[0, 1]:.2f}",
            f"{BATCH / many:.0f}",
            f"{middle[0, BATCH] / many:.2f}",
        ]
        print(f"| {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
