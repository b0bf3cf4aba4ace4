"""Benchmarks of costs and schedules: that both ways compute the same, and that they run. No times."""

from __future__ import annotations

import re
import subprocess
import sys

from test_benchmarks import BENCHMARKS


def run(*command: str) -> str:
    script, *arguments = command
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_published_costs_are_ours() -> None:
    printed = run("costs.py", "--quick")
    found = dict(re.findall(r"^(\w+): costs within (\S+) of float64", printed, re.MULTILINE))
    assert float(found["ours"]) < 1e-6 and float(found["published"]) < 1e-3
    assert re.search(r"^cpu +[0-9.]+ +[0-9.]+ +[0-9.]+ ", printed, re.MULTILINE)
    assert "best paths of every number of steps, 1 to 12" in printed


def test_every_way_to_sample_has_both_figures() -> None:
    printed = run("schedules.py", "ring", "edm", "--quick")
    assert re.findall(r"^## (\w+), 128 noises", printed, re.MULTILINE) == ["ring", "edm"]
    rows = re.findall(
        r"^\| ([A-Za-z].*?) \| (?:\*\*)?([0-9.]+) \[([0-9.]+), ([0-9.]+)\]", printed, re.MULTILINE
    )
    assert len(rows) == 2 * 2 * 10
    assert all(float(low) <= float(value) <= float(high) for _, value, low, high in rows)
    errors = [float(value) for name, value, _, _ in rows if name in ("Euler, uniform", "AB2, BOSS")]
    assert errors[1] < errors[0], "on the ring, of endpoint errors"
