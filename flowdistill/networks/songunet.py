"""The U-Nets of Song et al. (2021), DDPM++ and NCSN++, as EDM (Karras et al. 2022) trains them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.networks._edm_layers import (
    Block,
    BlockStyle,
    FilteredConv2d,
    Level,
    Norm,
    Positional,
    Resample,
    check_channels,
    levels_of,
    one_hot,
    without_autocast,
)

_EPSILON = 1e-6
_SUM_SCALE = math.sqrt(0.5)
_INITIAL_GAINS = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": math.sqrt(0.2)}
"""By the end of a layer's name; 1 for the others."""

_VP = {
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_VE = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "decoder_type": "standard",
    "resample_filter": [1, 3, 3, 1],
}
_CIFAR = {"img_resolution": 32, "channel_mult": [2, 2, 2], "dropout": 0.13}
_SIZE_64 = {"img_resolution": 64, "channel_mult": [1, 2, 2, 2]}
_DATA: dict[str, dict[str, Any]] = {
    "cifar10": _CIFAR,
    "cifar10-cond": _CIFAR | {"label_dim": 10},
    "ffhq64": _SIZE_64 | {"dropout": 0.05},
    "afhq64": _SIZE_64 | {"dropout": 0.25},
}
_COMMON = {"in_channels": 3, "out_channels": 3, "augment_dim": 9}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    **{
        f"edm-{data}-{kind}": _COMMON | sizes | layers
        for data, sizes in _DATA.items()
        for kind, layers in (("vp", _VP), ("ve", _VE))
    },
    "rfpp-cifar10": _COMMON | _CIFAR | _VE,
    "rfpp-ffhq64": _COMMON | _SIZE_64 | {"dropout": 0.25} | _VE,
    "rfpp-afhq64": _COMMON | _SIZE_64 | {"dropout": 0.25} | _VE,
}
"""The published networks of EDM ("vp" is DDPM++ and "ve" is NCSN++) and of rf++, which began as those."""


