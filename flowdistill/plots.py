"""Plots by matplotlib, an optional package: one style, as SVG for pages and as PNG for folders.

Everything is drawn on a figure of its own, without pyplot and its global state.
"""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any

from flowdistill.errors import MissingInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1f61a8", "#d1495b", "#2a9d8f", "#e9a23b", "#7b5ea7", "#6c757d")
"""Of lines, in their order: apart for those who see no red or no green too."""
STYLE: Any = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "flowdistill",
}


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes [rows, columns]; MissingInput without matplotlib."""
    if not available():
        raise MissingInput("plots need matplotlib; get it with pip install 'flowdistill[plots]'")
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    style = STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}
    with matplotlib.rc_context(style):
        drawn = Figure(figsize=(width, height), layout="constrained")
        return drawn, drawn.subplots(rows, columns, squeeze=False)


def png(drawn: Figure, dpi: int = 144) -> bytes:
    """The same bytes for the same figure."""
    return _saved(drawn, format="png", dpi=dpi, metadata={"Software": None})


def svg(drawn: Figure) -> str:
    """The same text for the same figure, without the XML declaration: to stand within a page."""
    text = _saved(drawn, format="svg", metadata={"Date": None, "Creator": None}, transparent=True).decode()
    return text[text.index("<svg") :]


def _saved(drawn: Figure, **how: Any) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        drawn.savefig(buffer, **how)
    return buffer.getvalue()
