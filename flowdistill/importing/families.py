"""Families of checkpoints: what their networks are fed, what they return, and whose licence they have.

A preset is a published network: `rf-cifar10` is the arguments of that name in `networks`, read as the family
`rf`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowdistill import networks
from flowdistill.errors import ArtifactError, UsageError, quoted, unknown

_DATA_WARD = {"name": "linear", "reversed": True}
_STABLE_DIFFUSION_VAE = {"scale": [0.18215], "vae": "stabilityai/sd-vae-ft-ema"}
_EDM = {"interpolant": {"name": "edm"}, "prediction": "v", "sign": -1}


@dataclass(frozen=True)
class Family:
    """How the networks of one project are read: parts of a card."""

    title: str
    card: Mapping[str, Any]


FAMILIES: Mapping[str, Family] = {
    "edm": Family(
        "EDM",
        {
            "convention": _EDM | {"clock": {"name": "logarithmic", "scale": 0.25}},
            "licence": "CC BY-NC-SA 4.0 (NVIDIA's EDM)",
        },
    ),
    "rf": Family(
        "RectifiedFlow",
        {
            "convention": {"sign": -1, "clock": _DATA_WARD | {"scale": 999.0}, "t_max": 0.999},
            "licence": "none stated for the weights (RectifiedFlow)",
        },
    ),
    "slimflow": Family(
        "SlimFlow",
        {
            "convention": {"sign": -1, "clock": _DATA_WARD | {"scale": 999.0}, "t_max": 0.999},
            "distilled": True,
            "licence": "Apache-2.0 (SlimFlow)",
        },
    ),
    "sit": Family(
        "SiT",
        {
            "convention": {"sign": -1, "clock": _DATA_WARD},
            "latent": _STABLE_DIFFUSION_VAE,
            "licence": "MIT (SiT); none stated for the weights apart",
        },
    ),
    "dit": Family(
        "DiT",
        {
            "convention": {"interpolant": {"name": "ddpm"}, "prediction": "eps"},
            "latent": _STABLE_DIFFUSION_VAE,
            "licence": "CC BY-NC 4.0 (DiT)",
        },
    ),
    "lfm": Family(
        "LFM",
        {
            "convention": {"interpolant": {"name": "lfm"}},
            "latent": _STABLE_DIFFUSION_VAE | {"vae": "stabilityai/sd-vae-ft-mse"},
            "licence": "AGPL-3.0 (LFM)",
        },
    ),
    "rfpp": Family(
        "rf++",
        {
            "convention": _EDM
            | {
                "interpolant": {"name": "edm", "sigma_min": 1e-5, "sigma_max": 1e5},
                "clock": {"name": "logarithmic", "scale": 0.25},
            },
            "distilled": True,
            "licence": "none stated for the weights (rf++); those of EDM that they began as: CC BY-NC-SA 4.0",
        },
    ),
    "cfm": Family(
        "torchcfm",
        {"convention": {"sign": -1, "clock": _DATA_WARD}, "licence": "MIT (torchcfm)"},
    ),
}

SIGNATURES: Mapping[str, str] = {
    "songunet": "map_layer0.weight",
    "dhariwalunet": "map_layer0.weight",
    "ncsnpp": "all_modules.2.weight",
    "admunet": "time_embed.0.weight",
    "dit": "x_embedder.proj.weight",
}
"""A name that all weights of an architecture have."""
# Of each architecture: its arguments for channels, side and number of classes.
_SIZES: Mapping[str, tuple[str, str, str]] = {
    "songunet": ("in_channels", "img_resolution", "label_dim"),
    "dhariwalunet": ("in_channels", "img_resolution", "label_dim"),
    "ncsnpp": ("num_channels", "image_size", ""),
    "admunet": ("in_channels", "image_size", "num_classes"),
    "dit": ("in_channels", "input_size", "num_classes"),
}


def card_of(preset: str) -> dict[str, Any]:
    """The card of a published network, or of a family what all its networks share; `family` names that."""
    family = FAMILIES.get(preset.partition("-")[0])
    if family is None or preset not in {*networks.presets(), *FAMILIES}:
        raise UsageError(f"--preset: {unknown('preset', preset, (*FAMILIES, *sorted(networks.presets())))}")
    card = {**family.card, "family": family.title}
    if preset in FAMILIES:
        return card
    architecture, arguments = networks.presets()[preset]
    if not arguments.get("centered", True):
        card["latent"] = {"scale": [0.5], "shift": [-1.0]}  # its data are pixels in [0, 1]
    return described(architecture, arguments) | card


def check_architecture(preset: str | None, card: Mapping[str, Any]) -> None:
    """Refuse a family whose networks are of other architectures than the card says."""
    published = networks.presets().items()
    own = {architecture for name, (architecture, _) in published if name.partition("-")[0] == preset}
    if own and card["architecture"] not in own:
        raise UsageError(
            f"--preset {preset} is for {' and '.join(sorted(own))}, the weights are of {card['architecture']}"
        )


def described(architecture: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture, arguments, shape and classes: the part of a card that the network itself determines."""
    if architecture not in _SIZES:
        raise UsageError(f"the card of a '{architecture}' has to say its shape: `shape: [C, H, W]`")
    channels, side, classes = (
        networks.argument(architecture, arguments, name) if name else 0 for name in _SIZES[architecture]
    )
    count = classes or 0
    return {
        "architecture": architecture,
        "arguments": dict(arguments),
        "shape": [channels, side, side],
        "classes": count if count > 1 else 0,
    }


