"""HTML that cannot be broken from within: all text is escaped, but for what is `Html`.

One page without anything outside it: styles, pictures and plots are in the file.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

_LEGIBLE = "34rem"
"""Width below which a picture is not made smaller: its box scrolls."""
_SHORT = 30
"""Characters of a cell that stay on one line."""


class Html(str):
    """Text that is HTML already: only what the package itself has made."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
    """`<name ...>children</name>`; text among the children is escaped, as are attributes' values.

    An attribute's name may end in an underscore (`class_`); another one is written as a hyphen.
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{words}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """One after the other, escaped where they are no HTML."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def paragraph(*children: str) -> Html:
    """Running text."""
    return tag("p", *children)


def with_intervals(text: str) -> Html:
    """Running text in which `[0.1, 0.2]` stands back."""
    parts = re.split(r"(\[[^\[\]]*\])", text)
    return join(*(tag("span", part, class_="range") if part[:1] == "[" else part for part in parts))


def with_code(text: str) -> Html:
    """Running text in which what stands between backticks is code."""
    parts = text.split("`")
    return join(*(tag("code", part) if number % 2 else part for number, part in enumerate(parts)))


def picture(png: bytes, description: str, width: int) -> Html:
    """A PNG of `width` pixels within the page, smaller on a narrow one, in a box that scrolls if need be."""
    data = base64.b64encode(png).decode()
    size = f"width: min({width}px, max(100%, {_LEGIBLE}))"
    image = Html(f'<img src="data:image/png;base64,{data}" alt="{escape(description)}" style="{size}">')
    return tag("div", image, class_="scroll")


def plot(svg: str, description: str) -> Html:
    """An SVG as the plot that it is, with words for those who do not see it."""
    return tag("div", Html(svg), class_="plot", role="img", aria_label=description)


def figure(title: str, content: Html, caption: str = "") -> Html:
    """A plot or picture under its title, with what one sees in it."""
    below = tag("p", caption, class_="caption") if caption else Html("")
    return tag("figure", tag("figcaption", title), content, below)


def figures(found: Iterable[Html], small: bool = False) -> Html:
    """Figures side by side, as many as there is room for."""
    return tag("div", *found, class_="figures small" if small else "figures")


def legend(entries: Iterable[tuple[str, int, str]]) -> Html:
    """(name, number of the colour, `dashed`, `dotted` or nothing) of each line."""
    keys = [
        tag("span", tag("i", class_=f"swatch line-{colour} {style}".strip()), name, class_="key")
        for name, colour, style in entries
    ]
    return tag("div", *keys, class_="legend")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[str] = ()) -> Html:
    """A table in a box that scrolls; the columns named in `numbers` stand to the right.

    Of `0.1 [0.09, 0.11]` the interval is set below the value.
    """
    right = {heading for heading in headings if heading in set(numbers)}
    kinds = ["number" if heading in right else "text" for heading in headings]
    head = tag("tr", *(tag("th", h, scope="col", class_=k) for h, k in zip(headings, kinds, strict=True)))
    body = [
        tag("tr", *(tag("td", _cell(c), class_=_width(c, k)) for c, k in zip(row, kinds, strict=True)))
        for row in rows
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def _cell(text: str) -> Html:
    value, bracket, rest = text.partition(" [")
    if isinstance(text, Html) or not (bracket and rest.endswith("]")):
        return join(text)
    return join(value, " ", tag("span", f"[{rest}", class_="interval"))


def _width(text: str, kind: str) -> str:
    return f"{kind} short" if len(text) <= _SHORT else kind


def facts(content: Mapping[str, str]) -> Html:
    """Names with their values."""
    pairs = [join(tag("dt", name), tag("dd", value)) for name, value in content.items()]
    return tag("dl", *pairs)


def code(text: str) -> Html:
    """Lines to copy."""
    return tag("pre", tag("code", text), class_="scroll")


def details(summary: str, content: Html) -> Html:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", summary), content)


def section(anchor: str, title: str, *content: Html) -> Html:
    """A part of the page under a heading."""
    return tag("section", tag("h2", title), *content, id=anchor)


def page(title: str, *content: Html) -> bytes:
    """The whole file."""
    style = resources.files("flowdistill.report").joinpath("page.css").read_text("utf-8")
    head = join(
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag("html", tag("head", head), tag("body", *content), lang="en")
    # A lone surrogate, as of a file name that is no text, becomes a question mark.
    return f"<!doctype html>\n{body}\n".encode(errors="replace")
