"""How fast the commands that look answer, against Python itself and the import of torch.

    python benchmarks/startup.py [RUNS]

Prints the median wall time of every command and its ratios. The targets are 0.25 s for `--help` and 0.4 s for
`validate`, on a quiet machine; the ratios move less than the times where it is not.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "ring.yaml"
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "python -c 'import torch'": ("-c", "import torch"),
    "flowdistill --help": ("-m", "flowdistill", "--help"),
    "flowdistill validate": ("-m", "flowdistill", "validate", str(RECIPE)),
    "flowdistill inspect": ("-m", "flowdistill", "inspect", str(RECIPE)),
    "flowdistill status": ("-m", "flowdistill", "status", str(RECIPE)),
}
PYTHON, TORCH = list(COMMANDS)[:2]


def seconds(arguments: tuple[str, ...]) -> float:
    """Wall time of one process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def main(runs: int) -> None:
    """Measure in turns, so that a busy moment falls on all alike."""
    measured: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):
        for name, arguments in COMMANDS.items():
            measured[name].append(seconds(arguments))
    medians = {
        name: statistics.median(times[1:]) for name, times in measured.items()
    }  # the first warms the disk
    print(f"{'median of ' + str(runs):26}{'seconds':>9}{'/ python':>10}{'/ torch':>9}")
    for name, median in medians.items():
        print(f"{name:26}{median:9.3f}{median / medians[PYTHON]:10.1f}{median / medians[TORCH]:9.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
