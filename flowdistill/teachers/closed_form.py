"""`analytic:NAME`: teachers without weights, for tests, tutorials and whole chains in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flowdistill import artifact
from flowdistill.analytic import Mixture, gaussian, mixture, ring
from flowdistill.errors import UsageError, did_you_mean, unknown
from flowdistill.teachers import Card, Model

# Name -> constructor and its one option: a positive integer.
FLOWS: Mapping[str, tuple[Callable[[int], Mixture], str]] = {
    "gaussian": (lambda dim: gaussian((dim,)), "dim"),
    "mixture": (lambda dim: mixture((dim,)), "dim"),
    "ring": (ring, "components"),
}
_DEFAULTS = {"dim": 2, "components": 8}


def open_analytic(name: str, options: Mapping[str, Any], device: str) -> Model:
    """The flow `name`; options are `dim` of gaussian and mixture (2) and `components` of ring (8)."""
    if name not in FLOWS:
        raise UsageError(unknown("analytic teacher", name, FLOWS))
    make, option = FLOWS[name]
    for key, value in options.items():
        if key != option:
            raise UsageError(
                f"teacher analytic:{name}: unknown option '{key}'{did_you_mean(key, (option,))} ({option})"
            )
        if type(value) is not int or not 1 <= value <= 4096:
            raise UsageError(
                f"teacher analytic:{name}: {key} is {value!r}, expected an integer from 1 to 4096"
            )
    size = options.get(option, _DEFAULTS[option])
    flow = make(size)
    card = Card(
        architecture="analytic",
        arguments={"name": name, option: size},
        shape=flow.shape,
        classes=flow.classes,
        data=f"analytic:{name}",
        notes="closed form",
    )
    digest = artifact.digest({"architecture": "analytic", **card.arguments})
    return Model(card, flow.to(device), digest, device)
