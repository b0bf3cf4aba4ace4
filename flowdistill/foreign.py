"""Packages of others that are imported only when they are used, through one place.

`load` explains what to install where a package is absent. It also mends torchvision, which diffusers, lpips
and torch-fidelity import: its wheels from the package index are built for CUDA and fail to import beside a
PyTorch built for the CPU, because the two operators that their compiled part should have registered are
unknown.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from flowdistill.errors import MissingInput

_INSTALL = {"diffusers": "flowdistill[diffusers]", "transformers": "flowdistill[diffusers]"}
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []
"""An operator library lives as long as its handle."""


def load(name: str) -> ModuleType:
    """Import a package of others; `MissingInput` where it is not installed."""
    try:
        _mend_torchvision()
        return import_module(name)
    except ModuleNotFoundError as error:
        wanted = _INSTALL.get(name, name)
        raise MissingInput(
            f"package '{error.name}' is not installed; `pip install '{wanted}'` brings it"
        ) from error


def member(name: str, of: str) -> Any:
    """The member `of` of a package of others; `MissingInput` where its version has none."""
    package = load(name)
    try:
        return getattr(package, of)
    except AttributeError:
        version = getattr(package, "__version__", "")
        raise MissingInput(f"{name} {version} has no '{of}'; `pip install -U {name}` may bring it") from None


@cache
def _mend_torchvision() -> None:
    """Import torchvision, declaring its operators first where its compiled part does not load.

    They are declared, not defined: boxes cannot be filtered, everything else works.
    """
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        return  # nobody needs it then: those who do depend on it
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        import torch

        for half_imported in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[half_imported]
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in _OPERATORS:
            library.define(operator)
        _kept.append(library)
        import_module("torchvision")
