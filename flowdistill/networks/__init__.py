"""Architectures, one file a family; `build` finds them by file name.

The file `NAME.py` holds one public `nn.Module`, the only one whose class name in lower case is NAME. Its
constructor's arguments are the `arguments` of a model card.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from flowdistill.errors import ArtifactError, UsageError, unknown


def architectures() -> tuple[str, ...]:
    """Names of the architectures: the modules of this folder, but for those that begin with an underscore."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def argument(architecture: str, arguments: Mapping[str, Any], name: str) -> Any:
    """An argument of a network, or the default that its constructor has for it."""
    default = inspect.signature(constructor(architecture)).parameters[name].default
    return arguments.get(name, default)


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A new network with random weights.

    Raises `UsageError` for an unknown architecture and `ArtifactError` for arguments that its
    constructor does not take or refuses.
    """
    if architecture not in architectures():
        raise UsageError(unknown("architecture", architecture, architectures()))
    kind = constructor(architecture)
    parameters = inspect.signature(kind).parameters
    for name in arguments:
        if name not in parameters:
            raise ArtifactError(unknown(f"{architecture} argument", name, tuple(parameters)))
    try:
        return kind(**arguments)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ArtifactError(f"{architecture}({given}): {error}") from error


def constructor(architecture: str) -> type[nn.Module]:
    """The class of an architecture."""
    module = import_module(f"{__name__}.{architecture}")
    for name, member in vars(module).items():
        if name.lower() == architecture and isinstance(member, type) and issubclass(member, nn.Module):
            return member
    raise LookupError(f"networks/{architecture}.py defines no class of that name")
