"""Pictures in the terminal: what is written there is the picture, and it is written nowhere else."""

from __future__ import annotations

import base64
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_processes import environment

from flowdistill.cli import preview

PNG = bytes(range(256)) * 40


def of_kitty(text: str) -> bytes:
    parts = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in parts) in text
    assert parts[0][0].startswith("a=T,f=100,q=2,m=")
    assert [keys[-3:] for keys, _ in parts] == ["m=1"] * (len(parts) - 1) + ["m=0"]
    assert all(len(data) <= 4096 for _, data in parts)
    return base64.b64decode("".join(data for _, data in parts))


def of_iterm(text: str) -> bytes:
    found = re.search(r"\x1b\]1337;File=inline=1;size=(\d+):([A-Za-z0-9+/=]*)\a", text)
    assert found is not None
    png = base64.b64decode(found[2])
    assert len(png) == int(found[1])
    return png


@pytest.mark.parametrize(
    ("variables", "decode"),
    [
        ({"TERM": "xterm-kitty"}, of_kitty),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, of_kitty),
        ({"TERM_PROGRAM": "ghostty"}, of_kitty),
        ({"TERM_PROGRAM": "iTerm.app"}, of_iterm),
        ({"TERM_PROGRAM": "WezTerm", "TERM": "xterm-256color"}, of_iterm),
        ({"LC_TERMINAL": "iTerm2"}, of_iterm),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux,1,0"}, None),
        ({}, None),
    ],
)
def test_terminals_are_known_by_their_variables(variables: dict[str, str], decode: Any) -> None:
    encode = preview.protocol(variables)
    assert (encode is None) == (decode is None)
    if encode is not None:
        assert decode(encode(PNG)) == PNG
        assert decode(encode(b"x")) == b"x"


@pytest.mark.parametrize("more", [[], ["-q"]])
def test_the_command_shows_its_grid_on_a_terminal_unless_it_is_to_be_quiet(
    more: list[str], tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    arguments = ["sample", "analytic:ring", "--count", "9", "--nfe", "1", "--out", str(tmp_path), *more]
    with subprocess.Popen(
        [sys.executable, "-m", "flowdistill", *arguments],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment(TERM="xterm-kitty"),
    ) as process:
        os.close(theirs)
        said = b""
        try:
            while part := os.read(ours, 65536):
                said += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    text = said.decode()
    assert str(tmp_path / "grid.png") in text
    if more:
        assert "\x1b_G" not in text
    else:
        assert of_kitty(text) == (tmp_path / "grid.png").read_bytes()
