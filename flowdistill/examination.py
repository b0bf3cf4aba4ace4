"""Whether a machine is ready: what `flowdistill doctor` looks at."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from flowdistill import artifact, teachers
from flowdistill.errors import FlowdistillError, MissingInput

_NEEDED = ("torch", "accelerate", "safetensors", "numpy", "pydantic", "typer", "rich", "PyYAML", "pillow")
_OPTIONAL = {"lpips": "LPIPS", "torch_fidelity": "FID on Inception features"}
"""Module -> what is not available where it cannot be imported."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. Only what is `broken` keeps flowdistill from working."""

    what: str
    state: Literal["ok", "absent", "broken"]
    found: str


def examine(out: Path) -> list[Finding]:
    """Everything that matters, the essential first; `out` is where results are to go."""
    return [*_packages(), *_devices(), _folder(out), *_shipped(), *_optional(), *_caches()]


def conclude(findings: Sequence[Finding]) -> None:
    """Raise `MissingInput` where something essential is broken."""
    broken = [finding.what for finding in findings if finding.state == "broken"]
    if broken:
        raise MissingInput(f"{', '.join(broken)}: broken, and flowdistill does not work without")


def _packages() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("python", "ok", f"{platform.python_version()} on {system}")
    for name in ("flowdistill", *_NEEDED):
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "broken", "not installed")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("device", "broken", f"torch cannot be imported: {error}")
        return
    yield Finding("device cpu", "ok", f"{torch.get_num_threads()} threads on {os.cpu_count()} cores")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 1e9:.0f} GB"
        yield Finding(f"device cuda:{index}", "ok", f"{properties.name}, {memory}")
    if torch.backends.mps.is_available():
        yield Finding("device mps", "ok", "Apple GPU")


def _folder(out: Path) -> Finding:
    """Whether results can be written, without leaving anything behind."""
    there = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding("results", "broken", f"{there} cannot be written ({error.strerror})")
    return Finding("results", "ok", f"{there} is writable, {shutil.disk_usage(there).free / 1e9:.1f} GB free")


def _shipped() -> Iterator[Finding]:
    if not (teachers.ASSETS / f"{teachers.DEFAULT}.safetensors").is_file():
        yield Finding(f"builtin {teachers.DEFAULT}", "broken", f"missing in {teachers.ASSETS}")
    models = [file for file in teachers.ASSETS.glob("*.safetensors") if not file.stem.endswith("-data")]
    for file in sorted(models):
        try:
            sha, size = artifact.sha256(file), file.stat().st_size
            artifact.load_tensors(file)
            yield Finding(f"builtin {file.stem}", "ok", f"{size / 1e6:.2f} MB, sha256 {sha[:16]}…")
        except FlowdistillError as error:
            yield Finding(f"builtin {file.stem}", "broken", str(error).partition("\n")[0])


def _optional() -> Iterator[Finding]:
    for module, use in _OPTIONAL.items():
        try:
            import_module(module)
            yield Finding(module, "ok", f"{version(module.replace('_', '-'))}, for {use}")
        except ImportError:
            yield Finding(module, "absent", f"not installed; needed for {use} only")
        except RuntimeError as error:
            # A torchvision that was built for another torch fails at import with its operators missing.
            yield Finding(module, "absent", f"cannot be imported ({error}); needed for {use} only")


def _caches() -> Iterator[Finding]:
    """Where other packages keep weights that were downloaded before."""
    home = Path.home() / ".cache"
    hub = Path(
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home / "huggingface") / "hub"
    )
    checkpoints = Path(os.environ.get("TORCH_HOME") or home / "torch") / "hub" / "checkpoints"
    for what, folder, pattern in (("hub cache", hub, "models--*"), ("torch cache", checkpoints, "*")):
        names = sorted(path.name.removeprefix("models--").replace("--", "/") for path in folder.glob(pattern))
        yield Finding(what, "ok" if names else "absent", ", ".join(names) or f"nothing in {folder}")
