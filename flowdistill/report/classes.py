"""The figures of an evaluation class by class, from what it kept of each sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowdistill.evaluation import metrics
from flowdistill.evaluation.results import Figure
from flowdistill.report.reading import Evaluation

NAMES: Mapping[str, str] = {"correct": "accuracy", "endpoint_error": "endpoint_error"}
"""Tensor of an evaluation -> the metric that its mean is."""


def figures(evaluation: Evaluation, name: str) -> dict[int, dict[str, Figure]]:
    """Class -> row -> mean with its interval, of the tensor `name` of each row, without lone samples."""
    samples = evaluation.samples
    labels = samples.get("label")
    if labels is None:
        return {}
    found: dict[int, dict[str, Figure]] = {}
    for row in evaluation.numbers.rows:
        values = samples.get(f"{row.id}.{name}")
        if values is None:
            continue
        known = labels[: len(values)]
        for label in sorted(set(known.tolist())):
            chosen = values[known == label]
            if len(chosen) > 1:
                found.setdefault(label, {})[row.id] = _mean(chosen, evaluation.numbers.seed)
    return dict(sorted(found.items()))


def _mean(values: Tensor, seed: int) -> Figure:
    if values.dtype == torch.bool:
        estimate = metrics.accuracy(values, torch.ones_like(values))
    else:
        estimate = metrics.mean_interval(values, seed)
    return Figure(**estimate.as_dict())
