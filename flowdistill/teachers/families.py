"""Families of diffusers' networks: how each relates to canonical velocity, and how its pipeline guides.

What a scheduler's config says is read: betas, prediction, whether it is a flow. What only the code of
diffusers says (the network's clock and sign, the guidance rule) stands here. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flowdistill.conventions import Convention, Linear, Prediction
from flowdistill.errors import ArtifactError, unknown
from flowdistill.guidance import Guidance, Row, Token
from flowdistill.interpolants import DDPM, Rectified


@dataclass(frozen=True)
class Flow:
    """Facts of a transformer of a rectified flow that stand in no config.

    `scale` is that of its pipeline's guidance, None where it is off by default; `embedded` the one that a
    distilled network is told. `share`: it is fed sigma or, where its clock runs `towards_data`, 1 - sigma;
    else the scheduler's timestep. Towards data its output is x0 - eps. `pixels` is the size of samples
    where its config has none.
    """

    scale: float | None
    share: bool = False
    towards_data: bool = False
    pixels: tuple[int, ...] = (1024, 1024)
    factors: tuple[int, int] = (1, 8)
    rescale: Token | Row | None = None
    embedded: float | None = None


FLOWS: Mapping[str, Flow] = {
    "SD3Transformer2DModel": Flow(7.0),
    "FluxTransformer2DModel": Flow(None, share=True, embedded=3.5),
    "Flux2Transformer2DModel": Flow(4.0, share=True, factors=(1, 16), embedded=4.0),
    "QwenImageTransformer2DModel": Flow(4.0, share=True, rescale=Token(), embedded=1.0),
    # The pipeline's scale is one less.
    "ZImageTransformer2DModel": Flow(6.0, share=True, towards_data=True),
    "Lumina2Transformer2DModel": Flow(4.0, share=True, towards_data=True, rescale=Row()),
    "SanaTransformer2DModel": Flow(4.5, factors=(1, 32)),
    "WanTransformer3DModel": Flow(5.0, pixels=(81, 480, 832), factors=(4, 8)),
    "LTXVideoTransformer3DModel": Flow(3.0, pixels=(161, 512, 704), factors=(8, 32)),
}
UNETS: Mapping[str, float] = {"UNet2DConditionModel": 7.5, "UNet2DModel": 1.0}
"""Scale of the guidance of U-Nets."""
_INSTAFLOW = "RectifiedFlowPipeline"
_INSTAFLOW_SCALE = 1.5

_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_DIFFUSION_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "UniPCMultistepScheduler",
)
"""Those whose config describes a table of betas that the network was trained on."""
_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def convention_of(
    index: Mapping[str, Any], name: str, config: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> Convention:
    """The convention of a network: from model_index.json, its class, its config and its scheduler's."""
    steps = int(scheduler.get("num_train_timesteps", 1000))
    if name in FLOWS:
        _require_flow(scheduler, name)
        flow = FLOWS[name]
        scale = 1.0 if flow.share else steps * float(config.get("timestep_scale", 1.0))
        return _rectified(scale, flow.towards_data, sign=-1 if flow.towards_data else 1)
    if index.get("_class_name") == _INSTAFLOW:  # its scheduler is there for the form only
        return _rectified(1000.0, reversed=False, sign=-1)
    if _is_flow(scheduler):
        _require_flow(scheduler, name)
        return _rectified(float(steps), reversed=False, sign=1)
    return Convention(interpolant=_betas(scheduler), prediction=_prediction(scheduler))


def _rectified(scale: float, reversed: bool, sign: Literal[1, -1]) -> Convention:
    return Convention(interpolant=Rectified(), sign=sign, clock=Linear(scale=scale, reversed=reversed))


def _is_flow(scheduler: Mapping[str, Any]) -> bool:
    kind = str(scheduler.get("_class_name"))
    return kind.startswith("FlowM") or scheduler.get("prediction_type") == "flow_prediction"


def _require_flow(scheduler: Mapping[str, Any], name: str) -> None:
    """Refuse networks distilled to something else than the velocity of a flow, by their scheduler."""
    kind = str(scheduler.get("_class_name"))
    known = kind in (*_FLOW_SCHEDULERS, *_DIFFUSION_SCHEDULERS)
    if not (known and _is_flow(scheduler)) or scheduler.get("invert_sigmas"):
        raise ArtifactError(
            f"scheduler '{kind}' of a {name} is not that of a rectified flow, "
            f"so its output is not a velocity; expected one like {_FLOW_SCHEDULERS[0]}"
        )


def _betas(scheduler: Mapping[str, Any]) -> DDPM:
    kind = str(scheduler.get("_class_name"))
    if kind not in _DIFFUSION_SCHEDULERS:
        raise ArtifactError(unknown("scheduler of a diffusion model", kind, _DIFFUSION_SCHEDULERS))
    if scheduler.get("trained_betas") is not None:
        raise ArtifactError(f"{kind} has 'trained_betas', a table of its own, which is not supported")
    rule = scheduler.get("beta_schedule", "linear")
    if rule not in _BETAS:
        raise ArtifactError(f"{kind}: {unknown('beta_schedule', str(rule), _BETAS)}")
    return DDPM(
        betas=rule,
        beta_start=float(scheduler.get("beta_start", 1e-4)),
        beta_end=float(scheduler.get("beta_end", 0.02)),
        steps=int(scheduler.get("num_train_timesteps", 1000)),
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
    )


def _prediction(scheduler: Mapping[str, Any]) -> Prediction:
    kind = str(scheduler.get("prediction_type", "epsilon"))
    if kind not in _PREDICTIONS:
        raise ArtifactError(unknown("prediction_type of a scheduler", kind, _PREDICTIONS))
    return _PREDICTIONS[kind]


def guidance_of(
    index: Mapping[str, Any], name: str, config: Mapping[str, Any], null: bool
) -> Guidance | None:
    """The pipeline's own rule where there is a null prompt and the network needs one."""
    if not null or index.get("is_distilled") or (name in FLOWS and config.get("guidance_embeds")):
        return None
    if index.get("_class_name") == _INSTAFLOW:
        return Guidance(scale=_INSTAFLOW_SCALE)
    if name not in FLOWS:
        xl = config.get("addition_embed_type") == "text_time"
        return Guidance(scale=5.0 if xl else UNETS[name])
    scale = FLOWS[name].scale
    return None if scale is None else Guidance(scale=scale, rescale=FLOWS[name].rescale)