def sit_reading(options: Mapping[str, Any]) -> dict[str, Any]:
    """The convention of a SiT that was trained with other options than the published one (arXiv 2401.08740).

    `options` are those its trainer saves: path_type (Linear, GVP, VP), prediction (velocity, noise, score).
    """
    paths = {"Linear": "rectified", "GVP": "cosine", "VP": "vp"}
    predictions = {"velocity": ("velocity", -1), "noise": ("eps", 1), "score": ("score", 1)}
    path, prediction = options.get("path_type", "Linear"), options.get("prediction", "velocity")
    if path not in paths or prediction not in predictions:
        raise ArtifactError(
            f"SiT with path_type {quoted(path)} and prediction {quoted(prediction)}: expected one of "
            f"{', '.join(paths)} and one of {', '.join(predictions)}; give the convention with --card"
        )
    name, sign = predictions[prediction]
    return {"interpolant": {"name": paths[path]}, "prediction": name, "sign": sign, "clock": _DATA_WARD}


def edm_reading(wrapper: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The convention of an EDM preconditioning (arXiv 2206.00364, Table 1); `state` has its constants."""
    match wrapper:
        case "EDMPrecond":
            path = {"name": "edm", "sigma_data": _number(state, "sigma_data", 0.5)}
            return _EDM | {"interpolant": path, "clock": {"name": "logarithmic", "scale": 0.25}}
        case "VPPrecond":
            low, spread = _number(state, "beta_min", 0.1), _number(state, "beta_d", 19.9)
            path = {
                "name": "vp",
                "beta_min": low,
                "beta_max": low + spread,
                "time_min": _number(state, "epsilon_t", 1e-5),
            }
            scale = _number(state, "M", 1000) - 1
            return {"interpolant": path, "prediction": "eps", "clock": {"name": "linear", "scale": scale}}
        case "VEPrecond":
            clock = {"name": "logarithmic", "over": 2.0}
            path = {
                "name": "ve",
                "sigma_min": _number(state, "sigma_min", 0.02),
                "sigma_max": _number(state, "sigma_max", 100.0),
            }
            return {"interpolant": path, "prediction": "eps", "sign": -1, "clock": clock}
        case "iDDPMPrecond":
            for name, value in (("C_1", 0.001), ("C_2", 0.008)):
                if _number(state, name, value) != value:
                    raise ArtifactError(f"iDDPM's table with {name} = {state[name]}, only {value} is known")
            path = {"name": "ddpm", "betas": "squaredcos_cap_v2", "steps": int(_number(state, "M", 1000))}
            return {"interpolant": path, "prediction": "eps", "clock": {"name": "nearest"}}
    known = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
    raise ArtifactError(unknown("EDM preconditioning", wrapper, known))


def _number(state: Mapping[str, Any], name: str, default: float) -> float:
    """A constant of a wrapper, which the file may lack."""
    value = state.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ArtifactError(f"its '{name}' is {quoted(value)}, expected a number")
    return float(value)
