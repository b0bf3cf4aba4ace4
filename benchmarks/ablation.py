"""Ablations over seeds: what each ingredient of a method brings, from the evaluations of several runs.

    for seed in 0 1 2; do flowdistill run rfpp/shapes --seed $seed --out runs/ablation/$seed; done
    python benchmarks/ablation.py runs/ablation/*

and the same with slimflow/shapes. Prints Markdown tables of one-step figures: means over the runs with 95 %
intervals (Student's t), and the change from the student that lacks the ingredient, seed by seed, whose
interval tells whether it did anything. All runs have their own pairs, initial weights, batches and times; the
noises that are evaluated are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

# Student -> what it is, and which other it is compared with.
Rows = Mapping[str, tuple[str, str | None]]
TABLES: Mapping[str, Rows] = {
    "rf++'s configurations (Table 1)": {
        "teacher": ("the teacher itself", None),
        "a": ("fresh weights, uniform t, squared l2, batch 32", None),
        "b": ("+ the teacher's weights, batch 64", "a"),
        "c": ("+ U-shaped t", "b"),
        "d": ("+ pseudo-Huber", "c"),
        "e": ("+ perceptual (LPIPS-Huber)", "d"),
        "f": ("+ perceptual / t", "e"),
    },
    "SlimFlow's annealing reflow (Table 3)": {
        "teacher": ("the teacher itself", None),
        "neither": ("a quarter of its parameters, fresh weights", None),
        "flip": ("+ mirrored pairs", "neither"),
        "anneal": ("+ annealing", "neither"),
        "both": ("+ both", "neither"),
    },
    "SlimFlow's distillation (Table 5)": {
        "anneal": ("the small flow", None),
        "l2": ("distilled, l2", "anneal"),
        "l2-two-step": ("distilled, l2, + two-step", "l2"),
        "perceptual": ("distilled, perceptual", "l2"),
        "perceptual-two-step": ("distilled, perceptual, + two-step", "perceptual"),
    },
}
FIGURES = {"fd": "Fréchet distance x 1000", "endpoint_error": "endpoint error x 1000"}


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of its 95 % interval."""
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def change(values: Sequence[float], base: Sequence[float]) -> str:
    """The same of the differences, seed by seed, with a sign."""
    found = interval([now - then for now, then in zip(values, base, strict=True)])
    return found if found.startswith("-") else f"+{found}"


def figure(evaluation: Mapping[str, Any], model: str, nfe: int, name: str) -> float:
    """One figure of one row, times 1000."""
    [row] = [row for row in evaluation["rows"] if row["model"] == model and row["nfe"] == nfe]
    [found] = [value for key, value in row["metrics"].items() if key.partition("@")[0] == name]
    return 1000 * float(found["value"])


def table(evaluations: Sequence[Mapping[str, Any]], rows: Rows, nfe: int) -> None:
    """Print one, in Markdown."""
    print(f"| | student | {' | '.join(f'{title} | change' for title in FIGURES.values())} |")
    print(f"|---|---|{'---|---|' * len(FIGURES)}")
    values = {
        (model, name): [figure(each, model, nfe, name) for each in evaluations]
        for model in rows
        for name in FIGURES
    }
    for model, (title, base) in rows.items():
        cells = []
        for name in FIGURES:
            cells.append(interval(values[model, name]))
            cells.append(change(values[model, name], values[base, name]) if base else "")
        print(f"| {model} | {title} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs of one recipe")
    parser.add_argument("--nfe", type=int, default=1)
    asked = parser.parse_args()
    if len(asked.runs) < 2:
        parser.error("an interval takes two runs or more")
    evaluations = [json.loads((run / "eval" / "eval.json").read_text()) for run in asked.runs]
    there = {row["model"] for row in evaluations[0]["rows"]}
    for title, rows in TABLES.items():
        if there.issuperset(rows):
            print(f"\n{title}: {len(evaluations)} seeds, {asked.nfe} NFE, ± half of the 95 % interval\n")
            table(evaluations, rows, asked.nfe)


if __name__ == "__main__":
    main()
