"""The README's commands, in its order, in one folder, by the real command line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
INSTALL = "python -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt "
# The quickstart is the same chain here, on fewer samples; by hand it takes minutes.
SMALLER = {
    "flowdistill run quickstart": "-s pairs.count=64 -s pairs.steps=2 -s reflow.steps=4 "
    "-s reflow.batch_size=8 -s boss.grid=8 -s boss.trajectories=8 -s boss.held_out=16 "
    "-s eval.samples=120 -s eval.nfe=[1,2] -s eval.reference.samples=8 -s eval.reference.steps=2 "
    "-s eval.straightness=0 -s eval.latency=false",
    "flowdistill run recipe.yaml": "-s eval.samples=500",
    "flowdistill boss --nfe 4": "-s boss.grid=20 -s boss.trajectories=16 -s boss.held_out=16",
}


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_the_first_screen_has_two_commands() -> None:
    first, second, *rest = commands()
    assert first == f"{INSTALL}. && flowdistill run quickstart"
    assert second == f"{INSTALL}-e '.[dev]' && pytest"
    assert not any("pip install" in line for line in rest)
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("\npytest")


def test_every_command_works(tmp_path: Path) -> None:
    shell = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    lines = ["flowdistill run quickstart", *commands()[2:]]
    for line in lines:
        arguments = [*shlex.split(line), *shlex.split(SMALLER.get(line, ""))]
        found = subprocess.run(
            arguments, cwd=tmp_path, env=shell, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, f"{line}\n{found.stdout}\n{found.stderr}"
        assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.stem
)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_no_figure_is_left_open() -> None:
    for path in PAGES:
        assert "@@" not in path.read_text(), path.name
