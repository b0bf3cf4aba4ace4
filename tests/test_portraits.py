"""The picture of a schedule: what is drawn is what was computed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_stages import make, work

from flowdistill import artifact, plots
from flowdistill.schedule import uniform
from flowdistill.stages.boss import TENSORS, Boss, file_name, picture_name
from flowdistill.tuning import portraits


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    figures: list[Any] = []

    real = plots.png
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or real(figure))
    return figures


def stairs(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Values and edges by label."""
    found = {}
    for patch in axes.patches:
        if "in all" in patch.get_label():
            values, edges, _ = patch.get_data()
            found[patch.get_label()] = (list(values), list(edges))
    return found


@pytest.mark.parametrize(("decay", "scale"), [(1.0, "linear"), (0.1, "log")])
def test_knots_and_costs_are_where_they_belong(decay: float, scale: str, drawn: list[Any]) -> None:
    fine = uniform(4)
    cost = np.triu(np.add.outer(np.arange(5.0), np.arange(5.0)), 1) * decay ** np.arange(5)[:, None]
    knots = {"uniform": uniform(2).times, "BOSS": (1.0, 0.75, 0.0), "written": (1.0, 0.6, 0.0)}
    data = portraits.portrait("2", knots, {"uniform": [0, 2, 4], "BOSS": [0, 1, 4]}, cost, fine)
    above, below = drawn[0].axes
    dots = [line.get_xdata() for line in above.lines if line.get_marker() == "o"]
    assert [tuple(each) for each in dots] == list(knots.values())
    assert [label.get_text() for label in above.get_yticklabels()] == list(knots)
    even, best = (cost[0, 2], cost[2, 4]), (cost[0, 1], cost[1, 4])
    assert stairs(below) == {
        f"uniform, {sum(even):.3g} in all": ([even[1], even[0]], [0.0, 0.5, 1.0]),
        f"BOSS, {sum(best):.3g} in all": ([best[1], best[0]], [0.0, 0.75, 1.0]),
    }
    assert below.get_yscale() == scale
    assert above.get_xlim() == below.get_xlim() == (1, 0)
    assert Image.open(io.BytesIO(data)).size[0] > 800


def test_jumps_that_cost_nothing_are_drawn_too() -> None:
    paths = {"uniform": [0, 1, 2]}
    data = portraits.portrait("2", {"uniform": uniform(2).times}, paths, np.zeros((3, 3)), uniform(2))
    assert data == portraits.portrait("2", {"uniform": uniform(2).times}, paths, np.zeros((3, 3)), uniform(2))


def test_the_stage_draws_its_own_numbers(tmp_path: Path, drawn: list[Any]) -> None:
    stage = make(Boss, grid=8, trajectories=8, held_out=16, nfe=[3])
    stage.run(work(tmp_path, stage, {"model": {"name": "analytic:ring"}}))
    content = artifact.load_json(tmp_path / file_name(3))
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert labels[:2] == ["uniform", "BOSS"]
    assert f"written: {content['solver']}, {content['schedule']}" in drawn[0].axes[0].get_title("left")
    costs = artifact.load_tensors(tmp_path / TENSORS)[0]["cost"]
    (name,) = [name for name in stairs(drawn[0].axes[1]) if name.startswith("BOSS")]
    values, edges = stairs(drawn[0].axes[1])[name]
    knots = [round(8 * (1 - t)) for t in edges]
    expected = [float(costs[j, i]) for i, j in zip(knots, knots[1:], strict=False)]
    assert values == pytest.approx(expected)
    assert (tmp_path / picture_name(3)).read_bytes().startswith(b"\x89PNG")
