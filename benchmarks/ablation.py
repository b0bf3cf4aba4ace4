"""rf++'s ablation over seeds: what each ingredient brings, from the evaluations of several runs.

    for seed in 0 1 2 3 4; do flowdistill run rfpp/shapes --seed $seed --out runs/ablation/$seed; done
    python benchmarks/ablation.py runs/ablation/*

Prints a Markdown table of one-step figures: means over the runs with 95 % intervals (Student's t), and the
change from the configuration above it, seed by seed, whose interval tells whether the ingredient did
anything. All runs have their own pairs, initial weights, batches and times; the noises that are evaluated are
the same.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import t as student_t

CONFIGURATIONS = {
    "a": "fresh weights, uniform t, squared l2, batch 32",
    "b": "+ the teacher's weights, batch 64",
    "c": "+ U-shaped t",
    "d": "+ pseudo-Huber",
    "e": "+ perceptual (LPIPS-Huber)",
    "f": "+ perceptual / t",
}
FIGURES = {"fd": "Fréchet distance x 1000", "endpoint_error": "endpoint error x 1000"}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def figure(evaluation: dict, model: str, nfe: int, name: str) -> float:
    """One figure of one row, times 1000."""
    [row] = [row for row in evaluation["rows"] if row["model"] == model and row["nfe"] == nfe]
    [found] = [value for key, value in row["metrics"].items() if key.partition("@")[0] == name]
    return 1000 * found["value"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs of rfpp/shapes")
    parser.add_argument("--nfe", type=int, default=1)
    asked = parser.parse_args()
    if len(asked.runs) < 2:
        parser.error("an interval takes two runs or more")
    evaluations = [json.loads((run / "eval" / "eval.json").read_text()) for run in asked.runs]
    names = [f"{title} | change" for title in FIGURES.values()]
    print(f"{len(evaluations)} seeds, {asked.nfe} NFE; mean ± half of the 95 % interval\n")
    print(f"| | configuration | {' | '.join(names)} |\n|---|---|{'---|---|' * len(names)}")
    before: dict[str, list[float]] = {}
    for model, title in {"teacher": "the teacher itself", **CONFIGURATIONS}.items():
        cells = []
        for name in FIGURES:
            values = [figure(each, model, asked.nfe, name) for each in evaluations]
            cells.append("{:.1f} ± {:.1f}".format(*interval(values)))
            change = [now - then for now, then in zip(values, before.get(name, ()), strict=False)]
            cells.append("{:+.1f} ± {:.1f}".format(*interval(change)) if change else "")
            if model != "teacher":
                before[name] = values
        print(f"| {model if model != 'teacher' else ''} | {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
