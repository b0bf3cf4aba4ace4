"""The U-Net of Dhariwal and Nichol (2021), ADM, as EDM (Karras et al. 2022) trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.networks._edm_layers import (
    Block,
    BlockStyle,
    Level,
    Norm,
    Positional,
    check_channels,
    levels_of,
    one_hot,
    without_autocast,
)

_EPSILON = 1e-5
_CHANNELS_A_HEAD = 64

_IMAGENET64 = {"img_resolution": 64, "in_channels": 3, "out_channels": 3, "label_dim": 1000}
_SLIM = _IMAGENET64 | {"model_channels": 128, "num_blocks": 2, "attn_resolutions": [32, 16], "dropout": 0.13}
_LATENT = {
    "img_resolution": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 256,
    "num_blocks": 2,
    "attn_resolutions": [16, 8, 4],
    "dropout": 0.0,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "edm-imagenet64-adm": _IMAGENET64,
    "rfpp-imagenet64": _IMAGENET64,
    "slimflow-imagenet64-45m": _SLIM | {"channel_mult": [1, 2, 2, 2]},
    "slimflow-imagenet64-81m": _SLIM | {"channel_mult": [1, 2, 2, 4]},
    "lfm-ffhq256-adm": _LATENT,
    "lfm-bed256-adm": _LATENT,
    "lfm-imagenet256-adm": _LATENT | {"label_dim": 1000},
}
"""The published networks of this kind: EDM's, and those of rf++, SlimFlow and LFM, which took them over."""


class DhariwalUNet(nn.Module):
    """(x [B, C, H, W], time [B], labels [B] | None) -> [B, C, H, W], C = `in_channels`, in the type of x.

    `time` is EDM's c_noise. Labels None is the zero vector, which EDM never trained; without `label_dim`
    labels are ignored, as are `augment_labels` [B, augment_dim] without `augment_dim` (None is no
    augmentation). Of more output channels, where a variance was learned, the first C are returned. Blocks of
    less than 64 channels have no attention. The arguments are those that EDM's checkpoints record. Raises
    ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        img_resolution: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels)
        levels = levels_of(img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions)
        style = BlockStyle(
            embedding=model_channels * channel_mult_emb,
            scales=True,
            projects=False,
            sum_scale=1.0,
            epsilon=_EPSILON,
            dropout=dropout,
            resample_filter=(1, 1),
        )
        self.label_dropout = label_dropout
        self.map_noise = Positional(model_channels, endpoint=False)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, style.embedding)
        self.map_layer1 = nn.Linear(style.embedding, style.embedding)
        self.map_label = nn.Linear(label_dim, style.embedding, bias=False) if label_dim else None
        self.enc, skips = _encoder(style, levels, in_channels)
        self.dec = _decoder(style, levels, skips)
        self.out_norm = Norm(levels[0].width, _EPSILON)
        self.out_conv = nn.Conv2d(levels[0].width, out_channels, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        """Torch's own weights, except that blocks start as the identity and the output at zero."""
        for name, layer in self.named_modules():
            if name.endswith(("conv1", "proj", "out_conv", "map_augment")):
                for weights in layer.parameters():
                    nn.init.zeros_(weights)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def forward(
        self, x: Tensor, time: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return self.outputs(x, time, labels, augment_labels)[:, : x.shape[1]].contiguous()

    def outputs(
        self, x: Tensor, time: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """All output channels: [B, out_channels, H, W]."""
        embedding = self._embed(time, labels, augment_labels)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            skips.append(layer(skips[-1], embedding) if skips else layer(x))
        h = skips[-1]
        for name, layer in self.dec.items():
            h = layer(torch.cat([h, skips.pop()], dim=1) if "block" in name else h, embedding)
        result: Tensor = self.out_conv(F.silu(self.out_norm(h)))
        return result.to(x.dtype)

    def _embed(self, time: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        with without_autocast(time):
            angles = self.map_noise(time)
            h = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.map_layer0.weight.dtype)
            if self.map_augment is not None and augment_labels is not None:
                h = h + self.map_augment(augment_labels.to(h.dtype))
            h = self.map_layer1(F.silu(self.map_layer0(h)))
            if self.map_label is not None:
                dropout = self.label_dropout if self.training else 0.0
                h = h + self.map_label(one_hot(labels, self.map_label.in_features, h, dropout))
            return F.silu(h)


def _block(style: BlockStyle, inputs: int, level: Level) -> Block:
    heads = level.width // _CHANNELS_A_HEAD if level.attended else 0
    return Block(style, inputs, level.width, heads=heads)


def _encoder(style: BlockStyle, levels: Sequence[Level], in_channels: int) -> tuple[nn.ModuleDict, list[int]]:
    """The layers by name, and the channels of each output that the decoder takes over."""
    layers = nn.ModuleDict()
    skips: list[int] = []
    for level in levels:
        if skips:
            layers[f"{level.name}_down"] = Block(style, skips[-1], skips[-1], "down")
            skips.append(skips[-1])
        else:
            layers[f"{level.name}_conv"] = nn.Conv2d(in_channels, level.width, 3, padding=1)
            skips.append(level.width)
        for number in range(level.blocks):
            layers[f"{level.name}_block{number}"] = _block(style, skips[-1], level)
            skips.append(level.width)
    return layers, skips


def _decoder(style: BlockStyle, levels: Sequence[Level], skips: list[int]) -> nn.ModuleDict:
    layers = nn.ModuleDict()
    h = skips[-1]
    for level in reversed(levels):
        if level is levels[-1]:
            layers[f"{level.name}_in0"] = Block(style, h, h, heads=h // _CHANNELS_A_HEAD)
            layers[f"{level.name}_in1"] = Block(style, h, h)
        else:
            layers[f"{level.name}_up"] = Block(style, h, h, "up")
        for number in range(level.blocks + 1):
            layers[f"{level.name}_block{number}"] = _block(style, h + skips.pop(), level)
            h = level.width
    return layers
