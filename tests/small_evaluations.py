"""Evaluations as `flowdistill eval` writes them, with values of each sample that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill import artifact


def write(
    folder: Path,
    rows: Mapping[str, Mapping[str, Tensor]],
    figures: Mapping[str, Mapping[str, float]] | None = None,
    models: Mapping[str, Mapping[str, float]] | None = None,
    index: Tensor | None = None,
    **changed: Any,
) -> Path:
    """An evaluation's folder with `rows`: id -> kind (or kind.influence) -> values [n].

    An id is `MODEL-NFE`. `figures` of rows and of `models` have a value and a standard error of 2 %; that of
    a kind with an influence has no value of its own and is taken from there. `changed` replaces keys of
    `eval.json`.
    """
    figures, tensors = figures or {}, {}
    n = max(len(values) for row in rows.values() for values in row.values())
    content_rows = []
    for name, kinds in rows.items():
        measured = {}
        for kind, values in kinds.items():
            tensors[f"{name}.{kind}"] = values
            if not kind.endswith(".influence"):
                measured |= figure("accuracy" if kind == "correct" else kind, values)
        measured |= {f"{kind}@{n}": rough(value, n) for kind, value in figures.get(name, {}).items()}
        model, nfe = name.rsplit("-", 1)
        content_rows.append(
            {"id": name, "model": model, "solver": "euler", "schedule": "uniform", "nfe": int(nfe)}
            | {"times": [1.0, 0.0], "metrics": measured, "skipped": {}}
        )
    names = dict.fromkeys(["teacher", *(row["model"] for row in content_rows)])
    described: dict[str, Any] = {
        name: {
            "digest": f"{name}-digest",
            "metrics": {
                f"{kind}@{n}": rough(value, n) for kind, value in (models or {}).get(name, {}).items()
            },
        }
        for name in names
    }
    content: dict[str, Any] = {
        "kind": "evaluation",
        "seed": 0,
        "samples": n,
        "extractor": "coordinates",
        "reference": {"model": "teacher", "solver": "heun", "nfe": 63, "samples": n},
        "data": {"name": "analytic:ring", "metrics": {}, "skipped": {}},
        "models": described,
        "rows": content_rows,
        "latency": {},
        **changed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    artifact.save_json(folder / "eval.json", content)
    order = torch.arange(n) if index is None else index
    header = {"kind": "evaluation", "seed": content["seed"]}
    artifact.save_tensors(folder / "samples.safetensors", {"index": order, **tensors}, header)
    return folder


def figure(kind: str, values: Tensor) -> dict[str, Any]:
    """The mean of values [n] with its normal interval, as in `eval.json`."""
    n, mean = len(values), float(values.double().mean())
    reach = 1.96 * float(values.double().std()) / n**0.5
    found: dict[str, Any] = {"value": mean, "low": mean - reach, "high": mean + reach, "n": n}
    return {f"{kind}@{n}": {**found, "method": "normal"}}


def rough(value: float, n: int) -> dict[str, Any]:
    """A figure with a standard error of 2 %."""
    reach = 1.959963984540054 * 0.02 * abs(value)
    return {"value": value, "low": value - reach, "high": value + reach, "n": n, "method": "rough"}


def errors(n: int, seed: int = 0) -> Tensor:
    """Values [n] like endpoint errors: positive and skewed."""
    return 0.06 * (0.4 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).exp().double()