class Fourier(nn.Module):
    """Angles [B, channels / 2] of the time [B] at random frequencies, which belong to the weights."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16.0 * torch.randn(channels // 2))

    def forward(self, time: Tensor) -> Tensor:
        return time.float()[:, None] * (2.0 * math.pi * self.freqs.float())


class SongUNet(nn.Module):
    """(x [B, C, H, W], time [B], labels [B] | None) -> [B, C, H, W], C = `in_channels`, in the type of x.

    `time` is EDM's c_noise. Labels None is the zero vector, which EDM never trained; without `label_dim`
    labels are ignored, as are `augment_labels` [B, augment_dim] without `augment_dim` (None is no
    augmentation). Of more output channels the first C are returned. The arguments are those that EDM's
    checkpoints record. Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        img_resolution: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        _one_of("embedding_type", embedding_type, ("positional", "fourier"))
        _one_of("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _one_of("decoder_type", decoder_type, ("standard", "skip"))
        check_channels(in_channels, out_channels)
        noise, embedding = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.label_dropout = label_dropout
        self.map_noise = Fourier(noise) if embedding_type == "fourier" else Positional(noise, endpoint=True)
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        style = BlockStyle(
            embedding=embedding,
            scales=False,
            projects=True,
            sum_scale=_SUM_SCALE,
            epsilon=_EPSILON,
            dropout=dropout,
            resample_filter=resample_filter,
        )
        levels = levels_of(img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions)
        self.enc, skips = _encoder(style, levels, in_channels, model_channels, encoder_type)
        self.dec = _decoder(style, levels, skips, out_channels, decoder_type)
        self._initialise()

    def _initialise(self) -> None:
        """Uniform weights of variance 2 / (inputs + outputs), no biases; new branches hardly speak."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                gains = (gain for end, gain in _INITIAL_GAINS.items() if name.endswith(end))
                nn.init.xavier_uniform_(layer.weight, next(gains, 1.0))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, time: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return self.outputs(x, time, labels, augment_labels)[:, : x.shape[1]].contiguous()

    def outputs(
        self, x: Tensor, time: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """All output channels: [B, out_channels, H, W]."""
        embedding = self._embed(time, labels, augment_labels)
        return self._decode(self._encode(x, embedding), embedding).to(x.dtype)

    def _embed(self, time: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        with without_autocast(time):
            angles = self.map_noise(time)
            h = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.map_layer0.weight.dtype)
            if self.map_label is not None:
                classes = self.map_label.in_features
                dropout = self.label_dropout if self.training else 0.0
                h = h + self.map_label(math.sqrt(classes) * one_hot(labels, classes, h, dropout))
            if self.map_augment is not None and augment_labels is not None:
                h = h + self.map_augment(augment_labels.to(h.dtype))
            return F.silu(self.map_layer1(F.silu(self.map_layer0(h))))

    def _encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """The outputs that the decoder takes over; the image itself enters again at every level."""
        skips: list[Tensor] = []
        image = x
        for name, layer in self.enc.items():
            match name.partition("_")[2]:
                case "conv":
                    skips.append(layer(x))
                case "aux_down":
                    image = layer(image)
                case "aux_skip":
                    skips[-1] = skips[-1] + layer(image)
                case "aux_residual":
                    skips[-1] = image = (skips[-1] + layer(image)) * _SUM_SCALE
                case _:
                    skips.append(layer(skips[-1], embedding))
        return skips

    def _decode(self, skips: list[Tensor], embedding: Tensor) -> Tensor:
        h = normal = skips[-1]
        image: Tensor | None = None
        for name, layer in self.dec.items():
            match name.partition("_")[2]:
                case "in0" | "in1" | "up":
                    h = layer(h, embedding)
                case "aux_up":
                    image = layer(image)
                case "aux_norm":
                    normal = F.silu(layer(h))
                case "aux_conv":
                    image = layer(normal) if image is None else image + layer(normal)
                case _:
                    h = layer(torch.cat([h, skips.pop()], dim=1), embedding)
        assert image is not None, "level 0 has an aux_conv"
        return image


def _encoder(
    style: BlockStyle, levels: Sequence[Level], in_channels: int, model_channels: int, encoder_type: str
) -> tuple[nn.ModuleDict, list[int]]:
    """The layers by name, and the channels of each output that the decoder takes over."""
    layers = nn.ModuleDict({f"{levels[0].name}_conv": nn.Conv2d(in_channels, model_channels, 3, padding=1)})
    skips, image = [model_channels], in_channels
    for level in levels:
        if level is not levels[0]:
            h = skips[-1]
            layers[f"{level.name}_down"] = Block(style, h, h, "down")
            if encoder_type == "skip":
                layers[f"{level.name}_aux_down"] = Resample("down", style.resample_filter)
                layers[f"{level.name}_aux_skip"] = nn.Conv2d(image, h, 1)
            if encoder_type == "residual":
                layers[f"{level.name}_aux_residual"] = FilteredConv2d(image, h, style.resample_filter)
                image = h
            skips.append(h)
        for number in range(level.blocks):
            heads = int(level.attended)
            layers[f"{level.name}_block{number}"] = Block(style, skips[-1], level.width, heads=heads)
            skips.append(level.width)
    return layers, skips


def _decoder(
    style: BlockStyle, levels: Sequence[Level], skips: list[int], out_channels: int, decoder_type: str
) -> nn.ModuleDict:
    layers = nn.ModuleDict()
    h = skips[-1]
    for level in reversed(levels):
        lowest = level is levels[-1]
        if lowest:
            layers[f"{level.name}_in0"] = Block(style, h, h, heads=1)
            layers[f"{level.name}_in1"] = Block(style, h, h)
        else:
            layers[f"{level.name}_up"] = Block(style, h, h, "up")
        for number in range(level.blocks + 1):
            heads = int(level.attended and number == level.blocks)
            layers[f"{level.name}_block{number}"] = Block(style, h + skips.pop(), level.width, heads=heads)
            h = level.width
        if decoder_type == "skip" and not lowest:
            layers[f"{level.name}_aux_up"] = Resample("up", style.resample_filter)
        if decoder_type == "skip" or level is levels[0]:
            layers[f"{level.name}_aux_norm"] = Norm(h, _EPSILON)
            layers[f"{level.name}_aux_conv"] = nn.Conv2d(h, out_channels, 3, padding=1)
    return layers


def _one_of(argument: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{argument} {value!r} must be one of {', '.join(known)}")
