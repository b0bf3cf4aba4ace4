"""Plots by matplotlib, an optional package: one style, as SVG for pages and as PNG for folders.

Everything is drawn on a figure of its own, without pyplot and its global state.
"""

from __future__ import annotations

import importlib.util
import io
import re
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

_FOR_PAGES = (
    (r"(?s)<!--.*?-->\s*", ""),
    (r"(?s)<defs>\s*<style.*?</style>\s*</defs>\s*", ""),  # it would be the whole page's
    (r'<g id="[^"]*">', "<g>"),
    (r" *\n *(?=[A-Zz\"])", " "),
    (r"\n\s+", "\n"),
    ("#b0b0b0", "var(--grid, #b0b0b0)"),
    *((colour, f"var(--line-{number}, {colour})") for number, colour in enumerate(COLOURS)),
)
"""What is taken out of matplotlib's SVG, or replaced, where it stands in a page."""


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require() -> None:
    """Raise `MissingInput` where matplotlib is not installed."""
    if not available():
        raise MissingInput("plots need matplotlib; get it with pip install 'flowdistill[plots]'")


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes [rows, columns]; MissingInput without matplotlib."""
    require()
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


def svg(drawn: Figure, ids: str = "") -> str:
    """The same text for the same figure, without the XML declaration: to stand within a page.

    Black is drawn in the page's own text colour, colour i of `COLOURS` in its `--line-i` and grids in its
    `--grid`, so that a dark page is readable too. `ids` begins all ids, which must differ among the figures
    of one page.
    """
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = _saved(drawn, format="svg", metadata=nothing, transparent=True).decode()
    text = text[text.index("<svg") :].replace("<svg ", '<svg fill="currentColor" ', 1)
    for pattern, replacement in _FOR_PAGES:
        text = re.sub(pattern, replacement, text)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{ids}", text).replace("#000000", "currentColor")


def _saved(drawn: Figure, **how: Any) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        drawn.savefig(buffer, **how)
    return buffer.getvalue()
