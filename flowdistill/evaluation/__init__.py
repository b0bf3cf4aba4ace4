"""How good a model is: metrics with intervals, feature extractors, and the table that is shown.

Importing this package does not import torch; its modules do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = ("fd", "fid", "accuracy", "endpoint_error")
"""Metrics that have a column, without the number of samples; the file has more."""


def table(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """An `eval.json` as rows of text, heading -> cell; the headings are those of the first row.

    Real samples come first: their figures are the best that can be reached. Each figure stands with
    its 95 % interval; cells without one are empty.
    """
    models, latency = evaluation["models"], evaluation["latency"]
    rows = [({"model": "real data", "NFE": "", "steps": ""}, evaluation["data"]["metrics"], "")]
    for row in evaluation["rows"]:
        steps = row["schedule"] if row["solver"] == "euler" else f"{row['schedule']}, {row['solver']}"
        text = {"model": row["model"], "NFE": str(row["nfe"]), "steps": steps}
        metrics = {**row["metrics"], **models[row["model"]]["metrics"]}
        took = f"{latency[row['id']]['p50_ms']:.3g}" if row["id"] in latency else ""
        rows.append((text, metrics, took))
    found = dict.fromkeys(name for _, metrics, _ in rows for name in metrics)
    columns = [name for kind in _SHOWN for name in found if name.partition("@")[0] == kind]
    return [
        {**text, **{name: _cell(metrics.get(name)) for name in columns}, "ms": took}
        for text, metrics, took in rows
    ]


def _cell(figure: Mapping[str, Any] | None) -> str:
    return "{value:.3g} [{low:.3g}, {high:.3g}]".format(**figure) if figure else ""
