"""Diffusion transformers: DiT (Peebles and Xie 2023), SiT (Ma et al. 2024) and LFM's (Dao et al. 2023).

The three are one network with one set of state-dict names. What they are fed and what their output means
differs, and is the card's business: DiT predicts the noise at DDPM steps 0 to 999, SiT the velocity towards
the data at times from 0 (noise) to 1 (data), LFM the velocity towards the noise at times from 0 (data) to 1.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available

_PERIOD = 10_000.0
_TIME_FEATURES = 256

HEADS: Mapping[int, int] = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads of the published widths, which no tensor's shape tells."""

_SIZES: Mapping[str, Mapping[str, int]] = {
    "s": {"hidden_size": 384, "depth": 12},
    "b": {"hidden_size": 768, "depth": 12},
    "l": {"hidden_size": 1024, "depth": 24},
    "xl": {"hidden_size": 1152, "depth": 28},
}


def _preset(size: str, patch_size: int = 2, **changes: Any) -> dict[str, Any]:
    """A network for 256 px images behind an autoencoder of factor 8, with ImageNet's classes."""
    sizes = _SIZES[size]
    return {
        "input_size": 32,
        "patch_size": patch_size,
        "in_channels": 4,
        **sizes,
        "num_heads": HEADS[sizes["hidden_size"]],
        "mlp_ratio": 4.0,
        "class_dropout_prob": 0.1,
        "num_classes": 1000,
        "learn_sigma": True,
        **changes,
    }


_LFM_UNCONDITIONAL = _preset("l", class_dropout_prob=0.0, num_classes=1, learn_sigma=False)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    f"{family}-{size}-{patch}": _preset(size, patch)
    for family in ("dit", "sit")
    for size in _SIZES
    for patch in (2, 4, 8)
} | {
    "dit-xl-2-512": _preset("xl", input_size=64),
    "sit-xl-2-512": _preset("xl", input_size=64, learn_sigma=False),
    "lfm-celeb256": _LFM_UNCONDITIONAL,
    "lfm-ffhq256": _LFM_UNCONDITIONAL,
    "lfm-church": _LFM_UNCONDITIONAL,
    "lfm-bedroom": _LFM_UNCONDITIONAL,
    "lfm-imagenet": _preset("b", learn_sigma=False),
}
"""Constructor arguments of the published networks, by name (`-512`: for 512 px images)."""


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Constructor arguments of the network that has tensors of these shapes.

    `num_heads` is None for a width that is not a published one. The table of classes does not say whether
    its last row is the null class: it is taken for one, as in training with label dropout (here at the
    published rate 0.1), unless it is the only row, as in LFM's unconditional networks.
    Raises ValueError where a tensor is missing or the shapes contradict each other.
    """
    try:
        hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        _, tokens, _ = shapes["pos_embed"]
        rows, _ = shapes["y_embedder.embedding_table.weight"]
        mlp_width, _ = shapes["blocks.0.mlp.fc1.weight"]
        outputs, _ = shapes["final_layer.linear.weight"]
    except KeyError as error:
        raise ValueError(f"not a DiT: tensor {error} is missing") from error
    side, values = math.isqrt(tokens), patch_size**2 * in_channels
    if side**2 != tokens or outputs not in (values, 2 * values):
        raise ValueError(
            f"not a DiT: {tokens} positions must be a square number, "
            f"{outputs} outputs a token {values} or {2 * values}"
        )
    return {
        "input_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": sum(name.startswith("blocks.") and name.endswith(".attn.qkv.weight") for name in shapes),
        "num_heads": HEADS.get(hidden_size),
        "mlp_ratio": mlp_width / hidden_size,
        "class_dropout_prob": 0.1 if rows > 1 else 0.0,
        "num_classes": max(rows - 1, 1),
        "learn_sigma": outputs == 2 * values,
    }


def time_features(time: Tensor) -> Tensor:
    """Cosines and sines [B, 256] of time [B], in float32 whatever the precision of the network."""
    half = _TIME_FEATURES // 2
    exponents = torch.arange(half, device=time.device, dtype=torch.float32) / half
    angles = time.float()[:, None] * torch.exp(-math.log(_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_features(side: int, channels: int) -> Tensor:
    """Sines and cosines [side * side, channels] of each token's column, then of its row (float32)."""
    quarter = channels // 4
    frequencies = _PERIOD ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=1).float()


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _zero(inputs: int, outputs: int) -> nn.Linear:
    """A layer that starts at zero, so that a block starts as the identity and the network as zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), _zero(width, parts * width))


def _normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm (adaLN): x [B, N, D] normalised, then scaled and shifted by [B, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1.0 + scale)


class Patches(nn.Module):
    """Tokens [B, N, D] of an image's patches, row by row."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


