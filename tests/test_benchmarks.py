"""Benchmarks that compare two ways of doing the same: that it is the same, and that they run. No times."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_step_of_rf_plus_plus_computes_what_ours_does() -> None:
    command = [sys.executable, str(BENCHMARKS / "reflow.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same = re.search(r"^same loss within (\S+), same gradient within (\S+)$", done.stdout, re.MULTILINE)
    assert same and float(same[1]) < 1e-4 and float(same[2]) < 1e-3
    parts = ("step, s", "LPIPS and its slope, s", "a draw of t, 16 at a time, us", "memory of two steps, MB")
    assert [part for part in parts if f"\n{part}  " not in done.stdout] == []
