"""Latents of a pipeline: what their numbers are in terms of its autoencoder's, and how they become pictures.

Everything in the package happens in the latents that a network sees. Pictures are decoded from them for eyes
and metrics alone, by the autoencoder in the pipeline's folder, which is read at the first picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdistill import foreign
from flowdistill.errors import ArtifactError, MissingInput, unknown
from flowdistill.teachers import hub
from flowdistill.teachers.cards import Latent

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Space:
    """The latents [B, C, (F,) H, W] of an autoencoder, as the network of its pipeline sees them.

    `patch`: so many places along a side of what the autoencoder decodes are channels of one place here.
    `factor` counts pixels along the side of a place, `frame_factor` frames of video a latent frame; the first
    latent frame is one frame.
    """

    latent: Latent
    factor: int
    frame_factor: int = 1
    patch: int = 1


class Decoder:
    """Latents [B, C, (F,) H, W] -> pixels [B, 3, (F,) H, W] in [-1, 1], by the autoencoder in `folder`."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        space = of_pipeline(folder)
        if space is None:
            raise MissingInput(f"{folder}: has no autoencoder (vae/config.json), its samples are no latents")
        self.folder, self.space, self.device = folder, space, device

    def __call__(self, x: Tensor) -> Tensor:
        import torch

        z = self.space.latent.decode(x.to(self.device, torch.float32))
        if self.space.patch > 1:
            z = torch.nn.functional.pixel_shuffle(z, self.space.patch)
        still = x.ndim == 4 and self.space.latent.vae in _OF_VIDEO
        with torch.no_grad():
            pixels: Tensor = self.autoencoder.decode(z.unsqueeze(2) if still else z, *self._noise_left(z))[0]
        return (pixels.squeeze(2) if still else pixels).float().clamp(-1, 1)

    @cached_property
    def autoencoder(self) -> Any:
        """The autoencoder, in float32; read when it is first needed."""
        constructor = foreign.member("diffusers", str(self.space.latent.vae))
        model = hub.weights(constructor, self.folder / "vae")
        return model.to(self.device).eval().requires_grad_(False)

    def _noise_left(self, z: Tensor) -> tuple[Tensor, ...]:
        """Some decoders of LTX are told how much noise is left in the latents; there is none."""
        told = self.autoencoder.config.get("timestep_conditioning")
        return (z.new_zeros(len(z)),) if told else ()


def of_pipeline(folder: Path) -> Space | None:
    """The latents of a pipeline, from its autoencoder's config; None where it has no autoencoder."""
    import torch

    if not (folder / "vae" / "config.json").is_file():
        return None
    config = hub.config(folder / "vae" / "config.json")
    name = str(config.get("_class_name"))
    if name not in _SPACES:
        raise ArtifactError(f"{folder / 'vae'}: {unknown('autoencoder', name, _SPACES)}")
    with torch.device("meta"):
        model = foreign.member("diffusers", name).from_config(dict(config))
    return _SPACES[name](name, model, folder / "vae")


def _scaled(name: str, model: Any, folder: Path) -> Space:
    config = model.config
    latent = Latent(scale=(config.scaling_factor,), shift=(config.shift_factor or 0.0,), vae=name)
    return Space(latent, 2 ** (len(config.block_out_channels) - 1))


def _compressing(name: str, model: Any, folder: Path) -> Space:
    config = model.config
    latent = Latent(scale=(config.scaling_factor,), vae=name)
    return Space(latent, 2 ** (len(config.encoder_block_out_channels) - 1))


def _batch_normed(name: str, model: Any, folder: Path) -> Space:
    config = model.config
    found = hub.tensors(folder, ("bn.running_mean", "bn.running_var"))
    deviation = (found["bn.running_var"] + config.batch_norm_eps).sqrt()
    (patch, _) = config.patch_size
    factor = patch * 2 ** (len(config.block_out_channels) - 1)
    return Space(
        _standardised(found["bn.running_mean"].tolist(), deviation.tolist(), name), factor, patch=patch
    )


def _by_channel(name: str, model: Any, folder: Path) -> Space:
    config = model.config
    latent = _standardised(config.latents_mean, config.latents_std, name)
    return Space(latent, model.spatial_compression_ratio, config.get("scale_factor_temporal", 1))


def _ltx(name: str, model: Any, folder: Path) -> Space:
    found = hub.tensors(folder, ("latents_mean", "latents_std"))
    deviation = found["latents_std"] / model.config.scaling_factor
    latent = _standardised(found["latents_mean"].tolist(), deviation.tolist(), name)
    return Space(latent, model.spatial_compression_ratio, model.temporal_compression_ratio)


def _standardised(mean: list[float], deviation: list[float], name: str) -> Latent:
    return Latent(scale=tuple(1 / value for value in deviation), shift=tuple(mean), vae=name)


_SPACES: Mapping[str, Callable[[str, Any, Path], Space]] = {
    "AutoencoderKL": _scaled,
    "AutoencoderDC": _compressing,
    "AutoencoderKLFlux2": _batch_normed,
    "AutoencoderKLQwenImage": _by_channel,
    "AutoencoderKLWan": _by_channel,
    "AutoencoderKLLTXVideo": _ltx,
}
_OF_VIDEO = ("AutoencoderKLQwenImage", "AutoencoderKLWan", "AutoencoderKLLTXVideo")