class Times(nn.Module):
    """Embedding [B, D] of the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, last = _linear(_TIME_FEATURES, width), _linear(width, width)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, time: Tensor) -> Tensor:
        # bfloat16 features could not tell SiT's times apart that are closer than 1/256.
        kind = time.device.type
        with torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext():
            embedding: Tensor = self.mlp(time_features(time).to(next(self.parameters()).dtype))
        return embedding


class Labels(nn.Module):
    """Embedding [B, D] of the class; a class of its own, the last row, stands for none."""

    def __init__(self, classes: int, dropout: float, width: int) -> None:
        super().__init__()
        rows = classes + (dropout > 0)
        self.dropout = dropout
        self.null = rows - 1 if dropout > 0 or rows == 1 else None
        self.embedding_table = nn.Embedding(rows, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor | None) -> Tensor:
        if labels is None:
            if self.null is None:
                raise ValueError(
                    "no labels given, but the network has no null class (class_dropout_prob = 0)"
                )
            return self.embedding_table.weight[self.null]  # [D], the same for the whole batch
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = labels.masked_fill(dropped, self.embedding_table.num_embeddings - 1)
        embedding: Tensor = self.embedding_table(labels)
        return embedding


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _linear(width, 3 * width)
        self.proj = _linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, N, D / heads]
        result: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """Attention, then a perceptron for each token; the embedding shifts, scales and gates both."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=_linear(width, mlp_width), gelu=nn.GELU("tanh"), fc2=_linear(mlp_width, width))
        )
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(embedding)[:, None].chunk(
            6, dim=2
        )
        x = torch.addcmul(x, gate, self.attn(_normalised(x, shift, scale)))
        return torch.addcmul(x, mlp_gate, self.mlp(_normalised(x, mlp_shift, mlp_scale)))


class Output(nn.Module):
    """The values of each token's patch [B, N, outputs]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = _zero(width, outputs)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(embedding)[:, None].chunk(2, dim=2)
        result: Tensor = self.linear(_normalised(x, shift, scale))
        return result


class DiT(nn.Module):
    """Transformer over patches: (x [B, C, S, S], time [B], labels [B] | None) -> [B, C, S, S].

    S is `input_size`, C `in_channels`. Labels None means the null class, number `num_classes`, which exists
    where `class_dropout_prob` > 0; in training that share of the labels is replaced by it. A network with a
    single class and no null class is unconditional and takes None as well. With `learn_sigma` the network
    also learns a variance (DDPM), which is not returned. Raises ValueError for sizes that do not fit
    together, and when called without labels where there is no null class.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        _check(input_size, patch_size, hidden_size, num_heads, num_classes, class_dropout_prob)
        self.patch_size = patch_size
        self.x_embedder = Patches(in_channels, patch_size, hidden_size)
        self.t_embedder = Times(hidden_size)
        self.y_embedder = Labels(num_classes, class_dropout_prob, hidden_size)
        positions = position_features(input_size // patch_size, hidden_size)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        # The tolerance: a ratio that was read off a checkpoint may round to just below the whole number.
        mlp_width = int(hidden_size * mlp_ratio + 1e-6)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_width) for _ in range(depth))
        self.final_layer = Output(hidden_size, patch_size**2 * in_channels * (1 + learn_sigma))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self.t_embedder(time) + self.y_embedder(labels)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, embedding)
        return self._image(self.final_layer(tokens, embedding), x.shape)

    def _image(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """Tokens [B, N, patch * patch * channels] put together; channels beyond the data's are left out."""
        batch, channels, height, width = shape
        patch = self.patch_size
        grid = tokens.reshape(batch, height // patch, width // patch, patch, patch, -1)[..., :channels]
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(shape).contiguous()


def _check(
    input_size: int, patch_size: int, hidden_size: int, num_heads: int, num_classes: int, dropout: float
) -> None:
    if patch_size < 1 or input_size < patch_size or input_size % patch_size:
        raise ValueError(f"input_size {input_size} must be a multiple of patch_size {patch_size}")
    if num_heads < 1 or hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads {num_heads}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"class_dropout_prob {dropout} must be a probability")
    if num_classes < 0 or num_classes + (dropout > 0) < 1:
        raise ValueError(f"num_classes {num_classes} must be at least 1, or 0 with class_dropout_prob > 0")
