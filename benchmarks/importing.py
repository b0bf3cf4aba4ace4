"""What importing a full-size checkpoint costs, against loading its weights from safetensors and hashing them.

    python benchmarks/importing.py [RUNS]

Writes a pickle with the structure of EDM's snapshots (every module a persistent object with its source text,
every storage a stream of its own) of the CIFAR-10 network, 228 MB, and imports it. Both sides are timed in
turns in one process; the memory is the peak of a process of its own, less what it has before it begins.
"""

from __future__ import annotations

import hashlib
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from flowdistill import importing
from flowdistill.networks.songunet import PRESETS, SongUNet

PEAK = """
import sys
from pathlib import Path
import torch
from flowdistill import importing, networks
from flowdistill.networks import songunet

def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

before = memory("VmRSS")
importing.convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(memory("VmHWM") - before)
"""


class Snapshots(pickle.Pickler):
    """Writes modules as EDM's `torch_utils.persistence` does."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, nn.Module) or isinstance(value, nn.ModuleDict | nn.ModuleList):
            return NotImplemented
        meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise RuntimeError('never executed')\n" * 500,
            "class_name": getattr(value, "persistent_name", type(value).__name__),
            "state": value.__dict__,
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def write(path: Path) -> None:
    """The snapshot of a new network."""
    module = types.ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): raise RuntimeError('only a name')", module.__dict__)
    module.__dict__["_reconstruct_persistent_obj"].__module__ = module.__name__
    sys.modules["torch_utils"] = types.ModuleType("torch_utils")
    sys.modules[module.__name__] = module
    arguments = dict(PRESETS["edm-cifar10-vp"])
    network = SongUNet(**arguments)
    network._init_args, network._init_kwargs = (), arguments  # type: ignore[assignment]
    wrapper = nn.Module()
    wrapper.persistent_name = "EDMPrecond"  # type: ignore[assignment]
    wrapper.model, wrapper.sigma_data = network, 0.5  # type: ignore[assignment]
    with path.open("wb") as file:
        Snapshots(file).dump({"ema": wrapper, "dataset_kwargs": {}})


def seconds(action: Callable[[], object]) -> float:
    """Wall time."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main(runs: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source, made, again = (Path(folder, name) for name in ("a.pkl", "a.safetensors", "b.safetensors"))
        write(source)
        importing.convert(source, made)

        def plain() -> None:
            safetensors.torch.load_file(made)
            with made.open("rb") as file:
                hashlib.file_digest(file, "sha256").hexdigest()

        def convert() -> None:
            again.unlink(missing_ok=True)
            importing.convert(source, again)

        times = [(seconds(plain), seconds(convert)) for _ in range(runs)]
        load, full = (statistics.median(each) for each in zip(*times, strict=True))
        again.unlink()
        command = [sys.executable, "-c", PEAK, str(source), str(again)]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size = source.stat().st_size
    print(f"{size / 1e6:.0f} MB, {runs} runs")
    print(f"load_file + SHA-256  {load:6.2f} s")
    print(f"import               {full:6.2f} s   ratio {full / load:.2f} (at most 3)")
    print(f"peak memory          {peak / 1e6:6.0f} MB  {peak / size:.2f} of the file (under 2.5)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
