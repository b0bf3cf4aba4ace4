"""What straightening is worth: BOSS's times against uniform ones, each trained for as long, and its options.

    python benchmarks/straighten.py --out runs/straighten-benchmark

Every student is the embedded teacher trained for --steps steps on the chords of its own paths and sampled by
Euler steps at the times that it was trained for. Prints Markdown tables: endpoint error and Fréchet distance
x 1000, with 95 % intervals, against the teacher's accurate solution on noises that no training has seen.
A run that was interrupted continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flowdistill import recipe, stages
from flowdistill.pipeline import Pipeline
from flowdistill.work import Stop

BUDGETS = (2, 4, 6, 8)
OPTIONS: dict[str, dict[str, Any]] = {
    "one network for 2, 4, 6, 8": {"schedule": "boss", "nfe": list(BUDGETS)},
    "half the steps at its own states": {"schedule": "boss", "own_states": 0.5},
    "all steps at its own states": {"schedule": "boss", "own_states": 1.0},
    "perceptual-l2 on the last chord": {"schedule": "boss", "last": {"name": "perceptual-l2"}},
    "LoRA of rank 4": {"schedule": "boss", "lora": {"rank": 4, "alpha": 4.0}, "optimizer": {"lr": 1e-3}},
    "LoRA of rank 16": {"schedule": "boss", "lora": {"rank": 16, "alpha": 16.0}, "optimizer": {"lr": 1e-3}},
}
"""Of BOSS's straightening for 4 evaluations."""


def content(steps: int, pairs: int) -> tuple[dict[str, Any], dict[str, tuple[str, int]]]:
    """The recipe, and which stage is which row at how many evaluations."""
    training = {"steps": steps, "batch_size": 64, "ema": {"decay": 0.998}}
    optimizer = {"lr": 2e-4, "warmup": 50, "decay": "cosine"}
    found: list[dict[str, Any]] = [
        {"boss": {"nfe": list(BUDGETS), "choose": "boss"}},
        {"pairs": {"count": pairs, "steps": 20, "path": {"schedule": "boss", "uniform": list(BUDGETS)}}},
    ]
    rows = {}

    def add(name: str, title: str, nfe: int, settings: dict[str, Any]) -> None:
        own = {**training, "nfe": [nfe], **settings, "name": name}
        own["optimizer"] = {**optimizer, **settings.get("optimizer", {})}
        found.append({"straighten": own})
        rows[name] = title, nfe

    for nfe in BUDGETS:
        add(f"uniform-{nfe}", "straightened, uniform", nfe, {})
        add(f"boss-{nfe}", "straightened, BOSS", nfe, {"schedule": "boss"})
    for number, (title, settings) in enumerate(OPTIONS.items()):
        add(f"option-{number}", title, 4, settings)
    measured = {"schedule": "boss", "samples": 2000, "latency": False, "straightness": 0}
    asked = {"teacher": list(BUDGETS), **{name: [nfe] for name, (_, nfe) in rows.items()}}
    asked["option-0"] = list(BUDGETS)
    found.append({"eval": {"models": list(asked), "nfe": asked, **measured}})
    return {"teacher": "builtin:shapes", "stages": found}, rows


def cell(metrics: dict[str, Any], kind: str) -> str:
    """`56.1 [54.0, 58.2]`, x 1000."""
    figure = next(value for name, value in metrics.items() if name.partition("@")[0] == kind)
    value, low, high = (1000 * figure[key] for key in ("value", "low", "high"))
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=5000)
    asked = parser.parse_args()
    described, stage_rows = content(asked.steps, asked.pairs)
    data = json.dumps(described).encode()
    pipeline = Pipeline(recipe.parse(data, Path("<benchmark>"), stages.verbs(), [], asked.out))
    pipeline.run(None, only=False, fresh=False, device="cpu", observe=lambda event: None, stop=Stop())
    evaluation = json.loads((asked.out / "eval" / "eval.json").read_text())
    print("| | NFE | endpoint error | Fréchet distance |")
    print("|---|---|---|---|")
    for row in sorted(evaluation["rows"], key=lambda row: row["nfe"]):
        title = stage_rows.get(row["model"], ("teacher", 0))[0]
        steps = "BOSS" if row["schedule"] == "boss" else row["schedule"]
        cells = [cell(row["metrics"], kind) for kind in ("endpoint_error", "fd")]
        print(f"| {title}, {steps} steps | {row['nfe']} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
