"""Pictures in the terminal, where it can show them: the protocols of kitty and of iTerm2."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import typer

_CHUNK = 4096
"""Characters of base64 that kitty takes at once."""


def preview(picture: Path) -> None:
    """Show a PNG below what was printed; nothing happens where stdout is no terminal that can."""
    encode = protocol(os.environ) if sys.stdout.isatty() else None
    if encode is not None:
        typer.echo(encode(picture.read_bytes()))


def protocol(environment: Mapping[str, str]) -> Callable[[bytes], str] | None:
    """What puts a PNG into the words of the terminal that these variables tell of; None where none is known.

    Within tmux and screen the picture would belong to no pane.
    """
    if "TMUX" in environment or "STY" in environment:
        return None
    program = environment.get("TERM_PROGRAM") or environment.get("LC_TERMINAL", "")
    if program in ("iTerm.app", "iTerm2", "WezTerm"):
        return _iterm
    known = environment.get("TERM") in ("xterm-kitty", "xterm-ghostty")
    return _kitty if known or "KITTY_WINDOW_ID" in environment or program == "ghostty" else None


def _iterm(png: bytes) -> str:
    """https://iterm2.com/documentation-images.html"""
    return f"\x1b]1337;File=inline=1;size={len(png)}:{base64.b64encode(png).decode()}\a"


def _kitty(png: bytes) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol/: a PNG (100) that is shown (T), no answer (q=2)."""
    text = base64.b64encode(png).decode()
    parts = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    last = len(parts) - 1
    controls = [f"{'a=T,f=100,q=2,' if k == 0 else ''}m={int(k < last)}" for k in range(len(parts))]
    return "".join(f"\x1b_G{each};{part}\x1b\\" for each, part in zip(controls, parts, strict=True))
