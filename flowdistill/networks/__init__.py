"""Architectures, one file a family; `build` finds them by file name.

The file `NAME.py` holds one public `nn.Module`, the only one whose class name in lower case is NAME. Its
constructor's arguments are the `arguments` of a model card.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from flowdistill.errors import ArtifactError, UsageError, quoted, unknown


def architectures() -> tuple[str, ...]:
    """Names of the architectures: the modules of this folder, but for those that begin with an underscore."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


@cache
def presets() -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    """Name -> architecture and arguments of the published networks."""
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for architecture in architectures():
        named = getattr(import_module(f"{__name__}.{architecture}"), "PRESETS", {})
        found |= {name: (architecture, arguments) for name, arguments in named.items()}
    return found


def argument(architecture: str, arguments: Mapping[str, Any], name: str) -> Any:
    """An argument of a network, or the default that its constructor has for it."""
    default = inspect.signature(constructor(architecture)).parameters[name].default
    return arguments.get(name, default)


def build(
    architecture: str, arguments: Mapping[str, Any], parameters_at_most: int | None = None
) -> nn.Module:
    """A new network with random weights.

    Arguments that come from a file are a claim: with `parameters_at_most` a network of more parameters than
    that is given up before it is complete.

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
        with _bounded(parameters_at_most):
            return kind(**arguments)
    except Exception as error:  # whatever a constructor makes of arguments that it was not made for
        given = ", ".join(f"{name}={quoted(value)}" for name, value in arguments.items())
        raise ArtifactError(f"{architecture}({given}): {str(error) or type(error).__name__}") from error


@contextmanager
def _bounded(parameters: int | None) -> Iterator[None]:
    """Raise ValueError when modules register more parameters than that."""
    if parameters is None:
        yield
        return
    left = parameters

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= parameter is not None
        if left < 0:
            raise ValueError(f"it has more than {parameters} parameters, far more than the file has tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def constructor(architecture: str) -> type[nn.Module]:
    """The class of an architecture."""
    module = import_module(f"{__name__}.{architecture}")
    for name, member in vars(module).items():
        if name.lower() == architecture and isinstance(member, type) and issubclass(member, nn.Module):
            return member
    raise LookupError(f"networks/{architecture}.py defines no class of that name")
